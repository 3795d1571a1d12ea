"""Magnitude pruning."""

from dataclasses import dataclass
from typing import ClassVar

from optimum_fista.solve.method import PrunedOperator, PruningMethod, register
from optimum_fista.solve.pattern import SparsityPattern
from optimum_fista.solve.problem import LayerProblem


@register
@dataclass(frozen=True)
class Magnitude(PruningMethod):
    """Keep the largest `|W_ij|`; inputs are ignored, and no weight is updated."""

    name: ClassVar[str] = "magnitude"
    updates_weights: ClassVar[bool] = False

    def prune(self, problem: LayerProblem, pattern: SparsityPattern) -> PrunedOperator:
        """Prune one operator to `pattern`."""
        mask = pattern.mask(problem.weight)
        weight = problem.weight * mask
        return PrunedOperator(weight, mask, problem.fit_error(weight))
