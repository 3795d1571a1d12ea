"""ALPS: l0-constrained ADMM with a growing penalty (arXiv 2406.07831).

One eigenvalue decomposition makes an inverse for every `rho`, as in the paper; `obs_admm` takes a few fixed ones. The
*support* are the weights that the mask keeps.

A `LayerProblem` has the dense weights `W` [out, in] of one linear operator, and statistics of the inputs that
calibration tokens give it, such as their Gram matrix. A `SparsityPattern` says how many weights stay, and which of them
compete.

The Gram matrix and the target are damped alike. Every `period` iterations `rho` grows by 1.3, 1.2 or 1.1 as
the support changed by more than 10%, more than 0.5%, or at all; it stops when the support stays the same.
Then at most `refit_iterations` conjugate-gradient steps on the support (Algorithm 2).

Two things differ from Algorithm 1. A change is counted once here, by the weights that leave the support; the authors
count those that join it, too, so their limits are half as large. And the first period only sets the support, where the
authors compare it with that of the dense weights.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from optimum_fista.solve.method import (
    MemoryFactors,
    PrunedOperator,
    PruningMethod,
    register,
    reported_error,
    require_damping,
)
from optimum_fista.solve.methods.admm import SplitState, unit_diagonal
from optimum_fista.solve.pattern import SparsityPattern
from optimum_fista.solve.problem import LayerProblem
from optimum_fista.solve.refit import refit


@register
@dataclass(frozen=True)
class Alps(PruningMethod):
    """ADMM in coordinates of unit Gram diagonal, `rho` growing as the support settles (Algorithm 1).

    The docstring of the module says how.
    """

    # Fraction of the mean Gram diagonal added to the diagonal.
    damping: float = 0.01
    first_rho: float = 0.1
    # Iterations between changes of `rho`.
    period: int = 3
    max_iterations: int = 300
    refit_iterations: int = 10
    name: ClassVar[str] = "alps"
    memory_factors: ClassVar[MemoryFactors | None] = MemoryFactors(
        gram_matrices=4.4, weight_matrices=4.2
    )

    def __post_init__(self) -> None:
        """Refuse options that make no sense (ValueError); the fields of `self` are the options."""
        self.require_at_least({"period": 1, "max_iterations": 1, "refit_iterations": 0})
        require_damping(self.damping)
        if not self.first_rho > 0:
            raise ValueError(f"first_rho={self.first_rho!r}: pass a positive number.")

    def prune(self, problem: LayerProblem, pattern: SparsityPattern) -> PrunedOperator:
        """Prune one operator to `pattern`: returns new weights with their mask.

        Nearly dead inputs (with hardly any energy) are treated as uncorrelated with all others. The Gram matrix of this
        is computed once and cached in `problem.statistics` (`LayerProblem.decoupled`); no tensor of `problem` changes.

        The fields of `self` are the options of the method, such as `damping` (a share of the mean of the diagonal of
        the Gram matrix) and `period` (iterations between changes of `rho`); the module's docstring has the steps.
        """
        problem = problem.decoupled()
        gram, target, scale = unit_diagonal(problem, self.damping)
        # one decomposition gives (G + rho I)^-1 for every rho
        values, vectors = torch.linalg.eigh(gram)
        values.clamp_min_(0)  # rounding makes zero eigenvalues negative

        # ADMM starts from the dense weights in scaled coordinates, and asks for C by blocks of rows. It takes a stack,
        # [operators, out, in], here of one operator.
        point = problem.weight / scale
        state = SplitState(target=lambda rows: target[None, rows], point=point[None])
        rho = self.first_rho
        iteration = 0
        settled = False
        support: Tensor | None = None  # the mask at the last change of rho
        while iteration < self.max_iterations and not settled:
            inverse = (vectors / (values + rho)) @ vectors.T
            num_steps = min(self.period, self.max_iterations - iteration)
            for _ in range(num_steps):
                state.iterate(inverse[None], rho, [pattern])
            iteration += num_steps
            assert state.mask is not None
            mask = state.mask[0]
            if support is not None:
                size = max(1, pattern.num_kept(support.shape))
                changed = float((support & ~mask).sum()) / size
                settled = changed == 0
                rho *= _growth_of_rho(changed)
            support = mask
        assert support is not None

        # Algorithm 2, in the coordinates of the iterations. On the support, `point` is now the projected iterate;
        # `refit` ignores the rest of it.
        weight, steps = refit(gram, target, point, support, max_iterations=self.refit_iterations)
        weight.mul_(scale)  # back from coordinates of unit diagonal
        message = ""
        if not settled:
            message = (
                f"the support still changed after max_iterations={self.max_iterations}: try more"
            )
        return PrunedOperator(
            weight=weight,
            mask=support,
            fit_error=reported_error(problem, weight),
            iterations=iteration + int(steps),
            converged=settled,
            message=message,
        )


def _growth_of_rho(changed: float) -> float:
    """The factor by which `rho` grows if this share of the support changed (Algorithm 1)."""
    if changed > 0.1:
        return 1.3
    if changed > 0.005:
        return 1.2
    return 1.1
