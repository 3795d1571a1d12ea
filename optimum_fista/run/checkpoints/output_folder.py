"""The folder that a run writes: what can't become one, who writes it, and how finished files come into it.

A run writes to `NAME.unfinished`, which is its own, and holds a lock there. When all files are whole they come into
`NAME`: by one rename if there is no such folder, otherwise one after another, so that the folder itself (a mount
point, the target of a link) and every file in it that is not the model's stay what they are.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import tempfile
import threading
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from optimum_fista.run.checkpoints.atomic import flush, write_text

try:
    import fcntl
except ImportError:  # no POSIX system
    fcntl = None  # type: ignore[assignment]

FOLDER = "journal"
"""What an unfinished folder holds besides the files of the model."""
_UNFINISHED, _LOCKED = ".unfinished", "process "  # how its name ends, how the text of its lock begins
_OFFLOADED = "offload-*"  # in it: weights that a rank of a running run reads again and again

# Weights that `from_pretrained` finds by name: those of another model would be loaded instead of the new ones.
WEIGHTS = ["model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json"]
WEIGHTS += ["packed.safetensors", "packed-*-of-*.safetensors", "packed.safetensors.index.json"]
WEIGHTS += ["pytorch_model.bin", "pytorch_model-*-of-*.bin", "pytorch_model.bin.index.json"]
_TOKENIZER = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"]
_TOKENIZER += ["chat_template.jinja", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model"]
_BESIDE = ["README.md", "generation_config.json", "fista/masks.safetensors", "fista/report.json"]
_BESIDE += ["fista/relative_error.png"]
_LATER = ["fista/report.html", "fista/evaluation.json"]  # what other commands wrote about the model
MODEL_FILES = ["config.json", *WEIGHTS, *_TOKENIZER, *_BESIDE]
"""Names of the files that a run writes, as patterns."""

_held = threading.local()  # .folders: those that this thread holds


def unfinished_folder(output_dir: Path) -> Path:
    """Where a run keeps what it has written until it is complete: beside `output_dir`, or inside a mount point."""
    output = Path(os.path.realpath(output_dir))
    name = f"{output.name}{_UNFINISHED}"
    inside = output.is_dir() and (os.path.ismount(output) or not os.access(output.parent, os.W_OK))
    return output / name if inside else output.with_name(name)


def require_output(
    output_dir: Path, overwrite: bool, *, source: str | Path | None = None, names: Iterable[str] = ()
) -> None:
    """Refuse an output folder that can't work, or in which a file would be lost.

    Args:
        output_dir: The output folder.
        overwrite: Whether a model in it may be replaced.
        source: The model that is read; the output must not be its folder or lie in it.
        names: Names, or patterns of names, that are about to be written.

    Raises:
        FileExistsError: If it is a file, holds a model and `overwrite` is False, or holds a file that is not a
            model's under one of the names.
        FileNotFoundError: If it is a link that leads nowhere.
        ValueError: If it has no name of its own, or lies in the folder that is read.
    """
    shown = f"output {str(output_dir)!r}"
    if output_dir.name in ("", ".."):
        raise ValueError(f"{shown} has no name of its own: pass a folder by its name, such as 'model-50'.")
    if os.path.realpath(output_dir).endswith(_UNFINISHED):
        raise ValueError(f"{shown} has the name of an unfinished run: pass a name that doesn't end in {_UNFINISHED!r}.")
    if output_dir.is_symlink() and not output_dir.exists():
        raise FileNotFoundError(f"{shown} is a link that leads nowhere: pass a folder, or remove the link.")
    output, unfinished = Path(os.path.realpath(output_dir)), unfinished_folder(output_dir)
    if source is not None and Path(source).is_dir():
        places = [path for place in (output, unfinished) for path in (place, *place.parents)]
        if any(path.exists() and path.samefile(source) for path in places):  # whatever names and mounts lead there
            raise ValueError(f"{shown} lies in the folder that is read, {str(source)!r}: pass a folder outside of it.")
    if not output.exists():
        return
    if not output.is_dir():
        raise FileExistsError(f"{shown} is a file: pass a folder.")
    names = list(names)
    ours = _being_installed(unfinished)
    if _holds_model(output, ours):
        if not overwrite:
            raise FileExistsError(
                f"{shown} already holds a model: pass another folder, or overwrite=True (--overwrite)."
            )
        taken = [name for name in _there(output, names) if (output / name).is_dir()]
    else:
        taken = [name for name in _there(output, {*names, "config.json", *WEIGHTS}) if name not in ours]
    # A link is never written through, and no folder takes the place of a file.
    above = {parent for name in names for parent in Path(name).parents if parent.name}
    taken += [str(p) for p in sorted(above) if os.path.lexists(output / p) and _is_no_folder(output / p)]
    if taken:
        more = f" and {len(taken) - 3} more" if len(taken) > 3 else ""
        raise FileExistsError(
            f"{shown} holds {', '.join(taken[:3])}{more} of something else, which the model would replace: pass "
            "another folder, or move them away."
        )


def is_model_file(name: str) -> bool:
    """Whether a name is one of a model's files, or of what other commands wrote about it."""
    return any(fnmatch(name, pattern) for pattern in MODEL_FILES + _LATER)


@contextmanager
def locked_output(output_dir: Path) -> Iterator[Path]:
    """Be the only one who writes `output_dir`; yields its unfinished folder, which is there and can be written to.

    The lock is a file that the system unlocks when the process ends, however it ends. The thread that holds it may ask
    again. What a process that was killed has left there is thrown away, but not the layers of a streamed run. At the
    end the folder goes if nothing but the lock is in it.

    Raises:
        BlockingIOError: If another run holds it; the message says which.
        FileExistsError: If the unfinished folder is not one of this package.
        OSError: If it can't be written to.
    """
    folder = unfinished_folder(output_dir)
    mine: set[Path] = vars(_held).setdefault("folders", set())
    if folder in mine:
        yield folder
        return
    lock, file = _lock_of(folder), _lock(folder, output_dir)
    mine.add(folder)
    try:
        if not _is_streamed(folder):
            _empty(folder)
        _remove_offloaded(folder)
        if _is_lock(_lock_of(output_dir)) and (output_dir / "config.json").exists():  # it was killed after the rename
            shutil.rmtree(output_dir / FOLDER, ignore_errors=True)
        yield folder
    finally:
        mine.remove(folder)
        try:
            if _is_same(lock, file) and _files(folder) == [lock]:
                shutil.rmtree(folder)
        finally:
            os.close(file)


def discard(folder: Path, overwrite: bool) -> None:
    """Throw away what is in an unfinished folder that is locked; layers of a streamed run only if `overwrite`.

    Raises:
        FileExistsError: If it holds such layers and `overwrite` is False.
    """
    if _is_streamed(folder) and not overwrite:
        raise FileExistsError(
            f"{str(folder)!r} holds an unfinished run: give its command again to finish it, delete the folder, or pass "
            "overwrite=True (--overwrite) to throw its layers away."
        )
    _empty(folder)
    for path in list((folder / FOLDER).glob("*")):
        if path not in (_lock_of(folder), _list_of(folder)) and not path.match(_OFFLOADED):
            _remove(path)


def install(folder: Path, output_dir: Path, overwrite: bool) -> None:
    """Bring the whole model in an unfinished folder into `output_dir`, and end the unfinished folder.

    If there is no such folder, it appears by one rename. Otherwise all files are brought there under other names first,
    so that a full disk leaves the old model whole. Then the old configuration goes first and the new one comes last, so
    that nothing loads a mixture of two models; every file comes by one rename, and what was begun is written down: if
    the process is killed in between, the next run into the same output finds all files in `folder`, may replace what
    this one wrote, and finishes.

    Raises:
        OSError: As `require_output`, or if a file can't be written; nothing is changed then.
    """
    output = Path(os.path.realpath(output_dir))
    files = [path for path in _files(folder) if (folder / FOLDER) not in path.parents]
    for path in files:
        if path.suffix == ".safetensors":  # which safetensors writes for their owner alone
            path.chmod(folder.stat().st_mode & 0o666)
        flush(path)
    if not output.exists():
        folder.rename(output)
        flush(output.parent)
        shutil.rmtree(output / FOLDER, ignore_errors=True)  # another process may be at it as well
        return
    names = sorted((path.relative_to(folder).as_posix() for path in files), key=lambda name: name == "config.json")
    require_output(output, overwrite, names=names)
    begun = _being_installed(folder)
    old = [name for name in _there(output, MODEL_FILES + _LATER) if not (output / name).is_dir()]
    if not _holds_model(output, begun):
        old = [name for name in old if name in begun]
    partials = {name: output / Path(name).with_name(f".{Path(name).name}.partial") for name in names}
    made = {path.relative_to(output).as_posix() for path in partials.values()}
    for name in begun:
        if name.endswith(".partial"):
            (output / name).unlink(missing_ok=True)
    for name in made - begun:
        if os.path.lexists(output / name):
            raise FileExistsError(f"output {str(output_dir)!r} holds {name}, which is in the way: move it away.")
    try:
        write_text(_list_of(folder), json.dumps(sorted({*begun, *made})))
        for name, partial in partials.items():
            partial.parent.mkdir(parents=True, exist_ok=True)
            _link(folder / name, partial)
            flush(partial)
        write_text(_list_of(folder), json.dumps(sorted({*begun, *made, *old, *names})))
    except OSError:
        for partial in partials.values():
            partial.unlink(missing_ok=True)
        if not begun:
            _list_of(folder).unlink(missing_ok=True)
        raise
    if "tokenizer_config.json" not in names:  # a model that brings none keeps the tokenizer that is there
        old = [name for name in old if name not in _TOKENIZER]
    (output / "config.json").unlink(missing_ok=True)
    flush(output)
    for name in set(old) - {"config.json", *names}:
        (output / name).unlink()
    for name, partial in partials.items():
        partial.replace(output / name)
        partial.unlink(missing_ok=True)  # renaming one name of a file to another of it does nothing
        flush(partial.parent)
    _list_of(folder).unlink()
    discard(folder, True)
    _remove_offloaded(folder)


def _lock(folder: Path, output_dir: Path) -> int:
    """Make the unfinished folder and lock it; returns the file that keeps the lock as long as it is open."""
    shown = f"output_dir={str(output_dir)!r}"
    for attempt in range(100):
        try:
            if folder.is_symlink() or not _is_ours(folder):
                if attempt < 5:  # its last holder may just be removing it, or the next one making it
                    time.sleep(0.02)
                    continue
                raise FileExistsError(
                    f"{str(folder)!r} is in the way and no unfinished run's: move it away, or pass another output."
                )
            (folder / FOLDER).mkdir(parents=True, exist_ok=True)
            if output_dir.is_dir():
                tempfile.TemporaryFile(dir=output_dir).close()
            file = os.open(_lock_of(folder), os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:
            continue  # its last holder is just removing it
        except OSError as error:
            if error.errno is None:
                raise
            if isinstance(error, FileExistsError) and attempt < 5:  # it was there, and is gone
                time.sleep(0.02)
                continue
            raise OSError(
                error.errno,
                f"{shown} can't be written to ({error.strerror}), nothing was done: pass another folder, or make this "
                "one writable",
                error.filename,
            ) from error
        try:
            if fcntl is None:
                raise OSError(errno.ENOSYS, "there are none on this system")
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(file, 1000, 0).decode(errors="replace") or "another process"
            os.close(file)
            raise BlockingIOError(
                f"{shown} is being written by {holder}: wait until it has ended, or pass another folder."
            ) from error
        except OSError as error:
            warnings.warn(f"{shown} can't be locked ({error.strerror}): don't start two runs into it.", stacklevel=3)
        if _is_same(_lock_of(folder), file):
            text = f"{_LOCKED}{os.getpid()} on {socket.gethostname()}".encode()
            os.ftruncate(file, os.pwrite(file, text, 0))  # in this order: it is never empty again
            return file
        os.close(file)  # its holder has ended and removed it
    raise OSError(errno.EAGAIN, f"{shown} is written by others again and again", str(folder))


def _lock_of(folder: Path) -> Path:
    return folder / FOLDER / "lock"


def _list_of(folder: Path) -> Path:
    return folder / FOLDER / "installing.json"


def _being_installed(folder: Path) -> set[str]:
    """Names that a run which was killed may have written to its output."""
    file = _list_of(folder)
    return set(json.loads(file.read_text())) if file.exists() else set()


def _is_lock(lock: Path) -> bool:
    """Whether there is a lock of this package, and not somebody's file of that name."""
    return lock.is_file() and lock.read_bytes().startswith(_LOCKED.encode())


def _is_ours(folder: Path) -> bool:
    """Whether a folder is none, without files but a new lock, or an unfinished one of this package."""
    lock = _lock_of(folder)
    return _is_lock(lock) or _is_streamed(folder) or not (folder.is_dir() and {*_files(folder)} - {lock})


def _is_streamed(folder: Path) -> bool:
    return (folder / FOLDER / "fingerprint.json").exists()


def _is_same(lock: Path, file: int) -> bool:
    try:
        return os.path.samestat(lock.stat(), os.fstat(file))
    except FileNotFoundError:
        return False


def _is_no_folder(path: Path) -> bool:
    return path.is_symlink() or not path.is_dir()


def _holds_model(output: Path, ours: set[str]) -> bool:
    """Whether there are a configuration and weights; one alone is somebody's file."""
    found = {*_there(output, ["config.json", *WEIGHTS])} - ours
    return "config.json" in found and len(found) > 1


def _there(output: Path, names: Iterable[str]) -> list[str]:
    """Those of the names, or patterns of names, that a folder has; links that lead nowhere are there as well.

    Only `WEIGHTS` are patterns: in a name of a user's file, `[` and `*` are letters.
    """
    names = list(names)
    patterns = [name for name in names if name in WEIGHTS]
    listed = [path.name for path in output.iterdir()]
    if (output / "fista").is_dir():
        listed += [f"fista/{path.name}" for path in (output / "fista").iterdir()]
    found = [name for name in listed if any(fnmatch(name, pattern) for pattern in patterns)]
    return sorted({*found, *(name for name in names if os.path.lexists(output / name))})


def _remove_offloaded(folder: Path) -> None:
    for left in (folder / FOLDER).glob(_OFFLOADED):
        shutil.rmtree(left)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())


def _empty(folder: Path) -> None:
    """Remove all but the journal."""
    for path in [path for path in folder.glob("*") if path.name != FOLDER]:
        _remove(path)


def _remove(path: Path) -> None:
    if path.is_symlink() or not path.is_dir():
        path.unlink()
    else:
        shutil.rmtree(path)


def _link(source: Path, target: Path) -> None:
    """A second name for a file, or a copy where the file system has no such thing."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)
