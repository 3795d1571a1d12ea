"""Putting a model back as it was when a run fails half-way."""

from __future__ import annotations

from types import TracebackType

from torch import Tensor

from optimum_fista.model.operator import LinearOperator


class Rollback:
    """Remembers weights before they are overwritten, in CPU memory, and restores them on any exception.

    An interrupt (Ctrl-C) counts as one. The copies cost one byte for each byte of pruned weights.
    """

    def __init__(self) -> None:
        self._originals: list[tuple[LinearOperator, Tensor]] = []

    def remember(self, operator: LinearOperator) -> None:
        """Copy the operator's weight; call it before the first write."""
        self._originals.append((operator, operator.parameter.detach().to("cpu", copy=True)))

    def __enter__(self) -> Rollback:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            for operator, original in self._originals:
                operator.parameter.data.copy_(original)
        self._originals.clear()
