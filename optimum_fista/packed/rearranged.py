"""Packed tensors cut, joined and transposed, for use in memory: masks of one bit a weight, and no checksums."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from optimum_fista.packed.bits import count_bits
from optimum_fista.packed.format import PackedTensor, pack, unpack, unpack_mask
from optimum_fista.packed.masks import BITS
from optimum_fista.packed.validation import PLAIN_VERSION


def with_bits(packed: PackedTensor) -> PackedTensor:
    """The same tensor with one bit a weight in its mask; the values are shared."""
    if packed.encoding is BITS:
        return packed.without_checksum()
    columns = packed.shape[-1]
    mask = torch.zeros(packed.mask.shape[0], BITS.row_bytes(columns), dtype=torch.uint8)
    BITS.write(unpack_mask(packed).view(-1, columns).cpu(), mask)
    device = packed.mask.device
    return PackedTensor(packed.values, mask.to(device), _layout(packed.shape).to(device))


def matrices_of(packed: PackedTensor) -> list[PackedTensor]:
    """The matrices of a checked tensor [count, rows, columns]; they share its values and its mask."""
    count, rows, columns = packed.shape
    packed = with_bits(packed)
    masks = packed.mask.split(rows)
    sizes = [int(count_bits(mask).sum()) for mask in masks]
    layout = _layout((rows, columns)).to(packed.mask.device)
    values = packed.values.split(sizes)
    return [PackedTensor(values[i], masks[i], layout) for i in range(count)]


def stacked_rows(parts: Sequence[PackedTensor]) -> PackedTensor:
    """One matrix of the rows of several checked ones, all with as many columns; one alone is shared."""
    bits = [with_bits(part) for part in parts]
    if len(bits) == 1:
        return bits[0]
    rows, columns = sum(part.shape[0] for part in bits), bits[0].shape[1]
    values, mask = torch.cat([part.values for part in bits]), torch.cat([part.mask for part in bits])
    return PackedTensor(values, mask, _layout((rows, columns)).to(mask.device))


def transposed(packed: PackedTensor) -> PackedTensor:
    """The transpose of a matrix, with the same weights kept; it is dense on the way."""
    return pack(unpack(packed).t(), unpack_mask(packed).t()).without_checksum()


def _layout(shape: Sequence[int]) -> torch.Tensor:
    return torch.tensor([PLAIN_VERSION, 0, 0, *shape])
