"""ADMM in optimal-brain-surgeon coordinates: the default method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from optimum_fista.solve.linalg import damped_cholesky, diagonal_blocks, inverse_in_place, row_blocks
from optimum_fista.solve.method import PrunedOperator, PruningMethod, register
from optimum_fista.solve.pattern import SparsityPattern
from optimum_fista.solve.problem import LayerProblem
from optimum_fista.solve.refit import refit, refit_columns
from optimum_fista.solve.splitting import SplitState, split_in_stages
from optimum_fista.solve.statistics import RIDGE_TOKENS, ridge_against_noise


@register
@dataclass(frozen=True)
class ObsAdmm(PruningMethod):
    """Splitting (ADMM) in coordinates where magnitude is the optimal-brain-surgeon saliency, then a refit.

    1. A ridge pulls towards the dense weights, so that few calibration tokens are not over-fitted:
       `G_r = G + r diag(G)` and `C_r = C + r W diag(G)`.
    2. Columns are scaled so that `G_r^-1` has unit diagonal: `W'_ij = W_ij / sqrt([G_r^-1]_jj)`. Then the projection
       on the pattern keeps the largest `w^2 / [G_r^-1]_jj`. This is the increase of the error if a weight is removed
       and the others of its row compensate for it (optimal brain surgeon, Hassibi & Stork 1993). If whole columns are
       removed in groups, the scaling makes the diagonal blocks of `G_r^-1` the identity.
    3. ADMM (as in ALPS, arXiv 2406.07831) runs in stages of fixed `rho`. A stage takes one Cholesky factorisation for
       all operators that share the inputs. In these coordinates a `rho` a little above 1 exchanges the kept weights
       that are worth exchanging, and a dozen iterations are enough (docs/solver.md says why).
    4. The kept weights are refitted by conjugate gradients on the ridge problem. Whole columns are refitted exactly
       (`refit_columns`), with a ridge of their own unless `ridge` is given.

    Besides the problem, it needs one matrix of the operators' shape and one of the Gram matrix's, in float32, masks of
    a byte a weight, and four blocks of rows (`solve.linalg.row_blocks`).

    Attributes:
        ridge: `r` above; `None`: `ridge_tokens * inputs / calibration tokens`, within [0.003, 0.5].
        ridge_tokens: See `ridge`.
        scale_damping: Damping of `G_r` in step 2, as a fraction of its diagonal.
        stages: Stages, each with one factorisation.
        iterations: Iterations of each stage.
        first_rho: `rho` of the first stage.
        last_rho: `rho` of the last stage; from stage to stage it grows by the same factor.
        refit_iterations: Conjugate-gradient steps on the final mask; 0 refits nothing.
    """

    ridge: float | None = None
    ridge_tokens: float = RIDGE_TOKENS
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
        widths = {pattern.column_width or 1 for pattern in patterns}
        if len(widths) > 1:  # each width has coordinates of its own
            return super().prune_sharing(problems, patterns)
        problems = [problem.decoupled() for problem in problems]
        statistics = problems[0].statistics
        # Step 1 of the docstring: r diag(G).
        penalty = statistics.diagonal * self.ridge_of(statistics.num_tokens, statistics.gram.shape[0])
        # Step 2. Every factorisation overwrites its G_r, so it is made again from G.
        surgeon, message = _SurgeonCoordinates.of(statistics.gram, penalty, self.scale_damping, widths.pop())
        copy = partial(surgeon.gram, statistics.gram, penalty)
        states = [SplitState(_SurgeonTarget(p, penalty, surgeon), surgeon.weight(p.weight)) for p in problems]
        # Steps 3 and 4.
        split_in_stages(copy, states, patterns, self.rhos, self.iterations)
        steps = self._refit(copy(), [s for s, p in zip(states, patterns, strict=True) if p.column_width is None])
        return [
            self._finish(problem, pattern, state, surgeon, steps, message)
            for problem, pattern, state in zip(problems, patterns, states, strict=True)
        ]

    def ridge_of(self, num_tokens: int, num_inputs: int) -> float:
        """The ridge `r`, in units of the Gram matrix's diagonal."""
        if self.ridge is not None:
            return self.ridge
        return ridge_against_noise(num_tokens, num_inputs, self.ridge_tokens)

    @property
    def rhos(self) -> list[float]:
        """`rho` of every stage."""
        ratio = (self.last_rho / self.first_rho) ** (1 / max(1, self.stages - 1))
        return [self.first_rho * ratio**stage for stage in range(self.stages)]

    def _refit(self, gram: Tensor, states: Sequence[SplitState]) -> int:
        """Refit in surgeon coordinates, a block of rows at a time, in place; returns the most steps taken."""
        taken = [torch.zeros((), dtype=torch.int64, device=gram.device)]
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
        self,
        problem: LayerProblem,
        pattern: SparsityPattern,
        state: SplitState,
        surgeon: _SurgeonCoordinates,
        steps: int,
        message: str,
    ) -> PrunedOperator:
        """Back in the problem's own coordinates; whole columns are refitted there."""
        assert state.mask is not None
        if pattern.column_width is not None and self.refit_iterations:
            weight, refitted = refit_columns(problem, state.mask[0], self.ridge)
            message = "; ".join(dict.fromkeys(filter(None, (message, refitted))))
        else:
            weight = surgeon.back(state.point.mul_(state.mask))
        return PrunedOperator(
            weight,
            state.mask,
            problem.fit_error(weight),
            iterations=self.stages * self.iterations + steps,
            converged=not message,
            message=message,
        )


@dataclass(frozen=True)
class _SurgeonCoordinates:
    """`W = W' S B^T` with a diagonal `S`, and a block-diagonal `B` if columns are removed in groups.

    In these coordinates the diagonal of `G_r^-1`, or its diagonal blocks, are those of the identity: the squared norm
    of a weight, or of a group of columns, is what its removal costs (`greedy_obs`, step 2). That the columns of a group
    are correlated is thus accounted for.

    Attributes:
        scale: `S` [in].
        blocks: The blocks of `B`, lower triangular, [in / width, width, width]; `None` if each column stands alone.
    """

    scale: Tensor
    blocks: Tensor | None = None

    @classmethod
    def of(cls, gram: Tensor, penalty: Tensor, damping: float, width: int) -> tuple[_SurgeonCoordinates, str]:
        """Those of `G_r + damping * diag(G_r)`, and the message of a factorisation that needed help."""
        # Factorised with unit diagonal, in which damping is a fraction of the diagonal, and rounding is mild.
        unit = cls((gram.diagonal() + penalty).rsqrt())
        factor, message = damped_cholesky(partial(unit.gram, gram, penalty), damping)
        inverse = inverse_in_place(factor)
        if width == 1:
            # [G_r^-1]_jj = s_j^2 [(s G_r s)^-1]_jj.
            return cls(inverse.diagonal().sqrt() * unit.scale), message
        return cls(unit.scale, torch.linalg.cholesky(diagonal_blocks(inverse, width))), message

    def gram(self, gram: Tensor, penalty: Tensor) -> Tensor:
        """A new matrix: `B^T S G_r S B`."""
        copy = gram.clone()
        copy.diagonal().add_(penalty)
        copy = copy.mul_(self.scale).mul_(self.scale[:, None])
        return copy if self.blocks is None else self._times_blocks(self._times_blocks(copy).mT).contiguous()

    def target(self, target: Tensor) -> Tensor:
        """`C S B`; the argument is used up."""
        return self._times_blocks(target.mul_(self.scale))

    def weight(self, weight: Tensor) -> Tensor:
        """A new matrix: `W' = W S^-1 B^-T`."""
        scaled = weight / self.scale
        if self.blocks is None:
            return scaled
        groups = scaled.unflatten(1, self.blocks.shape[:2]).transpose(0, 1)  # [groups, out, width]
        solved = torch.linalg.solve_triangular(self.blocks.mT, groups, upper=True, left=False)
        return solved.transpose(0, 1).flatten(1)

    def back(self, weight: Tensor) -> Tensor:
        """`W = W' B^T S`; the argument is used up."""
        return self._times_blocks(weight, transposed=True).mul_(self.scale)

    def _times_blocks(self, matrix: Tensor, transposed: bool = False) -> Tensor:
        """`matrix [rows, in] @ B`, or `B^T`; the matrix itself if there are no blocks."""
        if self.blocks is None:
            return matrix
        groups = matrix.unflatten(1, self.blocks.shape[:2]).transpose(0, 1)  # [groups, rows, width]
        return (groups @ (self.blocks.mT if transposed else self.blocks)).transpose(0, 1).flatten(1)


@dataclass(frozen=True)
class _SurgeonTarget:
    """`C_r` in surgeon coordinates, made a block of rows at a time from the problem's own matrices."""

    problem: LayerProblem
    penalty: Tensor
    surgeon: _SurgeonCoordinates

    def __getitem__(self, rows: slice) -> Tensor:
        return self.surgeon.target(torch.addcmul(self.problem.target[rows], self.problem.weight[rows], self.penalty))
