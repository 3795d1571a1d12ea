"""Sharing one budget of zeros over many operators."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from optimum_fista.solve.selection import kth_smallest

SLOPE = 7.0
"""Growth of the logarithm of an operator's squared error per unit of sparsity, about 0.5 (docs/solver.md)."""
REACH = 0.45
"""An operator's sparsity differs from the average by no more than this."""
HIGHEST = 0.95
"""An operator's sparsity is no higher than this, or than the average if that is higher."""


@dataclass(frozen=True)
class RemovalCost:
    """What the zeros of one operator cost at the average sparsity.

    Attributes:
        cost: Increase of the loss.
        size: Number of weights.
    """

    cost: float
    size: int

    @classmethod
    def of(cls, saliency: Tensor, sparsity: float) -> RemovalCost:
        """Sum of the smallest saliencies [out, in], a share `sparsity` of all, `0 < sparsity < 1`."""
        count = min(saliency.numel(), max(1, round(sparsity * saliency.numel())))
        threshold = kth_smallest(saliency, count)
        below = saliency < threshold
        sums = (saliency * below).sum(dtype=torch.float64), below.sum().double(), threshold.double()
        cost, smaller, largest = torch.stack(sums).tolist()  # one transfer
        return cls(cost + (count - smaller) * largest, saliency.numel())


def allocate(costs: Mapping[str, RemovalCost], sparsity: float) -> dict[str, float]:
    """Sparsity of every operator, so that all together lose least at the same number of zeros.

    With `E_k(s) = cost_k exp(SLOPE (s - sparsity))` the sum of all `E_k(s_k)` is least, at a given sum of
    `size_k s_k`, where no zero is worth moving from one operator to another:
    `s_k = sparsity + (mu - log(cost_k / size_k)) / SLOPE`, clipped.

    Args:
        costs: Costs by operator, of the same sparsity.
        sparsity: Zeros wanted over all operators together, in (0, 1).

    Returns:
        Sparsities by operator: whole numbers of zeros, `sparsity` on average over all weights.
    """
    lowest, highest = max(0.0, sparsity - REACH), max(sparsity, min(HIGHEST, sparsity + REACH))
    densities = {name: math.log(max(c.cost, 1e-300) / c.size) for name, c in costs.items()}
    wanted = round(sparsity * sum(c.size for c in costs.values()))

    def counts(level: float) -> dict[str, int]:
        shares = {name: sparsity + (level - density) / SLOPE for name, density in densities.items()}
        return {name: round(costs[name].size * min(highest, max(lowest, share))) for name, share in shares.items()}

    below, above = min(densities.values()) - SLOPE, max(densities.values()) + SLOPE
    for _ in range(60):
        middle = (below + above) / 2
        below, above = (middle, above) if sum(counts(middle).values()) <= wanted else (below, middle)
    zeros = counts(below)
    missing = wanted - sum(zeros.values())
    for name in sorted(zeros, key=lambda name: -costs[name].size):  # a zero or so each
        moved = min(missing, max(0, math.floor(costs[name].size * highest) - zeros[name]))
        zeros[name] += moved
        missing -= moved
    return {name: count / costs[name].size for name, count in zeros.items()}
