"""Errors and interrupts in the midst of a run: at its n-th operation, or at its n-th line of Python."""

import contextlib
import signal
import sys
from opcode import opname
from types import FrameType
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class RaiseAt(TorchDispatchMode):
    """As a context: counts operations that allocate a tensor of `least` bytes, and raises an error in place of the
    `number`-th, from 1; of none if it is 0.
    """

    def __init__(
        self, number: int = 0, error: BaseException | None = None, least: int = 1024
    ) -> None:
        super().__init__()
        self.count = 0
        self._number = number
        self._error = error
        self._least = least

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        given = _storages((args, kwargs))
        output = function(*args, **(kwargs or {}))
        self.count += any(
            size >= self._least for key, size in _storages(output).items() if key not in given
        )
        if self._error is not None and self.count == self._number:
            error, self._error = self._error, None
            raise error
        return output


class InterruptAt:
    """As a context: counts the lines run of the package and of contextlib, and presses Ctrl-C at some of them, from 1.

    The signals are real ones, so that they wait if the run has them wait.
    """

    def __init__(self, *lines: int) -> None:
        self.count = 0
        self._lines = lines

    def __enter__(self) -> "InterruptAt":
        sys.settrace(self._call)
        return self

    def __exit__(self, *error: object) -> None:
        sys.setprofile(None)
        sys.settrace(None)

    def _call(self, frame: FrameType, event: str, _: Any) -> Any:
        file = frame.f_code.co_filename
        return self._line if "/optimum_fista/" in file or file == contextlib.__file__ else None

    def _line(self, frame: FrameType, event: str, _: Any) -> Any:
        # After an error a `with` goes to its end without a look at signals, which a trace function can't know.
        if opname[frame.f_code.co_code[frame.f_lasti]] in ("PUSH_EXC_INFO", "WITH_EXCEPT_START"):
            return self._line
        self.count += 1
        if self.count in self._lines:
            sys.setprofile(self._resume)
            signal.raise_signal(signal.SIGINT)
            sys.setprofile(None)  # it waits
        return self._line

    def _resume(self, frame: FrameType | None, event: str, _: Any) -> None:
        """Count on: Python has taken the trace function off, because it raised."""
        sys.setprofile(None)
        sys.settrace(self._call)
        while frame is not None:
            frame.f_trace = self._call(frame, event, None)
            frame = frame.f_back


def _storages(values: Any) -> dict[int, int]:
    tensors = [
        value for value in tree_leaves(values) if isinstance(value, Tensor) and not value.is_meta
    ]
    storages = [tensor.untyped_storage() for tensor in tensors]
    return {storage._cdata: storage.nbytes() for storage in storages}
