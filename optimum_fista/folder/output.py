"""Output folders: a finished model folder takes its place at once, and no file of the user is lost.

While a model is written, the folder `NAME.unfinished` is beside the output `NAME`. It holds

- `model`, the folder that becomes the output,
- `journal`, what a streamed run needs to resume, and a mark of this package,
- `replaced`, for a moment: the old output, until the new one has its place.

The lock `NAME.unfinished.lock` is beside them. Every finished folder has a list of its files (`fista/files.json`). A
folder may be replaced if all its files are as on that list. A file that was added or changed belongs to the user, and
the folder is then not replaced.

A writer calls `require_output` early, and then `new_output`. A streamed run uses its parts: `locked_output` for the
whole run, and `install` at the end. In all functions, `output_dir` is the output as the user passed it, perhaps a link,
and `folder` a real folder: an unfinished one, or a finished one with a list.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from optimum_fista.atomic import digest_of, flush, partial_file, write_file

# Folders in an unfinished folder.
JOURNAL = "journal"
MODEL = "model"
RUN_FILE = f"{JOURNAL}/fingerprint.json"
"""In an unfinished folder: says that it holds a run that can be resumed, and which."""

FILES_FILE = "fista/files.json"
SAMPLED_TEXTS = "calibration-*.safetensors"
"""In the journal: tokens that a model wrote, a file for each way to sample them."""

_ABOUT = ("README.md", "fista/report.html")  # files that commands write into a finished folder
_MARK = f"{JOURNAL}/optimum-fista"  # says that an unfinished folder is of this package
_REPLACED = "replaced"
_OFFLOADED = "offload-*"  # in the journal: weights that a process reads again and again in a run


def unfinished_folder(output_dir: Path) -> Path:
    """Return the folder in which a run keeps its files until all are written. Links are followed."""
    return Path(f"{os.path.realpath(output_dir)}.unfinished")


def folder_beside(source: str | Path, ending: str) -> Path:
    """Return the default output of a command that reads `source`: the name of the model and `ending`.

    `source` is a folder or a Hub id. The output of a folder is beside it, that of a Hub id in the working folder.
    """
    path = Path(source)
    if path.name in ("", ".."):  # a folder such as "." has no name until its whole path is known
        path = path.resolve()
    name = f"{path.name}{ending}"
    return path.with_name(name) if path.is_dir() else Path(name)


def require_output(output_dir: Path, overwrite: bool, *, source: str | Path | None = None) -> None:
    """Refuse an output that can't be written, or that would replace files of the user.

    Nothing of the user is changed. If the output is refused because it holds a model, files that a killed process left
    beside it are removed. A folder may be replaced if all its files are as on its list (`fista/files.json`).

    Args:
        output_dir: The folder that is going to be written.
        overwrite: Whether a model that this package wrote there may be replaced.
        source: The folder or Hub id of the model that is read. The output must not be this folder or be inside it, and
            a run into the output must not delete it.

    Raises:
        ValueError, OSError: If the output is refused (FileExistsError, PermissionError for what is there).
    """
    output = Path(os.path.realpath(output_dir))
    if output_dir.name in ("", ".."):
        raise ValueError(
            f"output {str(output_dir)!r} has no name of its own: pass a folder by its name, such as 'model-50'."
        )
    if source is not None and Path(source).is_dir():
        _require_apart(output_dir, Path(source))
    if not output.exists():
        return
    if not output.is_dir():
        raise FileExistsError(f"output {str(output_dir)!r} is a file: pass a folder.")
    if os.path.ismount(output):
        raise ValueError(
            f"output {str(output_dir)!r} is a mount point, which can't be replaced: pass a folder in it."
        )

    listed = _listed_files(output)  # empty if it is no finished model of this package
    if listed and not overwrite:
        lock = Path(f"{unfinished_folder(output_dir)}.lock")
        if lock.exists():
            # Of a run that was killed at its end, or goes on. Locking removes the files of a killed one, and fails with
            # an OSError if the run goes on.
            with suppress(OSError), locked_output(output_dir):
                pass
        raise FileExistsError(
            f"output {str(output_dir)!r} already holds a model: pass another folder, or overwrite=True (--overwrite)."
        )

    # Of a folder without a list, all files are the user's.
    others = foreign_files(output) if listed else sorted(os.listdir(output))
    if others:
        # Another run may have put its model there since the list was read. Then everything is asked again.
        is_another_model = _listed_files(output) != listed
        if is_another_model:
            require_output(output_dir, overwrite, source=source)
            return
        names = ", ".join(others[:3])
        if len(others) > 3:
            names += f" and {len(others) - 3} more"
        # Weights are known by their size and time (`_stamp`), and `cp -r` gives them a new time.
        has_listed_weights = any(
            name in listed and name.endswith(".safetensors") for name in others
        )
        of_a_copy = " (weights that were copied without their time count as changed)"
        raise FileExistsError(
            f"output {str(output_dir)!r} holds {names}, which optimum-fista did not write or somebody changed"
            f"{of_a_copy if has_listed_weights else ''}: it would be lost. Pass another folder, or move it away."
        )
    if not os.access(output, os.W_OK):  # a folder that can't be written to can't change its place
        raise PermissionError(
            errno.EACCES,
            f"output {str(output_dir)!r} can't be replaced ({os.strerror(errno.EACCES)}): make it writable, or pass "
            "another folder",
            str(output),
        )


def _require_apart(output_dir: Path, source: Path) -> None:
    """Refuse an output in the folder `source`, which is read, and a source in the unfinished folder of the output.

    `output_dir` is the output as the user passed it. ValueError if it is refused; nothing is changed.
    """
    output = Path(os.path.realpath(output_dir))
    # The output, if it exists, and the folders that it is in.
    existing = [path for path in (output, *output.parents) if path.exists()]
    if any(path.samefile(source) for path in existing):
        raise ValueError(
            f"output {str(output_dir)!r} lies in the folder that is read, {str(source)!r}: pass a folder outside of it."
        )
    unfinished = unfinished_folder(output_dir)
    if Path(os.path.realpath(source)).is_relative_to(unfinished):
        raise ValueError(
            f"output {str(output_dir)!r}: the folder that is read, {str(source)!r}, lies in {str(unfinished)!r}, which "
            "a run into the output deletes: pass another output, or move the folder that is read."
        )


def foreign_files(folder: Path) -> list[str]:
    """Return the names of the files in a finished folder that are not on its list, or not as they were written.

    The list itself is no such file. Names are relative to the folder, such as "fista/report.json".
    """
    listed = _listed_files(folder)
    # What a process that was killed may have left of files that it wrote again (`rewrite`).
    written = [FILES_FILE, *listed]
    of_this_package = {FILES_FILE, *(partial_file(Path(name)).as_posix() for name in written)}
    return [
        name
        for name in all_names(folder)
        if name not in of_this_package and not _is_as_listed(folder / name, listed.get(name))
    ]


def _is_as_listed(file: Path, listed: Any) -> bool:
    """Tell whether a file is as it was written. `listed` is its stamp in the list, or two in a dictionary (`rewrite`).

    `None`: the file is not on the list.
    """
    if listed is None or not file.is_file():
        return False
    stamp = _stamp(file)
    return stamp in listed.values() if isinstance(listed, dict) else stamp == listed


def model_files(folder: Path) -> set[str]:
    """Return the names of the files in a folder that are on its list, and of the list; none if there is no list.

    Names are relative to the folder. Files that were changed since they were listed are among them.
    """
    listed = _listed_files(folder)
    if not listed:
        return set()
    of_model = {*listed, FILES_FILE}
    return {name for name in all_names(folder) if name in of_model}


def all_names(folder: Path) -> list[str]:
    """Return the names of all files below a folder in sorted order, relative to it, such as "fista/report.json".

    A link counts as a file, also one to a folder, which is not followed.
    """
    files = [path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()]
    return sorted(path.relative_to(folder).as_posix() for path in files)


@contextmanager
def locked_output(output_dir: Path) -> Iterator[Path]:
    """Lock `output_dir` against other runs, and yield its unfinished folder, which exists and can be written to.

    Makes the unfinished folder with the mark of this package, and the lock file beside it, which is deleted at the end.
    The thread that holds the lock may lock again: an inner context does nothing. Before and after the context, files
    that a killed process left are deleted, and the unfinished folder if it is empty then (`_tidy`). The layers of a
    streamed run that can be resumed stay, and so does a text that a model wrote.

    Raises:
        OSError: If another run writes the output (BlockingIOError), if the folder can't be written to, or if something
            of the user has the name of the unfinished folder (FileExistsError).
    """
    folder = unfinished_folder(output_dir)
    output = Path(os.path.realpath(output_dir))
    # The system releases the lock of a killed process. It is a singleton: this thread gets the same object each time.
    # With a timeout of 0, a lock that another run holds is an error at once.
    lock: Any = FileLock(f"{folder}.lock", timeout=0, is_singleton=True)
    is_locked_by_this_thread = lock.is_locked
    if is_locked_by_this_thread:
        yield folder
        return

    with ExitStack() as at_the_end:  # callbacks run from the last to the first
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except Timeout as error:
            raise BlockingIOError(
                f"output_dir={str(output_dir)!r} is being written by another run: wait until it has ended, or pass "
                "another folder."
            ) from error
        except OSError as error:
            raise OSError(
                error.errno,
                f"output_dir={str(output_dir)!r} can't be written to ({error.strerror}), nothing was done: pass "
                "another folder, or make this one writable",
                error.filename,
            ) from error
        at_the_end.callback(lock.release)
        at_the_end.callback(Path(lock.lock_file).unlink, missing_ok=True)

        # Something of the user may have the name of the unfinished folder.
        is_real_folder = folder.is_dir() and not folder.is_symlink()
        # A folder without files may be one of this package that was not marked yet.
        is_marked_or_empty = (folder / _MARK).exists() or not all_names(folder)
        is_of_this_package = is_real_folder and is_marked_or_empty
        if os.path.lexists(folder) and not is_of_this_package:
            raise FileExistsError(
                f"{str(folder)!r} is in the way and no unfinished run's: move it away, or pass another output."
            )

        at_the_end.callback(_tidy, folder, output)  # runs first, while the lock is still held
        _tidy(folder, output)  # after a process that was killed
        (folder / JOURNAL).mkdir(parents=True, exist_ok=True)
        (folder / _MARK).touch()
        yield folder


@contextmanager
def new_output(output_dir: Path, overwrite: bool, source: Path | None = None) -> Iterator[Path]:
    """Yield an empty folder to write a model into; at the end of the context it becomes `output_dir` (`install`).

    After an error inside the context, `output_dir` is as it was. The output is locked meanwhile (`locked_output`).
    Layers of an unfinished run into the same output are deleted if `overwrite` allows it, and are refused otherwise.

    Args:
        output_dir: The output, with no model of the user or, if `overwrite`, one that this package wrote.
        overwrite: Whether such a model, and an unfinished run, may be replaced.
        source: The folder of the model that is read, which must lie outside of the output; `None` if there is none.
    """
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

    The old output is renamed first, then the new one. If the second renaming fails, or the process is killed before it,
    the next `locked_output` of this output (also the one around this call) undoes the first one.

    Args:
        folder: The unfinished folder of `output_dir`, as `locked_output` yields it.
        output_dir: The folder that the model becomes. A link stays a link.
        overwrite: Whether a model there may be replaced. This is asked again (`require_output`), because hours may have
            passed since the run began.
        source: The folder that was read. Copies of files that the user had added to it are not listed as the model's.
    """
    model = folder / MODEL
    output = Path(os.path.realpath(output_dir))

    # of all files but the list, which is made here
    names = [name for name in all_names(model) if name != FILES_FILE]
    for name in names:
        if name.endswith(".safetensors"):
            # Safetensors writes files for their owner alone. Others may read these if they may read the folder.
            (model / name).chmod(model.stat().st_mode & 0o666)
        flush(model / name)  # whoever finds the folder by its name must find all of it

    # Only a folder of this package, with a list, tells which of its files the user has added.
    added_by_user: set[str] = set()
    if source is not None and _listed_files(source):
        added_by_user = set(all_names(source)) - model_files(source)
    stamps = {name: _stamp(model / name) for name in names if name not in added_by_user}
    (model / FILES_FILE).parent.mkdir(exist_ok=True)
    _write_list(model, stamps)

    require_output(output_dir, overwrite)
    try:
        if output.exists():
            model.chmod(output.stat().st_mode)  # its owner may have closed it to others
            output.rename(folder / _REPLACED)
        model.rename(output)
        flush(output.parent)
    except OSError as error:
        raise OSError(
            error.errno,
            f"{error.strerror}: the new model can't take its place; give the same command again",
            str(output),
        ) from error
    discard(folder)


def discard(folder: Path, *, keep_texts: bool = False) -> None:
    """Delete everything in a locked unfinished folder, except its mark and what this run has offloaded.

    `folder` is as `locked_output` yields it. `keep_texts` keeps the tokens that models wrote, too: the new run may have
    written them just before. What the run has offloaded are weights that it reads again and again.
    """
    journal = folder / JOURNAL
    # The file of the run goes first. Without it nothing resumes, even if the process is killed during the rest.
    (folder / RUN_FILE).unlink(missing_ok=True)

    # `_MARK` and `RUN_FILE` are paths in the folder, such as "journal/..."; the patterns are of names in the journal.
    stays = [folder / _MARK, *journal.glob(_OFFLOADED)]
    if keep_texts:
        stays += journal.glob(SAMPLED_TEXTS)
    in_journal = [path for path in journal.glob("*") if path not in stays]
    for path in [folder / MODEL, folder / _REPLACED, *in_journal]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def write_about(file: Path, text: str) -> None:
    """Write a file of text; if it is about the model of a finished folder, update the folder's list.

    Such a file is `README.md` or `fista/report.html`. It is not listed if the user had changed it before. Any other
    `file` is only written. `file` is a path whose folder must exist, and `text` the new content.
    """
    # The folder of the model, if it is one: that of `README.md`, or the one above `fista`.
    folder = file.parent if file.name == "README.md" else file.parent.parent
    name = file.relative_to(folder).as_posix()
    listed = _listed_files(folder)
    is_of_model = name in _ABOUT and bool(listed)
    # Asked before the file is replaced. A file that is not there yet is nobody's.
    was_changed_by_user = is_of_model and name in foreign_files(folder)

    write_file(file, text)
    if is_of_model and not was_changed_by_user:
        _write_list(folder, listed | {name: _stamp(file)})


def rewrite(folder: Path, texts: Mapping[str, str]) -> None:
    """Write files of the model in a finished folder again, and update the folder's list.

    Without the update, a later run would take them for files of the user, and not replace the folder. A file that the
    user had changed before is written, too, but not listed. `texts` are the contents by name, such as
    "fista/report.json". A folder without a list gets none.
    """
    stamps = _listed_files(folder)
    changed_by_user = foreign_files(folder)
    listed = [name for name in texts if stamps and name not in changed_by_user]
    new_stamps = {name: hashlib.sha256(texts[name].encode()).hexdigest() for name in listed}
    if listed:
        # Both stamps, until all files are written: a killed process leaves some of them as they were.
        both = {name: {"before": stamps.get(name), "after": new_stamps[name]} for name in listed}
        _write_list(folder, stamps | both)
    for name, text in texts.items():
        write_file(folder / name, text)
    if listed:
        _write_list(folder, stamps | new_stamps)


def _tidy(folder: Path, output: Path) -> None:
    """Remove from an unfinished folder what no later run needs, and the folder if it is then empty.

    If a process was killed between the two renamings of `install`, the old output gets its place again.

    Args:
        folder: The unfinished folder, which is locked. It may be missing.
        output: The real path of the output.
    """
    replaced = folder / _REPLACED
    # After both renamings, the new model is no longer in the folder.
    was_killed_between = (folder / MODEL).exists() and replaced.exists()
    if was_killed_between:
        replaced.rename(output)
    # After a failure, other processes of the run remove what they have offloaded at the same time: a file may be gone
    # before it is deleted here.
    with suppress(FileNotFoundError):
        can_be_resumed = (folder / RUN_FILE).exists()
        if not can_be_resumed:
            discard(folder, keep_texts=True)
        for path in [replaced, *(folder / JOURNAL).glob(_OFFLOADED)]:
            if path.exists():
                shutil.rmtree(path)
        if folder.exists() and set(all_names(folder)) <= {_MARK}:
            shutil.rmtree(folder)


def _listed_files(folder: Path) -> dict[str, Any]:
    """Return the list of a finished folder, `fista/files.json`; empty if there is none, or it is damaged.

    The list has a stamp (`_stamp`) by the name of each file, such as "fista/report.json". It is only read.
    """
    try:
        stamps = json.loads((folder / FILES_FILE).read_bytes())
    except (OSError, ValueError):
        return {}
    return stamps if isinstance(stamps, dict) else {}


def _write_list(folder: Path, stamps: dict[str, Any]) -> None:
    """Write the list of a folder's files, with the stamp of each (`_stamp`) by its name; an older list is replaced."""
    write_file(folder / FILES_FILE, json.dumps(stamps, indent=1, sort_keys=True) + "\n")


def _stamp(file: Path) -> Any:
    """Return a JSON value that changes with a file.

    It is [size in bytes, time of change in nanoseconds] of a file of weights, and the SHA-256 of any other file.
    """
    if file.suffix == ".safetensors":
        # A digest would read gigabytes. Programs that keep size and time do not change weights.
        status = file.stat()
        return [status.st_size, status.st_mtime_ns]
    return digest_of(file)
