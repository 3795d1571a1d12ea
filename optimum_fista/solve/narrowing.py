"""What stays of a matrix of which whole rows or columns go, while what stays is pruned."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from optimum_fista.solve.problem import LayerProblem
from optimum_fista.solve.pruned import PrunedOperator


@dataclass(frozen=True)
class Narrowing:
    """The rows or the columns of a weight that stay.

    Groups of n:m and shares of zeros are counted in what stays. The targets are still those of the whole weight, so
    that what stays compensates for the columns that go.

    Attributes:
        rows: Numbers of the rows that stay; `None`: all.
        columns: Numbers of the columns that stay; `None`: all.
        weight: Dense weights [out, columns] that they have without the other columns, refitted if the method does so.
    """

    rows: Tensor | None = None
    columns: Tensor | None = None
    weight: Tensor | None = None

    def shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        """What stays of a weight of `shape` [out, in]."""
        rows, columns = shape
        return rows if self.rows is None else len(self.rows), columns if self.columns is None else len(self.columns)

    def of_outputs(self, values: Tensor) -> Tensor:
        """The values of the outputs that stay, of one for each, [out]."""
        return values if self.rows is None else values[self.rows.to(values.device)]

    def problem(self, problem: LayerProblem) -> LayerProblem:
        """The layer problem of what stays."""
        if self.rows is not None:
            problem = problem.of_rows(self.rows)
        if self.columns is not None and self.weight is not None:
            problem = problem.of_columns(self.columns, self.weight)
        return problem

    def widened(self, pruned: PrunedOperator, shape: tuple[int, int]) -> PrunedOperator:
        """A pruned operator of what stays as one of `shape` [out, in], with zeros in all that goes."""
        weight, mask = pruned.weight, pruned.mask
        for axis, kept in enumerate((self.rows, self.columns)):
            if kept is not None:
                size = (*weight.shape[:axis], shape[axis], *weight.shape[axis + 1 :])
                weight = weight.new_zeros(size).index_copy_(axis, kept, weight)
                mask = mask.new_zeros(size).index_copy_(axis, kept, mask)
        return replace(pruned, weight=weight, mask=mask)
