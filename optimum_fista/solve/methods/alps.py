"""ALPS: l0-constrained ADMM with a growing penalty (arXiv 2406.07831).

One eigenvalue decomposition makes an inverse for every `rho`, as in the paper; `obs_admm` takes a few fixed ones.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from optimum_fista.solve.method import MemoryFactors, PrunedOperator, PruningMethod, register
from optimum_fista.solve.methods.admm import SplitState, unit_diagonal
from optimum_fista.solve.pattern import SparsityPattern
from optimum_fista.solve.problem import LayerProblem
from optimum_fista.solve.refit import refit


@register
@dataclass(frozen=True)
class Alps(PruningMethod):
    """ADMM in coordinates of unit Gram diagonal, `rho` growing as the support settles (Algorithm 1).

    The Gram matrix and the target are damped alike. Every `period` iterations `rho` grows by 1.3, 1.2 or 1.1 as
    the support changed by more than 10%, more than 0.5%, or at all; it stops when the support stays the same.
    Then at most `refit_iterations` conjugate-gradient steps on the support (Algorithm 2).
    """

    damping: float = 0.01  # fraction of the mean Gram diagonal added to the diagonal
    first_rho: float = 0.1
    period: int = 3  # iterations between changes of `rho`
    max_iterations: int = 300
    refit_iterations: int = 10
    name: ClassVar[str] = "alps"
    memory_factors: ClassVar[MemoryFactors | None] = MemoryFactors(4.4, 4.2)

    def prune(self, problem: LayerProblem, pattern: SparsityPattern) -> PrunedOperator:
        """Prune one operator to `pattern`."""
        problem = problem.decoupled()
        gram, target, scale = unit_diagonal(problem, self.damping)
        values, vectors = torch.linalg.eigh(
            gram
        )  # one decomposition gives (G + rho I)^-1 for every rho
        state = SplitState(target.__getitem__, problem.weight / scale)
        rho, iteration, settled = self.first_rho, 0, False
        support: Tensor | None = None
        while iteration < self.max_iterations and not settled:
            inverse = (
                vectors / (values.clamp_min(0) + rho)
            ) @ vectors.T  # rounding makes zero eigenvalues negative
            for _ in range(self.period):
                state.iterate(inverse, rho, pattern)
            iteration += self.period
            assert state.mask is not None
            if support is not None:
                # The support's size is the unit in which ALPS counts its changes.
                changed = float((support & ~state.mask).sum()) / max(
                    1, pattern.num_kept(support.shape)
                )
                settled = changed == 0
                rho *= 1.3 if changed > 0.1 else 1.2 if changed > 0.005 else 1.1
            support = state.mask
        assert support is not None
        # Algorithm 2, in the coordinates of the iterations.
        weight, steps = refit(
            gram, target, state.point, support, max_iterations=self.refit_iterations
        )
        weight.mul_(scale)  # back from coordinates of unit diagonal
        message = (
            ""
            if settled
            else f"the support still changed after max_iterations={self.max_iterations}: try more"
        )
        iteration, error = iteration + int(steps), problem.fit_error(weight)
        return PrunedOperator(weight, support, error, iteration, converged=settled, message=message)
