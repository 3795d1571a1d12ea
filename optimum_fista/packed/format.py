"""The packed format: a sparse tensor as its kept values, a mask and a layout. docs/formats.md has every byte.

All functions are pure. Nothing here needs more memory than its result and a few megabytes.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from optimum_fista.packed.bits import as_words, count_bits, place, select
from optimum_fista.packed.mask_bytes import BITS, CHUNK, MaskEncoding, encoding, smallest_encoding
from optimum_fista.packed.validation import PLAIN_VERSION, SUFFIXES, VERSION, PackedFormatError, check_tensors, shape_of


@dataclass(frozen=True)
class PackedTensor:
    """A sparse tensor of shape [..., cols] and dtype D; rows is the product of all dimensions but the last.

    Attributes:
        values: D [kept], the kept weights, row-major.
        mask: uint8 [rows, bytes], one bit a weight, or for n:m the places of the kept weights inside their groups.
        layout: int64 [4 + ndim]: version (2), n, m (0, 0: one bit a weight), the checksum, and the shape; version 1,
            [3 + ndim], has no checksum.
    """

    values: Tensor
    mask: Tensor
    layout: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense tensor."""
        return shape_of(self.layout)

    @property
    def n_of_m(self) -> tuple[int, int] | None:
        """`(n, m)` if the mask holds places inside groups, `None` if it holds one bit a weight."""
        n, m = self.layout[1:3].tolist()
        return (n, m) if m else None

    @property
    def encoding(self) -> MaskEncoding:
        """How the mask is written."""
        return encoding(self.n_of_m)

    @property
    def num_bytes(self) -> int:
        """Bytes of the three tensors."""
        return sum(t.numel() * t.element_size() for t in (self.values, self.mask, self.layout))

    @property
    def dense_bytes(self) -> int:
        """Bytes of the dense tensor."""
        return prod(self.shape) * self.values.element_size()

    def without_checksum(self) -> PackedTensor:
        """The same tensor for use in memory, where its values may change their dtype; of checked tensors."""
        version, n, m, *_ = self.layout.tolist()
        if version == PLAIN_VERSION:
            return self
        layout = torch.tensor([PLAIN_VERSION, n, m, *self.shape], device=self.layout.device)
        return PackedTensor(self.values, self.mask, layout)

    def named(self, name: str) -> dict[str, Tensor]:
        """The three tensors under the names that they have in a file, for a dense tensor called `name`."""
        return dict(zip((name + suffix for suffix in SUFFIXES), (self.values, self.mask, self.layout), strict=True))


def pack(weight: Tensor, mask: Tensor | None = None, pattern: tuple[int, int] | None = None) -> PackedTensor:
    """Pack a sparse tensor.

    Args:
        weight: [..., cols], any floating dtype.
        mask: Boolean, the shape of `weight`, True = kept, zero or not. `None`: all weights with a bit set are kept, so
            also -0.0.
        pattern: `(n, m)` to store the places of the kept weights inside their groups, if exactly n of every m
            consecutive ones are kept and this takes no more room; one bit a weight otherwise.

    Returns:
        The packed tensor, on the device of `weight`. It can be larger than a dense one: `num_bytes`, `dense_bytes`.
    """
    if not weight.is_floating_point() or weight.numel() == 0 or weight.dim() == 0:
        raise ValueError(
            f"weight is {weight.dtype} of shape {tuple(weight.shape)}: pass a floating tensor with at least one weight."
        )
    if mask is not None and (mask.dtype != torch.bool or mask.shape != weight.shape):
        raise ValueError(
            f"mask is {mask.dtype} of shape {tuple(mask.shape)}: pass a boolean one of the shape of weight, "
            f"{tuple(weight.shape)}."
        )
    columns = weight.shape[-1]
    dense = weight.detach().reshape(-1, columns)
    rows = dense.shape[0]
    kept = None if mask is None else mask.reshape(rows, columns)
    written = smallest_encoding(columns, pattern, (_kept(dense, kept, chunk) for chunk in _chunks(rows, columns)))
    packed_mask = torch.zeros(rows, written.row_bytes(columns), dtype=torch.uint8)
    counts = []
    for chunk in _chunks(rows, columns):
        bits = _kept(dense, kept, chunk)
        if mask is not None and bool(((dense[chunk] != 0).cpu() & ~bits).any()):
            raise ValueError(
                "weight has values other than zero outside of mask: pass the mask that it was pruned with."
            )
        counts.append(int(torch.count_nonzero(bits)))
        written.write(bits, packed_mask[chunk])
    values = torch.empty(sum(counts), dtype=dense.dtype)
    for chunk, target in zip(_chunks(rows, columns), as_words(values).split(counts), strict=True):
        target.copy_(select(as_words(dense[chunk]).cpu(), _kept(dense, kept, chunk)))
    layout = torch.tensor([VERSION, *written.numbers, 0, *weight.shape])
    layout[3] = _checksum(PackedTensor(values, packed_mask, layout))
    return PackedTensor(*(t.to(weight.device) for t in (values, packed_mask, layout)))


def check(packed: PackedTensor, name: str = "weight") -> None:
    """Check that three tensors of unknown origin are a packed tensor, and those that were packed if they say so."""
    check_tensors(packed.values, packed.mask, packed.layout, name)
    if packed.layout[0] == VERSION and packed.layout[3] != _checksum(packed):
        raise PackedFormatError(f"{name} has another checksum than its layout says: the file is damaged.")


def unpack(packed: PackedTensor, name: str = "weight") -> Tensor:
    """The dense tensor, bit for bit, on the device of the values."""
    check(packed, name)
    shape, device = packed.shape, packed.values.device
    columns = shape[-1]
    rows = prod(shape[:-1])
    dense = torch.zeros(rows, columns, dtype=packed.values.dtype, device=device)
    start = 0
    for chunk in _chunks(rows, columns):
        bits = packed.encoding.read(packed.mask[chunk].to(device), columns)
        stop = start + int(torch.count_nonzero(bits))
        place(as_words(packed.values[start:stop]), bits, as_words(dense)[chunk])
        start = stop
    return dense.view(shape)


def unpack_mask(packed: PackedTensor) -> Tensor:
    """Boolean mask of the dense tensor's shape, True = kept."""
    check(packed)
    rows, columns = packed.mask.shape[0], packed.shape[-1]
    chunks = (packed.encoding.read(packed.mask[chunk], columns) for chunk in _chunks(rows, columns))
    return torch.cat(list(chunks)).view(packed.shape)


def packed_names(names: Iterable[str]) -> list[str]:
    """Names of the dense tensors that are packed among the tensors called `names`, in their order."""
    present = list(names)
    known = set(present)
    found = []
    for suffixed in present:
        for suffix in SUFFIXES:
            name = suffixed.removesuffix(suffix)
            if name != suffixed and sum(name + other in known for other in SUFFIXES) > 1:
                found.append(name)
    for name in dict.fromkeys(found):
        for suffix in SUFFIXES:
            if name + suffix not in known:
                raise PackedFormatError(f"{name} is packed, but {name + suffix} is missing: the file is incomplete.")
        if name in known:
            raise PackedFormatError(f"{name} is there both packed and dense: the file is malformed.")
    return list(dict.fromkeys(found))


def with_bits(packed: PackedTensor) -> PackedTensor:
    """The same tensor with one bit a weight in its mask; the values are shared."""
    if packed.encoding is BITS:
        return packed.without_checksum()
    columns = packed.shape[-1]
    mask = torch.zeros(packed.mask.shape[0], BITS.row_bytes(columns), dtype=torch.uint8)
    BITS.write(unpack_mask(packed).view(-1, columns).cpu(), mask)
    device = packed.mask.device
    return PackedTensor(packed.values, mask.to(device), _bit_layout(packed.shape, device))


def matrices_of(packed: PackedTensor) -> list[PackedTensor]:
    """The matrices of a checked tensor [count, rows, columns]; they share its values and its mask."""
    count, rows, columns = packed.shape
    packed = with_bits(packed)
    masks = packed.mask.split(rows)
    sizes = [int(count_bits(mask).sum()) for mask in masks]
    layout = _bit_layout((rows, columns), packed.mask.device)
    values = packed.values.split(sizes)
    return [PackedTensor(values[i], masks[i], layout) for i in range(count)]


def stacked_rows(parts: Sequence[PackedTensor]) -> PackedTensor:
    """One matrix of the rows of several checked ones, all with as many columns; one alone is shared."""
    bits = [with_bits(part) for part in parts]
    if len(bits) == 1:
        return bits[0]
    rows, columns = sum(part.shape[0] for part in bits), bits[0].shape[1]
    values, mask = torch.cat([part.values for part in bits]), torch.cat([part.mask for part in bits])
    return PackedTensor(values, mask, _bit_layout((rows, columns), mask.device))


def transposed(packed: PackedTensor) -> PackedTensor:
    """The transpose of a matrix, with the same weights kept; it is dense on the way."""
    return pack(unpack(packed).t(), unpack_mask(packed).t()).without_checksum()


def _bit_layout(shape: Sequence[int], device: torch.device) -> Tensor:
    """The layout of a tensor in memory with one bit a weight."""
    return torch.tensor([PLAIN_VERSION, 0, 0, *shape], device=device)


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
    """Booleans of some rows, True = kept, on the CPU."""
    return (as_words(dense[chunk]) != 0 if kept is None else kept[chunk]).cpu().contiguous()
