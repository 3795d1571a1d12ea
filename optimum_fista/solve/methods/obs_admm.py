"""ADMM in optimal-brain-surgeon coordinates: the default method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from optimum_fista.solve.blocks import row_blocks
from optimum_fista.solve.cholesky import damped_cholesky, inverse_in_place
from optimum_fista.solve.method import PruningMethod, register
from optimum_fista.solve.pattern import SparsityPattern
from optimum_fista.solve.problem import LayerProblem
from optimum_fista.solve.pruned import PrunedOperator
from optimum_fista.solve.refit import refit
from optimum_fista.solve.splitting import SplitState, split_in_stages


@register
@dataclass(frozen=True)
class ObsAdmm(PruningMethod):
    """Splitting (ADMM) in coordinates where magnitude is the optimal-brain-surgeon saliency, then a refit.

    1. Ridge towards the dense weights, so that few calibration tokens are not over-fitted: with
       `S = diag(G)`, `G_r = G + r S` and `C_r = C + r W S`.
    2. Columns are scaled so that `G_r^-1` has unit diagonal: `W'_ij = W_ij / sqrt([G_r^-1]_jj)`. The projection
       on the pattern then keeps the largest `w^2 / [G_r^-1]_jj`, the increase of the error when a weight is
       removed and the others of its row compensate for it (optimal brain surgeon, Hassibi & Stork 1993).
    3. ADMM (as in ALPS, arXiv 2406.07831) in stages of fixed `rho`, one Cholesky factorisation each for all
       operators that share the inputs. It keeps the larger of `|w_i|` (kept) and `|g_j| / rho` (removed, with the
       gradient `g_j`). Swapping j for i pays if `g_j^2 / s_j > w_i^2 / h_i`, with the inverse diagonal `h` of the
       kept weights' Gram matrix and the Schur complement `s_j`. In these coordinates `h <= 1 <= s`, both near 1, so
       that `rho` a little above 1 swaps what pays to swap, and a dozen iterations are enough.
    4. Refit of the kept weights by conjugate gradients on the ridge problem.

    The working set, besides the problem, is one matrix of the operators' shape and one of the Gram matrix's, in
    float32, masks of a byte a weight, and four blocks of rows (`solve.blocks.row_blocks`).

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
        problems = [problem.decoupled() for problem in problems]
        statistics = problems[0].statistics
        penalty = statistics.diagonal * self.ridge_of(statistics.num_tokens, statistics.gram.shape[0])
        scale, message = _surgeon_scale(statistics.gram, penalty, self.scale_damping)
        copy = partial(_scaled, statistics.gram, penalty, scale)
        states = [SplitState(_ScaledTarget(p, penalty, scale), p.weight / scale) for p in problems]
        split_in_stages(copy, states, patterns, self.rhos, self.iterations)
        steps = self._refit(copy(), states)
        return [
            self._finish(problem, state, scale, steps, message) for problem, state in zip(problems, states, strict=True)
        ]

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

    def _refit(self, gram: Tensor, states: Sequence[SplitState]) -> int:
        """Refit in the scaled coordinates, a block of rows at a time, in place; returns the most steps taken."""
        taken = []
        for state in states:
            assert state.mask is not None
            for rows in row_blocks(state.point):
                _, steps = refit(
                    gram,
                    state.target[rows],
                    state.point[rows],
                    state.mask[rows],
                    max_iterations=self.refit_iterations,
                    in_place=True,
                )
                taken.append(steps)
        return int(torch.stack(taken).max())

    def _finish(
        self, problem: LayerProblem, state: SplitState, scale: Tensor, steps: int, message: str
    ) -> PrunedOperator:
        """Scale back."""
        assert state.mask is not None
        weight = state.point.mul_(scale)
        return PrunedOperator(
            weight,
            state.mask,
            problem.fit_error(weight),
            iterations=self.stages * self.iterations + steps,
            converged=not message,
            message=message,
            convergence=state.convergence,
        )


@dataclass(frozen=True)
class _ScaledTarget:
    """`C_r` in scaled coordinates, made a block of rows at a time from the problem's own matrices."""

    problem: LayerProblem
    penalty: Tensor
    scale: Tensor

    def __getitem__(self, rows: slice) -> Tensor:
        return torch.addcmul(self.problem.target[rows], self.problem.weight[rows], self.penalty).mul_(self.scale)


def _scaled(gram: Tensor, penalty: Tensor, scale: Tensor) -> Tensor:
    """A new matrix: `G_r` in scaled coordinates."""
    copy = gram.clone()
    copy.diagonal().add_(penalty)
    return copy.mul_(scale).mul_(scale[:, None])


def _surgeon_scale(gram: Tensor, penalty: Tensor, damping: float) -> tuple[Tensor, str]:
    """`sqrt([(G_r + damping * diag(G_r))^-1]_jj)` [in], and the message of a factorisation that needed help."""
    scale = (gram.diagonal() + penalty).rsqrt()
    factor, message = damped_cholesky(partial(_scaled, gram, penalty, scale), damping)
    return inverse_in_place(factor).diagonal().sqrt() * scale, message
