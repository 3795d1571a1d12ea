"""Unstructured sparsity: any weights, counted over the matrix or in every row."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Self

from torch import Tensor

from optimum_fista.solve.pattern import Scope, SparsityPattern
from optimum_fista.solve.selection import keep_largest, keep_largest_in_rows


@dataclass(frozen=True)
class Unstructured(SparsityPattern):
    """A fraction of zeros anywhere in the matrix, or in every row (`scope`)."""

    fixed: ClassVar[bool] = False

    @classmethod
    def read(cls, text: str, sparsity: float | None, scope: Scope) -> Self | None:
        """50% zeros if `sparsity` is not given."""
        return cls(0.5 if sparsity is None else float(sparsity), scope) if text == "unstructured" else None

    @property
    def text(self) -> str:
        """`"unstructured"`."""
        return "unstructured"

    def __str__(self) -> str:
        """For people: `"50% unstructured"`."""
        return f"{100 * self.sparsity:g}% unstructured"

    def at(self, sparsity: float) -> Self:
        """The same pattern with another fraction of zeros."""
        return replace(self, sparsity=sparsity)

    def num_kept(self, shape: tuple[int, int]) -> int:
        """Exact number of weights kept in a matrix of `shape` [out, in]."""
        rows, columns = shape
        if self.scope == "row":
            return rows * (columns - round(self.sparsity * columns))
        return rows * columns - round(self.sparsity * rows * columns)

    def mask(self, scores: Tensor) -> Tensor:
        """Keep the largest scores of the matrix, or of every row."""
        return self.mask_of_columns(scores, 0, scores.shape[1])

    def mask_of(self, matrix: Tensor) -> Tensor:
        """Keep the largest magnitudes, without a copy of the whole matrix."""
        if self.scope == "row":
            return super().mask_of(matrix)
        return keep_largest(matrix, self.num_kept((matrix.shape[0], matrix.shape[1])), magnitude=True)

    def mask_of_columns(self, scores: Tensor, left: int, columns: int) -> Tensor:
        """The zeros of a part are rounded from both of its ends, so that all parts add up."""
        by_row = self.scope == "row"
        rows, width = (1 if by_row else scores.shape[0]), scores.shape[1]
        zeros = rows * columns - self.num_kept((rows, columns))
        removed = round(zeros * (left + width) / columns) - round(zeros * left / columns)
        return (keep_largest_in_rows if by_row else keep_largest)(scores, rows * width - removed)
