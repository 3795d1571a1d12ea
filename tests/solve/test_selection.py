import numpy as np
import pytest
import torch

from optimum_fista.solve.selection import (
    keep_largest,
    keep_largest_in_groups,
    keep_largest_in_rows,
    kth_smallest_magnitude,
)

DTYPES = [torch.float32, torch.float64]


def random_scores(rows: int, columns: int, levels: int, dtype: torch.dtype) -> torch.Tensor:
    """Values of both signs with many ties (few levels) or none that matter (many)."""
    generator = torch.Generator().manual_seed(rows + 10 * columns + levels)
    return torch.randint(1 - levels, levels, (rows, columns), generator=generator).to(dtype) / 4


def sorting_oracle(scores: np.ndarray, count: int) -> np.ndarray:
    """Mask of the `count` largest magnitudes of every row; a stable sort leaves ties in their order."""
    order = np.argsort(-np.abs(scores), axis=1, kind="stable")[:, :count]
    mask = np.zeros(scores.shape, dtype=bool)
    np.put_along_axis(mask, order, True, axis=1)
    return mask


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("levels", [1, 3, 100])
@pytest.mark.parametrize("count", [0, 1, 6, 12, 13, 20])
def test_keep_largest_in_rows_agrees_with_sorting_every_row(dtype, levels, count):
    scores = random_scores(9, 13, levels, dtype)

    mask = keep_largest_in_rows(scores, count)

    assert np.array_equal(mask.numpy(), sorting_oracle(scores.double().numpy(), count))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("levels", [1, 3, 100])
@pytest.mark.parametrize("count", [-1, 0, 1, 30, 64, 90, 91, 100])
def test_keep_largest_agrees_with_sorting_the_whole_matrix(dtype, levels, count):
    scores = random_scores(7, 13, levels, dtype)
    expected = sorting_oracle(scores.double().numpy().reshape(1, -1), max(count, 0)).reshape(7, 13)

    mask = keep_largest(scores, count)

    assert np.array_equal(mask.numpy(), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("levels", [1, 3, 100])
@pytest.mark.parametrize(("n", "m"), [(1, 2), (1, 4), (2, 4), (3, 4), (4, 8), (5, 8), (16, 32)])
def test_keep_largest_in_groups_agrees_with_sorting_every_group(dtype, levels, n, m):
    scores = random_scores(5, 2 * m, levels, dtype)
    expected = sorting_oracle(scores.double().numpy().reshape(-1, m), n).reshape(5, 2 * m)

    mask = keep_largest_in_groups(scores, n, m)

    assert np.array_equal(mask.numpy(), expected)


def test_scores_that_are_not_contiguous_are_read_in_row_order():
    scores = random_scores(12, 8, 3, torch.float32).T
    assert not scores.is_contiguous()
    copied = scores.contiguous()

    assert torch.equal(keep_largest(scores, 40), keep_largest(copied, 40))
    assert torch.equal(keep_largest_in_rows(scores, 5), keep_largest_in_rows(copied, 5))
    assert torch.equal(keep_largest_in_groups(scores, 2, 4), keep_largest_in_groups(copied, 2, 4))


@pytest.mark.parametrize(
    "values", ["normal", "few levels", "sorted", "one huge", "a period of the sample"]
)
@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.731, 1.0])
def test_kth_smallest_of_many_values_is_exact(values, share):
    size = 300_000
    scores = torch.randn(size, generator=torch.Generator().manual_seed(1))
    if values == "few levels":
        scores = scores.round()
    elif values == "sorted":
        scores = scores.sort().values
    elif values == "one huge":
        scores[7] = 1e30
    elif values == "a period of the sample":
        scores[:: size // 16_384 | 1] += 100  # the sample tells nothing

    k = max(1, round(share * size))

    found = kth_smallest_magnitude(scores[None], k)

    assert float(found) == float(scores.abs().sort().values[k - 1])
