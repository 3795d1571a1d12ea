"""Sparsity patterns: which weights of a matrix may be kept, and how the largest scores become a mask."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from optimum_fista.solve.blocks import row_blocks
from optimum_fista.solve.selection import keep_largest, keep_largest_in_groups, keep_largest_in_rows

Scope = Literal["matrix", "row"]


@dataclass(frozen=True)
class SparsityPattern:
    """Unstructured sparsity, or n:m (n kept of every m consecutive inputs of a row).

    Attributes:
        sparsity: Fraction of zeros in [0, 1).
        n_of_m: `(n, m)` for an n:m pattern, `None` for unstructured sparsity.
        scope: Unstructured only: `"matrix"` shares the budget over the whole matrix, `"row"` gives each
            row (output) the same number of zeros.
    """

    sparsity: float
    n_of_m: tuple[int, int] | None = None
    scope: Scope = "matrix"

    @classmethod
    def parse(
        cls, pattern: str = "unstructured", sparsity: float | None = None, scope: Scope = "matrix"
    ) -> SparsityPattern:
        """Build a pattern from its text form, `"unstructured"` or `"n:m"`.

        Raises:
            ValueError: If the text is neither, if n >= m, if `sparsity` is outside [0, 1), or if both are
                given and disagree.
        """
        if scope not in ("matrix", "row"):
            raise ValueError(f"scope={scope!r}: pass 'matrix' or 'row'.")
        if sparsity is not None and (isinstance(sparsity, bool) or not 0 <= float(sparsity) < 1):
            raise ValueError(f"sparsity={sparsity!r} is outside [0, 1): pass the fraction of zeros, such as 0.5.")
        if pattern == "unstructured":
            return cls(0.5 if sparsity is None else float(sparsity), None, scope)
        found = re.fullmatch(r"(\d+):(\d+)", str(pattern))
        if found is None:
            raise ValueError(f"pattern={pattern!r}: pass 'unstructured' or 'n:m' such as '2:4'.")
        n, m = int(found[1]), int(found[2])
        if not 0 < n < m:
            raise ValueError(
                f"pattern={pattern!r} keeps {n} of every {m} weights: n must be positive and smaller than m, "
                "such as '2:4' (2 kept of 4)."
            )
        if sparsity is not None and abs(float(sparsity) - (1 - n / m)) > 1e-9:
            raise ValueError(
                f"sparsity={sparsity!r} and pattern={pattern!r} disagree: {pattern} means a sparsity of "
                f"{1 - n / m:g}. Pass only one of them."
            )
        return cls(1 - n / m, (n, m), scope)

    @property
    def text(self) -> str:
        """`"unstructured"` or `"n:m"`, as `parse` takes it."""
        return "unstructured" if self.n_of_m is None else f"{self.n_of_m[0]}:{self.n_of_m[1]}"

    def __str__(self) -> str:
        """For people: `"2:4"` or `"50% unstructured"`."""
        return f"{100 * self.sparsity:g}% unstructured" if self.n_of_m is None else self.text

    def require_shape(self, shape: tuple[int, int], name: str = "weight") -> None:
        """Check that the pattern fits a matrix of `shape` [out, in].

        Raises:
            ValueError: If m does not divide the row length.
        """
        if self.n_of_m is not None and shape[1] % self.n_of_m[1]:
            raise ValueError(
                f"{name} has rows of {shape[1]} inputs, which {self} does not divide: choose a pattern whose "
                f"m divides {shape[1]}, an unstructured sparsity, or exclude this operator."
            )

    def num_kept(self, shape: tuple[int, int]) -> int:
        """Exact number of weights kept in a matrix of `shape` [out, in]."""
        rows, columns = shape
        if self.n_of_m is not None:
            return rows * (columns // self.n_of_m[1]) * self.n_of_m[0]
        if self.scope == "row":
            return rows * (columns - round(self.sparsity * columns))
        return rows * columns - round(self.sparsity * rows * columns)

    def mask(self, scores: Tensor) -> Tensor:
        """Keep the largest scores.

        Ties are broken by position, so that the count is exact.

        Args:
            scores: [out, in], any floating dtype, finite.

        Returns:
            Boolean mask [out, in], True = kept, with exactly `num_kept` True values.

        Raises:
            ValueError: If an n:m pattern does not divide the row length.
        """
        rows, columns = scores.shape
        self.require_shape((rows, columns), "scores")
        if self.n_of_m is not None:
            return keep_largest_in_groups(scores, *self.n_of_m)
        if self.scope == "row":
            return keep_largest_in_rows(scores, self.num_kept((1, columns)))
        return keep_largest(scores, self.num_kept((rows, columns)))

    def mask_of(self, matrix: Tensor) -> Tensor:
        """`mask(matrix.abs())` for `matrix` [out, in], without a copy of the whole matrix where that can be."""
        rows, columns = matrix.shape
        if self.n_of_m is None and self.scope == "matrix":
            return keep_largest(matrix, self.num_kept((rows, columns)), magnitude=True)
        return torch.cat([self.mask(matrix[part].abs()) for part in row_blocks(matrix)])

    def violation(self, mask: Tensor) -> str | None:
        """Say how `mask` [out, in] (True = kept) breaks the pattern; `None` if it keeps it."""
        kept, expected = int(mask.sum()), self.num_kept((mask.shape[0], mask.shape[1]))
        if kept != expected:
            return f"keeps {kept} weights where {self} of {tuple(mask.shape)} keeps exactly {expected}"
        if self.n_of_m is not None:
            counts = mask.view(mask.shape[0], -1, self.n_of_m[1]).sum(-1)
            wrong = torch.nonzero(counts != self.n_of_m[0])
            if len(wrong):
                row, group = wrong[0].tolist()
                return f"row {row}, group {group} keeps {int(counts[row, group])} of {self.n_of_m[1]} weights"
        elif self.scope == "row":
            counts = mask.sum(1)
            wrong = torch.nonzero(counts != expected // mask.shape[0])
            if len(wrong):
                row = int(wrong[0])
                return f"row {row} keeps {int(counts[row])} weights, not {expected // mask.shape[0]}"
        return None
