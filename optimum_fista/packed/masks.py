"""Masks as bytes, one bit a weight. docs/formats.md has every byte.

Rows are padded to whole words of 64 bits, so that a kernel reads a row as words from an aligned address, and two rows
never share a byte. This needs at most 63 more bits per row. Bit and byte order are little-endian: on the processors of
the kernels, the n-th bit of a row is the n-th bit of its words.
"""

import numpy as np
import torch
from torch import Tensor

CHUNK = (
    1 << 22
)  # weights that are handled together, so that little memory is needed besides the result

_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def as_words(tensor: Tensor) -> Tensor:
    """The same bytes as integers: copies of floats may change a NaN's bits, and -0.0 == 0.0 hides a sign."""
    return tensor.view(_WORDS[tensor.element_size()])


def row_bytes(columns: int) -> int:
    """Bytes of a row of a mask, a multiple of 8."""
    return -(-columns // 64) * 8  # rounded up; in Python's integers, which do not overflow


def pack_bits(bits: Tensor, target: Tensor) -> None:
    """Write booleans [rows, count] into `target`, uint8 [rows, >= ceil(count / 8)]; both on the CPU."""
    packed = np.packbits(
        bits.numpy(), axis=1, bitorder="little"
    )  # vectorised; PyTorch has no such operation
    target[:, : packed.shape[1]] = torch.from_numpy(packed)  # bytes after these stay padding


def unpack_bits(packed: Tensor, count: int) -> Tensor:
    """The first `count` bits of each row of uint8 [rows, bytes], as booleans on the same device."""
    if packed.device.type == "cpu":
        bits = np.unpackbits(packed.numpy(), axis=1, count=count, bitorder="little")
        return torch.from_numpy(bits.view(bool))  # [rows, count], no copy
    # [rows, bytes, 1] >> [8] -> [rows, bytes, 8], lowest bit first
    bits_of_bytes = (
        packed[..., None] >> torch.arange(8, dtype=torch.uint8, device=packed.device)
    ) & 1
    return bits_of_bytes.view(packed.shape[0], -1)[:, :count].bool()


def count_bits(packed: Tensor) -> Tensor:
    """Number of bits set in each row of uint8 [rows, bytes], bytes a multiple of 8: int64 [rows]."""
    aligned = (
        packed if packed.is_contiguous() and packed.storage_offset() % 8 == 0 else packed.clone()
    )
    words = aligned.view(torch.int64)  # refuses an address that is no multiple of 8
    # Sums of neighbours in 2, then 4, then 8 bits (Hacker's Delight, 5-1). PyTorch has no popcount.
    words = words - ((words >> 1) & 0x5555555555555555)
    words = (words & 0x3333333333333333) + ((words >> 2) & 0x3333333333333333)
    words = (words + (words >> 4)) & 0x0F0F0F0F0F0F0F0F
    return ((words * 0x0101010101010101) >> 56 & 0xFF).sum(
        1
    )  # the product adds all eight bytes in the highest one


def select(values: Tensor, kept: Tensor) -> Tensor:
    """The values where `kept` (of as many booleans) is True, in order, on the CPU. Three times as fast as indexing."""
    return torch.from_numpy(np.compress(kept.reshape(-1).numpy(), values.reshape(-1).numpy()))


def place(values: Tensor, kept: Tensor, target: Tensor) -> None:
    """Inverse of `select`: write the values where `kept` is True and zeros elsewhere. Integers, on any device."""
    if values.numel():
        # [rows * columns]: the number of each place among the kept. A gather uses all threads, masked_scatter one.
        source = torch.cumsum(kept.view(-1), 0, dtype=torch.int32).sub_(1).clamp_(min=0)
        target.copy_(torch.index_select(values, 0, source).view(target.shape)).mul_(kept)
