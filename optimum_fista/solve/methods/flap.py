"""FLAP: pruning by how much inputs fluctuate, with the mean of the outputs kept (arXiv 2312.11983).

A `LayerProblem` has the dense weights `W` [out, in] of one linear operator, and statistics of the inputs that
calibration tokens give it, such as their Gram matrix. A `SparsityPattern` says how many weights stay, and which of them
compete.

With input means `mu` and variances `v`, weight ij is scored `W_ij^2 v_j`, and a column by the sum of its scores
(FLAP's metric WIFV). The removed weights add `b = W_removed mu` to the outputs on average. FLAP stores `b` as a
bias, but most models have no place for it. Here the kept weights compensate for it, in proportion to `mu / v`. This
minimizes `|| D mu - b ||^2 + sum_j D_:j^2 v_j`, the expected squared error of the change `D` of the weights if
inputs are uncorrelated:

    D_ij = b_i (mu_j / v_j) / (1 + sum_k mu_k^2 / v_k),   j and k kept in row i.
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
class Flap(PruningMethod):
    """Remove the inputs that stay near their mean, because a constant can take their place.

    The docstring of the module says how.
    """

    name: ClassVar[str] = "flap"
    defaults: ClassVar[MethodDefaults] = MethodDefaults(error_correction="none")
    memory_factors: ClassVar[MemoryFactors | None] = MemoryFactors(
        gram_matrices=0.2, weight_matrices=1.3, row_blocks=2.6
    )

    def prune(self, problem: LayerProblem, pattern: SparsityPattern) -> PrunedOperator:
        """Prune one operator to `pattern`: returns new weights with their mask; `problem` stays as it is.

        The problem's target is ignored: FLAP's target is `W X*`. Symbols are those of the module. `problem.statistics`
        has the means of the inputs over the calibration tokens (`mean`), and the sums of their squares (`diagonal`).
        Inputs with hardly any energy are nearly dead, the others `live`.
        """
        statistics = problem.statistics
        mean = statistics.mean  # mu, [in]
        mean_square = statistics.diagonal / max(1, statistics.num_tokens)
        # Of an input that is constant, rounding would leave a variance of either sign.
        variance = (mean_square - mean.square()).clamp_min(1e-6 * mean_square)  # v, [in]
        mask = pattern.mask(problem.weight * variance.sqrt())
        weight = problem.weight * mask
        missing = (problem.weight - weight) @ mean  # b, [out]
        # A weight of a nearly dead input would grow to stand for others.
        share = mean / variance * statistics.live  # mu_j / v_j, zero for nearly dead inputs
        total = 1 + mask.to(mean.dtype) @ (share * mean)  # 1 + sum_k mu_k^2 / v_k, by rows
        weight.addcmul_((missing / total)[:, None] * mask, share)  # W + D
        return PrunedOperator(weight, mask, reported_error(problem, weight))
