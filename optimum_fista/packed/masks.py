"""How the rows of a packed mask are written: one bit a weight, or the places of the kept weights in their groups.

Both encodings have the same methods, and `encoding` finds the one that a layout names. docs/formats.md has every byte.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from optimum_fista.packed.bits import count_bits, pack_bits, select, unpack_bits

MAX_GROUP = 256
CHUNK = 1 << 22  # weights that are looked at together, so that little memory is needed besides the result


class MaskEncoding(ABC):
    """What a mask [rows, columns] looks like as uint8 [rows, row_bytes]."""

    numbers: tuple[int, int]
    """n and m in the layout."""

    @abstractmethod
    def used_bits(self, columns: int) -> int:
        """Bits of a row that say something; those after them are zero."""

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row, a multiple of 8."""
        return -(-self.used_bits(columns) // 64) * 8

    @abstractmethod
    def write(self, kept: Tensor, target: Tensor) -> None:
        """Write booleans [rows, columns], True = kept, into zeros uint8 [rows, row_bytes]; both on the CPU."""

    @abstractmethod
    def read(self, mask: Tensor, columns: int) -> Tensor:
        """Booleans [rows, columns], True = kept, on the device of the mask, which was checked."""

    @abstractmethod
    def num_kept(self, mask: Tensor, columns: int) -> int:
        """Weights that the mask keeps."""

    def defect(self, mask: Tensor, columns: int) -> str | None:  # noqa: ARG002
        """What is wrong with a mask of the right size whose last bits are zero; `None` if nothing is."""
        return None


@dataclass(frozen=True)
class BitMask(MaskEncoding):
    """One bit a weight, lowest bit first."""

    numbers = (0, 0)

    def used_bits(self, columns: int) -> int:
        """One a weight."""
        return columns

    def write(self, kept: Tensor, target: Tensor) -> None:
        """See `MaskEncoding`."""
        pack_bits(kept, target)

    def read(self, mask: Tensor, columns: int) -> Tensor:
        """See `MaskEncoding`."""
        return unpack_bits(mask, columns)

    def num_kept(self, mask: Tensor, columns: int) -> int:  # noqa: ARG002
        """The number of ones."""
        return int(count_bits(mask).sum())


BITS = BitMask()


@dataclass(frozen=True)
class GroupMask(MaskEncoding):
    """The places of the n weights that every group of m keeps, rising, each in as few bits as m - 1 needs."""

    n: int
    m: int

    @property
    def numbers(self) -> tuple[int, int]:  # type: ignore[override]
        """n and m."""
        return self.n, self.m

    @property
    def place_bits(self) -> int:
        """Bits of a place."""
        return (self.m - 1).bit_length()

    def fits(self, columns: int) -> bool:
        """Whether rows of so many columns can be written, in no more bytes than by one bit a weight."""
        possible = 0 < self.n < self.m <= MAX_GROUP and columns % self.m == 0
        return possible and self.row_bytes(columns) <= BITS.row_bytes(columns)

    def used_bits(self, columns: int) -> int:
        """n places a group."""
        return columns // self.m * self.n * self.place_bits

    def write(self, kept: Tensor, target: Tensor) -> None:
        """See `MaskEncoding`; every group keeps n."""
        places = select(torch.arange(self.m, dtype=torch.uint8).repeat(kept.numel() // self.m), kept)
        digits = (places[:, None] >> torch.arange(self.place_bits, dtype=torch.uint8)) & 1
        pack_bits(digits.view(kept.shape[0], -1), target)

    def read(self, mask: Tensor, columns: int) -> Tensor:
        """See `MaskEncoding`."""
        places = self._places(mask, columns)
        kept = torch.zeros(len(places), self.m, dtype=torch.bool, device=mask.device)
        for column in places.split(1, 1):
            kept |= column == torch.arange(self.m, dtype=torch.uint8, device=mask.device)
        return kept.view(mask.shape[0], columns)

    def num_kept(self, mask: Tensor, columns: int) -> int:
        """n a group."""
        return mask.shape[0] * (columns // self.m) * self.n

    def defect(self, mask: Tensor, columns: int) -> str | None:
        """Places must be smaller than m and rise inside a group."""
        for rows in mask.split(max(1, CHUNK // columns)):
            places = self._places(rows, columns)
            if bool((places[:, -1] > self.m - 1).any()) or bool((places[:, 1:] <= places[:, :-1]).any()):
                return f"has a group whose places do not rise or are not smaller than {self.m}"
        return None

    def _places(self, mask: Tensor, columns: int) -> Tensor:
        """Places uint8 [groups, n]."""
        digits = unpack_bits(mask, self.used_bits(columns)).view(torch.uint8).view(-1, self.n, self.place_bits)
        places = digits[..., 0].clone()
        for digit in range(1, self.place_bits):
            places |= digits[..., digit] << digit
        return places


def encoding(n_of_m: tuple[int, int] | None) -> MaskEncoding:
    """The encoding of a layout with these n and m; `None` and (0, 0) stand for one bit a weight."""
    return GroupMask(*n_of_m) if n_of_m is not None and any(n_of_m) else BITS


def smallest_encoding(columns: int, n_of_m: tuple[int, int] | None, kept: Iterable[Tensor] = ()) -> MaskEncoding:
    """The encoding that is written for weights pruned to n:m, or to no such pattern (`None`).

    Args:
        columns: Columns of the mask.
        n_of_m: The pattern.
        kept: The mask, in booleans [rows, columns] one after another; groups are written only if each keeps n.
    """
    if n_of_m is None or not GroupMask(*n_of_m).fits(columns):
        return BITS
    n, m = n_of_m
    return GroupMask(n, m) if all(bool((rows.view(-1, m).sum(-1) == n).all()) for rows in kept) else BITS
