"""One run at a time writes an output folder; locks that the system takes back when a process ends, however it ends."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from optimum_fista.run.checkpoints.installation import empty, is_streamed, remove_offloaded, settle
from optimum_fista.run.checkpoints.output_folder import FOLDER, LOCK, all_names, unfinished_folder

try:
    import fcntl
except ImportError:  # no POSIX system
    fcntl = None  # type: ignore[assignment]

_LOCKED = "process "  # how the text of a lock begins
_held = threading.local()  # .folders: those that this thread holds


@contextmanager
def locked_output(output_dir: Path) -> Iterator[Path]:
    """Be the only one who writes `output_dir`; yields its unfinished folder, which is there and can be written to.

    Two things are locked: a file in the unfinished folder, and the folder itself that is or becomes the output, because
    under another mount it has another name, and with that another unfinished folder. Network file systems can't lock
    folders: there the file alone counts. The thread that holds the lock may ask again.

    An installation that was interrupted is finished, at the start and at the end. All else that is left in the
    unfinished folder is thrown away, but not the layers of a streamed run.

    Raises:
        BlockingIOError: If another run holds it; the message says which.
        FileExistsError: If the unfinished folder is not one of this package.
        OSError: If it can't be written to.
    """
    folder, output = unfinished_folder(output_dir), Path(os.path.realpath(output_dir))
    mine: set[Path] = vars(_held).setdefault("folders", set())
    if folder in mine:
        yield folder
        return
    files = [_lock(folder, output_dir)]
    mine.add(folder)
    try:
        if fcntl is not None:
            files.append(os.open(output if output.is_dir() else folder, os.O_RDONLY))
            _lock_folder(files[-1], output_dir)
        settle(folder, output)
        if not is_streamed(folder):
            empty(folder)
        remove_offloaded(folder)
        if _is_lock(output / LOCK) and (output / "config.json").exists():  # it was killed after the rename
            shutil.rmtree(output / FOLDER, ignore_errors=True)
        yield folder
    finally:
        mine.remove(folder)
        try:
            if is_at(folder / LOCK, files[0]):  # otherwise it became the output
                with suppress(OSError):  # then the next run does it
                    settle(folder, output)
                    if not is_streamed(folder):
                        empty(folder)
                if all_names(folder) == [LOCK]:
                    shutil.rmtree(folder)
        finally:
            for file in files:
                os.close(file)


@contextmanager
def locked(lock: Path, shown: str) -> Iterator[None]:
    """Be the only one who holds a lock, a file that goes afterwards.

    Raises:
        BlockingIOError: If another run holds it; the message says which.
    """
    while (file := _take(lock, shown)) is None:
        pass
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(file)


def lock_file(path: Path, shown: str, *, wait: bool = False) -> int | None:
    """Open a file, made if it is not there, and lock it; `None` if another process took it away in the meantime.

    Raises:
        BlockingIOError: If another process holds it, unless `wait`.
        OSError: If it can't be opened.
    """
    file = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
    try:
        if fcntl is None:
            raise OSError(errno.ENOSYS, "there are none on this system")
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        os.close(file)
        raise
    except OSError as error:
        warnings.warn(f"{shown} can't be locked ({error.strerror}): don't start two runs into it.", stacklevel=4)
    if is_at(path, file):
        return file
    os.close(file)
    return None


def is_at(path: Path, file: int) -> bool:
    """Whether an open file is the one of a name."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file))
    except FileNotFoundError:
        return False


def _lock(folder: Path, output_dir: Path) -> int:
    """Make the unfinished folder and lock it; returns the file that keeps the lock as long as it is open."""
    shown, lock = f"output_dir={str(output_dir)!r}", folder / LOCK
    for attempt in range(100):
        try:
            if folder.is_symlink() or not _is_ours(folder):
                raise FileExistsError
            lock.parent.mkdir(parents=True, exist_ok=True)
            if output_dir.is_dir():
                tempfile.TemporaryFile(dir=output_dir).close()
            file = _take(lock, shown)
        except FileNotFoundError:
            continue  # its last holder is just removing it
        except FileExistsError as error:
            if attempt < 5:  # its last holder may just be removing it, or the next one making it
                time.sleep(0.02)
                continue
            raise FileExistsError(
                f"{str(folder)!r} is in the way and no unfinished run's: move it away, or pass another output."
            ) from error
        except BlockingIOError:
            raise
        except OSError as error:
            for made in (lock.parent, folder):
                with suppress(OSError):  # what is in them stays
                    made.rmdir()
            raise OSError(
                error.errno,
                f"{shown} can't be written to ({error.strerror}), nothing was done: pass another folder, or make this "
                "one writable",
                error.filename,
            ) from error
        if file is not None:
            return file
    raise OSError(errno.EAGAIN, f"{shown} is written by others again and again", str(folder))


def _take(lock: Path, shown: str) -> int | None:
    """Lock a file as `lock_file` does, and write into it who holds it; if another does, the error says which."""
    try:
        file = lock_file(lock, shown)
    except BlockingIOError as error:
        holder = _text(lock) or "another process"
        raise BlockingIOError(
            f"{shown} is being written by {holder}: wait until it has ended, or pass another folder."
        ) from error
    if file is not None:
        text = f"{_LOCKED}{os.getpid()} on {socket.gethostname()}".encode()
        try:
            os.ftruncate(file, os.pwrite(file, text, 0))  # in this order: it is never empty again
        except OSError:  # a full disk
            if not _text(lock):
                lock.unlink()
            os.close(file)
            raise
    return file


def _lock_folder(file: int, output_dir: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise BlockingIOError(
            f"output_dir={str(output_dir)!r} is being written by another run, perhaps under another name of the "
            "folder: wait until it has ended, or pass another folder."
        ) from error
    except OSError:
        pass  # a network file system: see locked_output


def _is_lock(lock: Path) -> bool:
    """Whether there is a lock of this package, and not somebody's file of that name."""
    return lock.is_file() and _text(lock).startswith(_LOCKED)


def _text(lock: Path) -> str:
    try:
        return lock.read_bytes()[:1000].decode(errors="replace")
    except FileNotFoundError:
        return ""


def _is_ours(folder: Path) -> bool:
    """Whether a folder is none, without files but a new lock, or an unfinished one of this package."""
    lock = folder / LOCK
    return _is_lock(lock) or is_streamed(folder) or not (folder.is_dir() and {*all_names(folder)} - {LOCK})
