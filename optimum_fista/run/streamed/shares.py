"""Which decoder layers each process prunes."""

from __future__ import annotations

from collections.abc import Sequence


def share_layers(unfinished: Sequence[int], pruning_costs: Sequence[float], num_ranks: int) -> list[list[int]]:
    """Shares of the unfinished decoder layers, one a rank, so that the rank that takes longest takes least.

    Shares are contiguous, because a rank runs the dense network up to its last layer only: early ranks get more layers.

        cost of a share = 1 + (last layer in it that is pruned) + sum of its pruning costs

    Args:
        unfinished: Indices of the layers to share, ascending.
        pruning_costs: By decoder layer, what pruning it costs besides the dense forward pass, in forward passes of a
            layer; 0 where there is nothing to prune, so that no hidden states are needed.
        num_ranks: Number of processes.

    Returns:
        Indices by rank; the last ones are empty where there are fewer layers than ranks.
    """

    def cost(share: Sequence[int]) -> float:
        pruned = [index for index in share if pruning_costs[index] > 0]
        return 1 + pruned[-1] + sum(pruning_costs[index] for index in pruned) if pruned else 0.0

    def fill(limit: float) -> list[list[int]]:
        """As many layers in every share as the limit allows, rank after rank."""
        shares: list[list[int]] = [[]]
        for index in unfinished:
            if shares[-1] and cost([*shares[-1], index]) > limit:
                shares.append([])
            shares[-1].append(index)
        return shares

    stretches = [unfinished[i:j] for i in range(len(unfinished)) for j in range(i + 1, len(unfinished) + 1)]
    limits = sorted({cost(stretch) for stretch in stretches})
    low, high = 0, len(limits) - 1
    while low < high:
        middle = (low + high) // 2
        if len(fill(limits[middle])) <= num_ranks:
            high = middle
        else:
            low = middle + 1
    shares = fill(limits[low]) if limits else []
    return shares + [[] for _ in range(num_ranks - len(shares))]
