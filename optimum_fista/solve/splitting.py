"""The splitting method: ADMM between a least-squares problem and the set of sparse matrices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from optimum_fista.solve.pattern import SparsityPattern


@dataclass
class SplitState:
    """Iterates of one operator.

    Attributes:
        target: `C` [out, in].
        sparse: `Z`, the iterate that keeps the pattern, [out, in]; dense at the start.
        dual: `V`, the unscaled dual variable, [out, in].
        mask: Mask of `sparse`, True = kept; `None` before the first projection.
    """

    target: Tensor
    sparse: Tensor
    dual: Tensor
    mask: Tensor | None = None

    @classmethod
    def start(cls, target: Tensor, weight: Tensor) -> SplitState:
        """Start from the dense weights with a zero dual; takes `weight` over."""
        return cls(target, weight, torch.zeros_like(weight))

    def iterate(self, inverse: Tensor, rho: float, pattern: SparsityPattern) -> None:
        """One ADMM iteration with `inverse = (G + rho I)^-1` [in, in].

        It minimizes `1/2 <W G, W> - <W, C>` over `W = Z`, Z in the pattern (ALPS, arXiv 2406.07831, eqs. 3-5):
        `W = (C - V + rho Z) (G + rho I)^-1`, `Z = project(W + V / rho)`, `V += rho (W - Z)`.
        """
        weight = self.sparse.mul_(rho).add_(self.target).sub_(self.dual) @ inverse
        self.dual.add_(weight, alpha=rho)
        torch.div(self.dual, rho, out=self.sparse)
        self.mask = pattern.mask(torch.abs(self.sparse, out=weight))
        self.sparse.mul_(self.mask)
        self.dual.sub_(self.sparse, alpha=rho)


def damped_inverse(gram: Tensor, rho: float) -> Tensor:
    """`(G + rho I)^-1` of a symmetric positive semidefinite [in, in] matrix, rho > 0, by Cholesky.

    Raises:
        torch.linalg.LinAlgError: If the factorisation fails.
    """
    damped = gram.clone()
    damped.diagonal().add_(rho)
    factor = torch.linalg.cholesky(damped)
    return torch.cholesky_inverse(factor, out=damped)


def split_in_stages(
    gram: Tensor,
    states: Sequence[SplitState],
    patterns: Sequence[SparsityPattern],
    rhos: Sequence[float],
    iterations: int,
) -> None:
    """Run ADMM on operators that share a Gram matrix, with one factorisation for all of them a stage.

    Args:
        gram: `G` [in, in].
        states: One state an operator, changed in place.
        patterns: Their patterns.
        rhos: Penalty parameter of every stage, rising: the mask moves freely at first and settles at the end.
        iterations: Iterations a stage.
    """
    for rho in rhos:
        inverse = damped_inverse(gram, rho)
        for state, pattern in zip(states, patterns, strict=True):
            for _ in range(iterations):
                state.iterate(inverse, rho, pattern)
