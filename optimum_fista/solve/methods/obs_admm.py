"""ADMM in optimal-brain-surgeon coordinates: the default method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from optimum_fista.solve.cholesky import damped_cholesky
from optimum_fista.solve.cost import SolveCost
from optimum_fista.solve.method import MethodDefaults, PruningMethod
from optimum_fista.solve.pattern import SparsityPattern
from optimum_fista.solve.problem import LayerProblem
from optimum_fista.solve.pruned import PrunedOperator
from optimum_fista.solve.refit import refit
from optimum_fista.solve.splitting import SplitState, split_in_stages


@dataclass(frozen=True)
class ObsAdmm(PruningMethod):
    """Splitting (ADMM) in coordinates where magnitude is the optimal-brain-surgeon saliency, then a refit.

    1. Ridge towards the dense weights, so that few calibration tokens are not over-fitted: with
       `S = diag(G)`, `G_r = G + r S` and `C_r = C + r W S`.
    2. Columns are scaled so that `G_r^-1` has unit diagonal: `W'_ij = W_ij / sqrt([G_r^-1]_jj)`. The projection
       on the pattern then keeps the largest `w^2 / [G_r^-1]_jj`, the increase of the error when a weight is
       removed and the others of its row make up for it (optimal brain surgeon, Hassibi & Stork 1993).
    3. ADMM (as in ALPS, arXiv 2406.07831) in stages of fixed `rho`, one Cholesky factorisation each for all
       operators that share the inputs. It keeps the larger of `|w_i|` (kept) and `|g_j| / rho` (removed, with the
       gradient `g_j`). Swapping j for i pays where `g_j^2 / s_j > w_i^2 / h_i`, with the inverse diagonal `h` of the
       kept weights' Gram matrix and the Schur complement `s_j`. In these coordinates `h <= 1 <= s`, both near 1, so
       that `rho` a little above 1 swaps what pays to swap, and a dozen iterations are enough.
    4. Refit of the kept weights by conjugate gradients on the ridge problem.

    The working set, besides the problem, is four matrices of the operators' shape and three of the Gram matrix's, in
    float32, and masks of a byte a weight.

    Attributes:
        ridge: `r` above; `None`: `ridge_tokens` divided by the calibration tokens per input, within
            [0.003, 0.5].
        ridge_tokens: See `ridge`.
        scale_damping: Damping of the inverse that the columns are scaled by, as a fraction of the diagonal.
        stages: Stages, each with one factorisation.
        iterations: Iterations a stage.
        first_rho: `rho` of the first stage.
        last_rho: `rho` of the last; geometric in between.
        refit_iterations: Conjugate-gradient steps on the final mask.
    """

    ridge: float | None = None
    ridge_tokens: float = 1.5
    scale_damping: float = 0.0
    stages: int = 3
    iterations: int = 4
    first_rho: float = 1.0
    last_rho: float = 1.5
    refit_iterations: int = 5
    name: ClassVar[str] = "obs_admm"
    defaults: ClassVar[MethodDefaults] = MethodDefaults(
        error_correction=0.5, residual_correction=1.0, allocation="fisher"
    )

    def __post_init__(self) -> None:
        for option, least in (("stages", 1), ("iterations", 1), ("refit_iterations", 0)):
            if getattr(self, option) < least:
                raise ValueError(f"{option}={getattr(self, option)!r}: pass a whole number of at least {least}.")
        if self.ridge is not None and not self.ridge > 0:
            raise ValueError(f"ridge={self.ridge!r}: pass a positive number, or None.")
        if not 0 < self.first_rho <= self.last_rho:
            raise ValueError(f"first_rho={self.first_rho!r}, last_rho={self.last_rho!r}: pass 0 < first <= last.")

    def prune(self, problem: LayerProblem, pattern: SparsityPattern) -> PrunedOperator:
        """Prune one operator to `pattern`."""
        return self.prune_sharing([problem], [pattern])[0]

    def prune_sharing(
        self, problems: Sequence[LayerProblem], patterns: Sequence[SparsityPattern]
    ) -> list[PrunedOperator]:
        """Prune operators that share their inputs, with shared factorisations."""
        statistics = problems[0].statistics
        gram = statistics.gram.clone()
        diagonal = statistics.diagonal
        penalty = diagonal * self.ridge_of(statistics.num_tokens, gram.shape[0])
        penalty = torch.where(penalty > 0, penalty, torch.ones_like(penalty) * (float(penalty.mean()) or 1.0))
        gram.diagonal().add_(penalty)
        scale, message = _surgeon_scale(gram, self.scale_damping)
        gram.mul_(scale).mul_(scale[:, None])
        states = [_start(problem, penalty, scale) for problem in problems]
        split_in_stages(gram, states, patterns, self.rhos, self.iterations)
        return [
            self._finish(gram, problem, state, scale, message) for problem, state in zip(problems, states, strict=True)
        ]

    def cost(self) -> SolveCost:
        """Products of all iterations, of the refit and the error; a factorisation and an inverse a stage and before."""
        iterations = self.stages * self.iterations
        return SolveCost(
            products=iterations + self.refit_iterations + 2,
            factor=self.stages + 1,
            sweeps=16 * iterations + 12 * self.refit_iterations + 10,
            working=((2.25, 3), (5, 2), (4.25, 1)),
            shares_factor=True,
        )

    def ridge_of(self, num_tokens: int, num_inputs: int) -> float:
        """Ridge in units of the Gram matrix's diagonal."""
        if self.ridge is not None:
            return self.ridge
        return min(0.5, max(0.003, self.ridge_tokens * num_inputs / max(1, num_tokens)))

    @property
    def rhos(self) -> list[float]:
        """`rho` of every stage."""
        ratio = (self.last_rho / self.first_rho) ** (1 / max(1, self.stages - 1))
        return [self.first_rho * ratio**stage for stage in range(self.stages)]

    def _finish(
        self, gram: Tensor, problem: LayerProblem, state: SplitState, scale: Tensor, message: str
    ) -> PrunedOperator:
        """Refit in the scaled coordinates and scale back."""
        assert state.mask is not None
        weight, steps = refit(
            gram, state.target, state.point, state.mask, max_iterations=self.refit_iterations, in_place=True
        )
        weight.mul_(scale)
        return PrunedOperator(
            weight,
            state.mask,
            problem.relative_error(weight),
            iterations=self.stages * self.iterations + steps,
            converged=not message,
            message=message,
        )


def _surgeon_scale(gram: Tensor, damping: float) -> tuple[Tensor, str]:
    """`sqrt([(G + damping * diag(G))^-1]_jj)` [in], and the message of a factorisation that needed help."""
    scale = gram.diagonal().rsqrt()
    unit = (gram * scale).mul_(scale[:, None])
    factor, message = damped_cholesky(unit, damping, in_place=True)
    return torch.cholesky_inverse(factor, out=unit).diagonal().sqrt() * scale, message


def _start(problem: LayerProblem, penalty: Tensor, scale: Tensor) -> SplitState:
    target = torch.addcmul(problem.target, problem.weight, penalty).mul_(scale)
    return SplitState(target, problem.weight / scale)
