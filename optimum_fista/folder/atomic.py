"""Files that are there whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


def write_file(path: Path, content: str | bytes | Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write text, bytes, or tensors as safetensors beside `path`, flush the file to the disk, and rename it."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with errors_of_writing(path):
            if isinstance(content, str):
                partial.write_text(content)
            elif isinstance(content, bytes):
                partial.write_bytes(content)
            else:
                save_file(dict(content), partial, metadata=metadata)
            flush(partial)
            partial.replace(path)
            flush(path.parent)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def errors_of_writing(path: Path) -> Iterator[None]:
    """Have every error of the system be an OSError that names what could not be written."""
    try:
        yield
    except (SafetensorError, RuntimeError) as error:  # safetensors and torch.save wrap the system's errors in a text
        if isinstance(error, RuntimeError) and "inline_container" not in str(error):
            raise
        full = "os error 28" in str(error)
        raise OSError(errno.ENOSPC if full else errno.EIO, str(error), str(path)) from error
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def require_writable(file: Path) -> None:
    """Refuse an output that can't be written, before any work is done for it."""
    try:  # folders that are missing are made only when there is something to write
        if file.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if file.is_file() and not os.access(file, os.W_OK):  # a new file could take its place
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        if file.is_file() or not file.exists():  # and no pipe
            parents = Path(os.path.realpath(file)).parents
            tempfile.TemporaryFile(dir=next(folder for folder in parents if folder.exists())).close()
    except OSError as error:
        what = f"output can't be written to ({error.strerror}), nothing was done: pass another file"
        raise OSError(error.errno, what, str(file)) from error


def digest_of(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
