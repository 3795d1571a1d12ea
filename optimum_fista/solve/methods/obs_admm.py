"""ADMM in optimal-brain-surgeon coordinates: the default method.

Symbols are those of `LayerProblem`: `W` are the dense weights of an operator, `G` is the Gram matrix of its inputs, `C`
its target. ADMM splits the problem in two, a least-squares step and a projection on the pattern (`SplitState`).
The method has four steps:

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

`_Surgeon` makes the coordinates `W'` of step 2:

    W = W' B^T S.

`S` is diagonal. `B` is block-diagonal if columns are removed in groups, otherwise the identity. In these coordinates
the matrices of the problem are

    B^T S G_r S B    instead of G,
    C_r S B          instead of C.

A matrix is called `point` while ADMM changes it (`SplitState`).

ALPS lets `rho` grow over about 40 iterations until the mask settles. Here the coordinates show which `rho` compares
kept and removed weights correctly, so that twelve iterations reach the error of ALPS in a third of the time
(docs/solver.md). But the iterations do not run to convergence, and it is not known whether they converge.
"""

from __future__ import annotations

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
from optimum_fista.solve.problem import InputStatistics, LayerProblem
from optimum_fista.solve.refit import refit, refit_columns


@register
@dataclass(frozen=True)
class ObsAdmm(PruningMethod):
    """Splitting (ADMM) in coordinates where magnitude is the optimal-brain-surgeon saliency, then a refit.

    The docstring of the module has the steps.

    Besides the problem, it needs one matrix of the operators' shape and one of the Gram matrix's, in float32, masks of
    a byte a weight, and four blocks of rows (`solve.linalg.row_blocks`).
    """

    # `r` above; None: `1.5 * inputs / calibration tokens`, within [0.003, 0.5] (docs/solver.md). The fewer tokens an
    # input has, the more of the Gram matrix is noise.
    ridge: float | None = None
    # Each with one factorisation.
    stages: int = 3
    # Of each stage.
    iterations: int = 4
    # Of the first stage.
    first_rho: float = 1.0
    # Of the last stage; from stage to stage `rho` grows by the same factor.
    last_rho: float = 1.5
    # Conjugate-gradient steps on the final mask; 0 refits nothing.
    refit_iterations: int = 5
    name: ClassVar[str] = "obs_admm"
    defaults: ClassVar[MethodDefaults] = MethodDefaults(
        error_correction="intra", allocation="fisher"
    )
    # A removed decoder layer, or a head, is an error that later layers can make up for.
    defaults_of_parts: ClassVar[MethodDefaults | None] = MethodDefaults(
        error_correction=0.5, residual_correction=1.0, allocation="fisher"
    )
    memory_factors: ClassVar[MemoryFactors | None] = MemoryFactors(1.1, 1.2, 3.8)

    def __post_init__(self) -> None:
        """Refuse options that make no sense (ValueError); the fields of `self` are the options."""
        least_values = {"stages": 1, "iterations": 1, "refit_iterations": 0}
        for option, least in least_values.items():
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
        """Prune one operator to `pattern`: returns new weights with their mask.

        No tensor of `problem` changes; its statistics keep their decoupled form (`LayerProblem.decoupled`).
        """
        return self.prune_sharing([problem], [pattern])[0]

    def prune_sharing(
        self, problems: Sequence[LayerProblem], patterns: Sequence[SparsityPattern]
    ) -> list[PrunedOperator]:
        """Prune operators that share their inputs, with shared factorisations; returns one result for each.

        `problems` have the same `InputStatistics`, and `patterns` has one pattern for each. Patterns of whole columns
        may have groups of several columns, and each such width has coordinates of its own. If the widths differ,
        operators are pruned one by one. The fields of `self` are the options: numbers of stages, of `iterations` in a
        stage and of steps of the refit, and the `ridge`, if the user has given one.

        No tensor of `problems` changes. Their statistics keep a second form, in which nearly dead inputs are
        uncorrelated with all others (`LayerProblem.decoupled`): it is made at the first use.
        """
        # columns that are removed together; 1 for single weights
        widths = [pattern.width if pattern.whole_columns else 1 for pattern in patterns]
        width = widths[0]
        if any(other != width for other in widths):
            return super().prune_sharing(problems, patterns)  # one by one

        problems = [problem.decoupled() for problem in problems]
        statistics = problems[0].statistics
        gram = statistics.gram
        # Step 1. G_r and C_r are not kept: they are made of G, C and `r diag(G)` wherever they are needed.
        penalty = statistics.diagonal * self._ridge_of(statistics)  # r diag(G)
        surgeon, message = _Surgeon.of(gram, penalty, width)  # step 2
        states = [
            SplitState(
                # makes some rows of the target when they are needed, in place of a matrix of its size
                target=partial(surgeon.target_with_ridge, problem),
                point=surgeon.scaled_weight(problem.weight),
            )
            for problem in problems
        ]

        # Steps 3 and 4 write their results into `states`: the masks, and the points, which are weights in the
        # coordinates W'.
        self._split(states, patterns, surgeon, gram)
        # step 4 for states without whole columns
        num_steps = self._refit_by_rows(states, patterns, surgeon, gram)
        iterations = self.stages * self.iterations + num_steps

        return [
            self._pruned_operator(
                problem, pattern, state, surgeon, iterations=iterations, message=message
            )
            for problem, pattern, state in zip(problems, patterns, states, strict=True)
        ]

    def _pruned_operator(
        self,
        problem: LayerProblem,
        pattern: SparsityPattern,
        state: SplitState,
        surgeon: _Surgeon,
        *,
        iterations: int,
        message: str,
    ) -> PrunedOperator:
        """Bring the weights of an operator back to the coordinates of its problem; whole columns are refitted there.

        `state` has the mask and, without whole columns, the refitted weights in the coordinates of `surgeon`; its point
        is overwritten. `iterations` are those of ADMM and of the refit, and `message` is that of the factorisation, or
        empty. `self.refit_iterations` of 0 turns off all refits, and `self.ridge` is the user's ridge, or `None`.
        """
        assert state.mask is not None
        message_of_refit = ""
        # Also the refit of whole columns, which takes no iterations.
        refits = self.refit_iterations > 0
        if pattern.whole_columns and refits:
            # Step 4 of whole columns. All rows of the mask are equal.
            columns_kept = state.mask[0]
            weight, message_of_refit = refit_columns(problem, columns_kept, self.ridge)
        else:
            # W = W' B^T S
            sparse = state.point.mul_(state.mask)
            weight = surgeon.times_blocks(sparse, transposed=True).mul_(surgeon.scale)

        # Both factorisations may have needed help, and say the same.
        messages = [message] if message else []
        if message_of_refit and message_of_refit != message:
            messages.append(message_of_refit)
        return PrunedOperator(
            weight=weight,
            mask=state.mask,
            fit_error=problem.fit_error(weight),
            iterations=iterations,
            converged=not messages,
            message="; ".join(messages),
        )

    def _ridge_of(self, statistics: InputStatistics) -> float:
        """`r` of step 1: the option `ridge`, or a number that falls with the tokens of `statistics` per input."""
        if self.ridge is not None:
            return self.ridge
        inputs_per_token = len(statistics.gram) / max(1, statistics.num_tokens)
        return min(0.5, max(0.003, 1.5 * inputs_per_token))  # within [0.003, 0.5]

    def _split(
        self,
        states: Sequence[SplitState],
        patterns: Sequence[SparsityPattern],
        surgeon: _Surgeon,
        gram: Tensor,
    ) -> None:
        """Run the stages of ADMM, step 3, for all operators; changes the point, mask and rho of each of `states`.

        `patterns` has the pattern of each. `surgeon` has the coordinates of step 2, and `gram` is `G`, which stays as
        it is. The options are those of `self`: `rho` grows from `first_rho` to `last_rho` by the same factor from stage
        to stage, and each stage has the number of iterations in `iterations`.
        """
        num_steps = max(1, self.stages - 1)  # from stage to stage; a single stage has `first_rho`
        growth = (self.last_rho / self.first_rho) ** (1 / num_steps)
        for stage in range(self.stages):
            rho = self.first_rho * growth**stage
            # The factorisation overwrites the matrix that it gets, so each stage makes it again from G.
            inverse = damped_inverse(surgeon.gram_with_ridge(gram), rho)
            for state, pattern in zip(states, patterns, strict=True):
                for _ in range(self.iterations):
                    state.iterate(inverse, rho, pattern)
            del inverse  # before the next one is made

    def _refit_by_rows(
        self,
        states: Sequence[SplitState],
        patterns: Sequence[SparsityPattern],
        surgeon: _Surgeon,
        gram: Tensor,
    ) -> int:
        """Refit the kept weights, step 4; a state whose pattern has whole columns stays as it is.

        Changes the points of `states`, which are weights in the coordinates of `surgeon`. Each state gives its target
        `C_r S B` by blocks of rows (`state.target`). `gram` is `G`, which stays as it is.

        Blocks of rows are refitted one after the other, in `self.refit_iterations` steps at most. Returns the number of
        steps of the block that took most.
        """
        ridge_gram = surgeon.gram_with_ridge(gram)  # B^T S G_r S B
        steps = [torch.zeros((), dtype=torch.int64, device=gram.device)]
        for state, pattern in zip(states, patterns, strict=True):
            assert state.mask is not None
            if pattern.whole_columns:
                continue
            for rows in row_blocks(state.point):
                _, steps_of_rows = refit(
                    ridge_gram,
                    state.target(rows),
                    state.point[rows],
                    state.mask[rows],
                    max_iterations=self.refit_iterations,
                    in_place=True,  # the result is in `state.point`
                )
                steps.append(steps_of_rows)
        return int(torch.stack(steps).max())  # one wait for the device


@dataclass(frozen=True)
class _Surgeon:
    """Coordinates `W'` of weights `W` [out, in], in which magnitude is the optimal-brain-surgeon saliency.

    The two are related by

        W = W' B^T S,

    with `S` [in, in] diagonal. `B` [in, in] is block-diagonal if columns are removed in groups, otherwise the identity.
    `G_r` [in, in] is the Gram matrix with a ridge (step 1 of the module's docstring). In these coordinates the diagonal
    of `G_r^-1`, or its diagonal blocks, are those of the identity. So the squared norm of a weight, or of a group of
    columns `W_g` [out, width], is the cost of its removal. For a group, with the correlation of its columns, that is
    (ZipLM, arXiv 2302.04089)

        tr(W_g ([G_r^-1]_gg)^-1 W_g^T).
    """

    scale: Tensor  # `S` [in]
    penalty: Tensor  # `r diag(G)` [in]
    # Of `B`, lower triangular, [in / width, width, width]; None: columns stand alone.
    blocks: Tensor | None = None

    @classmethod
    def of(cls, gram: Tensor, penalty: Tensor, width: int) -> tuple[Self, str]:
        """Make the coordinates for groups of `width` columns; 1: columns stand alone.

        Args:
            gram: `G` [in, in], the Gram matrix without the ridge, which stays as it is.
            penalty: `r diag(G)` [in], the ridge.
            width: Columns in a group.

        Returns:
            The coordinates.
            The message of a factorisation that needed help (`damped_cholesky`), otherwise an empty one.
        """
        # Factorised with unit diagonal, in which damping is a fraction of the diagonal, and rounding is mild.
        unit = cls(scale=(gram.diagonal() + penalty).rsqrt(), penalty=penalty)
        factor, message = damped_cholesky(partial(unit.gram_with_ridge, gram))
        inverse = inverse_in_place(factor)
        if width == 1:
            # [G_r^-1]_jj = s_j^2 [(s G_r s)^-1]_jj.
            scale = inverse.diagonal().sqrt() * unit.scale
            return cls(scale=scale, penalty=penalty), message
        # B B^T are the diagonal blocks of the inverse.
        blocks = torch.linalg.cholesky(diagonal_blocks(inverse, width))
        return cls(scale=unit.scale, penalty=penalty, blocks=blocks), message

    def gram_with_ridge(self, gram: Tensor) -> Tensor:
        """Return the Gram matrix with its ridge in these coordinates, a new matrix [in, in]:

            B^T S G_r S B,   G_r = G + r diag(G).

        `gram` is `G` [in, in], which stays as it is. The coordinates have the diagonal of `S` (`self.scale`, [in]), the
        blocks of `B` (`self.blocks`; `None` if `B` is the identity), and the ridge `r diag(G)` (`self.penalty`, [in]).
        """
        copy = gram.clone()
        copy.diagonal().add_(self.penalty)
        copy = copy.mul_(self.scale).mul_(self.scale[:, None])
        if self.blocks is None:
            return copy
        # `times_blocks` multiplies by B from the right. With the symmetric X = S G_r S, this is (X B)^T B = B^T X B.
        return self.times_blocks(self.times_blocks(copy).mT).contiguous()

    def target_with_ridge(self, problem: LayerProblem, rows: slice) -> Tensor:
        """Return some rows of the target with its ridge in these coordinates, a new matrix [rows, in]:

            C_r S B,   C_r = C + r W diag(G).

        `problem` has `C` and `W` [out, in].
        """
        target = torch.addcmul(problem.target[rows], problem.weight[rows], self.penalty)
        return self.times_blocks(target.mul_(self.scale))

    def scaled_weight(self, weight: Tensor) -> Tensor:
        """Return weights in these coordinates, a new matrix [out, in]: `W' = W S^-1 B^-T`; `weight` is `W`.

        `self.scale` is the diagonal of `S`; `self.blocks` [in / width, width, width] are those of `B`.
        """
        scaled = weight / self.scale
        if self.blocks is None:
            return scaled
        groups = scaled.unflatten(1, self.blocks.shape[:2]).transpose(0, 1)  # [groups, out, width]
        # The blocks of B are lower triangular. This solves X B^T = W S^-1 for X, block by block.
        solved = torch.linalg.solve_triangular(self.blocks.mT, groups, upper=True, left=False)
        return solved.transpose(0, 1).flatten(1)

    def times_blocks(self, matrix: Tensor, transposed: bool = False) -> Tensor:
        """Return `matrix @ B`, or `matrix @ B^T`, a new matrix [rows, in]; `matrix` itself if `B` is the identity.

        `transposed` asks for the product with `B^T`. The blocks of `B` are `self.blocks` [in / width, width, width]. If
        that is `None`, `B` is the identity.
        """
        if self.blocks is None:
            return matrix
        factors = self.blocks.mT if transposed else self.blocks
        groups = matrix.unflatten(1, self.blocks.shape[:2]).transpose(0, 1)  # [groups, rows, width]
        return (groups @ factors).transpose(0, 1).flatten(1)
