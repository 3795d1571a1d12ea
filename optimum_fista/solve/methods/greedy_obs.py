"""Greedy optimal brain surgeon for whole columns (SlimGPT, arXiv 2412.18110; ZipLM, arXiv 2302.04089).

Both papers update the whole inverse after every column. Here 64 updates are done together, as a product of matrices.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from optimum_fista.solve.linalg import damped_cholesky, diagonal_blocks, inverse_in_place
from optimum_fista.solve.method import PrunedOperator, PruningMethod, register
from optimum_fista.solve.pattern import SparsityPattern
from optimum_fista.solve.problem import LayerProblem
from optimum_fista.solve.refit import refit_columns

_PENDING = 64  # columns removed between two updates of whole matrices, so that these are products of matrices


@register
@dataclass(frozen=True)
class GreedyObs(PruningMethod):
    """Remove the group of columns with the least increase of the error, let the others compensate for it, and repeat.

    1. A small ridge towards the dense weights, `H = G + d diag(G)`, and the best weights `W = (C + d W diag(G)) H^-1`.
    2. Removing group g and re-optimising all other columns increases the squared error by
       `tr(W_g ([H^-1]_gg)^-1 W_g^T)` (ZipLM). The group with the least increase is removed:
       `W -= W_g ([H^-1]_gg)^-1 [H^-1]_g,:` and `H^-1 -= [H^-1]_:,g ([H^-1]_gg)^-1 [H^-1]_g,:`.
    3. The kept columns are solved for once more (`refit_columns`), so that what the updates lost in float32 decides
       only which columns are kept.

    Both updates have the form `A -= B Z^T` with the same few columns `Z`. They wait until there are 64, and meanwhile
    only the columns and the diagonal that the next step reads are made: the result is the same up to rounding.

    Inputs are scaled so that `H` has unit diagonal. The diagonal of the inverse is then at least 1 for every column
    that is left, and no division is by a small number.
    """

    damping: float = 1e-3  # `d` of step 1; it is small, because a large one hides that columns can replace each other
    ridge: float | None = None  # of step 3, a fraction of the Gram matrix's diagonal; None: `refit_columns` chooses it
    name: ClassVar[str] = "greedy_obs"
    takes_weights: ClassVar[bool] = False  # rows that differ would need an inverse each

    def __post_init__(self) -> None:
        if not self.damping > 0:
            raise ValueError(f"damping={self.damping!r}: pass a positive fraction of the diagonal, such as 1e-3.")
        if self.ridge is not None and not self.ridge > 0:
            raise ValueError(f"ridge={self.ridge!r}: pass a positive number, or None.")

    def prune(self, problem: LayerProblem, pattern: SparsityPattern) -> PrunedOperator:
        """Prune one operator to `pattern`, which must be one of whole columns."""
        self.require_pattern(pattern)
        rows, columns = problem.weight.shape
        pattern.require_shape(problem.weight.shape, problem.name)
        problem = problem.decoupled()
        gram, target, _ = problem.with_ridge(problem.statistics.diagonal * self.damping)
        factor, message = damped_cholesky(gram.clone)
        inverse = inverse_in_place(factor)
        count = (columns - pattern.num_kept((1, columns))) // pattern.width
        kept, costs = _remove_groups(inverse, target @ inverse, pattern.width, count)
        if not bool(torch.isfinite(costs).all()):
            raise torch.linalg.LinAlgError(f"{problem.name}: the error of removing a column is NaN or Inf.")
        weight, refit_message = refit_columns(problem, kept, self.ridge)
        message = "; ".join(dict.fromkeys(filter(None, (message, refit_message))))
        mask, error = kept.repeat(rows, 1), problem.fit_error(weight)
        return PrunedOperator(weight, mask, error, count, converged=not message, message=message)


def _remove_groups(inverse: Tensor, weight: Tensor, width: int, count: int) -> tuple[Tensor, Tensor]:
    """Remove `count` groups of `width` columns, one after the other.

    Both matrices are used up. On other devices than the CPU nothing waits for the device. Symbols: the removals that
    are not in the whole matrices yet make them `H^-1 - Z Z^T` and `W - B Z^T`, with columns z and b for each removed
    column; D and N are the diagonal blocks of `H^-1` and of `W^T W`, and always up to date.

    `inverse` is `H^-1` [in, in], and `weight` is `C H^-1` [out, in]. Returns a mask [in], True = kept, and the increase
    of the squared error by every removal, [count].
    """
    rows, columns = weight.shape
    room = max(1, _PENDING // width) * width
    kept = torch.ones(columns // width, dtype=torch.bool, device=weight.device)
    costs = weight.new_empty(count)
    unit = torch.arange(width, device=weight.device)
    weight = weight.mT.contiguous()  # [in, out]: rows of memory are columns of W
    B, Z = weight.new_empty(rows, room), weight.new_empty(columns, room)
    used = 0
    D, N = diagonal_blocks(inverse, width), _inner_products(weight, width)
    for step in range(count):
        increases = _traces(D, N).masked_fill_(~kept, torch.inf)  # step 2 of the class: tr(W_g ([H^-1]_gg)^-1 W_g^T)
        costs[step], group = increases.min(0)
        chosen = group * width + unit
        # Current columns of H^-1 and W: those of the last update of the whole matrices, less what is pending.
        past, factors = Z[:, :used], B[:, :used]
        inverse_columns = inverse.index_select(1, chosen).addmm_(past, past[chosen].mT, alpha=-1)
        weight_columns = weight.index_select(0, chosen).mT.addmm(factors, past[chosen].mT, alpha=-1)
        root = torch.linalg.cholesky_ex(inverse_columns[chosen]).L  # [H^-1]_gg = L L^T
        # z = [H^-1]_:,g L^-T and b = W_g L^-T: then both updates of step 2 are A -= b z^T.
        z = torch.linalg.solve_triangular(root.mT, inverse_columns, upper=True, left=False)
        b = torch.linalg.solve_triangular(root.mT, weight_columns, upper=True, left=False)
        kept.index_fill_(0, group, False)
        Z[:, used : used + width], B[:, used : used + width] = z, b
        used += width
        if used == room:  # all that is pending goes into the whole matrices
            inverse.addmm_(Z, Z.mT, alpha=-1)
            weight.addmm_(Z, B.mT, alpha=-1)
            D, N = diagonal_blocks(inverse, width), _inner_products(weight, width)
            used = 0
            continue
        # (W - b z^T)^T (W - b z^T) = W^T W - f z^T - z f^T + z b^T b z^T with f = W^T b
        f = (weight @ b).addmm_(past, factors.mT @ b, alpha=-1)
        blocks, crossed = z.view(-1, width, width), f.view(-1, width, width)
        D = D - blocks @ blocks.mT
        outer = (crossed - blocks @ (b.mT @ b) / 2) @ blocks.mT
        N = N - outer - outer.mT
    return kept.repeat_interleave(width), costs


def _inner_products(transposed: Tensor, width: int) -> Tensor:
    """Inner products of the columns of each group, [in / width, width, width], of the transpose [in, out]."""
    if width == 1:
        return torch.linalg.vecdot(transposed, transposed).view(-1, 1, 1)
    groups = transposed.unflatten(0, (-1, width))
    return groups @ groups.mT


def _traces(inverse: Tensor, products: Tensor) -> Tensor:
    """`tr(D_g^-1 N_g)` of blocks [groups, width, width], [groups]."""
    if inverse.shape[1] == 1:
        return (products / inverse)[:, 0, 0]
    # Blocks of removed groups are zero up to rounding. Their factors are garbage, which the caller leaves out.
    factor = torch.linalg.cholesky_ex(inverse).L
    return torch.cholesky_solve(products, factor).diagonal(dim1=1, dim2=2).sum(1)
