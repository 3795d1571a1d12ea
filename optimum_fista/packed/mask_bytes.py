"""How the rows of a packed mask are written: one bit a weight, or the places of the kept weights in their groups.

`encoding` finds the one that a layout names; nothing else tells them apart. docs/formats.md has every byte.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from optimum_fista.packed.bits import count_bits, pack_bits, select, unpack_bits

MAX_GROUP = 256
CHUNK = 1 << 22  # weights that are looked at together, so that little memory is needed besides the result


class MaskEncoding:
    """What a mask [rows, columns] looks like as uint8 [rows, row_bytes]: here one bit a weight, lowest bit first.

    Attributes:
        numbers: n and m in the layout.
    """

    numbers = (0, 0)

    def used_bits(self, columns: int) -> int:
        """Bits of a row that say something; those after them are zero."""
        return columns

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row, a multiple of 8."""
        return -(-self.used_bits(columns) // 64) * 8

    def write(self, kept: Tensor, target: Tensor) -> None:
        """Write booleans [rows, columns], True = kept, into zeros uint8 [rows, row_bytes]; both on the CPU."""
        pack_bits(kept, target)

    def read(self, mask: Tensor, columns: int) -> Tensor:
        """Booleans [rows, columns], True = kept, on the device of the mask, which was checked."""
        return unpack_bits(mask, columns)

    def num_kept(self, mask: Tensor, columns: int) -> int:  # noqa: ARG002
        """Weights that the mask keeps."""
        return int(count_bits(mask).sum())

    def defect(self, mask: Tensor, columns: int) -> str | None:  # noqa: ARG002
        """What is wrong with a mask of the right size whose last bits are zero; `None` if nothing is."""
        return None


BITS = MaskEncoding()


class GroupMask(MaskEncoding):
    """The places of the n weights that every group of m keeps, rising, each in as few bits as m - 1 needs."""

    def __init__(self, n: int, m: int) -> None:
        self.numbers = (n, m)
        self._place_bits = (m - 1).bit_length()

    def used_bits(self, columns: int) -> int:
        """n places a group."""
        n, m = self.numbers
        return columns // m * n * self._place_bits

    def write(self, kept: Tensor, target: Tensor) -> None:
        """Write booleans of which every group keeps n."""
        m = self.numbers[1]
        places = select(torch.arange(m, dtype=torch.uint8).repeat(kept.numel() // m), kept)
        digits = (places[:, None] >> torch.arange(self._place_bits, dtype=torch.uint8)) & 1
        pack_bits(digits.view(kept.shape[0], -1), target)

    def read(self, mask: Tensor, columns: int) -> Tensor:
        """Booleans again: in every group the columns that are one of the n places."""
        places, m = self._places(mask, columns), self.numbers[1]
        kept = torch.zeros(len(places), m, dtype=torch.bool, device=mask.device)
        for column in places.split(1, 1):
            kept |= column == torch.arange(m, dtype=torch.uint8, device=mask.device)
        return kept.view(mask.shape[0], columns)

    def num_kept(self, mask: Tensor, columns: int) -> int:
        """n a group."""
        n, m = self.numbers
        return mask.shape[0] * (columns // m) * n

    def defect(self, mask: Tensor, columns: int) -> str | None:
        """Places must be smaller than m and rise inside a group."""
        m = self.numbers[1]
        for rows in mask.split(max(1, CHUNK // columns)):
            places = self._places(rows, columns)
            if bool((places[:, -1] > m - 1).any()) or bool((places[:, 1:] <= places[:, :-1]).any()):
                return f"has a group whose places do not rise or are not smaller than {m}"
        return None

    def _places(self, mask: Tensor, columns: int) -> Tensor:
        """Places uint8 [groups, n]."""
        digits = unpack_bits(mask, self.used_bits(columns)).view(torch.uint8)
        digits = digits.view(-1, self.numbers[0], self._place_bits)
        places = digits[..., 0].clone()
        for digit in range(1, self._place_bits):
            places |= digits[..., digit] << digit
        return places


def encoding(n_of_m: tuple[int, int] | None) -> MaskEncoding:
    """The encoding of a layout with these n and m; `None` and (0, 0) stand for one bit a weight."""
    return GroupMask(*n_of_m) if n_of_m is not None and any(n_of_m) else BITS


def smallest_encoding(columns: int, n_of_m: tuple[int, int] | None, kept: Iterable[Tensor] = ()) -> MaskEncoding:
    """Places for weights pruned to n:m, if every group keeps n and they take no more room; else one bit a weight.

    The mask comes in booleans [rows, columns], one after another.
    """
    if n_of_m is None:
        return BITS
    (n, m), groups = n_of_m, GroupMask(*n_of_m)
    if not 0 < n < m <= MAX_GROUP or columns % m or groups.row_bytes(columns) > BITS.row_bytes(columns):
        return BITS
    return groups if all(bool((rows.view(-1, m).sum(-1) == n).all()) for rows in kept) else BITS
