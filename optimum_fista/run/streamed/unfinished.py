"""The folder in which a streamed run keeps what it has finished."""

from __future__ import annotations

import tempfile
from pathlib import Path


def unfinished_folder(output_dir: Path) -> Path:
    """Where a run keeps what it has finished, until all of it becomes `output_dir`."""
    return output_dir.with_name(f"{output_dir.name}.unfinished")


def require_writable(folder: Path, output_dir: Path) -> None:
    """Refuse an output that can't be written to before any work is done."""
    existed = folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
        if not existed:
            folder.rmdir()
    except OSError as error:
        raise OSError(
            error.errno,
            f"output_dir={str(output_dir)!r} can't be written to ({error.strerror}), nothing was done: pass another "
            "folder, or make this one writable",
            error.filename,
        ) from error
