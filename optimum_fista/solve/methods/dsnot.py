"""DSnoT: dynamic sparse no training, swaps in Wanda's mask (arXiv 2310.08915).

All rows swap one weight each at the same time; weights that a pattern keeps together are swapped together.

A `LayerProblem` has the dense weights `W` [out, in] of one linear operator, and statistics of the inputs that
calibration tokens give it, such as their Gram matrix. A `SparsityPattern` says how many weights stay, and which of them
compete.

With input means `mu` and variances `v`, the error of a row is `e = sum over pruned w_j mu_j`. A cycle grows
the pruned weight with the largest `sign(e) w_i mu_i / v_i` and prunes, of the kept weights whose removal
moves e towards zero, the one with the smallest Wanda score (eqs. 3-5; n:m: in the same group). Weights that the
pattern keeps together (pairs) are swapped together. A row stops when `|e|` is below `threshold`, or no swap shrinks
it.
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
    reported_error,
)
from optimum_fista.solve.pattern import SparsityPattern
from optimum_fista.solve.problem import LayerProblem


@register
@dataclass(frozen=True)
class Dsnot(PruningMethod):
    """Swap weights in Wanda's mask so that the expected output error of every row shrinks; no weight changes.

    The docstring of the module says how.
    """

    # Swaps in a row at most.
    max_cycles: int = 50
    # Of the error of a row, below which the row stops.
    threshold: float = 0.1
    name: ClassVar[str] = "dsnot"
    defaults: ClassVar[MethodDefaults] = MethodDefaults(scope="row")
    memory_factors: ClassVar[MemoryFactors | None] = MemoryFactors(
        gram_matrices=0.8, weight_matrices=3.7
    )
    takes_columns: ClassVar[bool] = False  # it swaps within rows

    def prune(self, problem: LayerProblem, pattern: SparsityPattern) -> PrunedOperator:
        """Prune one operator to `pattern`: returns new weights with their mask; `problem` stays as it is.

        The weights that stay keep their values.
        """
        self.require_pattern(pattern)
        statistics = problem.statistics
        scores = problem.weight * statistics.diagonal.sqrt()  # Wanda's
        mask = pattern.mask(scores)
        mean = statistics.mean
        mean_square = statistics.diagonal / max(1, statistics.num_tokens)
        variance = (mean_square - mean.square()).clamp_min(1e-12)  # not 0, because it divides
        # Weights of nearly dead inputs would grow first: their variance, a divisor, is next to nothing.
        live = statistics.live

        def sum_groups(matrix: Tensor) -> Tensor:
            """Sum a matrix [out, in] over the weights of each group of `pattern`: [out, groups].

            If each weight is a group, `matrix` itself is returned.
            """
            if pattern.width == 1:
                return matrix
            return matrix.unflatten(1, (-1, pattern.width)).sum(-1)

        # The first weight of a group speaks for all of them.
        mask_of_groups = mask[:, :: pattern.width].contiguous()
        inputs_that_compete = mask.shape[1] if pattern.span is None else pattern.span
        # Contributions to the error add up over a group, and so do the squares of Wanda's scores. `_swap` changes
        # `mask_of_groups`. The scores are not needed after it, so they are overwritten.
        cycles = self._swap(
            scores=sum_groups(scores.square_()).sqrt_(),
            growth=sum_groups(problem.weight * (mean / variance * live)),
            contribution=sum_groups(problem.weight * mean),
            live=live.view(-1, pattern.width).all(1),  # [in] -> [groups]
            mask=mask_of_groups,
            groups_in_contest=inputs_that_compete // pattern.width,
        )

        mask = mask_of_groups.repeat_interleave(pattern.width, dim=1)
        weight = problem.weight * mask
        return PrunedOperator(weight, mask, reported_error(problem, weight), iterations=cycles)

    def _swap(
        self,
        *,
        scores: Tensor,
        growth: Tensor,
        contribution: Tensor,
        live: Tensor,
        mask: Tensor,
        groups_in_contest: int,
    ) -> int:
        """Swap in `mask` [out, groups], in place, until no row moves; returns the cycles in which one moved.

        Args:
            scores: Wanda's, [out, groups]: of the kept groups the one with the smallest is pruned.
            growth: `w_i mu_i / v_i` [out, groups]: of the pruned groups the one with the largest, times the sign of
                the error, grows.
            contribution: `w_j mu_j` [out, groups]: of a group to the error of its row, while it is pruned.
            live: Whether a group has no nearly dead input, [groups]: others never grow.
            mask: True = kept.
            groups_in_contest: Number of consecutive groups of a row that may be swapped with each other.

        The options are `self.max_cycles`, the most cycles, and `self.threshold`: a row whose error is smaller moves no
        more.
        """
        error = contribution.masked_fill(mask, 0).sum(1)  # e, [out]
        rows = torch.arange(len(error), device=error.device)
        groups = torch.arange(mask.shape[1], device=error.device)
        contest_of_group = groups // groups_in_contest
        infinity = float("inf")

        moves_in_cycle = []  # whether a row moved, on the device
        # Asking makes the host wait for a device; a cycle after the last move changes nothing.
        cycles_between_questions = 1 if error.device.type == "cpu" else 10
        for cycle in range(1, self.max_cycles + 1):
            sign = error.sign()[:, None]
            # Of each row, the pruned group to grow, and the kept group of its contest to prune.
            grown = (growth * sign).masked_fill(mask, -infinity).argmax(1)
            contest_of_grown = grown // groups_in_contest  # [out]
            in_contest_of_grown = contest_of_group == contest_of_grown[:, None]
            allowed = mask & in_contest_of_grown
            allowed &= contribution * sign < 0  # its removal moves the error towards zero
            lowest, pruned = scores.masked_fill(~allowed, infinity).min(1)

            # A grown weight leaves the sum over pruned weights, a pruned one enters it.
            error_after = error - contribution[rows, grown] + contribution[rows, pruned]
            moves = (
                (error.abs() > self.threshold)
                & torch.isfinite(lowest)  # infinite if no group is allowed
                & (error_after.abs() < error.abs())
                & live[grown]
            )
            mask[rows, grown] |= moves
            mask[rows, pruned] &= ~moves
            error = torch.where(moves, error_after, error)

            moves_in_cycle.append(moves.any())
            if cycle % cycles_between_questions == 0 and not bool(moves_in_cycle[-1]):
                break
        return int(torch.stack(moves_in_cycle).sum()) if moves_in_cycle else 0
