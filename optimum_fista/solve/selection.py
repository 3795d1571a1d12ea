"""Exact selection of the largest magnitudes by a threshold, never by sorting whole matrices.

Pruning keeps a fixed number of weights, those with the largest *magnitudes* (absolute values). `keep_largest` chooses
them in a whole matrix, `keep_largest_in_rows` in each row, and `keep_largest_in_groups` in each m consecutive ones of a
row. Each returns a boolean mask, True = kept, with exactly that number: magnitudes that are equal (*ties*) are told
apart by their position.

The *threshold* is the least magnitude that is kept. `torch.kthvalue` would rank a whole matrix on one processor of a
GPU, has no deterministic form there and copies its input. Here a threshold is found by counting, and magnitudes are
computed for one block of rows at a time. This needs several passes over the matrix.

A threshold is exact in each of three ways. On a CPU, NumPy partitions a small matrix. For a large one, a sample gives a
*bracket*: two magnitudes between which the threshold must lie. Only what lies between them is partitioned. On other
devices the threshold is found by halving an interval of numbers.

No function here changes its arguments.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from optimum_fista.solve.linalg import row_blocks

_SAMPLE = 16_384  # values in the sample that gives a bracket
# Of fewer values the sample would be a large part: then all values are partitioned at once.
_LEAST_VALUES_TO_SAMPLE = 8 * _SAMPLE
# Magnitudes compared with a number at a time on a CPU, in buffers that stay in its cache. With 2^20 of them, and new
# arrays for each comparison, a selection takes twice as long.
_BLOCK = 2**16
_PART = 2**18  # magnitudes ranked within their groups at a time, on a CPU
_PARTS_ON_DEVICES = 64  # times as many elsewhere


def kth_smallest_magnitude(values: Tensor, k: int) -> Tensor:
    """Return the `k`-th smallest absolute value of a matrix, a scalar on its device; k counts from 1.

    `values` [rows, columns] are weights or scores of weights, float32 or float64.
    """
    if values.device.type == "cpu":
        array = values.detach().numpy().reshape(-1)
        if array.size > _LEAST_VALUES_TO_SAMPLE:
            return values.new_tensor(_kth_magnitude_by_bracket(array, k))
        return values.new_tensor(np.partition(np.abs(array), k - 1)[k - 1])

    parts = [values[rows] for rows in row_blocks(values)]

    def count(threshold: Tensor) -> Tensor:
        """How many magnitudes of `parts`, the blocks of rows of `values`, do not exceed a threshold; both scalars."""
        return torch.stack([(part.abs() <= threshold).sum() for part in parts]).sum()

    scalar = values.new_empty(())  # only its shape, dtype and device are used
    return _kth_by_halving(count, k, like=scalar)


def _kth_in_rows(magnitudes: Tensor, k: int) -> Tensor:
    """Return the `k`-th smallest value (k from 1) of every row of `magnitudes` [rows, columns], as [rows, 1].

    `magnitudes` are absolute values, float32 or float64.
    """
    if magnitudes.device.type == "cpu":
        partitioned = np.partition(magnitudes.detach().numpy(), k - 1, axis=1)
        return torch.from_numpy(np.ascontiguousarray(partitioned[:, k - 1 : k]))

    def count(thresholds: Tensor) -> Tensor:
        """How many of the `magnitudes` in each row do not exceed its threshold; both are [rows, 1]."""
        return (magnitudes <= thresholds).sum(1, keepdim=True)

    column = magnitudes.new_empty(len(magnitudes), 1)  # only its shape, dtype and device are used
    return _kth_by_halving(count, k, like=column)


def _kth_magnitude_by_bracket(array: np.ndarray, k: int) -> float:
    """Return the `k`-th smallest of many magnitudes: a sample brackets it, and only what lies inside is partitioned.

    The result is exact (Floyd & Rivest 1975): the values below the bracket are counted, and if the bracket missed,
    everything is partitioned. `array` has one dimension and values of either sign; k counts from 1.
    """
    # The step is made odd, so that the sample meets all columns of a matrix whose width is a power of two.
    step = (array.size // _SAMPLE) | 1  # sets the last bit
    sample = np.sort(np.abs(array[::step]))

    # The place of the k-th magnitude in the sorted sample, and by how much it may be wrong: its standard deviation is
    # at most sqrt(sample.size) / 2, and five of these are taken to each side.
    rank = (k - 1) / array.size * sample.size
    margin = 2.5 * math.sqrt(sample.size)
    # The bracket, whose ends are places in the sample at most.
    last = sample.size - 1
    low = sample[min(max(0, int(rank - margin)), last)]
    high = sample[min(max(0, int(rank + margin)), last)]

    # Magnitudes below the bracket are counted, and those inside of it are kept.
    below = 0
    parts = []
    buffer = np.empty(_BLOCK, dtype=array.dtype)
    buffer_of_below = np.empty(_BLOCK, dtype=bool)
    buffer_of_inside = np.empty(_BLOCK, dtype=bool)
    for start in range(0, array.size, _BLOCK):
        values = array[start : start + _BLOCK]
        block = np.abs(values, out=buffer[: values.size])
        is_below = np.less(block, low, out=buffer_of_below[: values.size])
        below += int(np.count_nonzero(is_below))
        is_not_above = np.less_equal(block, high, out=buffer_of_inside[: values.size])
        # Not above, and not below. Of booleans, True is greater than False.
        is_inside_bracket = np.greater(is_not_above, is_below, out=is_not_above)
        parts.append(block.compress(is_inside_bracket))  # a copy
    inside = np.concatenate(parts)

    is_inside = below < k <= below + inside.size
    if is_inside:
        index = k - below - 1  # among those inside, from 0
        return float(np.partition(inside, index)[index])
    # The sample was no good picture of the matrix.
    return float(np.partition(np.abs(array), k - 1)[k - 1])


def _kth_by_halving(count: Callable[[Tensor], Tensor], k: int, like: Tensor) -> Tensor:
    """Find the smallest number that at least `k` values do not exceed. It is exact, and one of the values.

    This is a binary search between minus and plus infinity. Bit patterns of floating-point numbers, as integers, have
    the order of the numbers (`_ordered`). So each round halves an interval of integers, and there is one round for each
    bit. Counting is deterministic on every device. Nothing is read back, so the host never waits for the device.

    Args:
        count: Returns how many values do not exceed the numbers that it is given; both have the shape of `like`. It is
            called once in each round.
        k: Counted from 1.
        like: Has the shape, dtype (float32 or float64) and device of the numbers sought: [] for one threshold of all
            values, or [rows, 1] for one of each row. Its values are not read.
    """
    integer = torch.int64 if like.dtype == torch.float64 else torch.int32
    # Seen as integers (`view`), in the order of the numbers.
    low = _ordered(torch.full_like(like, -math.inf).view(integer))
    high = _ordered(torch.full_like(like, math.inf).view(integer))
    num_bits = 8 * like.element_size()
    for _ in range(num_bits):  # once low = high, further rounds change nothing
        # The mean: the bits that both have, plus half of those that one has. The sum of both may overflow.
        middle = (low & high) + ((low ^ high) >> 1)
        threshold = _ordered(middle).view(like.dtype)  # back to floating point
        enough = count(threshold) >= k
        low = torch.where(enough, low, middle + 1)
        high = torch.where(enough, middle, high)
    return _ordered(high).view(like.dtype)


def _ordered(bits: Tensor) -> Tensor:
    """Turn bit patterns of floating-point numbers into integers that have the order of the numbers.

    Patterns of negative numbers have the reverse order, so all their bits but the sign are inverted. A second call
    undoes this: the function is its own inverse.
    """
    return torch.where(bits < 0, bits ^ torch.iinfo(bits.dtype).max, bits)


def keep_largest(values: Tensor, count: int) -> Tensor:
    """Make a mask, True for exactly the `count` largest magnitudes of all `values` [rows, columns].

    Of ties, the first ones are kept, row by row. `values` are weights or scores, float32 or float64.
    """
    keeps_none_or_all = count <= 0 or count >= values.numel()
    if keeps_none_or_all:
        return torch.full(values.shape, count > 0, dtype=torch.bool, device=values.device)

    if values.device.type == "cpu" and values.numel() <= _LEAST_VALUES_TO_SAMPLE:
        mask_without_ties = _keep_largest_of_few(values, count)
        if mask_without_ties is not None:
            return mask_without_ties

    # of N magnitudes, the count-th largest is number N - count + 1 from below
    threshold = kth_smallest_magnitude(values, values.numel() - count + 1)
    mask = torch.empty(values.shape, dtype=torch.bool, device=values.device)
    blocks = [(values[rows], mask[rows]) for rows in row_blocks(values)]  # views
    if values.device.type == "cpu":
        num_not_below = _mark_not_below(values, threshold, mask)
        # Without ties at the threshold the mask is done. A device would have to be asked: there ties are always broken.
        if num_not_below == count:
            return mask
    else:
        for part, mask_of_part in blocks:
            torch.ge(part.abs(), threshold, out=mask_of_part)

    num_above = torch.stack([(part.abs() > threshold).sum() for part, _ in blocks]).sum()
    # Of the ties in this block and in the next ones, so many are kept; the number stays on the device.
    num_ties_to_keep = count - num_above
    for part, mask_of_part in blocks:
        ties = part.abs() == threshold
        number_of_tie = ties.flatten().cumsum(0, dtype=torch.int32).view(ties.shape)  # from 1
        # No tie, or one of the first ones. It takes the memory of `ties`, which is not used again.
        may_stay = ties.logical_not_().logical_or_(number_of_tie <= num_ties_to_keep)
        mask_of_part.logical_and_(may_stay)
        ties_in_part = number_of_tie[-1, -1]
        num_ties_to_keep = num_ties_to_keep - ties_in_part
    return mask


def _mark_not_below(values: Tensor, threshold: Tensor, mask: Tensor) -> int:
    """Fill `mask` with whether the magnitudes of `values` are at least the threshold; returns how many are.

    `values` and `mask` have one shape and are on a CPU; `mask` is contiguous, and `threshold` a scalar. NumPy does it
    with a buffer, because it counts booleans many times as fast as torch.
    """
    flat_values = values.detach().numpy().reshape(-1)
    flat_mask = mask.numpy().reshape(-1)  # a view
    least = flat_values.dtype.type(threshold.item())
    buffer = np.empty(_BLOCK, dtype=flat_values.dtype)
    count = 0
    for start in range(0, flat_values.size, _BLOCK):
        part = flat_values[start : start + _BLOCK]
        is_not_below = flat_mask[start : start + _BLOCK]
        magnitudes = np.abs(part, out=buffer[: part.size])
        np.greater_equal(magnitudes, least, out=is_not_below)
        count += int(np.count_nonzero(is_not_below))
    return count


def _keep_largest_of_few(values: Tensor, count: int) -> Tensor | None:
    """Make the mask of `keep_largest` for a small matrix on a CPU; `None` if there are ties at the threshold.

    NumPy does it all: for a small expert, calls of torch would take longer than the work.
    """
    magnitudes = np.abs(np.ascontiguousarray(values.detach().numpy()))
    place = magnitudes.size - count  # of the count-th largest, from below
    threshold = np.partition(magnitudes, place, axis=None)[place]
    mask = magnitudes >= threshold
    if np.count_nonzero(mask) != count:
        return None
    return torch.from_numpy(mask)


def keep_largest_in_rows(values: Tensor, count: int) -> Tensor:
    """Make a mask [rows, columns], True for exactly the `count` largest magnitudes of every row.

    Of ties, the first ones of the row are kept. `values` [rows, columns] are weights or scores, float32 or float64.
    """
    columns = values.shape[1]
    keeps_none_or_all = count <= 0 or count >= columns
    if keeps_none_or_all:
        return torch.full(values.shape, count > 0, dtype=torch.bool, device=values.device)

    mask = torch.empty(values.shape, dtype=torch.bool, device=values.device)
    for rows in row_blocks(values):
        part = values[rows].abs()
        mask_of_part = mask[rows]  # a view
        # of n magnitudes, the count-th largest is number n - count + 1 from below
        threshold = _kth_in_rows(part, columns - count + 1)
        torch.ge(part, threshold, out=mask_of_part)
        # Without ties at the threshold the rows are done. The host would have to wait for a device to know that: there
        # ties are always broken.
        if values.device.type == "cpu":
            num_not_below = np.count_nonzero(mask_of_part.numpy())
            if num_not_below == count * len(part):
                continue

        ties = part == threshold
        num_above = (part > threshold).sum(1, keepdim=True)  # [rows, 1]
        num_ties_to_keep = count - num_above
        is_late = ties.cumsum(1, dtype=torch.int32) > num_ties_to_keep
        late_ties = ties.logical_and_(is_late)  # in the memory of `ties`, which is not used again
        mask_of_part.logical_and_(late_ties.logical_not_())
    return mask


def keep_largest_in_groups(values: Tensor, n: int, m: int) -> Tensor:
    """Make a mask [rows, columns], True for the `n` largest magnitudes of every `m` consecutive ones of a row.

    `values` [rows, columns] are weights or scores; `columns` is a multiple of m. The rank of a value is the number of
    values of its group that beat it: those with a larger magnitude, and equal ones before it. This takes m - 1
    comparisons a weight, which for small m is far cheaper than sorting the groups.
    """
    # On a CPU a part stays in the cache; elsewhere a call is expensive.
    values_in_part = _PART if values.device.type == "cpu" else _PARTS_ON_DEVICES * _PART
    rows_in_part = max(1, values_in_part // max(1, values.shape[1]))
    rank_dtype = torch.uint8 if m < 256 else torch.int16

    mask = torch.empty(values.shape, dtype=torch.bool, device=values.device)
    parts = zip(values.split(rows_in_part), mask.split(rows_in_part), strict=True)
    for part, mask_of_part in parts:
        # [rows, columns] -> [m, groups]: the i-th values of all groups lie beside each other.
        groups = part.abs().reshape(-1, m).T.contiguous()
        ranks = torch.zeros(groups.shape, dtype=rank_dtype, device=values.device)
        for i in range(m):
            for j in range(i + 1, m):
                first_wins = groups[i] >= groups[j]
                ranks[j] += first_wins
                ranks[i] += first_wins.logical_not_()  # in place: `first_wins` is not used again
        # [m, groups] -> [rows, columns].
        mask_of_part.copy_((ranks < n).T.reshape(part.shape))
    return mask
