"""The splitting method: ADMM between a least-squares problem and the set of sparse matrices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from optimum_fista.solve.linalg import cholesky_in_place, inverse_in_place, mean_damping, row_blocks
from optimum_fista.solve.pattern import SparsityPattern
from optimum_fista.solve.problem import LayerProblem


@dataclass
class SplitState:
    """Iterates of one operator: the sparse iterate `Z` and the dual `V` in one matrix, which a mask tells apart.

    ADMM projects `P = W + V / rho` on the pattern: `Z` is `P` where the mask keeps it, and `V / rho` is what is left.

    Attributes:
        target: Makes some rows of `C` [out, in].
        point: `P` [out, in]; the dense weights at the start.
        mask: Mask of `Z`, True = kept; `None` before the first projection, where `Z = P` and `V = 0`.
        rho: The penalty parameter that `point` was made with.
    """

    target: Callable[[slice], Tensor]
    point: Tensor
    mask: Tensor | None = None
    rho: float = 1.0

    @property
    def sparse(self) -> Tensor:
        """`Z`, the iterate that keeps the pattern, [out, in]; dense at the start."""
        return self.point if self.mask is None else self.point * self.mask

    def iterate(self, inverse: Tensor, rho: float, pattern: SparsityPattern) -> None:
        """One ADMM iteration with `inverse = (G + rho I)^-1` [in, in].

        It minimizes `1/2 <W G, W> - <W, C>` over `W = Z`, Z in the pattern (ALPS, arXiv 2406.07831, eqs. 3-5):
        `W = (C - V + rho Z) (G + rho I)^-1`, `Z = project(W + V / rho)`, `V += rho (W - Z)`. A block of rows at a
        time but for the projection.
        """
        for rows in row_blocks(self.point):
            point = self.point[rows]  # becomes Z + V / rho, with the new rho
            if self.mask is None:
                ratio, dual = 0.0, torch.zeros_like(point)
            else:
                # V / rho of the last iteration; times `ratio` with the new rho, because V itself stays.
                ratio, dual = self.rho / rho, point * ~self.mask[rows]
            if ratio not in (0.0, 1.0):
                point.add_(dual, alpha=ratio - 1)
            # C - V + rho Z, the right-hand side of the W step.
            wanted = torch.sub(point, dual, alpha=2 * ratio)
            torch.add(self.target(rows), wanted, alpha=rho, out=wanted)
            # W + V / rho, the next `P`, in the memory of the dual.
            dual.addmm_(wanted, inverse, beta=ratio)
            del wanted
            point.copy_(dual)
        # The old mask and the last block go before the next mask is made.
        self.mask = None
        del dual
        # The projection, and the update of V: what the mask removes of P is the next V / rho.
        self.mask = pattern.mask_of(self.point)
        self.rho = rho


def damped_inverse(gram: Tensor, rho: float) -> Tensor:
    """`(G + rho I)^-1` of a symmetric positive semidefinite [in, in] matrix, contiguous, rho > 0, by Cholesky.

    The matrix is used up: the inverse takes its memory.
    """
    gram.diagonal().add_(rho)
    factor, failed = cholesky_in_place(gram)
    if failed:
        raise torch.linalg.LinAlgError(f"a Gram matrix of {gram.shape[0]} inputs plus {rho:g} is not positive definite")
    return inverse_in_place(factor)


def unit_diagonal(problem: LayerProblem, damping: float) -> tuple[Tensor, Tensor, Tensor]:
    """Damp `G` and `C` alike and scale the inputs so that the damped Gram matrix has unit diagonal.

    The ridge of `ridge_problem` is `damping * mean(diag G)`. For nearly dead inputs it is the same fraction of their
    own energy (`InputStatistics.energy_ratios`). It returns what `ridge_problem` does.
    """
    statistics = problem.statistics
    return ridge_problem(problem, mean_damping(statistics.diagonal, damping) * statistics.energy_ratios)


def ridge_problem(problem: LayerProblem, amounts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A ridge towards the dense weights, and inputs scaled so that the Gram matrix with it has unit diagonal.

    With the amounts `d` [in], positive, `G_d = G + diag(d)`, `C_d = C + W diag(d)`, and `s_j = 1 / sqrt([G_d]_jj)`;
    scaled weights are `W_ij / s_j`.

    Returns:
        `s_i s_j [G_d]_ij` [in, in], `[C_d]_ij s_j` [out, in], and `s` [in].
    """
    scale = (problem.statistics.diagonal + amounts).rsqrt()
    gram = problem.gram.clone()
    gram.diagonal().add_(amounts)
    gram.mul_(scale).mul_(scale[:, None])
    target = torch.addcmul(problem.target, problem.weight, amounts).mul_(scale)
    return gram, target, scale
