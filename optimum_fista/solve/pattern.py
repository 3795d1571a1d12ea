"""The interface of sparsity patterns: scores in, a mask of the weights to keep out; masks packed to bits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import numpy as np
import torch
from torch import Tensor

from optimum_fista.solve.linalg import row_blocks
from optimum_fista.solve.proximal_gradient import soft_threshold

Scope = Literal["matrix", "row"]


@dataclass(frozen=True)
class SparsityPattern(ABC):
    """Which weights of a matrix may be kept together.

    To add one, write `optimum_fista/solve/patterns/NAME.py` and name the class in `solve.patterns.PATTERNS`.

    Attributes:
        sparsity: Fraction of zeros in [0, 1).
        scope: `"matrix"` shares the zeros over the whole matrix, `"row"` gives each row (output) the same number.
            Without meaning if `fixed`.
        fixed: Whether the pattern itself sets the number of zeros of every row.
        orders_inputs: Whether `best_order` finds an order of inputs in which more is kept.
        unit: Consecutive weights of a row that are kept or removed together, if rows differ.
        column_width: Consecutive columns that all rows keep or lose together; `None` if rows differ.
    """

    sparsity: float
    scope: Scope = "matrix"
    fixed: ClassVar[bool] = True
    orders_inputs: ClassVar[bool] = False
    unit: ClassVar[int] = 1
    column_width: ClassVar[int | None] = None

    @classmethod
    @abstractmethod
    def read(cls, text: str, sparsity: float | None, scope: Scope) -> Self | None:
        """The pattern that `text` stands for; `None` if it has another form, a ValueError if it makes no sense."""

    @property
    @abstractmethod
    def text(self) -> str:
        """What `read` takes, for reports."""

    def __str__(self) -> str:
        """For people."""
        return self.text

    @property
    def n_of_m(self) -> tuple[int, int] | None:
        """`(n, m)` if n of every m consecutive weights of a row are kept: packed masks may then be shorter."""
        return None

    def best_order(self, scores: Tensor) -> Tensor:
        """An order of inputs, int64 [in], in which `scores` [out, in] keep much; theirs unless `orders_inputs`."""
        return torch.arange(scores.shape[1], device=scores.device)

    def at(self, sparsity: float) -> Self:  # noqa: ARG002, patterns that are not fixed use it
        """The same pattern with another fraction of zeros; itself if `fixed`."""
        return self

    def group_size(self, most: int) -> int:
        """Consecutive weights of a row among which the kept ones are counted; `most` if there are no groups."""
        return most

    def require_shape(self, shape: tuple[int, int], name: str = "weight") -> None:  # noqa: B027, most shapes fit
        """Refuse a matrix of `shape` [out, in] that the pattern does not fit."""

    @abstractmethod
    def num_kept(self, shape: tuple[int, int]) -> int:
        """Exact number of weights kept in a matrix of `shape` [out, in]."""

    @abstractmethod
    def mask(self, scores: Tensor) -> Tensor:
        """Keep the weights with the largest sum of scores.

        Ties are broken by position, so that the count is exact.

        Args:
            scores: [out, in], any floating dtype, finite. Scores of weights that are kept together are added, so
                they should be additive: squared saliencies. Methods with roots of them call `mask_of`.

        Returns:
            Boolean mask [out, in], True = kept, with exactly `num_kept` True values.
        """

    def mask_of(self, matrix: Tensor) -> Tensor:
        """Mask of the nearest matrix in the pattern: `mask(matrix ** 2)` for `matrix` [out, in].

        A weight of its own needs no square, which could make a tie of two numbers.
        """
        return torch.cat([self.mask(matrix[part].abs()) for part in row_blocks(matrix)])

    def mask_of_columns(self, scores: Tensor, left: int, columns: int) -> Tensor:  # noqa: ARG002, see `at`
        """`mask` of a part of whole groups, so that the counts of all parts add up to `num_kept`.

        Args:
            scores: [out, width].
            left: The part's first column in the matrix.
            columns: Columns of the matrix.
        """
        return self.mask(scores)

    def proximal_step(self, matrix: Tensor, threshold: float) -> Tensor:
        """Proximal step of `threshold` times the norm whose penalty makes zeros in this pattern: the l1 norm."""
        return soft_threshold(matrix, threshold)

    def dual_norm(self, matrix: Tensor) -> float:
        """Dual of that norm. With a penalty of `dual_norm(C)` and above, all weights of the solution are zero."""
        return float(matrix.abs().max())

    def violation(self, mask: Tensor) -> str | None:
        """Say how `mask` [out, in] (True = kept) breaks the pattern; `None` if it keeps it."""
        kept, expected = int(mask.sum()), self.num_kept((mask.shape[0], mask.shape[1]))
        if kept != expected:
            return f"keeps {kept} weights, but {self} of {tuple(mask.shape)} keeps exactly {expected}"
        if self.scope == "row" and not self.fixed:
            counts, expected = mask.sum(1), self.num_kept((1, mask.shape[1]))
            if len(wrong := torch.nonzero(counts != expected)):
                return f"row {int(wrong[0])} keeps {int(counts[wrong[0]])} weights, not {expected}"
        return None


def pack_mask(mask: Tensor) -> Tensor:
    """Pack a boolean mask of any shape to uint8 [ceil(numel / 8)], row-major, lowest bit first, 1 = kept."""
    bits = np.packbits(mask.detach().cpu().numpy().reshape(-1), bitorder="little")
    return torch.from_numpy(bits)


def unpack_mask(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Inverse of `pack_mask`."""
    count = int(np.prod(shape))
    if packed.dtype != torch.uint8 or packed.numel() != (count + 7) // 8:
        raise ValueError(
            f"packed has {packed.numel()} values of {packed.dtype}: a mask of shape {tuple(shape)} needs "
            f"{(count + 7) // 8} of torch.uint8."
        )
    bits = np.unpackbits(packed.cpu().numpy(), count=count, bitorder="little")
    return torch.from_numpy(bits.astype(bool)).view(shape)
