"""A process that is killed while it works on files, played in this process."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

_CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.mkdir", "os.chmod", "shutil.rmtree"}
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


def _watch(event: str, arguments: tuple) -> None:
    if _left and event in _CHANGES:
        if not _left[0]:
            raise Killed(event)
        _left[0] -= 1


sys.addaudithook(_watch)
