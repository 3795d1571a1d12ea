"""Files that are there whole or not at all."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Have `write` write a file beside `path`, flush it to the disk, and rename it.

    Raises:
        OSError: If the disk is full, the folder can't be written to, and the like; `path` is then as it was.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with errors_of_writing(path):
            write(partial)
            flush(partial)
            partial.replace(path)
            flush(path.parent)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def errors_of_writing(path: Path) -> Iterator[None]:
    """Have every error of the system be an OSError that names what could not be written.

    Raises:
        OSError: If the disk is full, the folder can't be written to, and the like.
    """
    try:
        yield
    except SafetensorError as error:  # safetensors wraps the system's errors in a text
        full = "os error 28" in str(error)
        raise OSError(errno.ENOSPC if full else errno.EIO, str(error), str(path)) from error
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    write_atomically(path, lambda partial: partial.write_text(text))


def write_bytes(path: Path, data: bytes) -> None:
    """Write a binary file, whole or not at all."""
    write_atomically(path, lambda partial: partial.write_bytes(data))


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file, whole or not at all."""
    write_atomically(path, lambda partial: save_file(tensors, partial, metadata=metadata))


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
