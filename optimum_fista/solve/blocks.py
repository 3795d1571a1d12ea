"""Rows of a matrix in blocks, so that what is made of them on the way is small."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

_ROWS = 192
_VALUES = 2**19


def rows_in_block(rows: int, columns: int, scale: int = 1) -> int:
    """Rows of a block of a matrix [rows, columns]."""
    most = max(_ROWS, _VALUES // max(1, columns)) * scale
    return -(-rows // max(1, -(-rows // most)))


def row_blocks(matrix: Tensor) -> Iterator[slice]:
    """Slices of the rows of a matrix: about half a million values each, but enough rows for a product to be efficient.

    On other devices than the CPU all rows are one block up to 128 times that size.
    """
    rows, columns = matrix.shape
    step = rows_in_block(rows, columns, 1 if matrix.device.type == "cpu" else 128)
    for start in range(0, rows, max(1, step)):
        yield slice(start, min(rows, start + step))
