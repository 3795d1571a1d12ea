"""Whole parts of a model: channels of its MLPs, key-value groups with their query heads, experts, or decoder layers.

This is the only pattern that is not for a single matrix. It says how many parts of each kind are removed. `Columns` of
the operators that read the parts decide which; for experts and decoder layers, `model` and `prune` decide.
"""

import re
from dataclasses import dataclass
from typing import ClassVar, Literal, NoReturn, Self, cast

from optimum_fista.solve.pattern import Scope, SparsityPattern

PartKind = Literal["channels", "heads", "experts", "layers"]

_SHARE = r"((?:\d+\.?\d*|\.\d+)(?:e-\d+)?)"  # what `float` reads
_PART = re.compile(rf"(channels|heads|experts|layers):{_SHARE}(?:/(\d+))?")


@dataclass(frozen=True)
class PartShare:
    """Share of the parts of one kind that is removed, in (0, 1).

    The number that stays is a multiple of `multiple_of`. `None`: of 64 if the number of channels is a multiple of 64
    now; for experts, equally many of every group that the router chooses first.
    """

    kind: PartKind
    share: float
    multiple_of: int | None = None

    def num_kept(self, number: int, equal_runs: int = 1, at_least: int = 1) -> int:
        """Count the parts of `number` that stay: at least `at_least`, and equally many in each of `equal_runs` runs."""
        step, kept = self._rounded(number, equal_runs)
        if not at_least <= kept < number:
            least, most = (
                -(-at_least // step) * step,
                (number - 1) // step * step,
            )  # multiples of the step
            fits = f"pass a share for which {least} to {most} stay"
            if most < least:
                fits = f"none can go in steps of {step}" + (
                    f" with {at_least} left at least" if at_least > 1 else ""
                )
            stay = f"{kept} of {number} {self.kind} would stay (a multiple of {step})"
            raise ValueError(f"pattern={str(self)!r}: {stay}; {fits}.")
        return kept

    def __str__(self) -> str:
        return f"{self.kind}:{self.share}" + (
            "" if self.multiple_of is None else f"/{self.multiple_of}"
        )

    @classmethod
    def keeping(cls, kind: PartKind, kept: int, number: int) -> Self:
        """Make the share that leaves `kept` of `number`, a multiple of the usual step, in as few digits as say it."""
        exact = 1 - kept / number  # may need 17 digits
        rounded = (cls(kind, round(exact, digits)) for digits in range(2, 9))
        return next(
            (part for part in rounded if part._rounded(number)[1] == kept), cls(kind, exact)
        )

    @staticmethod
    def usual_step(kind: PartKind, number: int, equal_runs: int = 1) -> int:
        """Divisor of the number of parts that stay, if the user gives none."""
        # Kernels of matrix products are fast for multiples of 64: a size that is one now stays one.
        rounds = kind == "channels" and number % 64 == 0
        return 64 if rounds and number > 64 else equal_runs

    def _rounded(self, number: int, equal_runs: int = 1) -> tuple[int, int]:
        """The step, and its multiple that is nearest to what would stay: possibly none or all."""
        step = (
            self.usual_step(self.kind, number, equal_runs)
            if self.multiple_of is None
            else self.multiple_of
        )
        return step, step * round((1 - self.share) * number / step)


@dataclass(frozen=True)
class WholeParts(SparsityPattern):
    """Shares of the parts of a model: equally many channels, heads and experts in every decoder layer, or whole layers.

    The pattern is for a whole model and refuses a matrix. A run turns it into `Columns` for the operators that read the
    removed parts (down projection, output projection of the attention), and later removes the rows that compute them.
    Experts are chosen by their outputs, decoder layers by the loss without them. Its sparsity is the largest share.
    """

    shares: tuple[PartShare, ...] = ()  # to remove, one for each kind
    whole_columns: ClassVar[bool] = True  # the operators that read parts lose columns

    @classmethod
    def read(cls, text: str, sparsity: float | None, scope: Scope) -> Self | None:  # noqa: ARG003, the text says it
        """Read `"channels:0.25"`, with a multiple `"channels:0.25/64"`, several joined by `"+"`."""
        found = [_PART.fullmatch(part) for part in text.split("+")]
        shares = []
        for part in found:
            if part is None:
                return None
            kind, share, multiple = part.groups()
            multiple_of = int(multiple) if multiple else None
            if not 0 < float(share) < 1 or multiple_of == 0:
                needed = f"a share of the {kind} in (0, 1) and a multiple of at least 1"
                raise ValueError(
                    f"pattern={text!r}: pass {needed}, such as '{kind}:0.25' or '{kind}:0.25/64'."
                )
            shares.append(PartShare(cast(PartKind, kind), float(share), multiple_of))
        if len({part.kind for part in shares}) < len(shares):
            raise ValueError(f"pattern={text!r}: name each kind once.")
        return cls(max(part.share for part in shares), scope, shares=tuple(shares))

    def __str__(self) -> str:
        return "+".join(map(str, self.shares))

    def require_shape(self, shape: tuple[int, ...], name: str = "weight") -> NoReturn:
        """Refuse a single matrix."""
        raise ValueError(
            f"{name} of shape {tuple(shape)} is one matrix, and '{self}' removes parts of a whole model: pass "
            f"pattern='columns:{self.sparsity:g}' for whole columns of a matrix."
        )

    def num_kept(self, shape: tuple[int, ...]) -> NoReturn:
        """Refuse a single matrix."""
        self.require_shape(shape)
