"""FISTAPruner: the convex method, and its search of the penalty (arXiv 2408.03728).

A *trial* solves a LASSO (`proximal_gradient.fista`): least squares with a penalty on the absolute weights, which makes
some of them zero. Its solution is *rounded*: the pattern's mask is applied to it. A larger penalty makes more zeros.
The problem (`LayerProblem`) has the dense weights `W` [out, in] of one linear operator, the Gram matrix `G` of its
inputs and the target `C`; the pattern (`SparsityPattern`) says how many weights stay, and which of them compete.

Only its defaults differ from the paper: the kept weights are refitted after the search, which improves the result most
after the warm start (docs/solver.md), SparseGPT is the warm start of every model, and there are four trials. The recipe
`paper` has the published settings.
"""

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, get_args

from torch import Tensor

from optimum_fista.solve.method import (
    MemoryFactors,
    MethodDefaults,
    PrunedOperator,
    PruningMethod,
    register,
    reported_error,
)
from optimum_fista.solve.methods.sparsegpt import SparseGPT
from optimum_fista.solve.methods.wanda import Wanda
from optimum_fista.solve.pattern import SparsityPattern
from optimum_fista.solve.problem import LayerProblem
from optimum_fista.solve.proximal_gradient import fista
from optimum_fista.solve.refit import refit

WarmStart = Literal["wanda", "sparsegpt"]


@dataclass
class PenaltySearch:
    """State and result of the penalty search: the best rounded weights [out, in] so far, and how they were found."""

    weight: Tensor
    mask: Tensor
    error: float  # || W* X* - Y ||_F
    l1_penalty: float | None = None  # None while no trial has improved on the start
    converged: bool = True  # whether FISTA converged in that trial
    iterations: int = 0  # FISTA steps over all trials


@register
@dataclass(frozen=True)
class Fista(PruningMethod):
    """LASSO by FISTA, rounding, bisection of the penalty (Algorithm 1), and a refit of the kept weights."""

    # The method whose pruned weights the first trial starts from. Wanda gives every row the same number of zeros, as
    # its authors do, for any scope of the pattern; the trials then move zeros between rows.
    warm_start: WarmStart = "sparsegpt"
    # FISTA steps a trial, the paper's K.
    max_iterations: int = 20
    # Relative change of the iterates at which FISTA stops.
    tolerance: float = 1e-6
    # Trials without improvement, the paper's T.
    patience: int = 3
    # The paper names no limit.
    max_trials: int = 4
    # Share of the rounding error above which the penalty rises, the paper's xi.
    rounding_share: float = 0.3
    # Conjugate-gradient steps on the final mask; 0 (as in the paper) refits nothing.
    refit_iterations: int = 20
    name: ClassVar[str] = "fista"
    defaults: ClassVar[MethodDefaults] = MethodDefaults(error_correction="intra")  # the paper's
    memory_factors: ClassVar[MemoryFactors | None] = MemoryFactors(
        gram_matrices=1.6, weight_matrices=5.5, row_blocks=0.3
    )
    takes_columns: ClassVar[bool] = False  # the l1 norm makes single weights zero

    def __post_init__(self) -> None:
        """Refuse options that make no sense (ValueError); the fields of `self` are the options.

        They are numbers of steps and trials, a `tolerance` and a share (`rounding_share`) of norms, and the name of the
        method of the warm start.
        """
        if self.warm_start not in get_args(WarmStart):
            raise ValueError(
                f"warm_start={self.warm_start!r}: pass one of {', '.join(get_args(WarmStart))}."
            )
        least_values = {"max_iterations": 1, "patience": 1, "max_trials": 1, "refit_iterations": 0}
        self.require_at_least(least_values)
        if self.tolerance < 0:
            raise ValueError(f"tolerance={self.tolerance!r}: pass a relative change of at least 0.")
        if not 0 < self.rounding_share < 1:
            raise ValueError(
                f"rounding_share={self.rounding_share!r}: pass a share between 0 and 1."
            )

    def prune(self, problem: LayerProblem, pattern: SparsityPattern) -> PrunedOperator:
        """Prune one operator to `pattern`: returns new weights with their mask.

        The steps are the warm start, the search of the penalty, and the refit. No tensor of `problem` changes; its
        statistics keep what is computed from them (`decoupled`, `lipschitz`). The fields of `self` are the options.
        """
        self.require_pattern(pattern)
        pattern.require_shape(problem.weight.shape, problem.name)
        rounded = self._rounded_start(problem, pattern)
        problem = problem.decoupled()
        best = self.search_penalty(problem, pattern, rounded)
        weight, steps = refit(
            problem.gram,
            problem.target,
            best.weight,
            best.mask,
            max_iterations=self.refit_iterations,
            singular=True,  # there may be fewer tokens than inputs
        )

        messages = [rounded.message] if rounded.message else []
        if not best.converged:
            messages.append(f"FISTA stopped at max_iterations={self.max_iterations}: try more")
        return PrunedOperator(
            weight=weight,
            mask=best.mask,
            fit_error=reported_error(problem, weight),
            iterations=best.iterations + int(steps),
            l1_penalty=best.l1_penalty,
            converged=best.converged and rounded.converged,
            message="; ".join(messages),
        )

    def search_penalty(
        self, problem: LayerProblem, pattern: SparsityPattern, rounded: PrunedOperator
    ) -> PenaltySearch:
        """Find the penalty by bisection (Algorithm 1), and weights in the pattern that are better than `rounded`.

        A trial solves the LASSO from the best weights so far, rounds the solution to the pattern and compares
        `E_round = || (W_round - W_fista) X* ||` with `E_total = || W_round X* - Y ||`: if their ratio exceeds
        `rounding_share`, rounding dominates and the penalty rises, otherwise it falls. The interval, which the
        paper does not give, is `[1e-6, 1] max |C|` on a logarithmic scale.

        It ends after `self.max_trials` trials, or after `self.patience` trials in a row without improvement. A trial
        has at most `self.max_iterations` steps, and ends before if a step changes the weights by less than
        `self.tolerance`, a share of their norm. `problem` is decoupled (`LayerProblem.decoupled`), and `rounded` is the
        warm start in the pattern. The tensors of both stay as they are; `problem.statistics` keeps its Lipschitz
        constant, which is computed once.
        """
        best = PenaltySearch(
            weight=rounded.weight,
            mask=rounded.mask,
            error=math.sqrt(problem.squared_error(rounded.weight)),
        )
        # Weights of nearly dead inputs go first: this is 1 for all other inputs.
        score_factors = problem.statistics.energy_ratios.sqrt()
        # From this penalty on the solution of the LASSO is zero.
        critical = float(problem.target.abs().max())
        if critical == 0.0:  # C = 0: it is zero at every penalty
            return best

        low = math.log(1e-6 * critical)
        high = math.log(critical)
        failures = 0
        for _ in range(self.max_trials):
            l1_penalty = math.exp((low + high) / 2)  # the geometric middle of the interval
            solution = fista(
                gram=problem.gram,
                target=problem.target,
                start=best.weight,
                l1_penalty=l1_penalty,
                lipschitz=problem.statistics.lipschitz,
                max_iterations=self.max_iterations,
                tolerance=self.tolerance,
            )
            mask = pattern.mask(solution.weight * score_factors)
            weight = solution.weight * mask  # W_round
            error = math.sqrt(problem.squared_error(weight))  # E_total
            best.iterations += solution.iterations
            if error < best.error:
                best.weight = weight
                best.mask = mask
                best.error = error
                best.l1_penalty = l1_penalty
                best.converged = solution.converged
                failures = 0
            else:
                failures += 1
            if failures >= self.patience:
                break

            # E_round > xi E_total: rounding dominates, and a larger penalty makes more weights zero before it.
            if problem.seminorm(weight - solution.weight) > self.rounding_share * error:
                low = math.log(l1_penalty)
            else:
                high = math.log(l1_penalty)
        return best

    def _rounded_start(self, problem: LayerProblem, pattern: SparsityPattern) -> PrunedOperator:
        """Prune by the method of the warm start (`self.warm_start`), as its paper counts zeros; returns its result.

        SparseGPT takes `pattern` as it is. Wanda has the same number of zeros in each row. No tensor of `problem`
        changes.
        """
        if self.warm_start == "sparsegpt":
            return SparseGPT().prune(problem, pattern)
        by_rows = replace(pattern, scope="row")
        rounded = Wanda().prune(problem, by_rows)
        shape = rounded.mask.shape
        if by_rows.num_kept(shape) == pattern.num_kept(shape):
            return rounded
        # The number of zeros was rounded in each row, so it is not that of the pattern: choose once more.
        mask = pattern.mask(rounded.weight)
        return replace(rounded, weight=rounded.weight * mask, mask=mask)
