"""The adaptive penalty: bisection on the share of the error that rounding makes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from optimum_fista.solve.method import PrunedOperator
from optimum_fista.solve.pattern import SparsityPattern
from optimum_fista.solve.problem import LayerProblem
from optimum_fista.solve.proximal_gradient import FistaSolution


@dataclass
class PenaltySearch:
    """State and result of the penalty search.

    Attributes:
        weight: Best rounded weights so far [out, in].
        mask: Their mask [out, in], True = kept.
        error: Their `|| W* X* - W X ||_F`.
        l1_penalty: Penalty that gave them, `None` while no trial has improved on the start.
        converged: Whether FISTA converged in that trial.
        iterations: FISTA steps over all trials.
    """

    weight: Tensor
    mask: Tensor
    error: float
    l1_penalty: float | None = None
    converged: bool = True
    iterations: int = 0


def search_penalty(
    problem: LayerProblem,
    pattern: SparsityPattern,
    start: Tensor,
    rounded: PrunedOperator,
    solve: Callable[[Tensor, float], FistaSolution],
    *,
    rounding_share: float = 0.3,
    patience: int = 3,
    penalty_range: tuple[float, float] = (1e-6, 1.0),
    max_trials: int = 30,
) -> PenaltySearch:
    """Find the penalty by bisection (FISTAPruner, arXiv 2408.03728, Algorithm 1).

    A trial solves the LASSO from the best weights so far, rounds the solution to the pattern and compares
    `E_round = || (W_round - W_fista) X* ||` with `E_total = || W_round X* - W X ||`: if their ratio exceeds
    `rounding_share`, rounding dominates and the penalty rises, otherwise it falls. The interval, which the
    paper does not give, is `penalty_range * max |C|` on a logarithmic scale (`SparsityPattern.dual_norm`): at its upper
    end the solution of the LASSO is zero.

    Args:
        problem: The layer problem.
        pattern: The sparsity pattern.
        start: Warm start [out, in] of the first trial; it need not be in the pattern.
        rounded: Weights in the pattern that the search has to improve on.
        solve: `(start, l1_penalty) -> FistaSolution`.
        rounding_share: The paper's xi.
        patience: Stop after this many trials without improvement, the paper's T.
        penalty_range: Ends of the interval as fractions of `max |C|`, or of the pattern's `dual_norm(C)`.
        max_trials: At most this many trials.

    Returns:
        The best weights found and how they were found.
    """
    best = PenaltySearch(rounded.weight, rounded.mask, math.sqrt(problem.squared_error(rounded.weight)))
    standing = problem.statistics.energy_ratios.sqrt()  # below 1 for nearly dead inputs alone
    critical = pattern.dual_norm(problem.target)
    # C = 0: the solution is zero at every penalty.
    if critical == 0.0:
        return best
    low, high = (math.log(end * critical) for end in penalty_range)
    failures = 0
    for _ in range(max_trials):
        # The geometric middle of the interval.
        l1_penalty = math.exp((low + high) / 2)
        solution = solve(start, l1_penalty)
        mask = pattern.mask_of(solution.weight * standing)
        weight = solution.weight * mask
        error = math.sqrt(problem.squared_error(weight))
        best.iterations += solution.iterations
        if error < best.error:
            start = best.weight = weight
            best.mask, best.error = mask, error
            best.l1_penalty, best.converged, failures = l1_penalty, solution.converged, 0
        else:
            failures += 1
        if failures >= patience:
            break
        # E_round > xi E_total: rounding dominates, and a larger penalty makes more weights zero before it.
        if problem.seminorm(weight - solution.weight) > rounding_share * error:
            low = math.log(l1_penalty)
        else:
            high = math.log(l1_penalty)
    return best
