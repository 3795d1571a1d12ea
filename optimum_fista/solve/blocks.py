"""Rows of a matrix in blocks, so that what is made of them on the way is small."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

_ROWS = 192  # at least, or a product is inefficient
_VALUES = 2**19  # about so many on a CPU: 2 MiB of float32
SCALE_ON_DEVICES = 128
"""How many times as many values a block has on other devices than the CPU, where a call is expensive: 256 MiB."""


def rows_in_block(rows: int, columns: int, scale: int = 1) -> int:
    """Rows of a block of a matrix [rows, columns]; `scale`: how many times as large it is as on a CPU."""
    most = max(_ROWS, scale * _VALUES // max(1, columns))
    # Rounded up twice: as few blocks as possible, of about equal size.
    return -(-rows // max(1, -(-rows // most)))


def row_blocks(matrix: Tensor) -> Iterator[slice]:
    """Slices of the rows of a matrix: about half a million values each, but enough rows for a product to be efficient.

    On other devices than the CPU all rows are one block up to `SCALE_ON_DEVICES` times that size.
    """
    rows, columns = matrix.shape
    step = rows_in_block(rows, columns, 1 if matrix.device.type == "cpu" else SCALE_ON_DEVICES)
    for start in range(0, rows, max(1, step)):
        yield slice(start, min(rows, start + max(1, step)))
