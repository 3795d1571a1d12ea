"""Rows of a matrix in blocks, so that what is made of them on the way is small."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

_ROWS = 384
_VALUES = 2**20


def row_blocks(matrix: Tensor) -> Iterator[slice]:
    """Slices of the rows of a matrix: about a million values each, but enough rows for a product to be efficient.

    On other devices than the CPU all rows are one block up to 64 times that size.
    """
    rows, columns = matrix.shape
    most = max(_ROWS, _VALUES // max(1, columns)) * (1 if matrix.device.type == "cpu" else 64)
    count = -(-rows // most)
    step = -(-rows // max(1, count))
    for start in range(0, rows, max(1, step)):
        yield slice(start, min(rows, start + step))
