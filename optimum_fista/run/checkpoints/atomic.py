"""Files and folders that are there whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Have `write` write a file beside `path`, flush it to the disk, and rename it.

    Raises:
        OSError: If the disk is full, the folder can't be written to, and the like; `path` is then as it was.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        write(partial)
        _flush(partial)
        partial.replace(path)
        _flush(path.parent)
    except SafetensorError as error:  # safetensors wraps the system's errors in a text
        full = "os error 28" in str(error)
        raise OSError(errno.ENOSPC if full else errno.EIO, str(error), str(path)) from error
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    write_atomically(path, lambda partial: _write_text(partial, text))


def write_bytes(path: Path, data: bytes) -> None:
    """Write a binary file, whole or not at all."""
    write_atomically(path, lambda partial: _write_bytes(partial, data))


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file, whole or not at all."""
    write_atomically(path, lambda partial: save_file(tensors, partial, metadata=metadata))


def replace_folder(new: Path, folder: Path) -> None:
    """Give a complete folder the name of another, which is thrown away; `folder` need not be there.

    The old folder is moved aside, the new one gets its name, and only then the old one goes: at no time is there a
    mixture of the two under the name. Where the process is killed in between, there is nothing under it, and the old
    folder is beside it in one called `.NAME.old.*`; the next replacement of `folder` throws that away.

    Args:
        new: The new folder, on the same file system.
        folder: The old folder.

    Raises:
        OSError: If a folder can't be renamed; the old one then has its name again.
    """
    if not folder.exists():
        new.rename(folder)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old.", dir=folder.parent))
    old = aside / folder.name
    try:
        folder.rename(old)
        try:
            new.rename(folder)
        except BaseException:
            old.rename(folder)
            raise
        _flush(folder.parent)
    finally:
        if folder.exists():
            for left in [path for path in folder.parent.iterdir() if path.name.startswith(f".{folder.name}.old.")]:
                shutil.rmtree(left, ignore_errors=True)


def flush_folder(folder: Path) -> None:
    """Wait until all files of a folder are on the disk."""
    for path in folder.rglob("*"):
        if path.is_file() or path.is_dir():
            _flush(path)
    _flush(folder)


def _write_text(path: Path, text: str) -> None:
    path.write_text(text)


def _write_bytes(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
