"""Masks packed to one bit a weight."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def pack_mask(mask: Tensor) -> Tensor:
    """Pack a boolean mask of any shape to uint8 [ceil(numel / 8)], row-major, lowest bit first, 1 = kept."""
    bits = np.packbits(mask.detach().cpu().numpy().reshape(-1), bitorder="little")
    return torch.from_numpy(bits)


def unpack_mask(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Inverse of `pack_mask`."""
    count = int(np.prod(shape))
    if packed.dtype != torch.uint8 or packed.numel() != (count + 7) // 8:
        raise ValueError(
            f"packed has {packed.numel()} values of {packed.dtype}: a mask of shape {tuple(shape)} needs "
            f"{(count + 7) // 8} of torch.uint8."
        )
    bits = np.unpackbits(packed.cpu().numpy(), count=count, bitorder="little")
    return torch.from_numpy(bits.astype(bool)).view(shape)
