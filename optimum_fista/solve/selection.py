"""Exact selection of the largest scores by a threshold, never by sorting whole matrices."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from optimum_fista.solve.blocks import row_blocks

_SAMPLE = 16_384
"""Values that bracket the one sought."""
_BLOCK = 2**20
"""Scores compared with the bracket at a time."""
_PART = 2**18
"""Scores ranked within their groups at a time, on a CPU."""


def kth_smallest(values: Tensor, k: int) -> Tensor:
    """The `k`-th smallest value (k from 1) along the last dimension; shape `values.shape[:-1]`."""
    if values.device.type == "cpu" and values.dtype == torch.float32:
        array = values.detach().numpy()
        if array.size == array.shape[-1] > 8 * _SAMPLE:
            return torch.full(values.shape[:-1], _kth_by_bracket(array.reshape(-1), k))
        return torch.from_numpy(np.ascontiguousarray(np.partition(array, k - 1, axis=-1)[..., k - 1]))
    return torch.kthvalue(values, k, dim=-1).values


def _kth_by_bracket(array: np.ndarray, k: int, *, magnitude: bool = False) -> float:
    """The `k`-th smallest of many values: a sample brackets it, and only what lies inside is partitioned.

    With `magnitude`, of their absolute values.

    Exact (Floyd & Rivest 1975): the values below the bracket are counted, and where the bracket missed, everything is
    partitioned.
    """
    sample = array[:: array.size // _SAMPLE | 1]
    sample = np.sort(np.abs(sample) if magnitude else sample)
    rank, margin = (k - 1) / array.size * sample.size, 2.5 * math.sqrt(sample.size)
    low, high = (sample[min(max(0, int(place)), sample.size - 1)] for place in (rank - margin, rank + margin))
    below, parts = 0, []
    for start in range(0, array.size, _BLOCK):
        block = array[start : start + _BLOCK]
        block = np.abs(block) if magnitude else block
        below += int(np.count_nonzero(block < low))
        parts.append(block[(block >= low) & (block <= high)])
    inside = np.concatenate(parts)
    if below < k <= below + inside.size:
        array, k = inside, k - below
    elif magnitude:
        array = np.abs(array)
    return float(np.partition(array, k - 1)[k - 1])


def keep_largest(scores: Tensor, count: int) -> Tensor:
    """Boolean mask, True for exactly the `count` largest of all scores; ties go to the first positions."""
    flat = scores.reshape(1, -1)
    return keep_largest_in_rows(flat, count).view(scores.shape)


def keep_largest_magnitudes(matrix: Tensor, count: int) -> Tensor:
    """`keep_largest(matrix.abs(), count)`, on a CPU without a copy of a large matrix where no two scores tie."""
    if matrix.device.type == "cpu" and matrix.dtype == torch.float32 and matrix.numel() > 8 * _SAMPLE:
        mask = torch.ones(matrix.shape, dtype=torch.bool)
        if 0 < count < matrix.numel():
            array = matrix.contiguous().view(-1).numpy()
            threshold = _kth_by_bracket(array, array.size - count + 1, magnitude=True)
            for rows in row_blocks(matrix):
                torch.ge(matrix[rows].abs(), threshold, out=mask[rows])
        if int(torch.count_nonzero(mask)) == count:
            return mask
        del mask
    return keep_largest(matrix.abs(), count)


def keep_largest_in_rows(scores: Tensor, count: int) -> Tensor:
    """Boolean mask [rows, columns], True for exactly the `count` largest of every row; ties by position."""
    rows, columns = scores.shape
    if count <= 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    if count >= columns:
        return torch.ones_like(scores, dtype=torch.bool)
    threshold = kth_smallest(scores, columns - count + 1).view(rows, 1)
    mask = scores >= threshold
    if int(torch.count_nonzero(mask)) == count * rows:  # no row keeps fewer
        return mask
    mask = scores > threshold
    missing = count - mask.sum(1, keepdim=True)
    ties = scores == threshold
    if rows == 1:  # a whole matrix: a running count of all its positions would be twice its size
        mask[0, ties[0].nonzero()[: int(missing), 0]] = True
        return mask
    place = ties.cumsum(1, dtype=torch.int32 if columns < 2**31 else torch.int64)
    return mask.logical_or_(ties.logical_and_(place <= missing))


def keep_largest_in_groups(scores: Tensor, n: int, m: int) -> Tensor:
    """Boolean mask [rows, columns], True for the `n` largest of every `m` consecutive scores of a row.

    The rank of a score is the number of scores of its group that beat it (ties by position): m - 1
    comparisons a weight, which for small m is far cheaper than sorting the groups. Rows are taken a part at a time:
    on a CPU a part stays in the cache.
    """
    part = max(1, (_PART if scores.device.type == "cpu" else 64 * _PART) // max(1, scores.shape[1]))
    mask = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    for rows, kept in zip(scores.split(part), mask.split(part), strict=True):
        groups = rows.reshape(-1, m).T.contiguous()
        ranks = torch.zeros(groups.shape, dtype=torch.uint8 if m < 256 else torch.int16, device=scores.device)
        for i in range(m):
            for j in range(i + 1, m):
                first_wins = groups[i] >= groups[j]
                ranks[j] += first_wins
                ranks[i] += first_wins.logical_not_()
        kept.copy_((ranks < n).T.reshape(rows.shape))
    return mask
