"""The packed format: a sparse tensor as its kept values, a mask and a layout. docs/formats.md has every byte.

`pack` makes a `PackedTensor` of a weight, `unpack` makes the weight again, bit for bit, and `check` refuses three
tensors of a file that are none. Unlike a CSR matrix, which stores 32 bits for the column of each kept weight, the mask
stores one bit for every weight: at half zeros that is 16 times less. No function needs more memory than its result and
a few megabytes, because rows are handled in chunks.
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

VALUES_SUFFIX = "_values"
SUFFIXES = (VALUES_SUFFIX, "_mask", "_layout")
"""What follows the name of a dense tensor in the names of its three packed ones."""

VERSION = [2, 0, 0]
"""The first three numbers of a layout. The zeros are reserved: earlier they described masks of n:m groups."""

MAX_DIMENSIONS = 8

_COPY_AGAIN = "Copy or download the file again, or pack the model again."


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
        """Return the three tensors by the names that they have in a file, for a dense tensor called `name`.

        Of "up_proj.weight" these are "up_proj.weight_values", "up_proj.weight_mask" and "up_proj.weight_layout".
        """
        values, mask, layout = (name + suffix for suffix in SUFFIXES)
        return {values: self.values, mask: self.mask, layout: self.layout}


def pack(weight: Tensor, mask: Tensor | None = None) -> PackedTensor:
    """Pack a sparse tensor [..., cols] of any floating dtype; the result is on the same device, and may be larger.

    Args:
        weight: The dense tensor. It is not changed.
        mask: Booleans of the shape of `weight`, True = kept, also if the weight is zero. `None`: all weights with a bit
            set are kept, so also -0.0.

    Raises:
        ValueError: If an argument has another form, or if a weight outside of the mask is not zero.
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
    dense = weight.detach().reshape(-1, columns)  # [..., cols] -> [rows, cols]
    rows = dense.shape[0]
    mask_of_rows = None if mask is None else mask.reshape(rows, columns)

    # First pass over the rows: write the mask, and count the kept weights of each chunk.
    packed_mask = torch.zeros(rows, row_bytes(columns), dtype=torch.uint8)
    counts = []
    for chunk in _chunks(rows, columns):
        bits = _mask_of_chunk(dense, mask_of_rows, chunk)
        is_nonzero = (dense[chunk] != 0).cpu()
        if mask is not None and bool((is_nonzero & ~bits).any()):
            raise ValueError(
                "weight has values other than zero outside of mask: pass the mask it was pruned with."
            )
        counts.append(int(torch.count_nonzero(bits)))
        pack_bits(bits, packed_mask[chunk])  # writes into `packed_mask`

    # Second pass: copy the kept values. Only one chunk at a time leaves the device.
    values = torch.empty(sum(counts), dtype=dense.dtype)
    values_of_chunks = as_words(values).split(counts)  # views: writing to them fills `values`
    for chunk, target in zip(_chunks(rows, columns), values_of_chunks, strict=True):
        bits = _mask_of_chunk(dense, mask_of_rows, chunk)
        target.copy_(select(as_words(dense[chunk]).cpu(), bits))

    # three numbers of the version, the checksum, and the shape
    layout = torch.tensor([*VERSION, 0, *weight.shape])
    layout[3] = _checksum(PackedTensor(values, packed_mask, layout))  # does not cover itself
    return PackedTensor(
        values=values.to(weight.device),
        mask=packed_mask.to(weight.device),
        layout=layout.to(weight.device),
    )


def check(packed: PackedTensor, name: str = "weight", *, checksum: bool = True) -> None:
    """Check that three tensors of unknown origin are a packed tensor, and that the checksum is right.

    First the sizes are compared with those of the tensors, in Python's integers, so that no number in the layout can
    cause a large allocation or an overflow. Nothing is changed.

    Args:
        packed: The three tensors, such as those of a file.
        name: Name of the dense tensor, for the messages.
        checksum: Whether to compare the checksum, too. It is right only for tensors that come from a file.

    Raises:
        PackedFormatError: If the three are no packed tensor, or the checksum is another one.
    """
    values = packed.values
    mask = packed.mask
    layout = packed.layout
    _check_layout(layout, name)
    rows = prod(packed.shape[:-1])
    columns = packed.shape[-1]

    mask_shape = (rows, row_bytes(columns))
    if mask.dtype != torch.uint8 or tuple(mask.shape) != mask_shape:
        raise PackedFormatError(
            f"{name}_mask is {mask.dtype} of shape {tuple(mask.shape)}: the layout {layout.tolist()} needs torch.uint8 "
            f"of shape {mask_shape}."
        )
    if not values.is_floating_point() or values.dim() != 1:
        raise PackedFormatError(
            f"{name}_values is {values.dtype} of shape {tuple(values.shape)}: a floating dtype and one dimension are "
            "needed."
        )
    # `unpack` views the values as integers and the mask as words.
    if not mask.is_contiguous() or not values.is_contiguous() or values.is_neg():
        raise PackedFormatError(
            f"{name}_values and {name}_mask must be contiguous, and no negative views."
        )

    # A bit after the last column of a row would count as a weight.
    if _has_bits_after(mask, columns):
        raise PackedFormatError(f"{name}_mask has bits set after the {columns} that a row has.")

    num_kept = int(count_bits(mask).sum())
    if values.numel() != num_kept:
        raise PackedFormatError(
            f"{name}_values holds {values.numel()} weights, but the mask keeps {num_kept}."
        )
    if checksum and layout[3] != _checksum(packed):  # last, because it reads every value
        raise PackedFormatError(
            f"{name} has another checksum than its layout says: the file is damaged. {_COPY_AGAIN}"
        )


def unpack(packed: PackedTensor, name: str = "weight") -> Tensor:
    """Return the dense tensor, bit for bit, on the device of the values; `name` is for the messages.

    Raises:
        PackedFormatError: See `check`. The checksum is not compared.
    """
    check(packed, name, checksum=False)
    columns = packed.shape[-1]
    rows = prod(packed.shape[:-1])
    device = packed.values.device
    dense = torch.zeros(rows, columns, dtype=packed.values.dtype, device=device)

    start = 0  # where the values of the chunk begin
    for chunk in _chunks(rows, columns):
        bits = unpack_bits(packed.mask[chunk].to(device), columns)
        stop = start + int(torch.count_nonzero(bits))
        # Writes into `dense`, as integers, so that no bit of a NaN changes.
        place(as_words(packed.values[start:stop]), bits, as_words(dense)[chunk])
        start = stop
    return dense.view(packed.shape)


def unpack_mask(packed: PackedTensor) -> Tensor:
    """Return the mask as booleans of the dense tensor's shape, True = kept; PackedFormatError if it is damaged."""
    check(packed, checksum=False)
    rows = packed.mask.shape[0]
    columns = packed.shape[-1]
    chunks = [unpack_bits(packed.mask[chunk], columns) for chunk in _chunks(rows, columns)]
    return torch.cat(chunks).view(packed.shape)


def packed_names(names: Iterable[str]) -> list[str]:
    """Return the names of the dense tensors that are packed among the tensors called `names`, in their order.

    `names` are those of the tensors in the files of a folder, such as "model.layers.0.mlp.up_proj.weight_mask".

    Raises:
        PackedFormatError: If a part of a packed tensor is missing, or if a tensor is there both packed and dense.
    """
    stored = dict.fromkeys(names)  # a set that keeps the order
    stems: dict[str, None] = {}  # names without a suffix; another set that keeps the order
    for name in stored:
        for suffix in SUFFIXES:
            if name.endswith(suffix):
                stems[name.removesuffix(suffix)] = None

    packed = []
    for stem in stems:
        parts = [stem + suffix for suffix in SUFFIXES]
        missing = [part for part in parts if part not in stored]
        if len(missing) > 1:
            continue  # one part alone is another tensor, such as `attention_mask`
        if missing:
            raise PackedFormatError(
                f"{stem} is packed, but {missing[0]} is missing: the file is incomplete. {_COPY_AGAIN}"
            )
        if stem in stored:
            raise PackedFormatError(
                f"{stem} is there both packed and dense: the file is malformed. {_COPY_AGAIN}"
            )
        packed.append(stem)
    return packed


def _check_layout(layout: Tensor, name: str) -> None:
    """Refuse a layout with impossible numbers; `name` is that of the dense tensor, for the messages.

    A layout has three numbers for the version of the format, the checksum, and the shape of the dense tensor.
    """
    is_vector_of_integers = layout.dtype == torch.int64 and layout.dim() == 1
    if not is_vector_of_integers or not 5 <= layout.numel() <= 4 + MAX_DIMENSIONS:
        raise PackedFormatError(
            f"{name}_layout is {layout.dtype} of shape {tuple(layout.shape)}: torch.int64 of one dimension and 5 to "
            f"{4 + MAX_DIMENSIONS} numbers is needed."
        )
    version = layout[:3].tolist()
    shape = layout[4:].tolist()
    if version != VERSION:
        raise PackedFormatError(
            f"{name} is packed in version {version} of the format; this package reads version {VERSION}. Update the "
            "package, or pack the model again."
        )
    if min(shape) < 1:
        raise PackedFormatError(
            f"{name}_layout says shape {tuple(shape)}: every dimension must be positive. {_COPY_AGAIN}"
        )


def _has_bits_after(mask: Tensor, columns: int) -> bool:
    """Tell whether a mask, uint8 [rows, bytes], has a bit set after the first `columns` bits of a row."""
    num_full_bytes = columns // 8
    num_bits = columns % 8  # of the next byte belong to the last columns
    tail = mask[:, num_full_bytes:]
    if tail.shape[1] == 0:
        return False
    first_byte = tail[:, 0] >> num_bits  # the lowest bits come first
    return bool(first_byte.any()) or bool(tail[:, 1:].any())


def _checksum(packed: PackedTensor) -> int:
    """Return the CRC-32 of the layout's other numbers, the mask and the values, as they are in a file.

    The number `layout[3]` is left out, because it is the checksum itself.
    """
    checksum = 0
    for part in (packed.layout[:3], packed.layout[4:], packed.mask.view(-1), packed.values):
        # NumPy has no bfloat16, so the memory is viewed as bytes.
        as_bytes = part.cpu().view(torch.uint8).numpy()
        checksum = zlib.crc32(as_bytes.data, checksum)
    return checksum


def _chunks(rows: int, columns: int) -> Iterator[slice]:
    """Return slices of whole rows, of about 4 million weights each, that together cover all rows."""
    rows_of_chunk = max(1, CHUNK // columns)
    for start in range(0, rows, rows_of_chunk):
        yield slice(start, min(start + rows_of_chunk, rows))


def _mask_of_chunk(dense: Tensor, mask: Tensor | None, chunk: slice) -> Tensor:
    """Return the mask of some rows as contiguous booleans [rows of the chunk, columns] on the CPU, True = kept.

    `dense` is the whole matrix, and `mask` its mask. If that is `None`, a weight with any bit set is kept: -0.0, too,
    so weights are compared as integers.
    """
    bits = as_words(dense[chunk]) != 0 if mask is None else mask[chunk]
    return bits.cpu().contiguous()  # as `pack_bits` needs them
