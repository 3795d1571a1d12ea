"""Putting a model back as it was when a run fails half-way."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from types import FrameType, TracebackType
from typing import Any

from torch import Tensor, nn

from optimum_fista.model.offload import alignment_hooks, kept_tensor, store_tensor
from optimum_fista.model.operator import LinearOperator


class Rollback:
    """Overwrites weights, and on any exception puts the model back as it was.

    An interrupt (Ctrl-C) counts as one. It may come at any moment, also while a context takes off what it has
    installed on modules, and again after another. So all that modules, the hooks of Accelerate and the configuration
    hold is put back, and interrupts wait until that is done.

    Old weights wait in CPU memory and cost one byte for each byte of pruned weights; those that are offloaded to the
    files of a checkpoint cost nothing, because the files are not touched.

    Args:
        model: The model.
        contexts: What the run works in; they are left without an interruption.
    """

    def __init__(self, model: nn.Module, *contexts: AbstractContextManager[Any]) -> None:
        self._model = model
        self._contexts = contexts
        self._entered = ExitStack()
        self._undo: list[tuple[str, Callable[[], None]]] = []
        self._onloaded: dict[tuple[int, str], tuple[nn.Module, str]] = {}
        self._interrupt: Callable[[int, FrameType | None], Any] = signal.default_int_handler
        self._waits = False

    def write(self, operator: LinearOperator, weight: Tensor) -> None:
        """Overwrite the weight of an operator by `weight` [out, in]; `settle` follows where it is offloaded."""
        if operator.is_offloaded:
            self._onloaded[id(operator.owner), operator.tensor] = (operator.owner, operator.tensor)
        else:
            original = operator.parameter.detach().to("cpu", copy=True)

            def restore() -> None:
                operator.parameter.data.copy_(original)

            self._undo.append((operator.name, restore))
        operator.write(weight)

    def settle(self) -> None:
        """Overwrite what was written where Accelerate keeps it, while it is still onloaded."""
        for owner, tensor in self._onloaded.values():
            store_tensor(owner, tensor, getattr(owner, tensor), lambda restore: self._undo.append(("", restore)))
        self._onloaded.clear()

    def forget(self) -> None:
        """Let go of the old weights, which are not to be put back any more."""
        self._undo.clear()
        self._onloaded.clear()

    def undo(self, operators: Sequence[LinearOperator]) -> None:
        """Put back the weights of some operators of a decoder layer that is not settled."""
        names = {operator.name for operator in operators}
        for name, undo in reversed(self._undo):
            if name in names:
                undo()
        self._undo = [(name, undo) for name, undo in self._undo if name not in names]
        for operator in operators:
            if operator.is_offloaded:
                kept = kept_tensor(operator.owner, operator.tensor)
                operator.parameter.data.copy_(operator.select(kept))

    def __enter__(self) -> Rollback:
        self._held = _held(self._model)
        self._gradients = [(p, p.requires_grad, p.grad) for p in self._model.parameters()]
        handler = signal.getsignal(signal.SIGINT)
        if callable(handler) and threading.current_thread() is threading.main_thread():
            self._interrupt = handler
            signal.signal(signal.SIGINT, self._on_interrupt)
        try:
            for context in self._contexts:
                self._entered.enter_context(context)
            if self._waits:
                raise KeyboardInterrupt
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        with ExitStack() as steps:  # from the last to the first, also after one that fails
            steps.callback(self.forget)
            if kind is not None or self._waits:
                for _, undo in self._undo:
                    steps.callback(undo)
                steps.callback(self._put_back)
            steps.callback(self._entered.close)
        if signal.getsignal(signal.SIGINT) == self._on_interrupt:
            signal.signal(signal.SIGINT, self._interrupt)
        if self._waits and not isinstance(value, KeyboardInterrupt):
            self._interrupt(signal.SIGINT, None)

    def _put_back(self) -> None:
        for attributes, before in self._held:
            attributes.clear()
            attributes.update(before)
        for parameter, needed, gradient in self._gradients:
            parameter.grad = gradient
            if parameter.requires_grad != needed:
                parameter.requires_grad_(needed)

    def _on_interrupt(self, number: int, frame: FrameType | None) -> None:
        """Interrupt the run unless it begins or ends. Python asks for this between any two steps of any function."""
        caller = frame
        while caller is not None and caller.f_code not in _UNINTERRUPTED:
            caller = caller.f_back
        self._waits = caller is not None
        if not self._waits:
            self._interrupt(number, frame)


_UNINTERRUPTED = (Rollback.__enter__.__code__, Rollback.__exit__.__code__)


def _held(model: nn.Module) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """The dictionaries in which modules, hooks of Accelerate and the configuration keep what they hold, with copies."""
    modules = list(model.modules())
    holders = [*modules, *(hook for module in modules for hook in alignment_hooks(module))]
    attributes = [vars(holder) for holder in [*holders, *([model.config] if hasattr(model, "config") else [])]]
    inner = [value for found in attributes for value in found.values() if isinstance(value, dict)]
    return [(found, dict(found)) for found in [*attributes, *inner]]
