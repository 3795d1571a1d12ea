"""Masks as bytes: one bit a weight, or the places of the kept weights in their groups. docs/formats.md has every byte.

Rows are padded to whole words of 64 bits, so that a kernel reads a row as words from an aligned address, and two rows
never share a byte. This needs at most 63 more bits per row. Bit and byte order are little-endian: on the processors of
the kernels, the n-th bit of a row is the n-th bit of its words.
"""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

MAX_GROUP = 256  # so that a place in a group fits one byte
CHUNK = 1 << 22  # weights that are handled together, so that little memory is needed besides the result

_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def as_words(tensor: Tensor) -> Tensor:
    """The same bytes as integers: copies of floats may change a NaN's bits, and -0.0 == 0.0 hides a sign."""
    return tensor.view(_WORDS[tensor.element_size()])


def pack_bits(bits: Tensor, target: Tensor) -> None:
    """Write booleans [rows, count] into `target`, uint8 [rows, >= ceil(count / 8)]; both on the CPU."""
    packed = np.packbits(bits.numpy(), axis=1, bitorder="little")  # vectorised; PyTorch has no such operation
    target[:, : packed.shape[1]] = torch.from_numpy(packed)  # bytes after these stay padding


def unpack_bits(packed: Tensor, count: int) -> Tensor:
    """The first `count` bits of each row of uint8 [rows, bytes], as booleans on the same device."""
    if packed.device.type == "cpu":
        bits = np.unpackbits(packed.numpy(), axis=1, count=count, bitorder="little")
        return torch.from_numpy(bits.view(bool))  # [rows, count], no copy
    # [rows, bytes, 1] >> [8] -> [rows, bytes, 8], lowest bit first
    bits_of_bytes = (packed[..., None] >> torch.arange(8, dtype=torch.uint8, device=packed.device)) & 1
    return bits_of_bytes.view(packed.shape[0], -1)[:, :count].bool()


def count_bits(packed: Tensor) -> Tensor:
    """Number of bits set in each row of uint8 [rows, bytes], bytes a multiple of 8: int64 [rows]."""
    aligned = packed if packed.is_contiguous() and packed.storage_offset() % 8 == 0 else packed.clone()
    words = aligned.view(torch.int64)  # refuses an address that is no multiple of 8
    # Sums of neighbours in 2, then 4, then 8 bits (Hacker's Delight, 5-1). PyTorch has no popcount.
    words = words - ((words >> 1) & 0x5555555555555555)
    words = (words & 0x3333333333333333) + ((words >> 2) & 0x3333333333333333)
    words = (words + (words >> 4)) & 0x0F0F0F0F0F0F0F0F
    return ((words * 0x0101010101010101) >> 56 & 0xFF).sum(1)  # the product adds all eight bytes in the highest one


def select(values: Tensor, kept: Tensor) -> Tensor:
    """The values where `kept` (of as many booleans) is True, in order, on the CPU. Three times as fast as indexing."""
    return torch.from_numpy(np.compress(kept.reshape(-1).numpy(), values.reshape(-1).numpy()))


def place(values: Tensor, kept: Tensor, target: Tensor) -> None:
    """Inverse of `select`: write the values where `kept` is True and zeros elsewhere. Integers, on any device."""
    if values.numel():
        # [rows * columns]: the number of each place among the kept. A gather uses all threads, masked_scatter one.
        source = torch.cumsum(kept.view(-1), 0, dtype=torch.int32).sub_(1).clamp_(min=0)
        target.copy_(torch.index_select(values, 0, source).view(target.shape)).mul_(kept)


class MaskEncoding:
    """A form of a mask [rows, columns] as uint8 [rows, row_bytes]: here one bit a weight, lowest bit first."""

    numbers = (0, 0)  # n and m in the layout

    def used_bits(self, columns: int) -> int:
        """Number of bits of a row that are used; those after them are zero."""
        return columns

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row, a multiple of 8."""
        return -(-self.used_bits(columns) // 64) * 8  # rounded up; in Python's integers, which do not overflow

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
        """Name the defect of a mask of the right size whose last bits are zero; `None` if it has none."""
        return None  # any bits are a mask


BITS = MaskEncoding()


class GroupMask(MaskEncoding):
    """The places of the n weights that every group of m keeps, rising, each in as few bits as m - 1 needs."""

    def __init__(self, n: int, m: int) -> None:
        self.numbers = (n, m)
        self._place_bits = (m - 1).bit_length()

    def used_bits(self, columns: int) -> int:
        """Bits of the n places of all groups."""
        n, m = self.numbers
        return columns // m * n * self._place_bits

    def write(self, kept: Tensor, target: Tensor) -> None:
        """Write booleans of which every group keeps n."""
        m = self.numbers[1]
        places = select(torch.arange(m, dtype=torch.uint8).repeat(kept.numel() // m), kept)  # [rows * groups * n]
        digits = (places[:, None] >> torch.arange(self._place_bits, dtype=torch.uint8)) & 1  # lowest bit first
        pack_bits(digits.view(kept.shape[0], -1), target)

    def read(self, mask: Tensor, columns: int) -> Tensor:
        """Booleans again: in every group the columns that are one of the n places."""
        places, m = self._places(mask, columns), self.numbers[1]
        kept = torch.zeros(len(places), m, dtype=torch.bool, device=mask.device)
        for column in places.split(1, 1):  # n steps over all groups at once; [groups, 1] == [m] -> [groups, m]
            kept |= column == torch.arange(m, dtype=torch.uint8, device=mask.device)
        return kept.view(mask.shape[0], columns)

    def num_kept(self, mask: Tensor, columns: int) -> int:
        """Weights that the mask keeps: n a group."""
        n, m = self.numbers
        return mask.shape[0] * (columns // m) * n

    def defect(self, mask: Tensor, columns: int) -> str | None:
        """Name the defect if places are not smaller than m, or do not rise inside a group (they would be ambiguous)."""
        m = self.numbers[1]
        for rows in mask.split(max(1, CHUNK // columns)):
            places = self._places(rows, columns)
            if bool((places[:, -1] > m - 1).any()) or bool((places[:, 1:] <= places[:, :-1]).any()):
                return f"has a group whose places do not rise or are not smaller than {m}"
        return None

    def _places(self, mask: Tensor, columns: int) -> Tensor:
        """Places uint8 [groups, n]."""
        digits = unpack_bits(mask, self.used_bits(columns)).view(torch.uint8)
        digits = digits.view(-1, self.numbers[0], self._place_bits)  # [groups, n, bits of a place]
        places = digits[..., 0].clone()
        for digit in range(1, self._place_bits):
            places |= digits[..., digit] << digit
        return places


def smallest_encoding(columns: int, n_of_m: tuple[int, int] | None, kept: Iterable[Tensor]) -> MaskEncoding:
    """Choose places for weights pruned to n:m, if every group keeps n and they need no more bytes; else bits.

    `kept` yields the parts of the mask, booleans [rows, columns].
    """
    if n_of_m is None:
        return BITS
    (n, m), groups = n_of_m, GroupMask(*n_of_m)
    if not 0 < n < m <= MAX_GROUP or columns % m or groups.row_bytes(columns) > BITS.row_bytes(columns):
        return BITS  # 4:8 needs 12 bits for 8 weights
    return groups if all(bool((rows.view(-1, m).sum(-1) == n).all()) for rows in kept) else BITS
