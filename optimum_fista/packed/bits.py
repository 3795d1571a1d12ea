"""Masks as rows of bits, lowest bit first, padded to whole words of 64 bits."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def as_words(tensor: Tensor) -> Tensor:
    """The same bytes as integers, so that no bit of a NaN changes."""
    return tensor.view(_WORDS[tensor.element_size()])


def index_bits(m: int) -> int:
    """Bits of a place inside a group of m."""
    return (m - 1).bit_length()


def mask_bits(columns: int, n_of_m: tuple[int, int] | None) -> int:
    """Bits used of a row of the mask: one a weight, or the places of the kept weights of all groups."""
    return columns if n_of_m is None else columns // n_of_m[1] * n_of_m[0] * index_bits(n_of_m[1])


def mask_bytes(columns: int, n_of_m: tuple[int, int] | None) -> int:
    """Bytes of a row of the mask, a multiple of 8."""
    return -(-mask_bits(columns, n_of_m) // 64) * 8


def pack_bits(bits: Tensor, target: Tensor) -> None:
    """Write booleans [rows, count] into `target`, uint8 [rows, >= ceil(count / 8)]; both on the CPU."""
    packed = np.packbits(bits.numpy(), axis=1, bitorder="little")
    target[:, : packed.shape[1]] = torch.from_numpy(packed)


def unpack_bits(packed: Tensor, count: int) -> Tensor:
    """The first `count` bits of each row of uint8 [rows, bytes], as booleans on the same device."""
    if packed.device.type == "cpu":
        bits = np.unpackbits(packed.numpy(), axis=1, count=count, bitorder="little")
        return torch.from_numpy(bits.view(bool))
    bits_of_bytes = (packed[..., None] >> torch.arange(8, dtype=torch.uint8, device=packed.device)) & 1
    return bits_of_bytes.view(packed.shape[0], -1)[:, :count].bool()


def count_bits(packed: Tensor) -> Tensor:
    """Number of bits set in each row of uint8 [rows, bytes], bytes a multiple of 8: int64 [rows]."""
    aligned = packed if packed.is_contiguous() and packed.storage_offset() % 8 == 0 else packed.clone()
    words = aligned.view(torch.int64)
    words = words - ((words >> 1) & 0x5555555555555555)
    words = (words & 0x3333333333333333) + ((words >> 2) & 0x3333333333333333)
    words = (words + (words >> 4)) & 0x0F0F0F0F0F0F0F0F
    return ((words * 0x0101010101010101) >> 56 & 0xFF).sum(1)


def pack_places(bits: Tensor, n_of_m: tuple[int, int], target: Tensor) -> None:
    """Write the places of the kept weights inside their groups; `bits` [rows, columns] keeps n of every m."""
    m = n_of_m[1]
    places = select(torch.arange(m, dtype=torch.uint8).repeat(bits.numel() // m), bits)
    digits = (places[:, None] >> torch.arange(index_bits(m), dtype=torch.uint8)) & 1
    pack_bits(digits.view(bits.shape[0], -1), target)


def unpack_places(packed: Tensor, columns: int, n_of_m: tuple[int, int]) -> Tensor:
    """Places uint8 [groups, n] out of rows of a mask, uint8 [rows, bytes]."""
    n, m = n_of_m
    digits = unpack_bits(packed, mask_bits(columns, n_of_m)).view(torch.uint8).view(-1, n, index_bits(m))
    places = digits[..., 0].clone()
    for digit in range(1, index_bits(m)):
        places |= digits[..., digit] << digit
    return places


def select(values: Tensor, kept: Tensor) -> Tensor:
    """The values where `kept` (of as many booleans) is True, in order, on the CPU. Three times as fast as indexing."""
    return torch.from_numpy(np.compress(kept.reshape(-1).numpy(), values.reshape(-1).numpy()))


def place(values: Tensor, kept: Tensor, target: Tensor) -> None:
    """Inverse of `select`: write the values where `kept` is True and zeros elsewhere. Integers, on any device."""
    if values.numel():
        source = torch.cumsum(kept.view(-1), 0, dtype=torch.int32).sub_(1).clamp_(min=0)
        target.copy_(torch.index_select(values, 0, source).view(target.shape)).mul_(kept)
