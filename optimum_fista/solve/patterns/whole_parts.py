"""Whole parts of a model: channels of its MLPs, key-value groups with their query heads, experts, or decoder layers."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar, Literal, NoReturn, Self, cast

from torch import Tensor

from optimum_fista.solve.pattern import Scope, SparsityPattern

PartKind = Literal["channels", "heads", "experts", "layers"]

_PART = re.compile(r"(channels|heads|experts|layers):([\d.]+(?:e-\d+)?)(?:/(\d+))?")
_SIZE = re.compile(r"bytes:([\d.]+)")


@dataclass(frozen=True)
class PartShare:
    """How many parts of one kind go.

    Attributes:
        kind: What goes.
        share: Share of them that is removed, in (0, 1).
        multiple_of: The number that stays is a multiple of it; `None`: 64 channels if they are a multiple of 64 now,
            and as many experts of every group that the router chooses first.
    """

    kind: PartKind
    share: float
    multiple_of: int | None = None

    def num_kept(self, number: int, equal_runs: int = 1, at_least: int = 1) -> int:
        """How many of so many stay, at least `at_least`, and the same number in each of `equal_runs` runs."""
        step, kept = self._rounded(number, equal_runs)
        if not at_least <= kept < number:
            least, most = -(-at_least // step) * step, (number - 1) // step * step
            fits = f"pass a share for which {least} to {most} stay"
            if most < least:
                fits = f"none can go in steps of {step}" + (f" with {at_least} left at least" if at_least > 1 else "")
            raise ValueError(
                f"pattern={str(self)!r}: {kept} of {number} {self.kind} would stay (a multiple of {step}); {fits}."
            )
        return kept

    def __str__(self) -> str:
        """As users write it."""
        return f"{self.kind}:{self.share!r}" + ("" if self.multiple_of is None else f"/{self.multiple_of}")

    @classmethod
    def keeping(cls, kind: PartKind, kept: int, number: int) -> Self:
        """The share, in as few digits as say it, that leaves `kept` of so many, a multiple of the usual step."""
        exact = 1 - kept / number
        rounded = (cls(kind, round(exact, digits)) for digits in range(2, 9))
        return next((part for part in rounded if part._rounded(number)[1] == kept), cls(kind, exact))

    @staticmethod
    def usual_step(kind: PartKind, number: int, equal_runs: int = 1) -> int:
        """What the number of parts that stay is a multiple of, unless the user says it."""
        return 64 if kind == "channels" and number % 64 == 0 and number > 64 else equal_runs

    def _rounded(self, number: int, equal_runs: int = 1) -> tuple[int, int]:
        """The step, and its multiple that is nearest to what would stay, which may be none or all."""
        step = self.usual_step(self.kind, number, equal_runs) if self.multiple_of is None else self.multiple_of
        return step, step * round((1 - self.share) * number / step)


@dataclass(frozen=True)
class WholeParts(SparsityPattern):
    """Shares of the parts of a model: as many channels, heads and experts in every decoder layer, or whole layers.

    Instead of shares there may be the size that the model is to have; a run then removes as many channels as it takes.

    It is for a whole model: a run makes `Columns` of it for the operators that read what is removed, the down
    projection and the attention's output projection, and removes the rows that compute it afterwards. Experts are
    chosen by what they return, decoder layers by the loss without them.

    Attributes:
        sparsity: The largest share, or that of the size.
        shares: What goes, one entry for each kind; empty if there is a `size`.
        size: Share of the dense model's bytes that is left, in (0, 1); `None` if there are shares.
    """

    shares: tuple[PartShare, ...] = ()
    size: float | None = None
    column_width: ClassVar[int | None] = 1  # of some operators; how wide they are depends on the model

    @classmethod
    def read(cls, text: str, sparsity: float | None, scope: Scope) -> Self | None:  # noqa: ARG003, the text says it
        """Read `"channels:0.25"`, rounded to a multiple `"channels:0.25/64"`, or several joined by `"+"`."""
        if (wanted := _SIZE.fullmatch(text)) is not None:
            size = float(wanted[1]) if wanted[1].count(".") <= 1 and wanted[1] != "." else 0.0
            if not 0 < size < 1:
                raise ValueError(
                    f"pattern={text!r}: pass the share of the bytes that is to be left, in (0, 1): 'bytes:0.75'."
                )
            return cls(1 - size, scope, size=size)
        found = [_PART.fullmatch(part) for part in text.split("+")]
        if not all(found):
            return None
        parts = [(cast(PartKind, m[1]), m[2], int(m[3]) if m[3] else None) for m in found if m is not None]
        if len({kind for kind, _, _ in parts}) < len(parts):
            raise ValueError(f"pattern={text!r}: name each kind once.")
        shares = []
        for kind, share, multiple in parts:
            try:
                number = float(share)
            except ValueError:
                number = 0.0
            if not 0 < number < 1 or multiple == 0:
                raise ValueError(
                    f"pattern={text!r}: pass a share of the {kind} in (0, 1), such as '{kind}:0.25', and a multiple of "
                    f"at least 1, such as '{kind}:0.25/64'."
                )
            shares.append(PartShare(kind, number, multiple))
        return cls(max(part.share for part in shares), scope, tuple(shares))

    @property
    def text(self) -> str:
        """What `read` takes."""
        return "+".join(map(str, self.shares)) if self.size is None else f"bytes:{self.size!r}"

    def require_shape(self, shape: tuple[int, int], name: str = "weight") -> NoReturn:
        """Refuse a single matrix."""
        raise ValueError(
            f"{name} of shape {tuple(shape)} is one matrix, and {self.text!r} removes parts of a whole model: pass "
            f"pattern='columns:{self.sparsity:g}' for whole columns of a matrix."
        )

    def num_kept(self, shape: tuple[int, int]) -> NoReturn:
        """Refuse a single matrix."""
        self.require_shape(shape)

    def mask(self, scores: Tensor) -> NoReturn:
        """Refuse a single matrix."""
        self.require_shape((scores.shape[0], scores.shape[1]), "scores")
