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
3. ADMM (as in ALPS, arXiv 2406.07831) runs in stages of fixed `rho`. A stage takes one inverse for all operators
   that share the inputs. In these coordinates a `rho` a little above 1 exchanges the kept weights that are worth
   exchanging, and nine iterations are enough (docs/solver.md says why). In a run that rounds products
   (`products_rounded_to`), those of the iterations are rounded (`SplitState.round_products`). Then only the first
   stage takes a factorisation, and the inverses of the others are made of the first (`_RoundedInverses`).
4. The kept weights are refitted by conjugate gradients on the ridge problem. Their steps are rounded, too
   (`ObsAdmm._refit_by_rounded_steps`). Whole columns are refitted exactly (`refit_columns`), with a ridge of their own
   unless `ridge` is given.

`_Surgeon` makes the coordinates `W'` of step 2:

    W = W' B^T S.

`S` is diagonal. `B` is block-diagonal if columns are removed in groups, otherwise the identity. In these coordinates
the matrices of the problem are

    B^T S G_r S B    instead of G,
    C_r S B          instead of C.

A matrix is called `point` while ADMM changes it (`SplitState`).

Groups of operators are solved together if their operators have equal shapes, as those of the experts of a mixture have
(`ObsAdmm.prune_groups`). So all matrices here are stacks: the first dimension are the groups, each with its own Gram
matrix. A group that is solved alone is a stack of one. torch computes the matrices of a stack one after the other, but
in one call, which takes less time if they are small. On a CPU all have the same bits as alone if they have an even
number of inputs (`solve.linalg`).

ALPS lets `rho` grow over about 40 iterations until the mask settles. Here the coordinates show which `rho` compares
kept and removed weights correctly, so that nine iterations reach nearly the error of ALPS in a third of the time
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
    add_upper_half,
    damped_choleskys,
    damped_inverse,
    diagonal_blocks,
    diagonals,
    dtype_of_rounded_products,
    fill_lower_half,
    inverse_in_place,
    line_to_other_rho,
    rounded_in_place,
    row_blocks,
    stacked,
)
from optimum_fista.solve.method import (
    MemoryFactors,
    MethodDefaults,
    ProblemGroup,
    PrunedOperator,
    PruningMethod,
    register,
    reported_error,
)
from optimum_fista.solve.methods.admm import SplitState
from optimum_fista.solve.pattern import SparsityPattern
from optimum_fista.solve.problem import InputStatistics, LayerProblem
from optimum_fista.solve.refit import descend, refit_columns, refit_stack

# By how much `rho` may grow from the first stage to the last one if products are rounded. The inverse of the last stage
# then has an error of 1.2% of `1 / rho` (`line_to_other_rho`).
_LARGEST_GROWTH = 2.0
# With more stages than these no products are rounded. Each stage rounds the inverse of the last one again, and in the
# end its changes are too small to be seen.
_MOST_ROUNDED_STAGES = 10


@register
@dataclass(frozen=True)
class ObsAdmm(PruningMethod):
    """Splitting (ADMM) in coordinates where magnitude is the optimal-brain-surgeon saliency, then a refit.

    The docstring of the module has the steps.

    Besides the problem, it needs one matrix of the operators' shape and one of the Gram matrix's, in float32, masks of
    a byte a weight, and four blocks of rows (`solve.linalg.row_blocks`). Rounded products need half a matrix of the
    operators' shape besides, and another block.
    """

    # `r` above; None: `1.5 * inputs / calibration tokens`, within [0.003, 0.5] (docs/solver.md). The fewer tokens an
    # input has, the more of the Gram matrix is noise.
    ridge: float | None = None
    # Each with one inverse. With more than ten, iterations round no products.
    stages: int = 3
    # Of each stage.
    iterations: int = 3
    # Of the first stage.
    first_rho: float = 1.0
    # Of the last stage; from stage to stage `rho` grows by the same factor. If it is more than twice the first one,
    # iterations round no products, and each stage takes a factorisation.
    last_rho: float = 1.5
    # Conjugate-gradient steps on the final mask; 0 refits nothing.
    refit_iterations: int = 3
    name: ClassVar[str] = "obs_admm"
    defaults: ClassVar[MethodDefaults] = MethodDefaults(
        error_correction="intra", allocation="fisher"
    )
    # With so few zeros the errors of the attention are small, and to correct them it would have to run twice.
    defaults_up_to_half: ClassVar[MethodDefaults | None] = MethodDefaults(
        error_correction="after_attention", allocation="fisher"
    )
    # A removed decoder layer, or a head, is an error that later layers can make up for.
    defaults_of_parts: ClassVar[MethodDefaults | None] = MethodDefaults(
        error_correction=0.5, residual_correction=1.0, allocation="fisher"
    )
    # With rounded products: half a weight matrix and a block of rows more than without (`SplitState.round_products`).
    memory_factors: ClassVar[MemoryFactors | None] = MemoryFactors(
        gram_matrices=1.1, weight_matrices=1.7, row_blocks=4.8
    )

    def __post_init__(self) -> None:
        """Refuse options that make no sense (ValueError); the fields of `self` are the options."""
        self.require_at_least({"stages": 1, "iterations": 1, "refit_iterations": 0})
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

        `problems` have the same `InputStatistics`, and `patterns` has one pattern for each. No tensor of `problems`
        changes; their statistics keep their decoupled form (`LayerProblem.decoupled`).
        """
        return self.prune_groups([ProblemGroup(problems, patterns)])[0]

    def prune_groups(self, groups: Sequence[ProblemGroup]) -> list[list[PrunedOperator]]:
        """Prune groups of operators; those whose operators have equal shapes are solved together.

        The operators of a group share their inputs, so they share factorisations. Patterns of whole columns may have
        groups of several columns, and each such width has coordinates of its own. If the widths differ in a group, its
        operators are pruned one by one.

        No tensor of the problems changes. Their statistics keep a second form, in which nearly dead inputs are
        uncorrelated with all others (`LayerProblem.decoupled`): it is made at the first use.
        """
        results: dict[int, list[PrunedOperator]] = {}  # by the number of the group
        numbers_by_form: dict[object, list[int]] = {}
        for number, (problems, patterns) in enumerate(groups):
            widths = {_width_of(pattern) for pattern in patterns}
            if len(widths) > 1:
                results[number] = [
                    self.prune(problem, pattern)
                    for problem, pattern in zip(problems, patterns, strict=True)
                ]
                continue
            forms_of_problems = tuple(map(_form_of, problems))
            have_whole_columns = tuple(pattern.whole_columns for pattern in patterns)
            form = (tuple(widths), forms_of_problems, have_whole_columns)
            numbers_by_form.setdefault(form, []).append(number)

        for numbers in numbers_by_form.values():
            together = self._prune_alike([groups[number] for number in numbers])
            results.update(zip(numbers, together, strict=True))
        return [results[number] for number in range(len(groups))]

    def _prune_alike(self, groups: Sequence[ProblemGroup]) -> list[list[PrunedOperator]]:
        """Prune groups whose operators have equal shapes, and patterns of one width, in stacks of their matrices.

        A matrix in a stack belongs to one of the groups; an operator with a number in its group has a stack with those
        of the same number in the other groups. No tensor of the problems changes. The fields of `self` are the options:
        numbers of stages, of `iterations` in a stage and of steps of the refit, and the `ridge`, if the user has given
        one.
        """
        # problems and patterns by the number of the operator in its group, then by group
        problems = [
            [problem.decoupled() for problem in problems_of_operator]
            for problems_of_operator in zip(*(group.problems for group in groups), strict=True)
        ]
        patterns = list(zip(*(group.patterns for group in groups), strict=True))
        statistics = [problem.statistics for problem in problems[0]]
        grams = stacked([of_group.gram for of_group in statistics])  # [groups, in, in]
        # Step 1. G_r and C_r are not kept: they are made of G, C and `r diag(G)` wherever they are needed.
        penalties = stacked(  # r diag(G), [groups, in]
            [of_group.diagonal * self._ridge_of(of_group) for of_group in statistics]
        )
        surgeon, messages = _Surgeon.of(grams, penalties, _width_of(patterns[0][0]))  # step 2
        dense_weights = []  # [groups, out, in] of each operator
        states = []
        for of_operator in problems:
            weights = stacked([problem.weight for problem in of_operator])
            targets = stacked([problem.target for problem in of_operator])
            state = SplitState(
                # makes some rows of the targets when they are needed, in place of matrices of their size
                target=partial(surgeon.target_with_ridge, targets, weights),
                point=surgeon.scaled_weight(weights),
            )
            dense_weights.append(weights)
            states.append(state)

        # Steps 3 and 4 write their results into `states`: the masks, and the points, which are weights in the
        # coordinates W'.
        self._split(states, patterns, dense_weights, surgeon, grams)
        # step 4 for states without whole columns
        num_steps = self._refit_by_rows(states, patterns, surgeon, grams)

        of_operators = [
            self._pruned_operators(
                problems_of_operator,
                patterns_of_operator,
                state,
                surgeon,
                iterations=[self.stages * self.iterations + steps for steps in num_steps],
                messages=messages,
            )
            for problems_of_operator, patterns_of_operator, state in zip(
                problems, patterns, states, strict=True
            )
        ]
        # by group, then by operator
        return [list(of_group) for of_group in zip(*of_operators, strict=True)]

    def _pruned_operators(
        self,
        problems: Sequence[LayerProblem],
        patterns: Sequence[SparsityPattern],
        state: SplitState,
        surgeon: _Surgeon,
        *,
        iterations: Sequence[int],
        messages: Sequence[str],
    ) -> list[PrunedOperator]:
        """Bring the weights of a stack back to the coordinates of their problems; whole columns are refitted there.

        `state` has the masks and, without whole columns, the refitted weights in the coordinates of `surgeon`; its
        points are overwritten. All other lists are by operator of the stack: `iterations` are those of ADMM and of the
        refit, and `messages` those of the factorisation, or empty. `self.refit_iterations` of 0 turns off all refits,
        and `self.ridge` is the user's ridge, or `None`.
        """
        assert state.mask is not None
        # Also the refit of whole columns, which takes no iterations.
        refits_columns = patterns[0].whole_columns and self.refit_iterations > 0
        if refits_columns:
            # Step 4 of whole columns. All rows of a mask are equal.
            refits = [
                refit_columns(problem, mask[0], self.ridge)
                for problem, mask in zip(problems, state.mask, strict=True)
            ]
            weights = [weight for weight, _ in refits]
            messages_of_refits = [message for _, message in refits]
        else:
            # W = W' B^T S
            sparse = state.point.mul_(state.mask)
            unscaled = surgeon.times_blocks(sparse, transposed=True)
            weights = list(unscaled.mul_(surgeon.scale[:, None]))
            messages_of_refits = [""] * len(problems)

        operators = []
        for number, problem in enumerate(problems):
            # Both factorisations may have needed help, and say the same: each message once, in this order.
            both = dict.fromkeys([messages[number], messages_of_refits[number]])
            message = "; ".join(filter(None, both))
            operator = PrunedOperator(
                weight=weights[number],
                mask=state.mask[number],
                fit_error=reported_error(problem, weights[number]),
                iterations=iterations[number],
                converged=not message,
                message=message,
            )
            operators.append(operator)
        return operators

    def _ridge_of(self, statistics: InputStatistics) -> float:
        """`r` of step 1: the option `ridge`, or a number that falls with the tokens of `statistics` per input."""
        if self.ridge is not None:
            return self.ridge
        inputs_per_token = len(statistics.gram) / max(1, statistics.num_tokens)
        return min(0.5, max(0.003, 1.5 * inputs_per_token))  # within [0.003, 0.5]

    def _split(
        self,
        states: Sequence[SplitState],
        patterns: Sequence[Sequence[SparsityPattern]],
        dense_weights: Sequence[Tensor],
        surgeon: _Surgeon,
        grams: Tensor,
    ) -> None:
        """Run the stages of ADMM, step 3, for all operators; changes the point, mask and rho of each of `states`.

        The options are those of `self`: `rho` grows from `first_rho` to `last_rho` by the same factor from stage to
        stage, and each stage has the number of iterations in `iterations`. If `rho` grows by more than a factor of
        `_LARGEST_GROWTH`, or in more than `_MOST_ROUNDED_STAGES` stages, no products are rounded here.

        Args:
            states: One for each operator.
            patterns: Those of each state, one for each group.
            dense_weights: `W` [groups, out, in] of each state.
            surgeon: The coordinates of step 2.
            grams: `G` [groups, in, in].

        All but `states` stay as they are.
        """
        num_steps = max(1, self.stages - 1)  # from stage to stage; a single stage has `first_rho`
        growth = (self.last_rho / self.first_rho) ** (1 / num_steps)
        rhos = [self.first_rho * growth**stage for stage in range(self.stages)]

        inverses: _ExactInverses | _RoundedInverses = _ExactInverses(surgeon, grams)
        dtype = dtype_of_rounded_products()
        are_near = self.stages == 1 or self.last_rho <= _LARGEST_GROWTH * self.first_rho
        if dtype is not None and are_near and self.stages <= _MOST_ROUNDED_STAGES:
            exact = inverses.begin_stage(rhos[0])
            for state, weights in zip(states, dense_weights, strict=True):
                dense = partial(surgeon.scaled_weight, weights)
                state.round_products(dense, exact, rhos[0], dtype)
            inverses = _RoundedInverses.of(exact, rhos[0], dtype)
            del exact  # `inverses` has its memory

        for rho in rhos:
            inverse = inverses.begin_stage(rho)
            for state, patterns_of_state in zip(states, patterns, strict=True):
                for _ in range(self.iterations):
                    state.iterate(inverse, rho, patterns_of_state)
            del inverse  # if it is exact, its memory is free before the next one is made
        for state in states:
            state.rounded = None  # the refit needs nothing of it

    def _refit_by_rows(
        self,
        states: Sequence[SplitState],
        patterns: Sequence[Sequence[SparsityPattern]],
        surgeon: _Surgeon,
        grams: Tensor,
    ) -> list[int]:
        """Refit the kept weights, step 4; a state whose patterns have whole columns stays as it is.

        Changes the points of `states`, which are weights in the coordinates of `surgeon`. Each state gives its targets
        `C_r S B` by blocks of rows (`state.target`). `patterns` has the patterns of each state, one for each group.
        `grams` are `G` [groups, in, in], which stay as they are.

        Blocks of rows are refitted one after the other, in `self.refit_iterations` steps at most. Returns for each
        group the number of steps of the block that took most, which is 0 if nothing is refitted.
        """
        refitted = [
            state
            for state, patterns_of_state in zip(states, patterns, strict=True)
            if not patterns_of_state[0].whole_columns
        ]
        if not refitted:
            return [0] * len(grams)
        ridge_grams = surgeon.gram_with_ridge(grams)  # B^T S G_r S B
        rounded_dtype = dtype_of_rounded_products()
        if rounded_dtype is not None:
            return self._refit_by_rounded_steps(refitted, ridge_grams, rounded_dtype)

        steps = [torch.zeros(len(grams), dtype=torch.int64, device=grams.device)]
        for state in refitted:
            assert state.mask is not None
            for rows in row_blocks(state.point):
                _, steps_of_rows = refit_stack(
                    ridge_grams,
                    state.target(rows),
                    state.point[:, rows],
                    state.mask[:, rows],
                    max_iterations=self.refit_iterations,
                    in_place=True,  # the result is in `state.point`
                )
                steps.append(steps_of_rows)
        return _most_steps(steps)

    def _refit_by_rounded_steps(
        self, states: Sequence[SplitState], grams: Tensor, dtype: torch.dtype
    ) -> list[int]:
        """Refit as `_refit_by_rows` does, with products that are rounded to `dtype`, but for that of the start.

        The first residual `C - W G` is a small difference of large numbers, so its product is exact. It is rounded
        afterwards, when only its own digits can be lost. It takes as much memory as `D` did in the iterations, which is
        free by now (`SplitState.round_products`). Then the Gram matrices are rounded in place, and `refit_iterations`
        steps multiply with these.

        `grams` are `B^T S G_r S B` [groups, in, in], which are overwritten.
        """
        residuals = []
        for state in states:
            assert state.mask is not None
            residual = torch.empty_like(state.point, dtype=dtype)
            for rows in row_blocks(state.point):
                weight = state.point[:, rows].mul_(state.mask[:, rows].view(torch.uint8))
                residual[:, rows] = state.target(rows).baddbmm_(weight, grams, alpha=-1)
            residuals.append(residual)

        rounded_grams = rounded_in_place(grams, dtype)
        steps = [torch.zeros(len(grams), dtype=torch.int64, device=grams.device)]
        for state, residual in zip(states, residuals, strict=True):
            assert state.mask is not None
            for rows in row_blocks(state.point):
                steps_of_rows = descend(
                    rounded_grams,
                    residual[:, rows].to(state.point.dtype),
                    state.point[:, rows],  # overwritten
                    state.mask[:, rows],
                    max_iterations=self.refit_iterations,
                )
                steps.append(steps_of_rows)
        return _most_steps(steps)


def _most_steps(steps: Sequence[Tensor]) -> list[int]:
    """Return for each group the most steps that a block of its rows took; `steps` has those of a block by group."""
    most: list[int] = torch.stack(list(steps)).amax(0).tolist()  # one wait for the device
    return most


@dataclass(frozen=True)
class _ExactInverses:
    """Makes `(G_r + rho I)^-1` for each stage by a factorisation, in the coordinates of `surgeon`."""

    surgeon: _Surgeon
    grams: Tensor  # `G` [groups, in, in]

    def begin_stage(self, rho: float) -> Tensor:
        """Return the inverse for the penalty `rho` of a stage, a new stack [groups, in, in]."""
        # The factorisation overwrites what it gets, so each stage makes it again from G.
        return damped_inverse(self.surgeon.gram_with_ridge(self.grams), rho)


@dataclass
class _RoundedInverses:
    """Makes `(G_r + rho I)^-1` of later stages from that of the first one, if products are rounded.

    With the inverse `X` of the first stage, that of a later one is nearly `a X + b X^2` (`line_to_other_rho`). So all
    stages take one factorisation, and one product of `X` with itself, of which half is computed.
    """

    inverse: Tensor  # of the current stage, [groups, in, in]; the next stage overwrites it
    square: Tensor  # memory for `X^2`, of the same shape
    first_rho: float  # of `X`
    # `a` and `b` of `inverse`; None: `X^2` is not computed yet
    line: tuple[float, float] | None = None

    @classmethod
    def of(cls, exact: Tensor, rho: float, dtype: torch.dtype) -> Self:
        """Round the inverse of the first stage to `dtype`; `exact` [groups, in, in] is overwritten.

        `rho` is the penalty of the first stage.
        """
        # The memory of `exact` has room for two rounded matrices: the first half is for the inverse, the second for its
        # square.
        rounded = rounded_in_place(exact, dtype)
        second_half = exact.view(-1).view(dtype)[exact.numel() : 2 * exact.numel()]
        return cls(inverse=rounded, square=second_half.view(exact.shape), first_rho=rho)

    def begin_stage(self, rho: float) -> Tensor:
        """Return the rounded inverse for the penalty `rho` of the next stage, which overwrites that of the last one."""
        if self.line is None:
            if rho == self.first_rho:
                return self.inverse
            for inverse, square in zip(self.inverse, self.square.zero_(), strict=True):
                add_upper_half(square, inverse)  # X^T X, and X is symmetric
                fill_lower_half(square)
            self.line = (1.0, 0.0)  # X itself

        # The next matrix a' X + b' X^2, made of the last one, a X + b X^2, and X^2.
        a, b = self.line
        self.line = line_to_other_rho(self.first_rho, rho)
        next_a, next_b = self.line
        ratio = next_a / a
        for rows in row_blocks(self.inverse):
            # in float32, so that an entry is rounded once in each stage
            part = self.inverse[:, rows].float().mul_(ratio)
            part.add_(self.square[:, rows], alpha=next_b - ratio * b)
            self.inverse[:, rows] = part
        return self.inverse


def _width_of(pattern: SparsityPattern) -> int:
    """Columns that a pattern removes together; 1 for single weights."""
    return pattern.width if pattern.whole_columns else 1


def _form_of(problem: LayerProblem) -> tuple[torch.Size, torch.dtype, torch.device]:
    """What is equal for the matrices of a stack."""
    return problem.weight.shape, problem.weight.dtype, problem.weight.device


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

    All of this is for each Gram matrix of a stack.
    """

    scale: Tensor  # `S`, [grams, in]
    penalty: Tensor  # `r diag(G)`, [grams, in]
    # Of `B`, lower triangular, [grams, in / width, width, width]; None: columns stand alone.
    blocks: Tensor | None = None

    @classmethod
    def of(cls, grams: Tensor, penalty: Tensor, width: int) -> tuple[Self, list[str]]:
        """Make the coordinates for groups of `width` columns; 1: columns stand alone.

        Args:
            grams: `G` [grams, in, in], the Gram matrices without the ridge, which stay as they are.
            penalty: `r diag(G)` [grams, in], the ridge.
            width: Columns in a group.

        Returns:
            The coordinates.
            For each Gram matrix, the message of a factorisation that needed help (`damped_cholesky`), or an empty one.
        """
        # Factorised with unit diagonal, in which damping is a fraction of the diagonal, and rounding is mild.
        unit = cls(scale=(diagonals(grams) + penalty).rsqrt(), penalty=penalty)
        factors, messages = damped_choleskys(partial(unit.gram_with_ridge, grams))
        inverse = inverse_in_place(factors)
        if width == 1:
            # [G_r^-1]_jj = s_j^2 [(s G_r s)^-1]_jj.
            scale = diagonals(inverse).sqrt() * unit.scale
            return cls(scale=scale, penalty=penalty), messages
        # B B^T are the diagonal blocks of the inverse.
        blocks = torch.linalg.cholesky(diagonal_blocks(inverse, width))
        return cls(scale=unit.scale, penalty=penalty, blocks=blocks), messages

    def gram_with_ridge(self, grams: Tensor) -> Tensor:
        """Return the Gram matrices with their ridge in these coordinates, a new stack [grams, in, in]:

            B^T S G_r S B,   G_r = G + r diag(G).

        `grams` are `G` [grams, in, in], which stay as they are. The coordinates have the diagonal of `S`
        (`self.scale`), the blocks of `B` (`self.blocks`; `None` if `B` is the identity), and the ridge `r diag(G)`
        (`self.penalty`).
        """
        copy = grams.clone(memory_format=torch.contiguous_format)
        diagonals(copy).add_(self.penalty)
        copy = copy.mul_(self.scale[:, None]).mul_(self.scale[:, :, None])
        if self.blocks is None:
            return copy
        # `times_blocks` multiplies by B from the right. With the symmetric X = S G_r S, this is (X B)^T B = B^T X B.
        return self.times_blocks(self.times_blocks(copy).mT).contiguous()

    def target_with_ridge(self, targets: Tensor, weights: Tensor, rows: slice) -> Tensor:
        """Return some rows of the targets with their ridge in these coordinates, a new stack [grams, rows, in]:

            C_r S B,   C_r = C + r W diag(G).

        `targets` are `C`, and `weights` are `W`, both [grams, out, in].
        """
        target = torch.addcmul(targets[:, rows], weights[:, rows], self.penalty[:, None])
        return self.times_blocks(target.mul_(self.scale[:, None]))

    def scaled_weight(self, weights: Tensor, rows: slice = slice(None)) -> Tensor:
        """Return some rows of weights in these coordinates, a new stack [grams, rows, in]: `W' = W S^-1 B^-T`.

        `weights` are `W` [grams, out, in]. `self.scale` is the diagonal of `S`, and `self.blocks` has the blocks of
        `B`, [grams, in / width, width, width], or is `None` if `B` is the identity.
        """
        scaled = weights[:, rows] / self.scale[:, None]
        if self.blocks is None:
            return scaled
        # [grams, groups, out, width]
        groups = scaled.unflatten(-1, self.blocks.shape[1:3]).transpose(1, 2)
        # The blocks of B are lower triangular. This solves X B^T = W S^-1 for X, block by block.
        solved = torch.linalg.solve_triangular(self.blocks.mT, groups, upper=True, left=False)
        return solved.transpose(1, 2).flatten(-2)

    def times_blocks(self, matrices: Tensor, transposed: bool = False) -> Tensor:
        """Return `matrices @ B`, or `@ B^T`, a new stack [grams, rows, in]; `matrices` itself if `B` is the identity.

        `transposed` asks for the product with `B^T`. The blocks of `B` are `self.blocks` [grams, in / width, width,
        width]. If that is `None`, `B` is the identity.
        """
        if self.blocks is None:
            return matrices
        factors = self.blocks.mT if transposed else self.blocks
        # [grams, groups, rows, width]
        groups = matrices.unflatten(-1, self.blocks.shape[1:3]).transpose(1, 2)
        return (groups @ factors).transpose(1, 2).flatten(-2)
