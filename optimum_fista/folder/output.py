"""Write files and folders so that they exist complete or not at all: beside their place first, then by one rename.

During a run, the folder `NAME.unfinished` is beside the output `NAME`. It has `model`, the folder that becomes the
output, and `journal`, which a run needs to resume. The lock is beside it. Every finished folder has a list of its files
(`FILES_FILE`). A folder may be replaced if all its files are as on the list. If a file was added or changed, it belongs
to the user, and the folder is not replaced. A record (`write_record`) has digests, so that damage is noticed.
"""

import ctypes
import errno
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

FOLDER, MODEL = "journal", "model"
RUN_FILE = f"{FOLDER}/fingerprint.json"  # says that an unfinished folder holds a run that can be resumed, and which
FILES_FILE = "fista/files.json"
SAMPLED_TEXTS = "calibration-*.safetensors"  # in the journal: tokens that a model wrote, a file for each way to do so
_ABOUT = ("README.md", "fista/report.html")  # files that commands write into a finished folder
_MARK = f"{FOLDER}/optimum-fista"  # of an unfinished folder of this package
_REPLACED = (
    "replaced"  # the old output, for a moment, where two folders can't be swapped in one step
)
_OFFLOADED = (
    "offload-*"  # in the journal: weights that a rank of a running run reads again and again
)
logger = logging.getLogger(__name__)
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of Linux


def unfinished_folder(output_dir: Path) -> Path:
    """The folder in which a run keeps its files until all are written."""
    return Path(f"{os.path.realpath(output_dir)}.unfinished")


def folder_beside(source: str | Path, ending: str) -> Path:
    """The default output of a command that reads `source`: the model's name and `ending`."""
    path = Path(source) if Path(source).name not in ("", "..") else Path(source).resolve()
    return path.with_name(f"{path.name}{ending}") if path.is_dir() else Path(f"{path.name}{ending}")


def require_output(output_dir: Path, overwrite: bool, *, source: str | Path | None = None) -> None:
    """Refuse an output that can't be written, or that would replace files of the user.

    `source` is the model that is read. The output must not be its folder or be inside it, and a run into the output
    must not delete it.
    """
    shown, output = f"output {str(output_dir)!r}", Path(os.path.realpath(output_dir))
    if output_dir.name in ("", ".."):
        raise ValueError(
            f"{shown} has no name of its own: pass a folder by its name, such as 'model-50'."
        )
    places = [path for path in (output, *output.parents) if path.exists()]
    if source is not None and Path(source).is_dir():
        if any(path.samefile(source) for path in places):
            raise ValueError(
                f"{shown} lies in the folder that is read, {str(source)!r}: pass a folder outside of it."
            )
        if Path(os.path.realpath(source)).is_relative_to(
            unfinished := unfinished_folder(output_dir)
        ):
            raise ValueError(
                f"{shown}: the folder that is read, {str(source)!r}, lies in {str(unfinished)!r}, which a run into the "
                "output deletes: pass another output, or move the folder that is read."
            )
    if not output.exists():
        return
    if not output.is_dir():
        raise FileExistsError(f"{shown} is a file: pass a folder.")
    if os.path.ismount(output):
        raise ValueError(f"{shown} is a mount point, which can't be replaced: pass a folder in it.")
    noted = _noted(output)
    if noted and not overwrite:
        if Path(
            f"{unfinished_folder(output_dir)}.lock"
        ).exists():  # of a run that was killed at its end, or goes on
            with suppress(OSError), locked_output(output_dir):
                pass
        raise FileExistsError(
            f"{shown} already holds a model: pass another folder, or overwrite=True (--overwrite)."
        )
    if others := foreign_files(output) if noted else sorted(os.listdir(output)):
        if _noted(output) != noted:  # another run's model came meanwhile
            require_output(output_dir, overwrite, source=source)
            return
        names = ", ".join(others[:3]) + (f" and {len(others) - 3} more" if len(others) > 3 else "")
        raise FileExistsError(
            f"{shown} holds {names}, which optimum-fista did not write or somebody changed: it would be lost. Pass "
            "another folder, or move it away."
        )
    if not os.access(output, os.W_OK):  # a folder that can't be written to can't change its place
        what = f"{shown} can't be replaced ({os.strerror(errno.EACCES)}): make it writable, or pass another folder"
        raise PermissionError(errno.EACCES, what, str(output))


def foreign_files(folder: Path) -> list[str]:
    """Names of the files in a folder that are not on its list, or not as they were written."""
    noted, found = _noted(folder), [name for name in all_names(folder) if name != FILES_FILE]
    return [
        name
        for name in found
        if not (folder / name).is_file() or noted.get(name) != _stamp(folder / name)
    ]


def model_files(folder: Path) -> set[str]:
    """Names of the files in a folder that are on its list, and of the list; none if there is no list."""
    noted = _noted(folder)
    return {*all_names(folder)} & {*noted, FILES_FILE} if noted else set()


def all_names(folder: Path) -> list[str]:
    """Names of all files below a folder, links included."""
    found = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return sorted(path.relative_to(folder).as_posix() for path in found)


@contextmanager
def locked_output(output_dir: Path) -> Iterator[Path]:
    """Lock `output_dir` against other runs, and yield its unfinished folder, which exists and can be written to.

    The thread that holds the lock may lock again. Files that a killed process left are deleted, but not the layers of a
    streamed run or a text that a model wrote.
    """
    folder, output = unfinished_folder(output_dir), Path(os.path.realpath(output_dir))
    # The system releases the lock of a killed process.
    lock: Any = FileLock(f"{folder}.lock", timeout=0, is_singleton=True)
    if lock.is_locked:  # by this thread
        yield folder
        return
    with ExitStack() as at_the_end:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except Timeout as error:
            why = "is being written by another run: wait until it has ended, or pass another folder"
            raise BlockingIOError(f"output_dir={str(output_dir)!r} {why}.") from error
        except OSError as error:
            what = f"output_dir={str(output_dir)!r} can't be written to ({error.strerror}), nothing was done: pass "
            raise OSError(
                error.errno, f"{what}another folder, or make this one writable", error.filename
            ) from error
        at_the_end.callback(lock.release)
        at_the_end.callback(Path(lock.lock_file).unlink, missing_ok=True)
        ours = (
            folder.is_dir()
            and not folder.is_symlink()
            and ((folder / _MARK).exists() or not all_names(folder))
        )
        if os.path.lexists(folder) and not ours:
            why = "is in the way and no unfinished run's: move it away, or pass another output"
            raise FileExistsError(f"{str(folder)!r} {why}.")
        at_the_end.callback(
            _tidy, folder, output
        )  # the last in is the first out: while the lock is held
        _tidy(folder, output)  # after a process that was killed
        (folder / FOLDER).mkdir(parents=True, exist_ok=True)
        (folder / _MARK).touch()
        yield folder


@contextmanager
def new_output(output_dir: Path, overwrite: bool, source: Path | None = None) -> Iterator[Path]:
    """Write a folder at once: yields an empty one, which becomes `output_dir` at the end (`install`)."""
    with locked_output(output_dir) as folder:
        require_output(output_dir, overwrite, source=source)
        if (folder / RUN_FILE).exists() and not overwrite:
            raise FileExistsError(
                f"{str(folder)!r} holds an unfinished run: give its command again to finish it, delete the folder, or "
                "pass overwrite=True (--overwrite) to throw its layers away."
            )
        discard(folder)
        (folder / MODEL).mkdir()
        yield folder / MODEL
        install(folder, output_dir, overwrite, source)


def install(folder: Path, output_dir: Path, overwrite: bool, source: Path | None = None) -> None:
    """Put the model of a locked unfinished folder in the place of `output_dir`, and end the unfinished folder.

    An existing folder is swapped with it in one step of the system. If the system can't do that, there are two renames.
    If the second one fails, or the process is killed before it, `locked_output` undoes the first one. Copies of files
    that the user had added to `source`, the folder that was read, are not listed.
    """
    model, output, replaced = (
        folder / MODEL,
        Path(os.path.realpath(output_dir)),
        folder / _REPLACED,
    )  # a link stays one
    names = [name for name in all_names(model) if name != FILES_FILE]
    for name in names:
        if name.endswith(".safetensors"):  # which safetensors writes for their owner alone
            (model / name).chmod(model.stat().st_mode & 0o666)
        flush(model / name)  # before the folder has its name: whoever finds it finds all of it
    added = (
        {*all_names(source)} - model_files(source)
        if source is not None and _noted(source)
        else set()
    )
    noted = {name: _stamp(model / name) for name in names if name not in added}
    (model / FILES_FILE).parent.mkdir(exist_ok=True)
    write_file(model / FILES_FILE, json.dumps(noted, indent=1, sort_keys=True) + "\n")
    require_output(output_dir, overwrite)  # again: hours have passed
    try:
        if output.exists():
            model.chmod(output.stat().st_mode)  # the folder's owner may have closed it to others
        if not output.exists():
            model.rename(output)
        elif not _swapped(model, output):
            output.rename(replaced)
            model.rename(output)
        flush(output.parent)
    except OSError as error:
        what = f"{error.strerror}: the new model can't take its place; give the same command again"
        raise OSError(error.errno, what, str(output)) from error
    discard(folder)


def discard(folder: Path, *, keep_texts: bool = False) -> None:
    """Delete everything in a locked unfinished folder.

    `keep_texts` keeps the tokens that models wrote: the new run may have written them just before.
    """
    journal = folder / FOLDER
    (folder / RUN_FILE).unlink(missing_ok=True)  # first: what is left then is no run
    kept = [
        folder / _MARK,
        *journal.glob(_OFFLOADED),
        *(journal.glob(SAMPLED_TEXTS) if keep_texts else ()),
    ]
    for path in [
        folder / MODEL,
        folder / _REPLACED,
        *(path for path in journal.glob("*") if path not in kept),
    ]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def write_about(file: Path, text: str) -> None:
    """Write a file; if it is about the model of a finished folder, list it there, unless the user had changed it."""
    folder = file.parent if file.name == "README.md" else file.parent.parent
    name = file.relative_to(folder).as_posix()
    noted = _noted(folder) if name in _ABOUT else {}
    listed = bool(noted) and name not in foreign_files(folder)
    write_file(file, text)
    if listed:
        write_file(
            folder / FILES_FILE,
            json.dumps(noted | {name: _stamp(file)}, indent=1, sort_keys=True) + "\n",
        )


def _tidy(folder: Path, output: Path) -> None:
    """Remove files that no later run needs, an old output that was replaced, and the folder if it is then empty."""
    model, replaced = folder / MODEL, folder / _REPLACED
    if (
        model.exists() and replaced.exists()
    ):  # a process was killed between the two renames of `install`
        replaced.rename(output)
    with suppress(
        FileNotFoundError
    ):  # after a failure other ranks remove what they have offloaded at the same time
        if not (folder / RUN_FILE).exists():
            discard(folder, keep_texts=True)
        for path in [replaced, *(folder / FOLDER).glob(_OFFLOADED)]:
            if path.exists():
                shutil.rmtree(path)
        if folder.exists() and {*all_names(folder)} <= {_MARK}:
            shutil.rmtree(folder)


def _swapped(first: Path, second: Path) -> bool:
    """Swap the names of two folders in one step; False if the system, or the file system, can't."""
    try:
        swap = ctypes.CDLL(None).renameat2
    except (AttributeError, TypeError, OSError):
        return False
    return (
        swap(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0
    )


def _noted(folder: Path) -> dict[str, Any]:
    """The list of a finished folder; empty if there is none, or it is damaged."""
    try:
        found = json.loads((folder / FILES_FILE).read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _stamp(file: Path) -> Any:
    """A value that changes with a file: size and time of change of weights, the digest of everything else."""
    found = file.stat()
    # A digest of weights would read gigabytes. Editors that keep size and time do not edit weights.
    return [found.st_size, found.st_mtime_ns] if file.suffix == ".safetensors" else digest_of(file)


def write_file(
    path: Path,
    content: str | bytes | Iterator[bytes | memoryview] | Mapping[str, Tensor],
    metadata: dict[str, str] | None = None,
) -> None:
    """Write text, bytes, or tensors as safetensors beside `path`, flush the file to the disk, and rename it."""
    partial = path.with_name(f".{path.name}.partial")
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
            flush(partial)
            partial.replace(
                path
            )  # on the disk before its name is, or a power cut leaves an empty file
            flush(path.parent)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def errors_of_writing(path: Path) -> Iterator[None]:
    """Turn every error of the system into an OSError that names the file that could not be written."""
    try:
        yield
    except (
        SafetensorError,
        RuntimeError,
    ) as error:  # safetensors and torch.save wrap the system's errors in a text
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
            tempfile.TemporaryFile(
                dir=next(folder for folder in parents if folder.exists())
            ).close()
    except OSError as error:
        what = f"output can't be written to ({error.strerror}), nothing was done: pass another file"
        raise OSError(error.errno, what, str(file)) from error


def digest_of(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)  # Python opens no folder
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_record(
    path: Path, values: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None
) -> None:
    """Write the tensors of a record, then its plain values as JSON with their digest."""
    sha256 = None if tensors is None else write_tensors(path.with_suffix(".safetensors"), tensors)
    record = {"values": values, "tensors": sha256}
    write_file(path, json.dumps({"sha256": _digest(record), **record}, indent=1))


def read_record(path: Path) -> dict[str, Any] | None:
    """Read the values of a record; `None` if the record is missing, or if it or its tensors are damaged."""
    try:
        found = json.loads(path.read_bytes())
        sha256, values, tensors = found.pop("sha256"), found["values"], found["tensors"]
        if sha256 == _digest(found):
            return (
                values
                if tensors is None or is_whole(path.with_suffix(".safetensors"), tensors)
                else None
            )
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError, AttributeError):
        pass
    logger.warning("%s is damaged and not used", path)
    return None


def is_whole(path: Path, sha256: str | None) -> bool:
    """Whether a file exists and still has the bytes that were written."""
    if path.exists() and digest_of(path) == sha256:
        return True
    logger.warning("%s is damaged and not used", path)
    return False


def _digest(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write a safetensors file and return its digest."""
    write_file(path, tensors, {"format": "pt"})  # a file without metadata and tensors can't be read
    return digest_of(path)
