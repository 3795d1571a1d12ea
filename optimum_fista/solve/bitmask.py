"""Masks packed to one bit a weight."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_BLOCK = 1 << 24  # weights


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


def count_kept(packed: Tensor, shape: tuple[int, int], dim: int) -> Tensor:
    """Weights that each row (`dim=0`) or column (`dim=1`) of a packed mask [rows, columns] keeps, int64.

    About 16 million weights are unpacked at a time.
    """
    rows, columns = shape
    step = max(8, _BLOCK // columns // 8 * 8)  # whole bytes
    if packed.numel() != (rows * columns + 7) // 8:
        unpack_mask(packed, shape)  # raises
    counts = torch.zeros(shape[dim], dtype=torch.int64)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        block = unpack_mask(packed[start * columns // 8 : (stop * columns + 7) // 8], (stop - start, columns))
        if dim == 0:
            counts[start:stop] = block.sum(1)
        else:
            counts += block.sum(0)
    return counts
