"""Files that are written whole or not at all, and records with digests.

A file is first written beside its place, flushed to the disk and then renamed, so that a reader never finds half of it.
A record is a JSON file with plain values and, beside it, a safetensors file with tensors. It holds digests of both, so
that damage is noticed when it is read. The journal of a run, from which the run resumes, is made of records.
"""

import errno
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

logger = logging.getLogger(__name__)

# Bytes of a file in which its kind is looked for.
_BEGINNING = 1 << 12


def write_file(
    path: Path,
    content: str | bytes | Iterator[bytes | memoryview] | Mapping[str, Tensor],
    metadata: dict[str, str] | None = None,
) -> None:
    """Write a file beside `path`, flush it to the disk, and rename it to `path`, which it replaces.

    If `path` is a pipe or a device, it stays one: text and bytes are written into it. The file beside `path` has the
    ending .partial, and is deleted after an error.

    Args:
        path: The file, in a folder that exists.
        content: Text, bytes, pieces of bytes, or tensors by their names, which are written as safetensors. An iterator
            is read to its end.
        metadata: Texts by key in the header of a safetensors file; not used for other content.

    Raises:
        OSError: If the file can't be written; it names `path`. A file that was there before is as it was.
    """
    is_pipe_or_device = path.exists() and not path.is_file() and not path.is_dir()
    if is_pipe_or_device and isinstance(content, str | bytes):
        with errors_of_writing(path), path.open("wb") as opened:
            opened.write(content.encode() if isinstance(content, str) else content)
        return

    partial = partial_file(path)
    try:
        with errors_of_writing(path):
            if isinstance(content, str):
                partial.write_text(content, "utf-8")
            elif isinstance(content, bytes):
                partial.write_bytes(content)
            elif isinstance(content, Iterator):
                with partial.open("wb") as file:
                    file.writelines(content)
            else:
                save_file(dict(content), partial, metadata=metadata)
            # The content must be on the disk before its name is: a power cut would leave an empty file.
            flush(partial)
            partial.replace(path)
            flush(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def partial_file(path: Path) -> Path:
    """The file in which `write_file` writes what becomes the file `path`."""
    return path.with_name(f".{path.name}.partial")


@contextmanager
def errors_of_writing(path: Path) -> Iterator[None]:
    """Turn every error of the system inside the context into an OSError that names `path`.

    Safetensors and `torch.save` wrap the system's errors in errors and texts of their own. Other errors pass. An
    OSError that names no file gets the name, and is raised again. `path` is what the caller writes.
    """
    try:
        yield
    except (SafetensorError, RuntimeError) as error:
        # The source file of PyTorch that raises it.
        is_of_torch_save = "inline_container" in str(error)
        if isinstance(error, RuntimeError) and not is_of_torch_save:
            raise
        is_full = "os error 28" in str(error)  # so safetensors says ENOSPC
        number = errno.ENOSPC if is_full else errno.EIO
        raise OSError(number, str(error), str(path)) from error
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def require_writable(file: Path) -> None:
    """Refuse an output file that can't be written, before any work is done for it. Nothing is left on the disk.

    Raises:
        OSError: If `file` is a folder, can't be written to, or would be in a folder that can't.
    """
    try:
        if file.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        # A new file could take the place of one that can't be written to, which its owner does not want.
        if file.is_file() and not os.access(file, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        is_pipe_or_device = file.exists() and not file.is_file()
        if not is_pipe_or_device:
            # Folders that are missing are made only when there is something to write. So a file is made, and deleted
            # at once, in the nearest folder that exists: the root is the last one.
            parents = Path(os.path.realpath(file)).parents
            nearest = next(folder for folder in parents if folder.exists())
            tempfile.TemporaryFile(dir=nearest).close()
    except OSError as error:
        raise OSError(
            error.errno,
            f"output can't be written to ({error.strerror}), nothing was done: pass another file",
            str(file),
        ) from error


def require_same_kind(file: Path, kind: str, mark: bytes) -> None:
    """Refuse an output file whose place a file of another kind has: it would be lost. Changes nothing.

    Args:
        file: The file that is going to be written.
        kind: What it is, for the error, such as "a GGUF file".
        mark: Bytes that a file of this kind has near its beginning.

    Raises:
        FileExistsError: If `file` exists, is not empty, and lacks the mark.
    """
    if not file.is_file():  # nothing, or a pipe or a device, which stays one
        return
    with file.open("rb") as opened:
        beginning = opened.read(_BEGINNING)
    if beginning and mark not in beginning:
        raise FileExistsError(
            f"output {str(file)!r} exists and is not {kind}: it would be lost, so nothing was done: pass another file."
        )


def digest_of(path: Path) -> str:
    """Return the SHA-256 of a file, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush(path: Path) -> None:
    """Wait until the content of the file `path`, or the names in the folder `path`, are on the disk."""
    handle = os.open(path, os.O_RDONLY)  # Python's own `open` opens no folder
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write tensors as a safetensors file, which replaces a file at `path`, and return the digest of the new file."""
    write_file(path, tensors, {"format": "pt"})  # a file without metadata and tensors can't be read
    return digest_of(path)


def write_record(
    path: Path, values: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None
) -> None:
    """Write a record: the tensors beside `path`, with the ending .safetensors, then the values at `path` as JSON.

    Files of these names are replaced. `values` must come back from JSON as they are: keys are texts, and there are
    lists instead of tuples. `tensors` have names that the caller chooses; `None`: the record has none.
    """
    sha256_of_tensors = None
    if tensors is not None:
        # the file is written, and its digest returned
        sha256_of_tensors = write_tensors(path.with_suffix(".safetensors"), tensors)

    # The entry "tensors" is the digest of their file. The JSON file is written last, when all that it names is there.
    record = {"values": values, "tensors": sha256_of_tensors}
    record_with_digest = {"sha256": _digest_of_values(record), **record}
    write_file(path, json.dumps(record_with_digest, indent=1))


def read_record(path: Path) -> dict[str, Any] | None:
    """Return the values of a record; `None` if it is missing, or if it or its tensors are damaged.

    Damage is logged as a warning; the files are only read. `path` is that of the JSON file, as `write_record` got it.
    Tensors are checked by their digest and not returned.
    """
    try:
        record = json.loads(path.read_bytes())
        sha256 = record.pop("sha256")
        values = record["values"]
        sha256_of_tensors = record["tensors"]
        is_as_written = sha256 == _digest_of_values(record)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError, AttributeError):
        is_as_written = False

    if not is_as_written:
        logger.warning("%s is damaged and not used", path)
        return None
    if sha256_of_tensors is None:  # the record was written without tensors
        return values
    if not is_whole(path.with_suffix(".safetensors"), sha256_of_tensors):
        return None
    return values


def is_whole(path: Path, sha256: str | None) -> bool:
    """Tell whether a file exists and still has the bytes that were written; logs a warning if not.

    `sha256` is the digest of those bytes, as `write_tensors` returned it; `None` equals no file's.
    """
    if path.exists() and digest_of(path) == sha256:
        return True
    logger.warning("%s is damaged and not used", path)
    return False


def _digest_of_values(values: Mapping[str, Any]) -> str:
    """Return the SHA-256 of plain values, written as JSON."""
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()
