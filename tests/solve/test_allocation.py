import math

import pytest
import torch

from optimum_fista.solve.allocation import HIGHEST, REACH, SLOPE, RemovalCost, allocate


def total_cost(costs, sparsities, sparsity):
    return sum(c.cost * math.exp(SLOPE * (sparsities[name] - sparsity)) for name, c in costs.items())


def average(costs, sparsities):
    return sum(sparsities[name] * c.size for name, c in costs.items()) / sum(c.size for c in costs.values())


@pytest.mark.parametrize("sparsity", [0.01, 0.5, 0.77, 0.999])
@pytest.mark.parametrize("ties", [False, True])
def test_cost_is_the_sum_of_the_smallest_saliencies(sparsity, ties):
    saliency = torch.rand(13, 21, generator=torch.Generator().manual_seed(0))
    saliency = (saliency * 4).round() if ties else saliency
    smallest = saliency.flatten().sort().values[: max(1, round(sparsity * saliency.numel()))]
    cost = RemovalCost.of(saliency, sparsity)
    assert cost.cost == pytest.approx(float(smallest.double().sum()), rel=1e-5)
    assert cost.size == 13 * 21


def test_equal_densities_get_equal_sparsities():
    costs = {"a": RemovalCost(1.0, 1000), "b": RemovalCost(3.0, 3000), "c": RemovalCost(0.5, 500)}
    assert allocate(costs, 0.6) == {"a": 0.6, "b": 0.6, "c": 0.6}


@pytest.mark.parametrize("sparsity", [0.2, 0.5, 0.8])
def test_no_zero_is_worth_moving(sparsity):
    costs = {"a": RemovalCost(1.0, 40_000), "b": RemovalCost(2.5, 90_000), "c": RemovalCost(0.7, 50_001)}
    shared = allocate(costs, sparsity)
    zeros = round(sparsity * 180_001)
    assert sum(round(shared[name] * c.size) for name, c in costs.items()) == zeros
    assert all(
        shared[name] * c.size == pytest.approx(round(shared[name] * c.size), abs=1e-6) for name, c in costs.items()
    )
    best = total_cost(costs, shared, sparsity)
    assert best < total_cost(costs, dict.fromkeys(costs, sparsity), sparsity)
    for giver in costs:
        for taker in costs:
            if giver != taker:
                moved = dict(shared)
                moved[giver] -= 500 / costs[giver].size
                moved[taker] += 500 / costs[taker].size
                assert best < total_cost(costs, moved, sparsity)


def test_by_the_formula():
    costs = {"a": RemovalCost(math.e, 1000), "b": RemovalCost(1.0, 1000)}
    shared = allocate(costs, 0.5)
    assert shared["b"] - shared["a"] == pytest.approx(1 / SLOPE, abs=2e-3)
    assert average(costs, shared) == pytest.approx(0.5, abs=1e-12)


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.9, 0.97])
def test_extreme_costs_stay_within_reach(sparsity):
    costs = {"costly": RemovalCost(1e9, 1000), "free": RemovalCost(0.0, 1000), "usual": RemovalCost(1.0, 10_000)}
    shared = allocate(costs, sparsity)
    assert max(0, sparsity - REACH) - 1e-9 <= shared["costly"] <= sparsity
    assert sparsity <= shared["free"] <= max(sparsity, min(HIGHEST, sparsity + REACH)) + 1e-9
    assert average(costs, shared) == pytest.approx(round(sparsity * 12_000) / 12_000, abs=1e-12)
