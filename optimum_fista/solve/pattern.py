"""Sparsity patterns: which weights of a matrix belong together, and how many of these groups stay.

The weights of a *group* are kept or removed together; groups *compete* with each other in a *contest*, of which the
ones with the largest scores stay. A pattern is described by data, the fields of `SparsityPattern`:

- A group has the weights of `width` consecutive inputs in one row, or in all rows if `whole_columns`.
- The groups within `span` consecutive inputs of a row compete, as in n:m with `span` m. Without a span those of a row
  compete (`scope="row"`), or those of the whole matrix (`scope="matrix"`).
- `sparsity` is the share of the groups of a contest that is removed.

In "2:4" a group is one weight (`width` 1). The groups of 4 consecutive inputs compete (`span` 4), and half of them is
removed (`sparsity` 0.5).

Counts, masks and the check of a mask follow from this data, so that a file of `patterns/` only reads and writes the
pattern's name.
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
class _Contests:
    """How the groups of a matrix compete: so many contests, all of equal size."""

    number: int
    groups: int  # in each of them
    removed: int  # of these groups


@dataclass(frozen=True)
class SparsityPattern(ABC):
    """Groups of weights that are kept or removed together, and the share of groups that is removed.

    To add one, write `optimum_fista/solve/patterns/NAME.py` with a direct subclass: `parse_pattern` finds it.
    Groups of several rows, but not all rows, need their own `require_shape`, `num_kept`, `mask` and `violation`, too.
    DSnoT, which swaps within rows, can't prune to them.
    """

    # Fraction of zeros in [0, 1): the share of the groups that is removed.
    sparsity: float
    # "matrix" lets all groups of a matrix compete, "row" those of each row (output); not used if groups compete in
    # spans or have whole columns.
    scope: Scope = "matrix"
    # Consecutive inputs whose weights form a group.
    width: int = 1
    # Consecutive inputs of a row whose groups compete, the m of n:m; None: see `scope`.
    span: int | None = None
    # Whether a group has the weights of all rows.
    whole_columns: ClassVar[bool] = False
    # Whether the pattern's name determines its sparsity, so that budgets can't change it.
    fixed: ClassVar[bool] = True

    @classmethod
    @abstractmethod
    def read(cls, text: str, sparsity: float | None, scope: Scope) -> Self | None:
        """Make the pattern that `text` stands for; `None` if it has another form, a ValueError if it makes no sense."""

    @abstractmethod
    def __str__(self) -> str:
        """The text that `read` takes."""

    def require_shape(self, shape: tuple[int, ...], name: str = "weight") -> None:
        """Refuse a matrix of `shape` [out, in] that the pattern does not fit; `name` is for the message.

        A row must consist of whole groups (`self.width` inputs), or of whole spans (`self.span` inputs, whose groups
        compete) if the pattern has spans.
        """
        inputs_together = self.width if self.span is None else self.span
        if shape[1] % inputs_together:
            raise ValueError(
                f"{name} has rows of {shape[1]} inputs, which {self} does not divide: choose a pattern whose groups "
                f"divide {shape[1]}, 'unstructured', or exclude this operator."
            )

    def num_kept(self, shape: tuple[int, ...]) -> int:
        """Exact number of weights that the pattern keeps in a matrix of `shape` [out, in]."""
        rows, columns = shape
        contests = self._contests(rows, columns)
        kept_groups = contests.number * (contests.groups - contests.removed)
        rows_of_group = rows if self.whole_columns else 1
        return kept_groups * self.width * rows_of_group

    def _contests(self, rows: int, columns: int) -> _Contests:
        """Count the contests of a matrix [rows, columns], the groups in each, and those that it removes.

        `require_shape` has checked that the width, or the span, divides the columns; the width divides the span. The
        fields of `self` are explained in the module's docstring.
        """
        groups_of_row = columns // self.width
        if self.whole_columns:
            # All rows lose a group together, so the matrix is one contest. The number of kept groups is rounded, and
            # not that of removed ones: a run that removes parts of a model (`PartShare`) must count alike. At halves
            # the two differ.
            num_kept = round((1 - self.sparsity) * groups_of_row)
            return _Contests(number=1, groups=groups_of_row, removed=groups_of_row - num_kept)

        if self.span is not None:
            number = rows * (columns // self.span)
            groups = self.span // self.width
        elif self.scope == "row":
            number = rows
            groups = groups_of_row
        else:
            number = 1
            groups = rows * groups_of_row
        return _Contests(number=number, groups=groups, removed=round(self.sparsity * groups))

    def mask(
        self, matrix: Tensor, *, squared: bool = False, within: tuple[int, int] | None = None
    ) -> Tensor:
        """Mask [out, in], True = kept, of the nearest matrix in the pattern: the groups with the largest norms stay.

        Scores of a group are sums of squares. For squared saliencies this is the cost of the removal if the weights
        are independent. Single weights are compared without squaring, because two squares could be rounded to a tie.
        Ties are broken by position, so that exactly `num_kept` weights are kept. `matrix` is only read.

        Args:
            matrix: Weights, or roots of saliencies, finite, [out, in].
            squared: Whether `matrix` has squares already, so nonnegative saliencies.
            within: `(first column, columns)` if `matrix` is a part of a matrix of so many columns, made of whole
                groups. The zeros are shared over the parts so that they add up.
        """
        rows, columns = matrix.shape
        self.require_shape(matrix.shape)
        contests = self._contests(rows, columns)
        removed = contests.removed
        if within is not None and self.span is None:
            first, all_columns = within
            zeros = self._contests(rows, all_columns).removed
            # A part loses the zeros of all columns up to its end, minus those of all columns before it. Both are
            # rounded, so that the parts have the zeros of the whole matrix together.
            zeros_before = round(zeros * first / all_columns)
            zeros_until_end = round(zeros * (first + columns) / all_columns)
            removed = zeros_until_end - zeros_before
        num_kept = contests.groups - removed  # groups of each contest

        # Scores of groups are made for a block of rows at a time, because squares of all weights would be one more
        # matrix.
        if self.whole_columns:
            sums = torch.cat([self._scores(matrix[part], squared) for part in row_blocks(matrix)])
            scores = sums.sum(0, keepdim=True)  # [blocks, groups] -> [1, groups]
            mask_of_groups = keep_largest(scores, num_kept)  # the same for all rows
            return mask_of_groups.repeat_interleave(self.width, dim=1).repeat(rows, 1)

        if contests.number == 1:
            if self.width == 1:  # without a copy of the matrix
                return keep_largest(matrix, num_kept)
            scores = torch.cat([self._scores(matrix[part], squared) for part in row_blocks(matrix)])
            mask = keep_largest(scores, num_kept)
        elif self.span is None:  # each row is a contest
            mask = torch.cat(
                [
                    keep_largest_in_rows(self._scores(matrix[part], squared), num_kept)
                    for part in row_blocks(matrix)
                ]
            )
        else:
            mask = torch.cat(
                [
                    keep_largest_in_groups(
                        self._scores(matrix[part], squared), n=num_kept, m=contests.groups
                    )
                    for part in row_blocks(matrix)
                ]
            )
        # [out, groups] -> [out, in]
        return mask if self.width == 1 else mask.repeat_interleave(self.width, dim=1)

    def _scores(self, block: Tensor, squared: bool) -> Tensor:
        """Scores [rows, groups] of the groups in a block of rows [rows, in]; [1, groups] of whole columns.

        Those of single weights are the block itself: the selections compare absolute values. `block` has weights or
        roots of saliencies, as `mask` gets them; `squared`: whether it has their squares, the saliencies, already.
        """
        if self.width == 1 and not self.whole_columns:
            return block
        squares = block if squared else block.square()
        if self.whole_columns:
            # In float64, because sums over thousands of rows decide.
            squares = squares.sum(0, keepdim=True, dtype=torch.float64)
        return squares.unflatten(1, (-1, self.width)).sum(-1)  # [rows, in] -> [rows, groups]

    def violation(self, mask: Tensor, num_kept: int | None = None) -> str | None:
        """Say how `mask` [out, in] (True = kept) breaks the pattern; `None` if it keeps it.

        `num_kept` is the number of weights that the mask keeps; `None`: they are counted, for which the host waits for
        a device.
        """
        rows, columns = mask.shape
        if num_kept is None:
            num_kept = int(mask.sum())
        expected = self.num_kept(mask.shape)
        if num_kept != expected:
            return f"keeps {num_kept} weights, but {self} of {tuple(mask.shape)} keeps exactly {expected}"

        # Groups of one weight can't be divided, and this check makes the host wait for a device once more.
        if self.width > 1 or self.whole_columns:
            # The first weight of each group speaks for all of them; that of row 0 if groups have whole columns.
            rows_to_compare = mask[:1] if self.whole_columns else mask
            first = rows_to_compare[:, :: self.width].repeat_interleave(self.width, dim=1)
            different = torch.nonzero(mask != first)
            if len(different):
                row, column = different[0].tolist()
                return f"row {row}, column {column} differs from the first weight of its group"

        contests = self._contests(rows, columns)
        if contests.number == 1:
            return None
        # [out, in] -> [contests, weights] -> [contests]
        kept_in_contest = mask.reshape(contests.number, -1).sum(1)
        expected_in_contest = expected // contests.number
        wrong = torch.nonzero(kept_in_contest != expected_in_contest).flatten().tolist()
        if not wrong:
            return None
        first_wrong = wrong[0]
        row, group = divmod(first_wrong, contests.number // rows)
        place = f"row {row}" if self.span is None else f"row {row}, group {group}"
        weights = mask.numel() // contests.number
        return f"{place} keeps {int(kept_in_contest[first_wrong])} of {weights} weights"


@dataclass(frozen=True)
class Unstructured(SparsityPattern):
    """A fraction of zeros anywhere in the matrix, or in every row (`scope`): each weight is a group of its own."""

    fixed: ClassVar[bool] = False

    @classmethod
    def read(cls, text: str, sparsity: float | None, scope: Scope) -> Self | None:
        """Read "unstructured"; it has 50% zeros if `sparsity` is not given."""
        if text != "unstructured":
            return None
        return cls(0.5 if sparsity is None else float(sparsity), scope)

    def __str__(self) -> str:
        return "unstructured"


def parse_pattern(
    text: str = "unstructured", sparsity: float | None = None, scope: Scope = "matrix"
) -> SparsityPattern:
    """Build a pattern from its text, such as "2:4"; inverse of `str`.

    Each subclass of `SparsityPattern` is asked to read it. `sparsity` and `scope` are those of the pattern, for texts
    that do not name them; a text and a sparsity that disagree are refused.
    """
    if scope not in ("matrix", "row"):
        raise ValueError(f"scope={scope!r}: pass 'matrix' or 'row'.")
    if sparsity is not None and (isinstance(sparsity, bool) or not 0 <= float(sparsity) < 1):
        raise ValueError(
            f"sparsity={sparsity!r} is outside [0, 1): pass the fraction of zeros, such as 0.5."
        )
    before, comma, after = str(text).partition(",")
    if comma:
        raise ValueError(
            f"pattern={text!r}: one run removes parts or sets zeros. Prune with {before!r}, and then prune the smaller "
            f"model with {after!r}."
        )

    pattern = None
    for kind in SparsityPattern.__subclasses__():  # also those that users have defined
        pattern = kind.read(str(text), sparsity, scope)
        if pattern is not None:
            break
    if pattern is None:
        raise ValueError(f"pattern={text!r}: pass {_usual_form_of(str(text))}.")

    if sparsity is not None and abs(float(sparsity) - pattern.sparsity) > 1e-9:
        raise ValueError(
            f"sparsity={sparsity!r} and pattern={text!r} disagree: {text} means a sparsity of {pattern.sparsity:g}. "
            "Pass only one of them, and for parts and zeros prune the smaller model again."
        )
    return pattern


def _usual_form_of(text: str) -> str:
    """Say what to pass instead of a text that no pattern reads, for the end of an error.

    Some users write a pattern as folders of results are named ("2of4"), or only the share of zeros ("0.5").
    """
    n_of_m = re.fullmatch(r"(\d+)of(\d+)", text)
    if n_of_m:
        return f"'{n_of_m[1]}:{n_of_m[2]}'"
    if re.fullmatch(r"0?\.\d+", text):
        return f"sparsity={text} (--sparsity {text}) for this share of zeros"
    return (
        "'unstructured', '2:4' or 'channels:0.25' (`optimum-fista prune --help` names all patterns)"
    )


def pack_mask(mask: Tensor) -> Tensor:
    """Pack a boolean mask of any shape to uint8 [ceil(numel / 8)], row-major, lowest bit first, 1 = kept."""
    bits = np.packbits(mask.detach().cpu().numpy().reshape(-1), bitorder="little")
    return torch.from_numpy(bits)


def unpack_mask(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Unpack a mask of `shape`, boolean, True = kept, from the bits of `pack_mask`: uint8 [ceil(numel / 8)]."""
    count = int(np.prod(shape))
    num_bytes = (count + 7) // 8  # rounded up
    if packed.dtype != torch.uint8 or packed.numel() != num_bytes:
        raise ValueError(
            f"packed has {packed.numel()} values of {packed.dtype}: a mask of shape {tuple(shape)} needs {num_bytes} "
            "values of torch.uint8, as pack_mask returns them."
        )
    bits = np.unpackbits(packed.cpu().numpy(), count=count, bitorder="little")
    return torch.from_numpy(bits.astype(bool)).view(shape)
