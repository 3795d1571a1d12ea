"""Putting a model back as it was when a run fails half-way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType

from torch import Tensor, nn

from optimum_fista.model.offload import kept_tensor, store_tensor
from optimum_fista.model.operator import LinearOperator


class Rollback:
    """Overwrites weights, and puts the old ones back on any exception.

    An interrupt (Ctrl-C) counts as one. Old weights wait in CPU memory and cost one byte for each byte of pruned
    weights; those that are offloaded to the files of a checkpoint cost nothing, because the files are not touched.
    """

    def __init__(self) -> None:
        self._undo: list[tuple[str, Callable[[], None]]] = []
        self._onloaded: dict[tuple[int, str], tuple[nn.Module, str]] = {}

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
            self._undo.append(("", store_tensor(owner, tensor, getattr(owner, tensor))))
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
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            for _, undo in reversed(self._undo):
                undo()
        self._undo.clear()
