"""The packed format: a sparse tensor as its kept values, a mask and a layout. docs/formats.md has every byte.

`pack` and `unpack` are pure and inverse to each other, bit for bit. Unlike a CSR matrix, which stores 32 bits for each
kept weight's column, the mask stores one bit for every weight: at half zeros that is 16 times less. But the start of
each row in the values must be counted. No function needs more memory than its result and a few megabytes.
"""

import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from optimum_fista.packed.masks import (
    CHUNK,
    as_words,
    count_bits,
    pack_bits,
    place,
    row_bytes,
    select,
    unpack_bits,
)

SUFFIXES = ("_values", "_mask", "_layout")
VERSION = [2, 0, 0]  # the zeros are reserved: earlier they described masks of n:m groups
MAX_DIMENSIONS = 8


class PackedFormatError(ValueError):
    """Tensors that do not have the form described in docs/formats.md."""


@dataclass(frozen=True)
class PackedTensor:
    """A sparse tensor of shape [..., cols] and dtype D; rows is the product of all dimensions but the last.

    The layout is int64 [4 + ndim]: version, 0, 0, the checksum, and the shape. The checksum is that of the tensors in a
    file. In memory it may be wrong, because values may change their dtype there.
    """

    values: Tensor  # D [kept], the kept weights, row-major
    mask: Tensor  # uint8 [rows, bytes], one bit a weight
    layout: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense tensor."""
        return tuple(self.layout[4:].tolist())

    @property
    def num_bytes(self) -> int:
        """Bytes of the three tensors."""
        return sum(t.numel() * t.element_size() for t in (self.values, self.mask, self.layout))

    @property
    def dense_bytes(self) -> int:
        """Bytes of the dense tensor."""
        return prod(self.shape) * self.values.element_size()

    def named(self, name: str) -> dict[str, Tensor]:
        """The three tensors under the names that they have in a file, for a dense tensor called `name`."""
        return dict(
            zip(
                (name + suffix for suffix in SUFFIXES),
                (self.values, self.mask, self.layout),
                strict=True,
            )
        )


def pack(weight: Tensor, mask: Tensor | None = None) -> PackedTensor:
    """Pack a sparse tensor [..., cols] of any floating dtype, on its device; the result may be larger.

    `mask` has the shape of `weight`, True = kept, zero or not; `None`: all weights with a bit set are kept, so also
    -0.0.
    """
    if not weight.is_floating_point() or weight.numel() == 0 or weight.dim() == 0:
        found = f"weight is {weight.dtype} of shape {tuple(weight.shape)}"
        raise ValueError(f"{found}: pass a floating tensor with at least one weight.")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != weight.shape):
        shapes = f"of shape {tuple(mask.shape)}: pass a boolean one of the shape of weight, {tuple(weight.shape)}"
        raise ValueError(f"mask is {mask.dtype} {shapes}.")
    columns = weight.shape[-1]
    dense = weight.detach().reshape(-1, columns)  # [..., cols] -> [rows, cols]
    rows = dense.shape[0]
    kept = None if mask is None else mask.reshape(rows, columns)
    # Two passes over the rows, a few megabytes at a time: write the mask, copy the values.
    packed_mask = torch.zeros(rows, row_bytes(columns), dtype=torch.uint8)
    counts = []
    for chunk in _chunks(rows, columns):
        bits = _kept(dense, kept, chunk)
        if mask is not None and bool(((dense[chunk] != 0).cpu() & ~bits).any()):
            raise ValueError(
                "weight has values other than zero outside of mask: pass the mask it was pruned with."
            )
        counts.append(int(torch.count_nonzero(bits)))
        pack_bits(bits, packed_mask[chunk])
    values = torch.empty(sum(counts), dtype=dense.dtype)
    for chunk, target in zip(_chunks(rows, columns), as_words(values).split(counts), strict=True):
        target.copy_(
            select(as_words(dense[chunk]).cpu(), _kept(dense, kept, chunk))
        )  # one chunk leaves the device
    layout = torch.tensor([*VERSION, 0, *weight.shape])  # the checksum does not cover itself
    layout[3] = _checksum(PackedTensor(values, packed_mask, layout))
    return PackedTensor(*(t.to(weight.device) for t in (values, packed_mask, layout)))


def check(packed: PackedTensor, name: str = "weight", *, checksum: bool = True) -> None:
    """Check that three tensors of unknown origin are a packed tensor, and that the checksum is right.

    First the sizes are compared with those of the tensors, in Python's integers, so that no number in the layout can
    cause a large allocation or an overflow. `checksum` is for tensors that come from a file.
    """
    values, mask, layout = packed.values, packed.mask, packed.layout
    _check_layout(layout, name)
    rows, columns = prod(packed.shape[:-1]), packed.shape[-1]
    width = row_bytes(columns)
    if mask.dtype != torch.uint8 or tuple(mask.shape) != (rows, width):
        needed = f"the layout {layout.tolist()} needs torch.uint8 of shape {(rows, width)}"
        raise PackedFormatError(
            f"{name}_mask is {mask.dtype} of shape {tuple(mask.shape)}: {needed}."
        )
    if not values.is_floating_point() or values.dim() != 1:
        found = f"{name}_values is {values.dtype} of shape {tuple(values.shape)}"
        raise PackedFormatError(f"{found}: a floating dtype and one dimension are needed.")
    if (
        not (mask.is_contiguous() and values.is_contiguous()) or values.is_neg()
    ):  # the kernels read bytes
        raise PackedFormatError(
            f"{name}_values and {name}_mask must be contiguous, and no negative views."
        )
    # A kernel would treat a bit after the last column as a weight, and write after the end of its row.
    tail = mask[:, columns // 8 :]
    # The first byte may hold the bits of the last columns, too.
    if tail.shape[1] and (bool((tail[:, 0] >> (columns % 8)).any()) or bool(tail[:, 1:].any())):
        raise PackedFormatError(f"{name}_mask has bits set after the {columns} that a row has.")
    kept = int(count_bits(mask).sum())
    if values.numel() != kept:
        raise PackedFormatError(
            f"{name}_values holds {values.numel()} weights, but the mask keeps {kept}."
        )
    if checksum and layout[3] != _checksum(packed):  # last: it reads every value
        raise PackedFormatError(
            f"{name} has another checksum than its layout says: the file is damaged."
        )


def unpack(packed: PackedTensor, name: str = "weight") -> Tensor:
    """The dense tensor, bit for bit, on the device of the values."""
    check(packed, name, checksum=False)
    shape, device = packed.shape, packed.values.device
    rows, columns = prod(shape[:-1]), shape[-1]
    dense = torch.zeros(rows, columns, dtype=packed.values.dtype, device=device)
    start = 0  # of the chunk's values
    for chunk in _chunks(rows, columns):
        bits = unpack_bits(packed.mask[chunk].to(device), columns)
        stop = start + int(torch.count_nonzero(bits))
        place(as_words(packed.values[start:stop]), bits, as_words(dense)[chunk])
        start = stop
    return dense.view(shape)


def unpack_mask(packed: PackedTensor) -> Tensor:
    """Boolean mask of the dense tensor's shape, True = kept."""
    check(packed, checksum=False)
    rows, columns = packed.mask.shape[0], packed.shape[-1]
    chunks = (unpack_bits(packed.mask[chunk], columns) for chunk in _chunks(rows, columns))
    return torch.cat(list(chunks)).view(packed.shape)


def packed_names(names: Iterable[str]) -> list[str]:
    """Names of the dense tensors that are packed among the tensors called `names`, in their order."""
    known = dict.fromkeys(names)
    stems = dict.fromkeys(
        name.removesuffix(suffix) for name in known for suffix in SUFFIXES if name.endswith(suffix)
    )
    # Two parts of three must be there: another tensor may be called `attention_mask`.
    found = [stem for stem in stems if sum(stem + suffix in known for suffix in SUFFIXES) > 1]
    for name in found:
        if missing := [name + suffix for suffix in SUFFIXES if name + suffix not in known]:
            raise PackedFormatError(
                f"{name} is packed, but {missing[0]} is missing: the file is incomplete."
            )
        if name in known:
            raise PackedFormatError(
                f"{name} is there both packed and dense: the file is malformed."
            )
    return found


def _check_layout(layout: Tensor, name: str) -> None:
    """Refuse a layout with impossible numbers."""
    if (
        layout.dtype != torch.int64
        or layout.dim() != 1
        or not 5 <= layout.numel() <= 4 + MAX_DIMENSIONS
    ):
        needed = f"torch.int64 of one dimension and 5 to {4 + MAX_DIMENSIONS} numbers is needed"
        raise PackedFormatError(
            f"{name}_layout is {layout.dtype} of shape {tuple(layout.shape)}: {needed}."
        )
    version, shape = layout[:3].tolist(), layout[4:].tolist()
    if version != VERSION:
        why = f"{name} is packed in version {version} of the format; this package reads version {VERSION}"
        raise PackedFormatError(f"{why}. Update it, or pack the model again.")
    if min(shape) < 1:
        raise PackedFormatError(
            f"{name}_layout says shape {tuple(shape)}: every dimension must be positive."
        )


def _checksum(packed: PackedTensor) -> int:
    """CRC-32 of the layout's other numbers, the mask and the values, as they are in a file."""
    found = 0
    for part in (packed.layout[:3], packed.layout[4:], packed.mask.view(-1), packed.values):
        found = zlib.crc32(part.cpu().view(torch.uint8).numpy().data, found)
    return found


def _chunks(rows: int, columns: int) -> Iterator[slice]:
    """Slices of whole rows of about 4 million weights."""
    step = max(1, CHUNK // columns)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def _kept(dense: Tensor, kept: Tensor | None, chunk: slice) -> Tensor:
    """Booleans of some rows, True = kept, on the CPU. As integers, because -0.0 has a bit set and is kept."""
    return (as_words(dense[chunk]) != 0 if kept is None else kept[chunk]).cpu().contiguous()
