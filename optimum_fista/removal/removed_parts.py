"""How many parts of a model a pattern removes.

A pattern such as "heads:0.25+layers:0.1" asks for shares. `removed_parts` counts the parts of the model, and turns each
share into a whole number. Which parts go is not known here.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from optimum_fista.removal.model_outline import ModelOutline
from optimum_fista.removal.parts import Kind
from optimum_fista.solve.patterns import PartShare, WholeParts
from optimum_fista.solve.patterns.whole_parts import QUANTIZERS_MULTIPLE


@dataclass(frozen=True)
class RemovedParts:
    """How many parts of one kind a run removes: of every decoder layer, or how many decoder layers."""

    share: PartShare  # that was asked for
    number: int  # of all
    kept: int
    num_router_groups: int = 1  # of experts; each keeps equally many

    def __str__(self) -> str:
        """Write it for people, such as `1 of 3 heads of every decoder layer (33.33%; asked for: 34%)`.

        There `self.number` is 3, `self.kept` is 2, and `self.share` is what was asked for: 0.34 of the heads. If the
        user asked for a divisor of the number of experts that stay, that number is named, too. If the number of
        channels is a multiple of 128 now, the text says whether that is so of those that stay.
        """
        if self.share.kind == "layers":
            kind = "decoder layers"
            place = ""  # they are no parts of a decoder layer
        elif self.share.kind == "expert_channels":
            kind = "channels"
            place = " of every expert"
        else:
            kind = self.share.kind
            place = " of every decoder layer"
        asked = f"; asked for: {100 * self.share.share:g}%" if self.is_rounded else ""
        if self.share.divisible_by is not None:
            asked += f"; {self.kept} stay, a multiple of {self.share.divisible_by}"
        multiples = PartShare.multiples_of_channels(self.share.kind, self.number)
        if multiples and multiples[0] == QUANTIZERS_MULTIPLE:
            is_multiple = self.kept % QUANTIZERS_MULTIPLE == 0
            asked += f"; {self.kept} stay, {'a' if is_multiple else 'no'} multiple of {QUANTIZERS_MULTIPLE}"
        removed = self.number - self.kept
        return f"{removed} of {self.number} {kind}{place} ({removed / self.number:.2%}{asked})"

    @property
    def is_rounded(self) -> bool:
        """Tell whether not exactly the share that was asked for is removed."""
        return not math.isclose(1 - self.kept / self.number, self.share.share, rel_tol=1e-9)

    @property
    def pattern(self) -> str:
        """The pattern with the share that is really removed, such as `heads:0.33`; `self.share` was asked for."""
        if not self.is_rounded:
            return str(self.share)
        asked = self.share
        return str(PartShare.keeping(asked.kind, self.kept, self.number, asked.multiple_of))


def removed_parts(outline: ModelOutline, pattern: WholeParts) -> list[RemovedParts]:
    """Count the parts that a pattern removes from the model of `outline`, in the order of the pattern.

    `pattern` has a share for each kind, such as a quarter of the heads. The outline keeps the parts that it finds.
    Nothing is removed yet.

    Raises:
        ValueError: If the model can't lose such parts, or no whole number of them is near enough to a share.
    """
    removed = list[RemovedParts]()
    for share in pattern.shares:
        if share.kind == "layers":
            number = len(outline.layers)
            removed.append(RemovedParts(share, number, share.num_kept(number)))
            continue
        parts = outline.parts(share.kind)
        # Raises ValueError. Equally many experts stay in each group of a router, and at least as many as a token is
        # sent to.
        kept = share.num_kept(parts.groups, parts.num_router_groups, parts.at_least)
        removed.append(RemovedParts(share, parts.groups, kept, parts.num_router_groups))
    return removed


def kept_by_kind(removed: Iterable[RemovedParts]) -> dict[Kind, int]:
    """How many channels, heads and experts every decoder layer keeps, and how many channels every expert, by kind.

    `removed` has an entry for each kind that loses some. That of decoder layers is left out.
    """
    counts = dict[Kind, int]()
    for parts in removed:
        kind = parts.share.kind
        if kind != "layers":
            counts[kind] = parts.kept
    return counts
