"""ADMM between a least-squares problem and the set of sparse matrices.

ADMM looks for weights that are the least-squares solution `W` and a matrix `Z` in the pattern at once. It takes turns:
solve for `W` close to `Z`, project `W` on the pattern, and sum up their difference in the *dual* `V`. The number `rho`
says how strongly `W` is drawn to `Z`. `G` and `C` are the Gram matrix of the inputs and the target of a `LayerProblem`,
which has the dense weights of one linear operator. A `SparsityPattern` makes the mask.

Operators of one shape are solved together: `SplitState` has a *stack* of their matrices, [operators, out, in], and each
operator has an inverse and a pattern of its own.

ALPS and the default method `obs_admm` also use the iteration of `SplitState`, each in its own coordinates and with its
own schedule of rho. The method here is that of Boza (arXiv 2401.02938), written as in its paper.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from optimum_fista.solve.linalg import (
    as_factors,
    damped_inverse,
    mean_damping,
    row_blocks,
    stacked,
)
from optimum_fista.solve.method import (
    MemoryFactors,
    PrunedOperator,
    PruningMethod,
    register,
    reported_error,
    require_damping,
)
from optimum_fista.solve.pattern import SparsityPattern
from optimum_fista.solve.problem import LayerProblem


@dataclass(frozen=True)
class RoundedIterations:
    """The dense weights and their change, from which an iteration with a rounded product computes the next `W`.

    Symbols are those of `SplitState.round_products`.
    """

    # Makes some rows of `W0`: a new tensor [operators, rows, in] of a slice.
    dense: Callable[[slice], Tensor]
    change: Tensor  # `D` [operators, out, in], rounded
    rho: float  # `rho0`

    def update(self, rows: slice, difference: Tensor, inverse: Tensor, rho: float) -> Tensor:
        """Return some rows of the next `W`, a new tensor [operators, rows, in]:

            W0 + D + ((rho0 - rho) D + rho (Z - W0) - V) (G + rho I)^-1.

        Args:
            rows: Which rows.
            difference: `Z - V / rho` of these rows, [operators, rows, in]; overwritten.
            inverse: `(G + rho I)^-1` [operators, in, in], in the dtype of rounded products.
            rho: The penalty parameter of this iteration.
        """
        dense = self.dense(rows)
        change = self.change[:, rows]
        difference.sub_(dense).mul_(rho)  # rho (Z - W0) - V
        difference.add_(change, alpha=self.rho - rho)
        product = torch.bmm(difference.to(inverse.dtype), inverse)
        return dense.add_(change).add_(product)


@dataclass
class SplitState:
    """Iterates of a stack of operators: the sparse iterate `Z` and the dual `V` in one matrix, told apart by a mask.

    ADMM projects `P = W + V / rho` on the pattern: `Z` is `P` where the mask keeps it, and `V / rho` is what is left.
    """

    # Makes some rows of `C`, [operators, rows, in] of a slice, which stay as they are.
    target: Callable[[slice], Tensor]
    # `P` [operators, out, in]; the dense weights at the start. Changed in place.
    point: Tensor
    # Of `Z`, True = kept; None before the first projection, where `Z = P` and `V = 0`.
    mask: Tensor | None = None
    # The penalty parameter that `point` was made with.
    rho: float = 1.0
    # What rounded products need (`round_products`); None: no product is rounded.
    rounded: RoundedIterations | None = None

    def round_products(
        self, dense: Callable[[slice], Tensor], inverse: Tensor, rho: float, dtype: torch.dtype
    ) -> None:
        """Prepare iterations whose products are rounded to `dtype`; sets `self.rounded`.

        The entries of `C` are far larger than those of the weights, above all for strong inputs. Rounded to 8
        significant bits, `C` would lose the weights. So the update of `W` (`iterate`) is written with matrices of the
        size of the weights: the dense ones, `W0`, and their change `D` in an update that begins with `Z = W0` and
        `V = 0`, with a `rho` called `rho0`:

            D  =  (C + rho0 W0) (G + rho0 I)^-1 - W0.

        For every `rho`, the update is then

            W  <-  W0 + D + ((rho0 - rho) D + rho (Z - W0) - V) (G + rho I)^-1.

        This equals the usual one, because of what the first equation says of `C`:

            C  =  (W0 + D) (G + rho0 I) - rho0 W0.

        Only `D` and the last product are rounded. An error of 0.4% in these changes exchanges weights that are about
        equally good, and a refit makes up for it.

        Args:
            dense: Makes some rows of `W0`: a new tensor [operators, rows, in] of a slice.
            inverse: `(G + rho0 I)^-1` of each operator, [operators, in, in], not rounded.
            rho: This `rho0`.
            dtype: What to round to.
        """
        change = torch.empty_like(self.point, dtype=dtype)
        for rows in row_blocks(self.point):
            of_rows = dense(rows)
            right_side = torch.add(self.target(rows), of_rows, alpha=rho)  # C + rho0 W0
            change[:, rows] = torch.bmm(right_side, inverse).sub_(of_rows)
        self.rounded = RoundedIterations(dense, change, rho)

    def iterate(self, inverse: Tensor, rho: float, patterns: Sequence[SparsityPattern]) -> None:
        """Do one ADMM iteration; changes `point`, `mask` and `rho`.

        ADMM minimizes for each operator, over weights `W` that equal a matrix `Z` in the pattern,

            1/2 <W G, W> - <W, C>.

        An iteration updates three matrices [out, in] (ALPS, arXiv 2406.07831, eqs. 3-5):

            W  <-  (C - V + rho Z) (G + rho I)^-1
            Z  <-  project(W + V / rho)
            V  <-  V + rho (W - Z)

        `self.point` [operators, out, in] holds two of them in one matrix. After an iteration it is

            P = W + V / rho,    with the `rho` of that iteration.

        Its entries are those of `Z` if `self.mask` is True there, and those of `V / rho` if it is False. Before the
        first iteration there is no mask, `Z` is the point, and `V` is zero.

        The first update takes one block of rows at a time, for which `self.target` makes these rows of `C`. After
        `round_products` it is written in another way, with a rounded product. The projection needs all rows.

        Args:
            inverse: `(G + rho I)^-1` of each operator, [operators, in, in]; after `round_products` in its dtype.
            rho: The penalty parameter of this iteration; it may differ from that of the last one (`self.rho`).
            patterns: Choose the masks of `Z`, one for each operator.
        """
        for rows in row_blocks(self.point):
            point = self.point[:, rows]  # becomes Z + V / rho, with the new rho
            if self.mask is None:
                ratio = 0.0
                dual = torch.zeros_like(point)
            else:
                # V / rho of the last iteration; times `ratio` with the new rho, because V itself stays.
                ratio = self.rho / rho
                dual = as_factors(~self.mask[:, rows], point.dtype).mul_(point)
            has_other_rho = ratio not in (0.0, 1.0)
            if has_other_rho:
                # Z + V / rho with the new rho; Z stays, because the dual is zero there.
                point.add_(dual, alpha=ratio - 1)
            # `point` is Z + V / rho by now; this makes Z - V / rho.
            difference = torch.sub(point, dual, alpha=2 * ratio)
            next_point = dual  # the same memory, which becomes W + V / rho, the next `P`
            if self.rounded is None:
                # C - V + rho Z, in the memory of `difference`
                right_side = torch.add(self.target(rows), difference, alpha=rho, out=difference)
                next_point.baddbmm_(right_side, inverse, beta=ratio)
                del right_side
            else:
                next_point.mul_(ratio).add_(self.rounded.update(rows, difference, inverse, rho))
            del difference
            point.copy_(next_point)
        # The old mask and the last block go before the next mask is made.
        self.mask = None
        del dual, next_point
        # The projection, and the update of V: what the mask removes of P is the next V / rho.
        self.mask = stacked(
            [pattern.mask(point) for pattern, point in zip(patterns, self.point, strict=True)]
        )
        self.rho = rho


def unit_diagonal(problem: LayerProblem, damping: float) -> tuple[Tensor, Tensor, Tensor]:
    """Damp the Gram matrix of a problem, and scale its inputs so that the diagonal is 1 (`LayerProblem.with_ridge`).

    The damping is a ridge of `damping` times the mean of the diagonal; for nearly dead inputs it is the same fraction
    of their own energy (`InputStatistics.energy_ratios`). `problem` stays as it is.

    Returns:
        The new `G` [in, in].
        The new `C` [out, in].
        The scale [in]: weights are divided by it to get those of the new coordinates.
    """
    statistics = problem.statistics
    return problem.with_ridge(mean_damping(statistics.diagonal, damping) * statistics.energy_ratios)


@register
@dataclass(frozen=True)
class Admm(PruningMethod):
    """ADMM in coordinates of unit Gram diagonal with one inverse, `rho = 1`, and a mask that is then frozen."""

    # Fraction of the mean Gram diagonal added to the diagonal.
    damping: float = 0.1
    # ADMM's penalty parameter in units of the Gram diagonal.
    rho: float = 1.0
    max_iterations: int = 20
    # Before the mask is frozen.
    ramp_iterations: int = 15
    name: ClassVar[str] = "admm"
    memory_factors: ClassVar[MemoryFactors | None] = MemoryFactors(
        gram_matrices=2.0, weight_matrices=4.1, row_blocks=1.8
    )

    def __post_init__(self) -> None:
        """Refuse options that make no sense (ValueError); the fields of `self` are the options."""
        self.require_at_least({"max_iterations": 1, "ramp_iterations": 0})
        require_damping(self.damping)
        if not self.rho > 0:
            raise ValueError(f"rho={self.rho!r}: pass a positive number.")

    def prune(self, problem: LayerProblem, pattern: SparsityPattern) -> PrunedOperator:
        """Prune one operator to `pattern`: returns new weights with their mask.

        No tensor of `problem` changes; its statistics keep their decoupled form (`LayerProblem.decoupled`).

        Symbols are those of the paper (Algorithm 1), matrices [out, in]: `W` is the least-squares iterate, `Z` the
        sparse one, and `U = V / rho` the scaled dual. The mask keeps the largest entries of `|W + U|`. In the first
        `ramp_iterations` the mask is chosen again in every iteration k. The sparsity of an unstructured pattern then
        rises to its end value s on a cubic ramp (the released code skips the ramp):

            s_k = s (1 - (1 - k / ramp_iterations)^3)

        After that the mask is frozen. The fields of `self` are the options, such as `damping`, a share of the mean of
        the diagonal of the Gram matrix.
        """
        problem = problem.decoupled()
        # in coordinates in which the Gram matrix has a diagonal of 1; `scale` [in] leads to them
        gram, target, scale = unit_diagonal(problem, self.damping)
        inverse = damped_inverse(gram, self.rho)  # of `gram + rho I`; `gram` is overwritten by it
        Z = problem.weight / scale  # the dense weights in scaled coordinates
        U = Z.new_zeros(Z.shape)
        mask = pattern.mask(Z)
        for k in range(1, self.max_iterations + 1):
            W = (target + self.rho * (Z - U)) @ inverse  # the W step
            P = W + U  # of which Z is the projection
            if k <= self.ramp_iterations:
                # The cubic schedule: most zeros come in the first iterations.
                ramp = 1 - (1 - k / self.ramp_iterations) ** 3
                # A fixed pattern has no other sparsity: it is chosen anew as it is.
                ramped = pattern
                if not pattern.fixed:
                    ramped = replace(pattern, sparsity=pattern.sparsity * ramp)
                mask = ramped.mask(P)
            Z = P * mask  # the projection
            U = P - Z  # U + W - Z
        # With fewer iterations than the ramp has, Z keeps too many weights until now.
        final_mask = pattern.mask(Z)
        weight = Z * final_mask * scale  # back from scaled coordinates
        return PrunedOperator(
            weight=weight,
            mask=final_mask,
            fit_error=reported_error(problem, weight),
            iterations=self.max_iterations,
        )
