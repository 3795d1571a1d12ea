"""Exact selection of the largest magnitudes by a threshold, never by sorting whole matrices.

`torch.kthvalue` ranks a whole matrix on one processor of a GPU, has no deterministic form there and copies its input.
Here a threshold is found by counting, and magnitudes are computed for one block of rows at a time. This needs several
passes over the matrix.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from optimum_fista.solve.linalg import row_blocks

_SAMPLE = 16_384  # values that bracket the one sought
_BLOCK = 2**20  # magnitudes compared with the bracket at a time
_PART = 2**18  # magnitudes ranked within their groups at a time, on a CPU


def kth_smallest(values: Tensor, k: int) -> Tensor:
    """The `k`-th smallest magnitude (k from 1) of [rows, columns], float32 or better; a scalar on their device."""
    if values.device.type == "cpu":
        array = values.detach().numpy().reshape(-1)
        if array.size > 8 * _SAMPLE:
            return values.new_tensor(_kth_by_bracket(array, k))
        return values.new_tensor(np.partition(np.abs(array), k - 1)[k - 1])
    parts = [values[rows] for rows in row_blocks(values)]

    def count(threshold: Tensor) -> Tensor:
        return torch.stack([(part.abs() <= threshold).sum() for part in parts]).sum()

    return _kth_by_halving(count, k, values.new_empty(()))


def _kth_in_rows(magnitudes: Tensor, k: int) -> Tensor:
    """The `k`-th smallest value (k from 1) of every row, [rows, 1]."""
    if magnitudes.device.type == "cpu":
        found = np.partition(magnitudes.detach().numpy(), k - 1, axis=1)[:, k - 1 : k]
        return torch.from_numpy(np.ascontiguousarray(found))
    like = magnitudes.new_empty(len(magnitudes), 1)
    return _kth_by_halving(
        lambda threshold: (magnitudes <= threshold).sum(1, keepdim=True), k, like
    )


def _kth_by_bracket(array: np.ndarray, k: int) -> float:
    """The `k`-th smallest of many magnitudes: a sample brackets it, and only what lies inside is partitioned.

    The result is exact (Floyd & Rivest 1975): the values below the bracket are counted, and if the bracket missed,
    everything is partitioned.
    """
    # The step is odd, so that the sample meets all columns of a matrix whose width is a power of two.
    sample = np.sort(np.abs(array[:: array.size // _SAMPLE | 1]))
    # The rank of a sampled quantile has a standard deviation of at most sqrt(n) / 2: five of them to each side.
    rank, margin = (k - 1) / array.size * sample.size, 2.5 * math.sqrt(sample.size)
    low, high = (
        sample[min(max(0, int(place)), sample.size - 1)] for place in (rank - margin, rank + margin)
    )
    below, parts = 0, []
    for start in range(0, array.size, _BLOCK):
        block = np.abs(array[start : start + _BLOCK])
        below += int(np.count_nonzero(block < low))
        parts.append(block[(block >= low) & (block <= high)])
    inside = np.concatenate(parts)
    if below < k <= below + inside.size:
        return float(np.partition(inside, k - below - 1)[k - below - 1])
    return float(np.partition(np.abs(array), k - 1)[k - 1])


def _kth_by_halving(count: Callable[[Tensor], Tensor], k: int, like: Tensor) -> Tensor:
    """The smallest number that at least `k` values do not exceed, exactly, in as many passes as it has bits.

    Counting has a deterministic form on every device, and no number reaches the host: floating-point numbers are
    ordered as their bit patterns are, so that the patterns can be halved as integers. `count` says how many values do
    not exceed a number; `like` has the shape, dtype and device of the numbers sought; k counts from 1.
    """
    whole = {4: torch.int32, 8: torch.int64}[like.element_size()]
    low, high = (_ordered(torch.full_like(like, end).view(whole)) for end in (-math.inf, math.inf))
    for _ in range(8 * like.element_size()):
        middle = (low & high) + ((low ^ high) >> 1)  # the mean, without the sum, which may overflow
        enough = count(_ordered(middle).view(like.dtype)) >= k
        low, high = torch.where(enough, low, middle + 1), torch.where(enough, middle, high)
    return _ordered(high).view(like.dtype)


def _ordered(bits: Tensor) -> Tensor:
    """Bit patterns of floating-point numbers as integers in the order of the numbers; its own inverse."""
    return torch.where(bits < 0, bits ^ torch.iinfo(bits.dtype).max, bits)


def keep_largest(values: Tensor, count: int) -> Tensor:
    """Boolean mask, True for exactly the `count` largest magnitudes of all [rows, columns]; ties by position."""
    mask = torch.full(values.shape, count > 0, dtype=torch.bool, device=values.device)
    if not 0 < count < values.numel():
        return mask
    threshold = kth_smallest(values, values.numel() - count + 1)
    blocks = [(values[rows], mask[rows]) for rows in row_blocks(values)]
    for part, kept in blocks:
        torch.ge(part.abs(), threshold, out=kept)
    # Without ties at the threshold the mask is done. A device would have to be asked: there ties are always broken.
    if values.device.type == "cpu" and int(torch.count_nonzero(mask)) == count:
        return mask
    left = count - torch.stack([(part.abs() > threshold).sum() for part, _ in blocks]).sum()
    for part, kept in blocks:
        ties = part.abs() == threshold
        # Number of a tie within its block; `left` counts down from block to block.
        place = ties.flatten().cumsum(0, dtype=torch.int32).view(ties.shape)
        kept.logical_and_(ties.logical_not_().logical_or_(place <= left))
        left = left - place[-1, -1]
    return mask


def keep_largest_in_rows(values: Tensor, count: int) -> Tensor:
    """Boolean mask [rows, columns], True for exactly the `count` largest magnitudes of every row; ties by position."""
    columns = values.shape[1]
    mask = torch.full(values.shape, count > 0, dtype=torch.bool, device=values.device)
    if not 0 < count < columns:
        return mask
    for rows in row_blocks(values):
        part, kept = values[rows].abs(), mask[rows]
        threshold = _kth_in_rows(part, columns - count + 1)
        torch.ge(part, threshold, out=kept)
        if values.device.type == "cpu" and int(torch.count_nonzero(kept)) == count * len(part):
            continue  # no row has ties at its threshold
        ties = part == threshold
        left = count - (part > threshold).sum(1, keepdim=True)
        kept.logical_and_(ties.logical_not().logical_or_(ties.cumsum(1, dtype=torch.int32) <= left))
    return mask


def keep_largest_in_groups(values: Tensor, n: int, m: int) -> Tensor:
    """Boolean mask [rows, columns], True for the `n` largest magnitudes of every `m` consecutive ones of a row.

    The rank of a value is the number of values of its group that beat it (ties by position): m - 1 comparisons a
    weight, which for small m is far cheaper than sorting the groups.
    """
    # On a CPU a part stays in the cache; elsewhere a call is expensive.
    rows_of_part = max(
        1, (_PART if values.device.type == "cpu" else 64 * _PART) // max(1, values.shape[1])
    )
    mask = torch.empty(values.shape, dtype=torch.bool, device=values.device)
    for rows, kept in zip(values.split(rows_of_part), mask.split(rows_of_part), strict=True):
        # [rows, columns] -> [m, groups]: members of one number lie beside each other.
        groups = rows.abs().reshape(-1, m).T.contiguous()
        ranks = torch.zeros(
            groups.shape, dtype=torch.uint8 if m < 256 else torch.int16, device=values.device
        )
        for i in range(m):
            for j in range(i + 1, m):
                first_wins = groups[i] >= groups[j]
                ranks[j] += first_wins
                ranks[i] += first_wins.logical_not_()
        # [m, groups] -> [rows, columns].
        kept.copy_((ranks < n).T.reshape(rows.shape))
    return mask
