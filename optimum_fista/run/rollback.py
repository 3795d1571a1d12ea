"""Putting a model back as it was when a run fails half-way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType

from torch import Tensor

from optimum_fista.model.offload import is_offloaded, kept_tensor, store_tensor
from optimum_fista.model.operator import LinearOperator


class Rollback:
    """Overwrites weights, and puts the old ones back on any exception.

    An interrupt (Ctrl-C) counts as one. Old weights wait in CPU memory and cost one byte for each byte of pruned
    weights; those that are offloaded to the files of a checkpoint cost nothing, because the files are not touched.
    """

    def __init__(self) -> None:
        self._undo: list[tuple[LinearOperator, Callable[[], None]]] = []

    def write(self, operator: LinearOperator, weight: Tensor) -> None:
        """Overwrite the weight of an operator by `weight` [out, in], where it is and where Accelerate keeps it."""
        if is_offloaded(operator.module):
            stored = weight.T if operator.transposed else weight
            self._undo.append((operator, store_tensor(operator.module, "weight", stored)))
        else:
            original = operator.parameter.detach().to("cpu", copy=True)

            def restore() -> None:
                operator.parameter.data.copy_(original)

            self._undo.append((operator, restore))
        operator.write(weight)

    def undo(self, operators: Sequence[LinearOperator]) -> None:
        """Put back the weights of some operators, where Accelerate keeps them and where they are onloaded now."""
        names = {operator.name for operator in operators}
        for operator, undo in reversed(self._undo):
            if operator.name in names:
                undo()
                if is_offloaded(operator.module):
                    operator.parameter.data.copy_(kept_tensor(operator.module, "weight"))
        self._undo = [(operator, undo) for operator, undo in self._undo if operator.name not in names]

    def __enter__(self) -> Rollback:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            for _, undo in reversed(self._undo):
                undo()
        self._undo.clear()
