"""Masks as bytes, one bit for each weight, and the helpers by which `packed.format` packs and unpacks tensors.

A mask tells which weights of a matrix are kept (1) and which are zero (0). docs/formats.md has every byte: the bits of
a row follow each other from the lowest bit of its first byte, and rows are padded to whole words of 64 bits, so that
two rows never share a byte.
"""

import numpy as np
import torch
from torch import Tensor

CHUNK = 1 << 22
"""Number of weights that are handled together, so that little memory is needed besides the result."""

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integer dtypes by their size in bytes."""


def as_words(tensor: Tensor) -> Tensor:
    """View a floating tensor as integers of the same size; the memory is shared.

    A copy of a float may change the bits of a NaN, and a comparison with zero does not see the sign of -0.0.
    """
    return tensor.view(_INTEGERS[tensor.element_size()])


def row_bytes(columns: int) -> int:
    """Return how many bytes the mask of a row of `columns` weights takes: a multiple of 8."""
    # In Python's integers, which do not overflow: `columns` may come from a damaged file.
    num_words = (columns + 63) // 64  # rounded up
    return num_words * 8


def pack_bits(bits: Tensor, target: Tensor) -> None:
    """Write a mask into the bytes `target`. Both are on the CPU.

    `bits` are booleans [rows, columns]; `target` is uint8 [rows, bytes], with at least ceil(columns / 8) bytes a row.
    The bytes after those are left as they are.
    """
    # NumPy, because PyTorch has no such operation
    packed = np.packbits(bits.numpy(), axis=1, bitorder="little")
    target[:, : packed.shape[1]] = torch.from_numpy(packed)


def unpack_bits(packed: Tensor, count: int) -> Tensor:
    """Return the first `count` bits of each row of a mask, uint8 [rows, bytes], as booleans on the same device."""
    if packed.device.type == "cpu":
        bits = np.unpackbits(packed.numpy(), axis=1, count=count, bitorder="little")
        return torch.from_numpy(bits.view(bool))  # [rows, count], no copy

    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    bits_of_bytes = (packed[..., None] >> shifts) & 1  # [rows, bytes, 8], the lowest bit first
    return bits_of_bytes.view(packed.shape[0], -1)[:, :count].bool()


def count_bits(packed: Tensor) -> Tensor:
    """Return the number of bits that are set in each row of a mask: int64 [rows].

    `packed` is uint8 [rows, bytes], with a multiple of 8 bytes a row.
    """
    is_aligned = packed.is_contiguous() and packed.storage_offset() % 8 == 0
    aligned = packed if is_aligned else packed.clone()
    words = aligned.view(torch.int64)

    # PyTorch has no operation that counts bits. Sums of neighbours in 2, then 4, then 8 bits (Hacker's Delight, 5-1).
    words = words - ((words >> 1) & 0x5555555555555555)
    words = (words & 0x3333333333333333) + ((words >> 2) & 0x3333333333333333)
    words = (words + (words >> 4)) & 0x0F0F0F0F0F0F0F0F
    # The product adds all eight bytes of a word in its highest byte.
    counts = ((words * 0x0101010101010101) >> 56) & 0xFF
    return counts.sum(dim=1)


def select(values: Tensor, kept: Tensor) -> Tensor:
    """Return the values where the booleans `kept` are True, in order, as a new tensor [number of kept] on the CPU.

    Both tensors are on the CPU and have the same number of elements. This is three times as fast as indexing.
    """
    return torch.from_numpy(np.compress(kept.reshape(-1).numpy(), values.reshape(-1).numpy()))


def place(values: Tensor, kept: Tensor, target: Tensor) -> None:
    """Write `values` into `target`, which has zeros, where `kept` is True: the inverse of `select`.

    `values` are integers [number of kept], `kept` booleans [rows, columns], and `target` integers [rows, columns]. All
    are on one device, of any kind.
    """
    if values.numel() == 0:  # there is nothing to write, and no valid index
        return
    # [rows * columns]: how many weights are kept up to each place, less one. So for a kept weight it is the index of
    # its value; elsewhere it is any valid index. (A gather uses all threads, masked_scatter only one.)
    index = torch.cumsum(kept.view(-1), 0, dtype=torch.int32).sub_(1).clamp_(min=0)
    target.copy_(torch.index_select(values, 0, index).view(target.shape)).mul_(kept)
