"""ADMM pruning with a gradual schedule (Boza, arXiv 2401.02938)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from optimum_fista.solve.method import PrunedOperator, PruningMethod, register
from optimum_fista.solve.pattern import SparsityPattern
from optimum_fista.solve.problem import LayerProblem
from optimum_fista.solve.splitting import damped_inverse, unit_diagonal


@register
@dataclass(frozen=True)
class Admm(PruningMethod):
    """ADMM in coordinates of unit Gram diagonal with one inverse, `rho = 1`, and a mask that is then frozen.

    The mask keeps the largest `|W + U|`; for the first `ramp_iterations` it is chosen again in every iteration,
    unstructured on a cubic ramp of the sparsity `s (1 - (1 - k / ramp)^3)`, and frozen after that (Algorithm 1;
    the released code skips the ramp).

    Attributes:
        damping: Fraction of the mean Gram diagonal added to the diagonal.
        rho: ADMM's penalty parameter in units of the Gram diagonal.
        max_iterations: Iterations.
        ramp_iterations: Iterations before the mask is frozen.
    """

    damping: float = 0.1
    rho: float = 1.0
    max_iterations: int = 20
    ramp_iterations: int = 15
    name: ClassVar[str] = "admm"

    def prune(self, problem: LayerProblem, pattern: SparsityPattern) -> PrunedOperator:
        """Prune one operator to `pattern`. Symbols as in the paper: W, Z, U (scaled dual)."""
        problem = problem.decoupled()
        gram, target, scale = unit_diagonal(problem, self.damping)
        inverse = damped_inverse(gram, self.rho)
        # The dense weights in scaled coordinates.
        Z = problem.weight / scale
        U = Z.new_zeros(Z.shape)
        mask = pattern.mask_of(Z)
        for k in range(1, self.max_iterations + 1):
            # The W step; U = V / rho is the scaled dual.
            W = (target + self.rho * (Z - U)) @ inverse
            V = W + U
            if k <= self.ramp_iterations:
                # The cubic schedule: most zeros come in the first iterations.
                ramp = 1 - (1 - k / self.ramp_iterations) ** 3
                mask = pattern.at(pattern.sparsity * ramp).mask_of(V)
            Z = V * mask
            U = V - Z
        # With fewer iterations than the ramp has, Z keeps too many weights until now.
        final = pattern.mask_of(Z)
        weight = Z * final * scale  # back from scaled coordinates
        return PrunedOperator(weight, final, problem.fit_error(weight), iterations=self.max_iterations)
