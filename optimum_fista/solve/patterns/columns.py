"""Whole columns: groups of consecutive inputs that all rows keep, or that all rows lose."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from optimum_fista.solve.linalg import row_blocks
from optimum_fista.solve.pattern import Scope, SparsityPattern
from optimum_fista.solve.selection import keep_largest


@dataclass(frozen=True)
class Columns(SparsityPattern):
    """Groups of `width` consecutive columns, each kept or removed for all rows at once.

    An input that no row reads need not be made: whole channels of an MLP are columns of its down projection, and
    key-value groups with their query heads are groups of columns of the attention's output projection.

    The number of groups kept is exact. `Columns(0.25)` keeps the whole number that is nearest to 75% of the groups;
    `Columns.keeping(7, 9, 64)` keeps 7 of 9 groups of 64 columns.

    Attributes:
        sparsity: Share of the groups that is removed, in [0, 1).
        width: Consecutive columns that are kept or removed together.
        groups: Groups of the matrices that the pattern fits; `None`: any number.
    """

    width: int = 1
    groups: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity={self.sparsity!r}: pass the share of the columns to remove, in [0, 1).")
        for name in ("width", "groups"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value!r}: pass a whole number of at least 1.")

    @classmethod
    def keeping(cls, kept: int, groups: int, width: int = 1) -> Self:
        """The pattern that keeps exactly `kept` of `groups` groups of `width` columns."""
        if not 0 < kept <= groups:
            raise ValueError(f"kept={kept!r} of {groups} groups: pass a whole number from 1 to {groups}.")
        return cls(1 - kept / groups, width=width, groups=groups)

    @classmethod
    def read(cls, text: str, sparsity: float | None, scope: Scope) -> Self | None:  # noqa: ARG003, the text says it
        """The pattern of `"columns:0.25"`, or of `"columns:0.25x64"` with a width.

        `"columns:7of9x64"` keeps exactly 7 of 9 groups of 64 columns.
        """
        found = re.fullmatch(r"columns:(?:(\d+)of(\d+)|([\d.]+(?:e-\d+)?))(?:x(\d+))?", text)
        if found is None:
            return None
        kept, groups, share, width = found.groups()
        try:
            if share is None:
                return cls.keeping(int(kept), int(groups), int(width or 1))
            return cls(float(share), scope, int(width or 1))
        except ValueError as error:
            raise ValueError(f"pattern={text!r}: {error}") from None

    @property
    def text(self) -> str:
        """What `read` takes."""
        width = f"x{self.width}" if self.width > 1 else ""
        if self.groups is not None:
            return f"columns:{self.groups_kept(self.groups)}of{self.groups}{width}"
        return f"columns:{self.sparsity!r}{width}"

    @property
    def column_width(self) -> int:  # type: ignore[override]
        """`width`."""
        return self.width

    def groups_kept(self, groups: int) -> int:
        """Groups that are kept of so many; 0 if the share leaves none."""
        return round((1 - self.sparsity) * groups)

    def require_shape(self, shape: tuple[int, int], name: str = "weight") -> None:
        """Check that the columns are whole groups, and that some of them are kept."""
        groups, rest = divmod(shape[1], self.width)
        if rest:
            raise ValueError(
                f"{name} has {shape[1]} columns, which groups of {self.width} do not divide: choose a width that "
                f"divides {shape[1]}, or exclude this operator."
            )
        if self.groups is not None and groups != self.groups:
            raise ValueError(
                f"{name} has {groups} groups of {self.width} columns, not {self.groups} as {self} has: count the "
                "groups of every operator, or pass a share such as 'columns:0.25'."
            )
        if self.groups_kept(groups) == 0:
            raise ValueError(
                f"{name} has {groups} groups of {self.width} columns, and {self} keeps none: pass a share of at most "
                f"{1 - 1 / groups:g}."
            )

    def num_kept(self, shape: tuple[int, int]) -> int:
        """Exact number of weights kept in a matrix of `shape` [out, in]."""
        return shape[0] * self.width * self.groups_kept(shape[1] // self.width)

    def mask(self, scores: Tensor) -> Tensor:
        """Keep the groups with the largest sums of scores over all rows."""
        return self._mask_of_sums([scores[rows].sum(0, dtype=torch.float64) for rows in row_blocks(scores)], scores)

    def mask_of(self, matrix: Tensor) -> Tensor:
        """Keep the groups with the largest norms, without a copy of the whole matrix."""
        return self._mask_of_sums(
            [matrix[rows].square().sum(0, dtype=torch.float64) for rows in row_blocks(matrix)], matrix
        )

    def _mask_of_sums(self, parts: list[Tensor], matrix: Tensor) -> Tensor:
        shape = (matrix.shape[0], matrix.shape[1])
        self.require_shape(shape)
        sums = torch.stack(parts).sum(0).view(1, -1, self.width).sum(-1)
        kept = keep_largest(sums, self.groups_kept(sums.numel()))
        return kept.repeat_interleave(self.width, dim=1).repeat(shape[0], 1)

    def proximal_step(self, matrix: Tensor, threshold: float) -> Tensor:
        """Group soft-thresholding: a group `W_g` times `max(1 - threshold / ||W_g||_F, 0)`."""
        norms = self._norms(matrix)
        factors = (1 - threshold / norms.clamp_min(torch.finfo(norms.dtype).tiny)).clamp_min(0)
        return matrix * factors.repeat_interleave(self.width)

    def dual_norm(self, matrix: Tensor) -> float:
        """The largest norm of a group."""
        return float(self._norms(matrix).max())

    def _norms(self, matrix: Tensor) -> Tensor:
        """Frobenius norms of the groups, [groups]."""
        return torch.linalg.vector_norm(matrix.unflatten(1, (-1, self.width)), dim=(0, 2))

    def violation(self, mask: Tensor) -> str | None:
        """Say how `mask` [out, in] (True = kept) breaks the pattern; `None` if it keeps it."""
        broken = super().violation(mask)
        if broken:
            return broken
        split = torch.nonzero(mask != mask[:1, :: self.width].repeat_interleave(self.width, dim=1))
        if not len(split):
            return None
        row, column = split[0].tolist()
        return f"row {row} and row 0 do not agree on the group of {self.width} columns that holds column {column}"
