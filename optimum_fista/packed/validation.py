"""Checks of packed tensors of unknown origin: sizes and masks, before anything reads the values."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from optimum_fista.packed.mask_bytes import MAX_GROUP, MaskEncoding, encoding

SUFFIXES = ("_values", "_mask", "_layout")
VERSION = 2
PLAIN_VERSION = 1  # without a checksum: older files, and tensors in memory
MAX_DIMENSIONS = 8


class PackedFormatError(ValueError):
    """Tensors that are not what docs/formats.md describes."""


def check_tensors(values: Tensor, mask: Tensor, layout: Tensor, name: str) -> None:
    """Check the three tensors of the packed tensor called `name`, all but its checksum.

    Sizes are compared with those of the tensors before anything is computed from them, in Python's integers, so
    that no number in `layout` can make this allocate much or overflow.
    """
    shape, written = _check_layout(layout, name)
    rows, columns = prod(shape[:-1]), shape[-1]
    width = written.row_bytes(columns)
    if mask.dtype != torch.uint8 or tuple(mask.shape) != (rows, width):
        raise PackedFormatError(
            f"{name}_mask is {mask.dtype} of shape {tuple(mask.shape)}: the layout {layout.tolist()} needs torch.uint8 "
            f"of shape {(rows, width)}."
        )
    if not values.is_floating_point() or values.dim() != 1:
        raise PackedFormatError(
            f"{name}_values is {values.dtype} of shape {tuple(values.shape)}: a floating dtype and one dimension "
            "are needed."
        )
    if not (mask.is_contiguous() and values.is_contiguous()) or values.is_neg():
        raise PackedFormatError(f"{name}_values and {name}_mask must be contiguous, and no negative views.")
    used = written.used_bits(columns)
    tail = mask[:, used // 8 :]
    if tail.shape[1]:
        first = tail[:, 0] >> (used % 8)
        if bool(first.any()) or bool(tail[:, 1:].any()):
            raise PackedFormatError(f"{name}_mask has bits set after the {used} that a row has.")
    kept = written.num_kept(mask, columns)
    if values.numel() != kept:
        raise PackedFormatError(f"{name}_values holds {values.numel()} weights, but the mask keeps {kept}.")
    if defect := written.defect(mask, columns):
        raise PackedFormatError(f"{name}_mask {defect}: the file is damaged.")


def shape_of(layout: Tensor) -> tuple[int, ...]:
    """The dense shape that a layout says."""
    version, _, _, *numbers = layout.tolist()
    return tuple(numbers[1:] if version == VERSION else numbers)


def _check_layout(layout: Tensor, name: str) -> tuple[tuple[int, ...], MaskEncoding]:
    """The shape and the encoding of the mask, of a layout that makes sense by itself."""
    if layout.dtype != torch.int64 or layout.dim() != 1 or not 4 <= layout.numel() <= 4 + MAX_DIMENSIONS:
        raise PackedFormatError(
            f"{name}_layout is {layout.dtype} of shape {tuple(layout.shape)}: torch.int64 of one dimension and 4 to "
            f"{4 + MAX_DIMENSIONS} numbers is needed."
        )
    version, n, m = layout[:3].tolist()
    if version not in (PLAIN_VERSION, VERSION):
        raise PackedFormatError(
            f"{name} is packed in version {version} of the format; this package reads versions {PLAIN_VERSION} and "
            f"{VERSION}. Update it, or pack the model again."
        )
    shape = shape_of(layout)
    if not 1 <= len(shape) <= MAX_DIMENSIONS or min(shape) < 1:
        raise PackedFormatError(
            f"{name}_layout says shape {shape}: 1 to {MAX_DIMENSIONS} dimensions are needed, and every dimension must "
            "be positive."
        )
    if (n, m) != (0, 0) and (not 0 < n < m <= MAX_GROUP or shape[-1] % m):
        raise PackedFormatError(
            f"{name}_layout says {n} kept of every {m} in rows of {shape[-1]}: 0 < n < m <= {MAX_GROUP} and m dividing "
            "the row are needed."
        )
    return shape, encoding((n, m))
