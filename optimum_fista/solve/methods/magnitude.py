"""Magnitude pruning."""

from dataclasses import dataclass
from typing import ClassVar

from optimum_fista.solve.method import (
    MemoryFactors,
    MethodDefaults,
    PrunedOperator,
    PruningMethod,
    register,
)
from optimum_fista.solve.pattern import SparsityPattern
from optimum_fista.solve.problem import LayerProblem


@register
@dataclass(frozen=True)
class Magnitude(PruningMethod):
    """Keep the largest `|W_ij|`; inputs are ignored, and no weight is updated."""

    name: ClassVar[str] = "magnitude"
    defaults: ClassVar[MethodDefaults] = MethodDefaults(error_correction="none")
    memory_factors: ClassVar[MemoryFactors | None] = MemoryFactors(0.2, 1.3, 2.6)
    updates_weights: ClassVar[bool] = False

    def prune(self, problem: LayerProblem, pattern: SparsityPattern) -> PrunedOperator:
        """Prune one operator to `pattern`."""
        mask = pattern.mask(problem.weight)
        weight = problem.weight * mask
        return PrunedOperator(weight, mask, problem.fit_error(weight))
