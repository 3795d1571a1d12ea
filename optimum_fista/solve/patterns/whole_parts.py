"""Whole parts of a model: channels of its MLPs or experts, key-value groups with their query heads, experts, or layers.

This is the only pattern that is not for a single matrix. A `PartShare` says which share of the parts of one kind is
removed, and a `WholeParts` is one or several of them. `Columns` of the operators that read the parts decide which ones
go. For experts and decoder layers, `removal` decides.
"""

import math
import re
from dataclasses import dataclass
from typing import ClassVar, Literal, NoReturn, Self, cast

from optimum_fista.solve.pattern import Scope, SparsityPattern

PartKind = Literal["channels", "expert_channels", "heads", "experts", "layers"]

# A share is refused if the whole number of parts that is nearest to it differs by more than this part of it.
_LARGEST_ROUNDING = 0.1
_MOST_SHARES_LISTED = 8  # in an error
# Kernels of matrix products are fast for sizes that are multiples of it.
_FAST_MULTIPLE = 64
# Quantizers that round weights in groups of 128 inputs, such as W4A16 of llm-compressor, refuse other sizes.
QUANTIZERS_MULTIPLE = 128

_SHARE = r"((?:\d+\.?\d*|\.\d+)(?:e-\d+)?)"  # what `float` reads
_PART = re.compile(rf"(channels|expert_channels|heads|experts|layers):{_SHARE}(?:/(\d+))?")


@dataclass(frozen=True)
class PartShare:
    """Share of the parts of one kind that is removed, in (0, 1).

    The channels of an expert ("expert_channels") are counted as those of an MLP are. The number that stays is a
    multiple of `multiple_of`. `None`: of 128 or 64 if the number of channels is one now; for experts, equally many of
    every group that the router chooses first.

    `divisible_by` is the user's option `keep_divisible`, for experts only. It is a multiple, too, but the number is
    rounded to it however far that is from the share.
    """

    kind: PartKind
    share: float
    multiple_of: int | None = None
    divisible_by: int | None = None

    def num_kept(self, number: int, num_router_groups: int = 1, at_least: int = 1) -> int:
        """Count the parts that stay of the `number` parts that a decoder layer, or the model, has now.

        `self.share` of them is to be removed; they are `self.kind`, such as "channels". At least `at_least` stay. If a
        router chooses groups of experts first (`num_router_groups` of them, otherwise 1), equally many experts of each
        stay.

        The number that stays is a multiple of `self.step`.

        Raises:
            ValueError: If the nearest multiple of the step is too small, or all parts, or if the number that goes would
                differ from the share by more than a tenth of it. The message has possible shares, if there are any.
        """
        if self.divisible_by is not None:
            return self._num_kept_divisible(number, num_router_groups, at_least)
        step = self.step(number, num_router_groups)
        kept = self._nearest(number, step)
        # The smallest and the largest multiple of the step that may stay: fewer than `number`, so that a part goes.
        least = math.ceil(at_least / step) * step  # rounded up
        most = (number - 1) // step * step  # rounded down
        if most < least:
            limit = f" with {at_least} left at least" if at_least > 1 else ""
            raise ValueError(
                f"pattern={str(self)!r}: {kept} of {number} {self.kind} would stay (a multiple of {step}); none can go "
                f"in steps of {step}{limit}."
            )

        possible = self._possible_shares(number, range(least, most + 1, step))
        if not least <= kept <= most:
            raise ValueError(
                f"pattern={str(self)!r}: {kept} of {number} {self.kind} would stay (a multiple of {step}); pass a "
                f"share for which {least} to {most} stay: {possible}."
            )
        if self._is_far_from(kept, number):
            raise ValueError(
                f"pattern={str(self)!r}: only whole numbers of {self.kind} can be removed, in steps of {step}. Of "
                f"{number}, the nearest is {number - kept} ({1 - kept / number:.2%}). Pass a possible share: "
                f"{possible}."
            )
        return kept

    def _num_kept_divisible(self, number: int, num_router_groups: int, at_least: int) -> int:
        """Count the experts that stay of `number` if `self.divisible_by` divides how many stay.

        It is the multiple that is nearest to the share, but at least `at_least` experts. Each of `num_router_groups`
        groups keeps equally many. ValueError if no such number is possible, or if all would stay.
        """
        assert self.divisible_by is not None
        step = math.lcm(self.divisible_by, num_router_groups)
        least = math.ceil(at_least / step) * step  # rounded up
        most = (number - 1) // step * step  # rounded down: at least one has to go
        option = f"keep_divisible={self.divisible_by} (--keep-divisible)"
        if most < least:
            by_groups = ""
            if step != self.divisible_by:
                by_groups = (
                    f" (each of {num_router_groups} groups of the router keeps equally many)"
                )
            raise ValueError(
                f"{option}: from {at_least} to {number - 1} of {number} experts may stay, and no multiple of {step}"
                f"{by_groups} is among these numbers: pass a smaller number, or leave it out."
            )
        kept = max(least, self._nearest(number, step))
        if kept > most:
            larger = self.keeping(self.kind, most, number).share
            raise ValueError(
                f"{option} and pattern={str(self)!r}: {kept} is the multiple of {step} that is nearest to the share, "
                f"so none of {number} experts would go: pass a larger share, such as {larger:g}."
            )
        return kept

    def __str__(self) -> str:
        """The text that `WholeParts.read` takes."""
        multiple = "" if self.multiple_of is None else f"/{self.multiple_of}"
        return f"{self.kind}:{self.share}{multiple}"

    @classmethod
    def keeping(
        cls, kind: PartKind, kept: int, number: int, multiple_of: int | None = None
    ) -> Self:
        """Make the share that leaves `kept` of `number` parts, with as few digits as are needed for that.

        `kind` is "channels", "heads", "experts" or "layers". `kept` must be a multiple of `multiple_of`, or of the
        usual step if that is `None`.
        """
        exact = 1 - kept / number  # may need 17 digits
        for digits in range(2, 9):
            share = cls(kind, round(exact, digits), multiple_of)
            step = share.step(number)
            # whether the rounded share still leaves `kept` parts, and is accepted for them
            if share._nearest(number, step) == kept and not share._is_far_from(kept, number):
                return share
        return cls(kind, exact, multiple_of)

    def step(self, number: int, num_router_groups: int = 1) -> int:
        """Return the step in which parts are removed: the number that stays of `number` is a multiple of it.

        If the user gave `self.multiple_of`, the step is that. If not, channels go in steps of 128 or 64, as long as
        `number` is such a multiple now (`multiples_of_channels`): of 128 if one of its multiples is near enough to the
        share, otherwise of 64. All other parts go in steps of `num_router_groups`, as in `num_kept`.
        """
        if self.multiple_of is not None:
            return math.lcm(self.multiple_of, num_router_groups)

        multiples = self.multiples_of_channels(self.kind, number)
        if not multiples:
            return num_router_groups
        for multiple in multiples:
            kept = self._nearest(number, multiple)
            if 0 < kept < number and not self._is_far_from(kept, number):
                return multiple
        return multiples[-1]

    @staticmethod
    def multiples_of_channels(kind: PartKind, number: int) -> list[int]:
        """List the sizes of which a number of channels should stay a multiple, the best one first.

        They are 128 and 64, if the `number` of parts is a larger multiple of them now. Other kinds than channels have
        none.
        """
        if kind not in ("channels", "expert_channels"):
            return []
        return [
            multiple
            for multiple in (QUANTIZERS_MULTIPLE, _FAST_MULTIPLE)
            if number % multiple == 0 and number > multiple
        ]

    @classmethod
    def fewer_channels(cls, kept: int, number: int) -> int:
        """Return the number of channels to keep of `number` if at most `kept`, a multiple of 64, may stay.

        It is the next smaller multiple of 128 if that is near enough, and if `number` is such a multiple.
        """
        multiple = cls.multiples_of_channels("channels", number)[0]
        fewer = kept // multiple * multiple
        is_far = cls("channels", 1 - kept / number)._is_far_from(fewer, number)
        return kept if fewer == 0 or is_far else fewer

    def _nearest(self, number: int, step: int) -> int:
        """The multiple of `step` that is nearest to what would stay of `number`: possibly none or all."""
        return step * round((1 - self.share) * number / step)

    def _is_far_from(self, kept: int, number: int) -> bool:
        """Tell whether removing all but `kept` of `number` parts differs from the share by more than a tenth of it."""
        wanted = self.share * number  # parts to remove
        removed = number - kept
        # The arithmetic rounds, and exactly a tenth is not too much.
        rounding = 1e-9 * number
        return abs(removed - wanted) > _LARGEST_ROUNDING * wanted + rounding

    def _possible_shares(self, number: int, possible: range) -> str:
        """List the shares that leave one of the `possible` numbers of parts; of many, those nearest to this share.

        `number` is that of the parts now; they are `self.kind`, such as "channels". Each share is followed by how many
        parts it removes, for an error.
        """
        wanted = (1 - self.share) * number
        nearest = dict[int, float]()  # shares, by the number of parts that they leave
        are_more = False
        for kept in sorted(possible, key=lambda kept: abs(kept - wanted)):
            # The share with as few digits as are needed to keep this number of parts.
            share = self.keeping(self.kind, kept, number, self.multiple_of)
            if share._nearest(number, share.step(number)) != kept:
                # A multiple of 64 channels, so near to one of 128 that each share leaves that one.
                continue
            if len(nearest) == _MOST_SHARES_LISTED:
                are_more = True
                break
            nearest[kept] = share.share

        texts = []
        for kept in sorted(nearest, reverse=True):
            texts.append(f"{nearest[kept]:g} ({number - kept} of {number})")
        more = ", ..." if are_more else ""
        return ", ".join(texts) + more


@dataclass(frozen=True)
class WholeParts(SparsityPattern):
    """Shares of the parts of a model: equally many channels, heads and experts in every decoder layer, or whole layers.

    Every expert may lose channels, too, equally many of each. The pattern is for a whole model and refuses a matrix. A
    run turns it into `Columns` for the operators that read the removed parts (down projection, output projection of the
    attention), and later removes the rows that compute them. Experts are chosen by their outputs, decoder layers by the
    loss without them. Its sparsity is the largest share.
    """

    shares: tuple[PartShare, ...] = ()  # to remove, one for each kind
    whole_columns: ClassVar[bool] = True  # the operators that read parts lose columns

    @classmethod
    def read(cls, text: str, sparsity: float | None, scope: Scope) -> Self | None:  # noqa: ARG003, the text says it
        """Read `"channels:0.25"`, with a multiple `"channels:0.25/64"`, several joined by `"+"`.

        The numbers after ":" and "/" are `PartShare.share` and `PartShare.multiple_of`. Returns `None` if the text is a
        pattern of another kind; ValueError if it names parts and makes no sense. The text says the shares, so
        `sparsity` is not read; `scope` is only kept.
        """
        shares = list[PartShare]()
        for part in text.split("+"):
            match = _PART.fullmatch(part)
            if match is None:
                return None
            # texts, such as "channels", "0.25" and "64"; the last may be None
            kind, share, multiple = match.groups()
            multiple_of = None if multiple is None else int(multiple)
            if not 0 < float(share) < 1 or multiple_of == 0:
                raise ValueError(
                    f"pattern={text!r}: pass a share of the {kind} in (0, 1) and a multiple of at least 1, such as "
                    f"'{kind}:0.25' or '{kind}:0.25/64'."
                )
            shares.append(PartShare(cast(PartKind, kind), float(share), multiple_of))

        kinds = {share.kind for share in shares}
        if len(kinds) < len(shares):
            raise ValueError(f"pattern={text!r}: name each kind once.")
        if {"experts", "expert_channels"} <= kinds:
            raise ValueError(
                f"pattern={text!r}: one run removes either experts or their channels: pass one of the two, and prune "
                "the smaller model with the other."
            )
        # The sparsity of the whole pattern is its largest share. Each `share` is a `PartShare` here.
        return cls(max(share.share for share in shares), scope, shares=tuple(shares))

    def __str__(self) -> str:
        """The text that `read` takes."""
        return "+".join(map(str, self.shares))

    def require_shape(self, shape: tuple[int, ...], name: str = "weight") -> NoReturn:
        """Refuse every single matrix (ValueError); `name` is that of the weight, for the message."""
        raise ValueError(
            f"{name} of shape {tuple(shape)} is one matrix, and '{self}' removes parts of a whole model: pass "
            f"pattern='columns:{self.sparsity:g}' for whole columns of a matrix."
        )

    def num_kept(self, shape: tuple[int, ...]) -> NoReturn:
        """Refuse every single matrix (ValueError)."""
        self.require_shape(shape)
