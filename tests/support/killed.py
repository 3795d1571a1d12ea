"""A process that is killed, or interrupted, while it works on files, played in this process."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from optimum_fista.prune.journal import Journal

_CHANGES = {
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.link",
    "os.symlink",
    "os.mkdir",
    "os.chmod",
    "shutil.rmtree",
}
_left: list[int] = []


class Killed(BaseException):
    """The process is gone: nothing it would still do to files happens."""


@contextmanager
def killed_at(step: int) -> Iterator[None]:
    """Let `step` changes of names, folders and modes happen; the next one, and all after it, raise `Killed`."""
    _left[:] = [step]
    try:
        yield
    finally:
        _left.clear()


@contextmanager
def killed_at_write(number: int) -> Iterator[None]:
    """Raise `Killed` in place of the `number`-th rename of a file that is whole, from 1, and of all after it."""
    replace = Path.replace
    done = []

    def counted(self: Path, target: Path) -> Path:
        done.append(target)
        if len(done) >= number:
            raise Killed(str(target))
        return replace(self, target)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Path, "replace", counted)
        yield


@contextmanager
def interrupted_after(layer: int) -> Iterator[None]:
    """Press Ctrl-C once a run from files has finished this decoder layer."""
    keep = Journal.keep_layer

    def keep_and_stop(self: Journal, index: int, *arguments: Any) -> None:
        keep(self, index, *arguments)
        if index == layer:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Journal, "keep_layer", keep_and_stop)
        yield


def _watch(event: str, arguments: tuple) -> None:
    if _left and event in _CHANGES:
        if not _left[0]:
            raise Killed(event)
        _left[0] -= 1


sys.addaudithook(_watch)
