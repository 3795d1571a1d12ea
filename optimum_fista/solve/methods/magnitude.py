"""Magnitude pruning: the smallest weights are removed.

A `LayerProblem` has the dense weights `W` [out, in] of one linear operator, and statistics of the inputs that
calibration tokens give it, such as their Gram matrix. A `SparsityPattern` says how many weights stay, and which of them
compete.
"""

from dataclasses import dataclass
from typing import ClassVar

from optimum_fista.solve.method import (
    MemoryFactors,
    MethodDefaults,
    PrunedOperator,
    PruningMethod,
    register,
    reported_error,
)
from optimum_fista.solve.pattern import SparsityPattern
from optimum_fista.solve.problem import LayerProblem


@register
@dataclass(frozen=True)
class Magnitude(PruningMethod):
    """Keep the largest `|W_ij|`; inputs are ignored, and no weight is updated."""

    name: ClassVar[str] = "magnitude"
    defaults: ClassVar[MethodDefaults] = MethodDefaults(error_correction="none")
    memory_factors: ClassVar[MemoryFactors | None] = MemoryFactors(
        gram_matrices=0.2, weight_matrices=1.3, row_blocks=2.6
    )
    updates_weights: ClassVar[bool] = False

    def prune(self, problem: LayerProblem, pattern: SparsityPattern) -> PrunedOperator:
        """Prune one operator to `pattern`: returns new weights with their mask; `problem` stays as it is."""
        # The pattern keeps the largest absolute values.
        mask = pattern.mask(problem.weight)
        weight = problem.weight * mask
        return PrunedOperator(weight, mask, reported_error(problem, weight))
