"""4:8 in pairs: of eight consecutive inputs, seen as four pairs, two pairs are kept whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from optimum_fista.solve.linalg import row_blocks
from optimum_fista.solve.pattern import Scope
from optimum_fista.solve.patterns.n_of_m import NOfM
from optimum_fista.solve.selection import keep_largest_in_groups

_TEXT = "4:8-pairs"


@dataclass(frozen=True)
class Pairs(NOfM):
    """The pattern of Blackwell's sparse FP4 tensor cores (PTX ISA, `mma.sp` with `.e2m1`: 4:8 in pairs).

    The score of a pair is the sum of the scores of its two weights. For squared saliencies that is what removing both
    costs if the two are independent: squared errors of magnitudes `w_j^2`, of Wanda `w_j^2 ||x_j||^2` and of optimal
    brain surgeon `w_j^2 / [H^-1]_jj` add up, without the product of the two weights. Magnitudes themselves do not.
    """

    n: int = 4
    m: int = 8
    orders_inputs: ClassVar[bool] = False
    unit: ClassVar[int] = 2

    @classmethod
    def read(cls, text: str, sparsity: float | None, scope: Scope) -> Self | None:  # noqa: ARG003, it is 0.5
        """The pattern of `"4:8-pairs"`."""
        return cls(0.5, scope) if text == _TEXT else None

    @property
    def text(self) -> str:
        """`"4:8-pairs"`."""
        return _TEXT

    def mask(self, scores: Tensor) -> Tensor:
        """Keep the two pairs with the largest sums of every group."""
        self.require_shape((scores.shape[0], scores.shape[1]), "scores")
        sums = scores.unflatten(1, (-1, 2)).sum(-1)
        return keep_largest_in_groups(sums, self.n // 2, self.m // 2).repeat_interleave(2, dim=1)

    def mask_of(self, matrix: Tensor) -> Tensor:
        """Mask of the nearest matrix in the pattern."""
        return torch.cat([self.mask(matrix[part].square()) for part in row_blocks(matrix)])

    def violation(self, mask: Tensor) -> str | None:
        """Say how `mask` [out, in] (True = kept) breaks the pattern; `None` if it keeps it."""
        broken = super().violation(mask)
        if broken:
            return broken
        split = torch.nonzero(mask[:, ::2] != mask[:, 1::2])
        if not len(split):
            return None
        row, pair = split[0].tolist()
        return f"row {row} keeps only one weight of the pair of inputs {2 * pair} and {2 * pair + 1}"
