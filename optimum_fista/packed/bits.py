"""Booleans as bits, lowest bit first, in rows padded to whole words of 64 bits; and choosing values by booleans."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def as_words(tensor: Tensor) -> Tensor:
    """The same bytes as integers, so that no bit of a NaN changes."""
    return tensor.view(_WORDS[tensor.element_size()])


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


def select(values: Tensor, kept: Tensor) -> Tensor:
    """The values where `kept` (of as many booleans) is True, in order, on the CPU. Three times as fast as indexing."""
    return torch.from_numpy(np.compress(kept.reshape(-1).numpy(), values.reshape(-1).numpy()))


def place(values: Tensor, kept: Tensor, target: Tensor) -> None:
    """Inverse of `select`: write the values where `kept` is True and zeros elsewhere. Integers, on any device."""
    if values.numel():
        source = torch.cumsum(kept.view(-1), 0, dtype=torch.int32).sub_(1).clamp_(min=0)
        target.copy_(torch.index_select(values, 0, source).view(target.shape)).mul_(kept)
