"""Sparsity patterns: which weights of a matrix belong together, and how many of these groups stay.

A pattern is described by data: the shape of its groups (`width`, `whole_columns`), which groups compete (`span`,
`scope`) and the share of groups that is removed (`sparsity`). Counts, masks and the check
of a mask follow from this data, so that a file of `patterns/` only reads and writes the pattern's name.
"""

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import numpy as np
import torch
from torch import Tensor

from optimum_fista.solve.linalg import row_blocks
from optimum_fista.solve.selection import keep_largest, keep_largest_in_groups, keep_largest_in_rows

Scope = Literal["matrix", "row"]


@dataclass(frozen=True)
class SparsityPattern(ABC):
    """Groups of weights that are kept or removed together, and the share of groups that is removed.

    To add one, write `optimum_fista/solve/patterns/NAME.py` with a direct subclass: `parse_pattern` finds it.
    Groups of several rows, but not all rows, need their own `require_shape`, `num_kept`, `mask` and `violation`, too.
    DSnoT, which swaps within rows, can't prune to them.
    """

    sparsity: float  # fraction of zeros in [0, 1): the share of the groups that is removed
    # "matrix" lets all groups of a matrix compete, "row" those of each row (output); not used if groups compete in
    # spans or have whole columns
    scope: Scope = "matrix"
    width: int = 1  # consecutive inputs whose weights form a group
    span: int | None = (
        None  # consecutive inputs of a row whose groups compete, the m of n:m; None: see `scope`
    )
    whole_columns: ClassVar[bool] = False  # whether a group has the weights of all rows
    fixed: ClassVar[bool] = (
        True  # whether the pattern's name determines its sparsity, so that budgets can't change it
    )

    @classmethod
    @abstractmethod
    def read(cls, text: str, sparsity: float | None, scope: Scope) -> Self | None:
        """Make the pattern that `text` stands for; `None` if it has another form, a ValueError if it makes no sense."""

    @abstractmethod
    def __str__(self) -> str:
        """The text that `read` takes."""

    def require_shape(self, shape: tuple[int, ...], name: str = "weight") -> None:
        """Refuse a matrix of `shape` [out, in] that the pattern does not fit."""
        if shape[1] % (self.span or self.width):
            advice = f"choose a pattern whose groups divide {shape[1]}, 'unstructured', or exclude this operator"
            raise ValueError(
                f"{name} has rows of {shape[1]} inputs, which {self} does not divide: {advice}."
            )

    def num_kept(self, shape: tuple[int, ...]) -> int:
        """Exact number of weights kept in a matrix of `shape` [out, in]."""
        contests, rivals, removed = self._contests(*shape)
        return contests * (rivals - removed) * self.width * (shape[0] if self.whole_columns else 1)

    def _contests(self, rows: int, columns: int) -> tuple[int, int, int]:
        """Number of sets in which groups compete, groups in each set, and how many of these are removed."""
        groups = columns // self.width  # of a row
        if self.whole_columns:  # the kept groups are rounded, as those of `PartShare`
            return 1, groups, groups - round((1 - self.sparsity) * groups)
        contests, rivals = (rows, groups) if self.scope == "row" else (1, rows * groups)
        if self.span is not None:
            contests, rivals = rows * (columns // self.span), self.span // self.width
        return contests, rivals, round(self.sparsity * rivals)

    def mask(
        self, matrix: Tensor, *, squared: bool = False, within: tuple[int, int] | None = None
    ) -> Tensor:
        """Mask [out, in], True = kept, of the nearest matrix in the pattern: the groups with the largest norms stay.

        Scores of a group are sums of squares. For squared saliencies this is the cost of the removal if the weights
        are independent. Single weights are compared without squaring, because two squares could be rounded to a tie.
        Ties are broken by position, so that exactly `num_kept` weights are kept.

        `matrix` has weights, or roots of saliencies, finite; `squared`: squares already, so nonnegative saliencies.
        `within` is `(first column, columns)` if it is a part of a matrix, made of whole groups. The zeros are shared
        over the parts so that they add up.
        """
        rows, columns = matrix.shape
        self.require_shape(matrix.shape)
        contests, rivals, removed = self._contests(rows, columns)
        if within is not None and self.span is None:
            left, whole = within
            zeros = self._contests(rows, whole)[2]
            # Rounded at both ends of the part, so that rounding errors of the parts cancel.
            removed = round(zeros * (left + columns) / whole) - round(zeros * left / whole)
        kept = rivals - removed

        def scores(part: slice) -> Tensor:
            block = matrix[part]
            if self.width == 1 and not self.whole_columns:
                return block  # the selections compare absolute values
            squares = block if squared else block.square()
            if self.whole_columns:  # in float64: sums over thousands of rows decide
                squares = squares.sum(0, keepdim=True, dtype=torch.float64)
            return squares.unflatten(1, (-1, self.width)).sum(-1)  # [rows, in] -> [rows, groups]

        if self.whole_columns:
            sums = torch.cat([scores(part) for part in row_blocks(matrix)]).sum(0, keepdim=True)
            return keep_largest(sums, kept).repeat_interleave(self.width, dim=1).repeat(rows, 1)
        if contests == 1:
            all_scores = (
                matrix
                if self.width == 1
                else torch.cat([scores(part) for part in row_blocks(matrix)])
            )
            mask = keep_largest(all_scores, kept)  # of single weights without a copy of the matrix
        elif self.span is None:
            mask = torch.cat(
                [keep_largest_in_rows(scores(part), kept) for part in row_blocks(matrix)]
            )
        else:
            mask = torch.cat(
                [keep_largest_in_groups(scores(part), kept, rivals) for part in row_blocks(matrix)]
            )
        return mask if self.width == 1 else mask.repeat_interleave(self.width, dim=1)

    def violation(self, mask: Tensor) -> str | None:
        """Say how `mask` [out, in] (True = kept) breaks the pattern; `None` if it keeps it."""
        rows, columns = mask.shape
        kept, expected = int(mask.sum()), self.num_kept(mask.shape)
        if kept != expected:
            return (
                f"keeps {kept} weights, but {self} of {tuple(mask.shape)} keeps exactly {expected}"
            )
        if self.width > 1 or self.whole_columns:  # a device is asked once more for it
            # The first weight of each group speaks for all of them; that of row 0 if groups have whole columns.
            first = (mask[:1] if self.whole_columns else mask)[:, :: self.width]
            torn = torch.nonzero(mask != first.repeat_interleave(self.width, dim=1))
            if len(torn):
                row, column = torn[0].tolist()
                return f"row {row}, column {column} differs from the first weight of its group"
        contests = self._contests(rows, columns)[0]
        if contests == 1:
            return None
        counts = mask.reshape(contests, -1).sum(1)  # [out, in] -> [contests, weights]
        wrong = torch.nonzero(counts != expected // contests).flatten().tolist()
        if not wrong:
            return None
        row, group = divmod(wrong[0], contests // rows)
        where = f"row {row}" if self.span is None else f"row {row}, group {group}"
        return f"{where} keeps {int(counts[wrong[0]])} of {mask.numel() // contests} weights"


@dataclass(frozen=True)
class Unstructured(SparsityPattern):
    """A fraction of zeros anywhere in the matrix, or in every row (`scope`): each weight is a group of its own."""

    fixed: ClassVar[bool] = False

    @classmethod
    def read(cls, text: str, sparsity: float | None, scope: Scope) -> Self | None:
        """50% zeros if `sparsity` is not given."""
        return (
            cls(0.5 if sparsity is None else float(sparsity), scope)
            if text == "unstructured"
            else None
        )

    def __str__(self) -> str:
        return "unstructured"


def parse_pattern(
    text: str = "unstructured", sparsity: float | None = None, scope: Scope = "matrix"
) -> SparsityPattern:
    """Build a pattern from its text, which one of the patterns in `solve/patterns` reads; inverse of `str`."""
    if scope not in ("matrix", "row"):
        raise ValueError(f"scope={scope!r}: pass 'matrix' or 'row'.")
    if sparsity is not None and (isinstance(sparsity, bool) or not 0 <= float(sparsity) < 1):
        raise ValueError(
            f"sparsity={sparsity!r} is outside [0, 1): pass the fraction of zeros, such as 0.5."
        )
    before, comma, after = str(text).partition(",")
    if comma:
        advice = f"Prune with {before!r}, and then prune the smaller model with {after!r}"
        raise ValueError(f"pattern={text!r}: one run removes parts or sets zeros. {advice}.")
    kinds = SparsityPattern.__subclasses__()  # also those that users have defined
    found = next(
        (pattern for kind in kinds if (pattern := kind.read(str(text), sparsity, scope))), None
    )
    if found is None:
        usual = "'unstructured', '2:4' or 'channels:0.25' (`optimum-fista prune --help` names all patterns)"
        if n_of_m := re.fullmatch(
            r"(\d+)of(\d+)", str(text)
        ):  # so the program itself names folders
            usual = f"'{n_of_m[1]}:{n_of_m[2]}'"
        elif re.fullmatch(r"0?\.\d+", str(text)):
            usual = f"sparsity={text} (--sparsity {text}) for this share of zeros"
        raise ValueError(f"pattern={text!r}: pass {usual}.")
    if sparsity is not None and abs(float(sparsity) - found.sparsity) > 1e-9:
        why = f"sparsity={sparsity!r} and pattern={text!r} disagree: {text} means a sparsity of {found.sparsity:g}"
        raise ValueError(
            f"{why}. Pass only one of them, and for parts and zeros prune the smaller model again."
        )
    return found


def pack_mask(mask: Tensor) -> Tensor:
    """Pack a boolean mask of any shape to uint8 [ceil(numel / 8)], row-major, lowest bit first, 1 = kept."""
    bits = np.packbits(mask.detach().cpu().numpy().reshape(-1), bitorder="little")
    return torch.from_numpy(bits)


def unpack_mask(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Inverse of `pack_mask`."""
    count = int(np.prod(shape))
    if packed.dtype != torch.uint8 or packed.numel() != (count + 7) // 8:
        needed = f"a mask of shape {tuple(shape)} needs {(count + 7) // 8} of torch.uint8"
        raise ValueError(f"packed has {packed.numel()} values of {packed.dtype}: {needed}.")
    bits = np.unpackbits(packed.cpu().numpy(), count=count, bitorder="little")
    return torch.from_numpy(bits.astype(bool)).view(shape)
