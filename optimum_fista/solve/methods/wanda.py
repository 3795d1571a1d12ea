"""Wanda: pruning by weights and activations (arXiv 2306.11695).

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
class Wanda(PruningMethod):
    """Keep the largest `|W_ij| * || X_j ||_2` of every row; no weight is updated (Wanda, eq. 1)."""

    name: ClassVar[str] = "wanda"
    defaults: ClassVar[MethodDefaults] = MethodDefaults(scope="row")
    memory_factors: ClassVar[MemoryFactors | None] = MemoryFactors(
        gram_matrices=0.2, weight_matrices=1.3, row_blocks=2.6
    )
    updates_weights: ClassVar[bool] = False

    def prune(self, problem: LayerProblem, pattern: SparsityPattern) -> PrunedOperator:
        """Prune one operator to `pattern`: returns new weights with their mask; `problem` stays as it is."""
        input_norms = problem.statistics.diagonal.sqrt()  # || X_j ||_2, [in]
        # The pattern keeps the largest absolute values.
        mask = pattern.mask(problem.weight * input_norms)
        weight = problem.weight * mask
        return PrunedOperator(weight, mask, reported_error(problem, weight))
