"""Exact selection of the largest magnitudes by a threshold, never by sorting whole matrices.

Pruning keeps a fixed number of weights, those with the largest *magnitudes* (absolute values). `keep_largest` chooses
them in a whole matrix, `keep_largest_in_rows` in each row, and `keep_largest_in_groups` in each m consecutive ones of a
row. Each returns a boolean mask, True = kept, with exactly that number: magnitudes that are equal (*ties*) are told
apart by their position.

The *threshold* is the least magnitude that is kept. `torch.kthvalue` would rank a whole matrix on one processor of a
GPU, has no deterministic form there and copies its input. Here a threshold is found by counting, and magnitudes are
computed for one block of rows at a time. This needs several passes over the matrix.
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
_PARTS_ON_DEVICES = 64  # times as many elsewhere


def kth_smallest(values: Tensor, k: int) -> Tensor:
    """The `k`-th smallest magnitude (k from 1) of [rows, columns], float32 or better; a scalar on their device."""
    if values.device.type == "cpu":
        array = values.detach().numpy().reshape(-1)
        if array.size > 8 * _SAMPLE:
            return values.new_tensor(_kth_by_bracket(array, k))
        return values.new_tensor(np.partition(np.abs(array), k - 1)[k - 1])

    parts = [values[rows] for rows in row_blocks(values)]

    def count(threshold: Tensor) -> Tensor:
        """How many magnitudes do not exceed a threshold."""
        return torch.stack([(part.abs() <= threshold).sum() for part in parts]).sum()

    return _kth_by_halving(count, k, values.new_empty(()))


def _kth_in_rows(magnitudes: Tensor, k: int) -> Tensor:
    """The `k`-th smallest value (k from 1) of every row, [rows, 1]."""
    if magnitudes.device.type == "cpu":
        partitioned = np.partition(magnitudes.detach().numpy(), k - 1, axis=1)
        return torch.from_numpy(np.ascontiguousarray(partitioned[:, k - 1 : k]))

    def count(thresholds: Tensor) -> Tensor:
        """How many values of each row do not exceed its threshold, [rows, 1]."""
        return (magnitudes <= thresholds).sum(1, keepdim=True)

    return _kth_by_halving(count, k, magnitudes.new_empty(len(magnitudes), 1))


def _kth_by_bracket(array: np.ndarray, k: int) -> float:
    """The `k`-th smallest of many magnitudes: a sample brackets it, and only what lies inside is partitioned.

    The result is exact (Floyd & Rivest 1975): the values below the bracket are counted, and if the bracket missed,
    everything is partitioned. `array` has one dimension, values of either sign, and stays as it is; k counts from 1.
    """
    # The step is made odd, so that the sample meets all columns of a matrix whose width is a power of two.
    step = (array.size // _SAMPLE) | 1
    sample = np.sort(np.abs(array[::step]))

    # The rank of a sampled quantile has a standard deviation of at most sqrt(n) / 2: five of them to each side.
    rank = (k - 1) / array.size * sample.size
    margin = 2.5 * math.sqrt(sample.size)
    last = sample.size - 1
    low = sample[min(max(0, int(rank - margin)), last)]
    high = sample[min(max(0, int(rank + margin)), last)]

    below = 0
    parts = []
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
    ordered as their bit patterns are, so that the patterns can be halved as integers.

    Args:
        count: Says how many values do not exceed the numbers that it is given, which have the shape of `like`.
        k: Counted from 1.
        like: Has the shape, dtype and device of the numbers sought: one for all values, or one for each row.
    """
    integer = {4: torch.int32, 8: torch.int64}[like.element_size()]
    low = _ordered(torch.full_like(like, -math.inf).view(integer))
    high = _ordered(torch.full_like(like, math.inf).view(integer))
    for _ in range(8 * like.element_size()):
        middle = (low & high) + ((low ^ high) >> 1)  # the mean, without the sum, which may overflow
        enough = count(_ordered(middle).view(like.dtype)) >= k
        low = torch.where(enough, low, middle + 1)
        high = torch.where(enough, middle, high)
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
    blocks = [(values[rows], mask[rows]) for rows in row_blocks(values)]  # views
    for part, mask_of_part in blocks:
        torch.ge(part.abs(), threshold, out=mask_of_part)
    # Without ties at the threshold the mask is done. A device would have to be asked: there ties are always broken.
    if values.device.type == "cpu" and int(torch.count_nonzero(mask)) == count:
        return mask

    num_above = torch.stack([(part.abs() > threshold).sum() for part, _ in blocks]).sum()
    num_ties_to_keep = count - num_above  # in this block and the next ones; on the device
    for part, mask_of_part in blocks:
        ties = part.abs() == threshold
        number_of_tie = ties.flatten().cumsum(0, dtype=torch.int32).view(ties.shape)  # from 1
        is_kept = ties.logical_not_().logical_or_(number_of_tie <= num_ties_to_keep)
        mask_of_part.logical_and_(is_kept)
        ties_in_part = number_of_tie[-1, -1]
        num_ties_to_keep = num_ties_to_keep - ties_in_part
    return mask


def keep_largest_in_rows(values: Tensor, count: int) -> Tensor:
    """Boolean mask [rows, columns], True for exactly the `count` largest magnitudes of every row; ties by position."""
    columns = values.shape[1]
    mask = torch.full(values.shape, count > 0, dtype=torch.bool, device=values.device)
    if not 0 < count < columns:
        return mask

    for rows in row_blocks(values):
        part = values[rows].abs()
        mask_of_part = mask[rows]  # a view
        threshold = _kth_in_rows(part, columns - count + 1)
        torch.ge(part, threshold, out=mask_of_part)
        if values.device.type == "cpu":
            has_ties = int(torch.count_nonzero(mask_of_part)) != count * len(part)
            if not has_ties:
                continue

        ties = part == threshold
        num_ties_to_keep = count - (part > threshold).sum(1, keepdim=True)  # [rows, 1]
        is_late = ties.cumsum(1, dtype=torch.int32) > num_ties_to_keep
        # in the memory of `ties`: all but the ties that come too late in their row
        mask_of_part.logical_and_(ties.logical_and_(is_late).logical_not_())
    return mask


def keep_largest_in_groups(values: Tensor, n: int, m: int) -> Tensor:
    """Boolean mask [rows, columns], True for the `n` largest magnitudes of every `m` consecutive ones of a row.

    `columns` is a multiple of m. The rank of a value is the number of values of its group that beat it (ties by
    position): m - 1 comparisons a weight, which for small m is far cheaper than sorting the groups.
    """
    # On a CPU a part stays in the cache; elsewhere a call is expensive.
    values_in_part = _PART if values.device.type == "cpu" else _PARTS_ON_DEVICES * _PART
    rows_in_part = max(1, values_in_part // max(1, values.shape[1]))
    rank_dtype = torch.uint8 if m < 256 else torch.int16

    mask = torch.empty(values.shape, dtype=torch.bool, device=values.device)
    parts = zip(values.split(rows_in_part), mask.split(rows_in_part), strict=True)
    for part, mask_of_part in parts:
        # [rows, columns] -> [m, groups]: members of one number lie beside each other.
        groups = part.abs().reshape(-1, m).T.contiguous()
        ranks = torch.zeros(groups.shape, dtype=rank_dtype, device=values.device)
        for i in range(m):
            for j in range(i + 1, m):
                first_wins = groups[i] >= groups[j]
                ranks[j] += first_wins
                ranks[i] += first_wins.logical_not_()
        # [m, groups] -> [rows, columns].
        mask_of_part.copy_((ranks < n).T.reshape(part.shape))
    return mask
