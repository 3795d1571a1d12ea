import itertools

import pytest

from optimum_fista.run.streamed.shares import share_layers


def cost(share: list[int], costs: list[float]) -> float:
    """The dense network up to the last pruned layer, and the pruning."""
    pruned = [index for index in share if costs[index]]
    return 1 + pruned[-1] + sum(costs[index] for index in pruned) if pruned else 0


def best(unfinished: list[int], costs: list[float], num_ranks: int) -> float:
    """The least time of the slowest rank over all contiguous splits, one by one."""
    cuts = itertools.combinations_with_replacement(range(len(unfinished) + 1), num_ranks - 1)
    ends = [(0, *cut, len(unfinished)) for cut in cuts]
    return min(max(cost(unfinished[a:b], costs) for a, b in itertools.pairwise(end)) for end in ends)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 7])
@pytest.mark.parametrize(
    ("unfinished", "costs"),
    [
        (list(range(6)), [4.0] * 6),
        (list(range(9)), [0.5] * 9),
        ([1, 2, 5, 7], [4.0] * 9),
        (list(range(6)), [0.0, 4.0, 0.0, 8.0, 1.0, 0.0]),
        ([0, 5], [0.0, 4.0, 4.0, 4.0, 4.0, 0.0]),
        ([3], [4.0] * 4),
    ],
)
def test_no_contiguous_split_is_faster(unfinished, costs, num_ranks):
    shares = share_layers(unfinished, costs, num_ranks)
    assert len(shares) == num_ranks
    assert [index for share in shares for index in share] == unfinished
    assert max(cost(share, costs) for share in shares) == best(unfinished, costs, num_ranks)


def test_early_ranks_get_more_layers():
    sizes = [len(share) for share in share_layers(range(80), [4.0] * 80, 8)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > sizes[-1] > 0


def test_nothing_is_left():
    assert share_layers([], [4.0] * 4, 3) == [[], [], []]
