"""DSnoT: dynamic sparse no training, swaps in Wanda's mask (arXiv 2310.08915).

All rows swap one weight each at the same time; weights that a pattern keeps together are swapped together.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

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
class Dsnot(PruningMethod):
    """Swap weights in Wanda's mask so that the expected output error of every row shrinks; no weight changes.

    With input means `mu` and variances `v`, the error of a row is `e = sum over pruned w_j mu_j`. A cycle grows
    the pruned weight with the largest `sign(e) w_i mu_i / v_i` and prunes, of the kept weights whose removal
    moves e towards zero, the one with the smallest Wanda score (eqs. 3-5; n:m: in the same group). Weights that the
    pattern keeps together (pairs) are swapped together. A row stops when `|e|` is below `threshold`, or no swap shrinks
    it.
    """

    max_cycles: int = 50  # swaps in a row at most
    threshold: float = 0.1
    name: ClassVar[str] = "dsnot"
    defaults: ClassVar[MethodDefaults] = MethodDefaults(scope="row")
    memory_factors: ClassVar[MemoryFactors | None] = MemoryFactors(0.8, 3.7)
    takes_columns: ClassVar[bool] = False  # it swaps within rows

    def prune(self, problem: LayerProblem, pattern: SparsityPattern) -> PrunedOperator:
        """Prune one operator to `pattern`."""
        self.require_pattern(pattern)
        statistics = problem.statistics
        scores = problem.weight * statistics.diagonal.sqrt()
        mask = pattern.mask(scores)
        mean = statistics.mean
        # E[x^2] - E[x]^2, kept off zero because it divides.
        variance = (statistics.diagonal / max(1, statistics.num_tokens) - mean.square()).clamp_min(
            1e-12
        )
        live = (
            statistics.energy_ratios == 1
        )  # others would grow first: their variance, a divisor, is next to nothing

        def of_groups(
            matrix: Tensor,
        ) -> Tensor:  # [out, in] -> [out, groups]; no copy if each weight is a group
            return (
                matrix if pattern.width == 1 else matrix.unflatten(1, (-1, pattern.width)).sum(-1)
            )

        kept = mask[:, :: pattern.width].contiguous()
        # Contributions to the error add up over a group, and so do the squares of Wanda's scores.
        scores = of_groups(scores.square_()).sqrt_()
        growth = of_groups(problem.weight * (mean / variance * live))
        whole = live.view(-1, pattern.width).all(1)
        group = (pattern.span or mask.shape[1]) // pattern.width
        cycles = self._swap(of_groups(problem.weight * mean), growth, whole, scores, kept, group)
        mask = kept.repeat_interleave(pattern.width, dim=1)
        weight = problem.weight * mask
        return PrunedOperator(weight, mask, problem.fit_error(weight), iterations=cycles)

    def _swap(
        self,
        contribution: Tensor,
        growth: Tensor,
        live: Tensor,
        scores: Tensor,
        mask: Tensor,
        group: int,
    ) -> int:
        """Swap in `mask` [out, groups] until no row moves; returns the number of cycles in which one moved."""
        error = contribution.masked_fill(mask, 0).sum(1)
        moved = []
        rows = torch.arange(len(error), device=error.device)
        groups = torch.arange(mask.shape[1], device=error.device) // group
        infinity = float("inf")
        look = (
            1 if error.device.type == "cpu" else 10
        )  # a cycle after the last move changes nothing
        for cycle in range(1, self.max_cycles + 1):
            sign = error.sign()[:, None]
            grown = (growth * sign).masked_fill(mask, -infinity).argmax(1)
            allowed = mask & (contribution * sign < 0) & (groups == (grown // group)[:, None])
            candidates = scores.masked_fill(~allowed, infinity)
            lowest, pruned = candidates.min(1)
            # A grown weight leaves the sum over pruned weights, a pruned one enters it.
            after = error - contribution[rows, grown] + contribution[rows, pruned]
            move = (
                (error.abs() > self.threshold)
                & torch.isfinite(lowest)
                & (after.abs() < error.abs())
                & live[grown]
            )
            mask[rows, grown] |= move
            mask[rows, pruned] &= ~move
            error = torch.where(move, after, error)
            moved.append(move.any())
            if cycle % look == 0 and not bool(moved[-1]):
                break
        return int(torch.stack(moved).sum()) if moved else 0
