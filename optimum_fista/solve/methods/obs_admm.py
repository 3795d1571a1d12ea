"""ADMM in optimal-brain-surgeon coordinates: the default method.

ALPS lets `rho` grow over about 40 iterations until the mask settles. Here the coordinates show which `rho` compares
kept and removed weights correctly, so that twelve iterations reach the error of ALPS in a third of the time
(docs/solver.md). But the iterations do not run to convergence, and it is not known whether they converge.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Self

import torch
from torch import Tensor

from optimum_fista.solve.linalg import (
    damped_cholesky,
    damped_inverse,
    diagonal_blocks,
    inverse_in_place,
    row_blocks,
)
from optimum_fista.solve.method import (
    MemoryFactors,
    MethodDefaults,
    PrunedOperator,
    PruningMethod,
    register,
)
from optimum_fista.solve.methods.admm import SplitState
from optimum_fista.solve.pattern import SparsityPattern
from optimum_fista.solve.problem import LayerProblem
from optimum_fista.solve.refit import refit, refit_columns


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
    """

    # `r` above; None: `1.5 * inputs / calibration tokens`, within [0.003, 0.5] (docs/solver.md). The fewer tokens an
    # input has, the more of the Gram matrix is noise.
    ridge: float | None = None
    stages: int = 3  # each with one factorisation
    iterations: int = 4  # of each stage
    first_rho: float = 1.0  # of the first stage
    last_rho: float = 1.5  # of the last stage; from stage to stage `rho` grows by the same factor
    refit_iterations: int = 5  # conjugate-gradient steps on the final mask; 0 refits nothing
    name: ClassVar[str] = "obs_admm"
    defaults: ClassVar[MethodDefaults] = MethodDefaults(
        error_correction=0.5, residual_correction=1.0, allocation="fisher"
    )
    memory_factors: ClassVar[MemoryFactors | None] = MemoryFactors(1.1, 1.2, 3.8)

    def __post_init__(self) -> None:
        for option, least in (("stages", 1), ("iterations", 1), ("refit_iterations", 0)):
            if getattr(self, option) < least:
                raise ValueError(
                    f"{option}={getattr(self, option)!r}: pass a whole number of at least {least}."
                )
        if self.ridge is not None and not self.ridge > 0:
            raise ValueError(f"ridge={self.ridge!r}: pass a positive number, or None.")
        if not 0 < self.first_rho <= self.last_rho:
            raise ValueError(
                f"first_rho={self.first_rho!r}, last_rho={self.last_rho!r}: pass 0 < first <= last."
            )

    def prune(self, problem: LayerProblem, pattern: SparsityPattern) -> PrunedOperator:
        """Prune one operator to `pattern`."""
        return self.prune_sharing([problem], [pattern])[0]

    def prune_sharing(
        self, problems: Sequence[LayerProblem], patterns: Sequence[SparsityPattern]
    ) -> list[PrunedOperator]:
        """Prune operators that share their inputs, with shared factorisations; steps are those of the class."""
        widths = {pattern.width if pattern.whole_columns else 1 for pattern in patterns}
        if len(widths) > 1:  # each width has coordinates of its own
            return super().prune_sharing(problems, patterns)
        problems = [problem.decoupled() for problem in problems]
        statistics = problems[0].statistics
        gram, ridge = statistics.gram, self.ridge
        if ridge is None:
            ridge = min(0.5, max(0.003, 1.5 * len(gram) / max(1, statistics.num_tokens)))
        # Step 1 is made in parts, where it is read: r diag(G) is all that is kept of it.
        surgeon, message = _Surgeon.of(gram, statistics.diagonal * ridge, widths.pop())  # step 2
        states = [
            SplitState(partial(surgeon.target, p), surgeon.weight(p.weight)) for p in problems
        ]
        growth = (self.last_rho / self.first_rho) ** (1 / max(1, self.stages - 1))
        for stage in range(self.stages):  # step 3
            rho = self.first_rho * growth**stage
            # A factorisation overwrites its G_r, so that is made again from G.
            inverse = damped_inverse(surgeon.gram(gram), rho)
            for state, pattern in zip(states, patterns, strict=True):
                for _ in range(self.iterations):
                    state.iterate(inverse, rho, pattern)
            del inverse  # before the next one is made
        fit = partial(
            refit, surgeon.gram(gram), max_iterations=self.refit_iterations, in_place=True
        )
        taken = [torch.zeros((), dtype=torch.int64, device=gram.device)]
        for state, pattern in zip(states, patterns, strict=True):  # step 4, in place
            assert state.mask is not None
            for rows in () if pattern.whole_columns else row_blocks(state.point):
                taken.append(fit(state.target(rows), state.point[rows], state.mask[rows])[1])
        del fit  # with its Gram matrix
        iterations = self.stages * self.iterations + int(
            torch.stack(taken).max()
        )  # one wait for the device
        pruned = []
        for problem, pattern, state in zip(problems, patterns, states, strict=True):
            assert state.mask is not None
            advice = message
            if pattern.whole_columns and self.refit_iterations:  # in the problem's own coordinates
                weight, refitted = refit_columns(problem, state.mask[0], self.ridge)
                advice = "; ".join(dict.fromkeys(filter(None, (message, refitted))))
            else:
                # W = W' B^T S, in the memory of P
                weight = surgeon.times_blocks(state.point.mul_(state.mask), transposed=True).mul_(
                    surgeon.scale
                )
            error = problem.fit_error(weight)
            pruned.append(
                PrunedOperator(
                    weight, state.mask, error, iterations, converged=not advice, message=advice
                )
            )
        return pruned


@dataclass(frozen=True)
class _Surgeon:
    """`W = W' S B^T` with a diagonal `S`, and a block-diagonal `B` if columns are removed in groups.

    In these coordinates the diagonal of `G_r^-1`, or its diagonal blocks, are those of the identity: the squared norm
    of a weight, or of a group of columns, is the cost of its removal. For a group that is
    `tr(W_g ([G_r^-1]_gg)^-1 W_g^T)` (ZipLM, arXiv 2302.04089), with the correlation of its columns.
    """

    scale: Tensor  # `S` [in]
    penalty: Tensor  # `r diag(G)` [in]
    blocks: Tensor | None = (
        None  # of `B`, lower triangular, [in / width, width, width]; None: columns stand alone
    )

    @classmethod
    def of(cls, gram: Tensor, penalty: Tensor, width: int) -> tuple[Self, str]:
        """Make the coordinates of `G_r`; returns also the message of a factorisation that needed help."""
        # Factorised with unit diagonal, in which damping is a fraction of the diagonal, and rounding is mild.
        unit = cls((gram.diagonal() + penalty).rsqrt(), penalty)
        factor, message = damped_cholesky(partial(unit.gram, gram))
        inverse = inverse_in_place(factor)
        if width == 1:
            # [G_r^-1]_jj = s_j^2 [(s G_r s)^-1]_jj.
            return cls(inverse.diagonal().sqrt() * unit.scale, penalty), message
        return cls(
            unit.scale, penalty, torch.linalg.cholesky(diagonal_blocks(inverse, width))
        ), message

    def gram(self, gram: Tensor) -> Tensor:
        """A new matrix: `B^T S G_r S B`."""
        copy = gram.clone()
        copy.diagonal().add_(self.penalty)
        copy = copy.mul_(self.scale).mul_(self.scale[:, None])
        return (
            copy
            if self.blocks is None
            else self.times_blocks(self.times_blocks(copy).mT).contiguous()
        )

    def target(self, problem: LayerProblem, rows: slice) -> Tensor:
        """`C_r S B` of some rows, made from the problem's own matrices."""
        target = torch.addcmul(problem.target[rows], problem.weight[rows], self.penalty)
        return self.times_blocks(target.mul_(self.scale))

    def weight(self, weight: Tensor) -> Tensor:
        """A new matrix: `W' = W S^-1 B^-T`."""
        scaled = weight / self.scale
        if self.blocks is None:
            return scaled
        groups = scaled.unflatten(1, self.blocks.shape[:2]).transpose(0, 1)  # [groups, out, width]
        solved = torch.linalg.solve_triangular(self.blocks.mT, groups, upper=True, left=False)
        return solved.transpose(0, 1).flatten(1)

    def times_blocks(self, matrix: Tensor, transposed: bool = False) -> Tensor:
        """`matrix [rows, in] @ B`, or `B^T`; the matrix itself if there are no blocks."""
        if self.blocks is None:
            return matrix
        groups = matrix.unflatten(1, self.blocks.shape[:2]).transpose(0, 1)  # [groups, rows, width]
        return (groups @ (self.blocks.mT if transposed else self.blocks)).transpose(0, 1).flatten(1)
