"""Whole columns: groups of consecutive inputs of a matrix [out, in] that all rows keep, or that all rows lose.

A user writes `columns:0.25`. A run that removes parts of a model makes `Columns.keeping` for each operator that reads
such parts.
"""

import re
from dataclasses import dataclass
from typing import ClassVar, Self

from optimum_fista.solve.pattern import Scope, SparsityPattern

_TEXT = re.compile(
    r"columns:(?:(?P<kept>\d+)of(?P<groups>\d+)|(?P<share>[\d.]+(?:e-\d+)?))(?:x(?P<width>\d+))?"
)


@dataclass(frozen=True)
class Columns(SparsityPattern):
    """Groups of `width` consecutive columns, each kept or removed for all rows at once.

    If no row reads an input, it need not be computed. Channels of an MLP are columns of its down projection; key-value
    groups with their query heads are groups of columns of the attention's output projection.

    The number of groups kept is exact. `Columns(0.25)` keeps the whole number that is nearest to 75% of the groups;
    `Columns.keeping(7, 9, 64)` keeps 7 of 9 groups of 64 columns.
    """

    groups: int | None = None  # of the matrices that the pattern fits; None: any number
    whole_columns: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuse a share (`self.sparsity`) or a number of columns in a group (`self.width`) that makes no sense."""
        if not 0 <= self.sparsity < 1:
            raise ValueError(
                f"sparsity={self.sparsity!r}: pass the share of the columns to remove, in [0, 1)."
            )
        if self.width < 1:
            raise ValueError(f"width={self.width!r}: pass a whole number of at least 1.")

    @classmethod
    def keeping(cls, kept: int, groups: int, width: int = 1) -> Self:
        """Make the pattern that keeps exactly `kept` of `groups` groups of `width` columns."""
        if not 0 < kept <= groups:
            raise ValueError(
                f"kept={kept!r} of {groups} groups: pass a whole number from 1 to {groups}."
            )
        return cls(1 - kept / groups, width=width, groups=groups)

    @classmethod
    def read(cls, text: str, sparsity: float | None, scope: Scope) -> Self | None:  # noqa: ARG003, the text says it
        """Read `"columns:0.25"`, with a width `"columns:0.25x64"`, or exactly 7 of 9 groups, `"columns:7of9x64"`.

        Returns `None` if the text is a pattern of another kind; ValueError if its numbers make no sense. The text says
        the sparsity, so `sparsity` is not read. `scope` is only kept: whole columns compete in the whole matrix.
        """
        match = _TEXT.fullmatch(text)
        if match is None:
            return None
        width = 1 if match["width"] is None else int(match["width"])
        try:
            if match["kept"] is not None:
                return cls.keeping(int(match["kept"]), int(match["groups"]), width)
            return cls(float(match["share"]), scope, width)
        except ValueError as error:
            # From `float`, `keeping` or `__post_init__`: the message lacks the text of the user.
            raise ValueError(f"pattern={text!r}: {error}") from None

    def __str__(self) -> str:
        """The text that `read` takes, such as "columns:0.25x64" or "columns:7of9x64".

        `self.sparsity` is the share of the groups that is removed, `self.width` the number of columns in a group, and
        `self.groups` the number of groups, if the pattern was made for it.
        """
        width = f"x{self.width}" if self.width > 1 else ""
        if self.groups is None:
            # `repr` keeps every digit, as a share in a report must
            return f"columns:{self.sparsity!r}{width}"
        num_kept = round((1 - self.sparsity) * self.groups)
        return f"columns:{num_kept}of{self.groups}{width}"

    def require_shape(self, shape: tuple[int, ...], name: str = "weight") -> None:
        """Refuse a matrix of `shape` [out, in] whose columns are not whole groups, or of which none would be kept.

        `name` is that of the weight, for the message. `self.groups` is the number of groups that the matrix must have
        (`None`: any), and `self.width` the number of columns in each.
        """
        super().require_shape(shape, name)
        groups = shape[1] // self.width
        if self.groups is not None and groups != self.groups:
            raise ValueError(
                f"{name} has {groups} groups of {self.width} columns, not {self.groups} as {self} has: pass a share "
                "such as 'columns:0.25'."
            )
        columns_kept = self.num_kept((1, shape[1]))
        if columns_kept == 0:
            raise ValueError(
                f"{name} has {groups} groups of {self.width} columns, and {self} keeps none: pass a share of at most "
                f"{1 - 1 / groups:g}."
            )
