import math

import pytest
import torch
from layer_problems import example

from optimum_fista.solve.allocation import (
    LEAST_DENSITY,
    REACH,
    SLOPE,
    allocate,
    prune_stacked,
    removal_cost,
)
from optimum_fista.solve.methods import METHODS, create_method
from optimum_fista.solve.patterns import Unstructured
from optimum_fista.solve.problem import LayerProblem


def total_cost(costs, sparsities, sparsity):
    return sum(
        cost * math.exp(SLOPE * (sparsities[name] - sparsity)) for name, cost in costs.items()
    )


def average(sizes, sparsities):
    return sum(sparsities[name] * size for name, size in sizes.items()) / sum(sizes.values())


@pytest.mark.parametrize("sparsity", [0.01, 0.5, 0.77, 0.999])
@pytest.mark.parametrize("ties", [False, True])
def test_cost_is_the_sum_of_the_smallest_saliencies(sparsity, ties):
    saliency = torch.rand(13, 21, generator=torch.Generator().manual_seed(0))
    saliency = (saliency * 4).round() if ties else saliency

    smallest = saliency.flatten().sort().values[: max(1, round(sparsity * saliency.numel()))]

    assert removal_cost(saliency, sparsity) == pytest.approx(
        float(smallest.double().sum()), rel=1e-5
    )


@pytest.mark.parametrize("sparsity", [0.2, 0.5, 0.8])
def test_no_zero_is_worth_moving(sparsity):
    costs = {"a": 1.0, "b": 2.5, "c": 0.7}
    sizes = {"a": 40_000, "b": 90_000, "c": 50_001}
    shared = allocate(costs, sizes, sparsity)
    zeros = round(sparsity * 180_001)

    counts = [shared[name] * size for name, size in sizes.items()]

    assert sum(map(round, counts)) == zeros
    assert counts == pytest.approx([round(count) for count in counts], abs=1e-6)
    best = total_cost(costs, shared, sparsity)
    assert best < total_cost(costs, dict.fromkeys(costs, sparsity), sparsity)
    for giver in costs:
        for taker in costs:
            if giver != taker:
                moved = dict(shared)
                moved[giver] -= 500 / sizes[giver]
                moved[taker] += 500 / sizes[taker]
                assert best < total_cost(costs, moved, sparsity)


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.9, 0.97])
def test_extreme_costs_stay_within_reach(sparsity):
    sizes = {"costly": 1000, "free": 1000, "usual": 10_000}

    shared = allocate({"costly": 1e9, "free": 0.0, "usual": 1.0}, sizes, sparsity)

    assert max(0, sparsity - REACH) - 1e-9 <= shared["costly"] <= sparsity
    assert shared["free"] == pytest.approx(1 - LEAST_DENSITY * (1 - sparsity), abs=1e-3)
    assert average(sizes, shared) == pytest.approx(round(sparsity * 12_000) / 12_000, abs=1e-12)


HALF = Unstructured(0.5)


def parts(made, *sizes):
    """A problem cut into operators of these numbers of outputs."""
    problem = made.problem
    start = 0
    cut = []
    for size in sizes:
        rows = slice(start, start + size)
        given = (problem.target[rows], problem.output_energies[rows]) if problem.corrected else ()
        cut.append(
            LayerProblem(problem.weight[rows], problem.statistics, *given, name=f"part{start}")
        )
        start += size
    return cut


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_equal_weights_prune_the_operators_as_one(name, corrected):
    made = example(12, 16, corrected=corrected, correlation=2.0)
    method = create_method(name)
    stacked = prune_stacked(
        method, parts(made, 4, 8), [HALF, HALF], [torch.full((4,), 7.0), torch.full((8,), 7.0)]
    )

    whole = method.prune(made.problem, HALF)

    assert torch.equal(torch.cat([p.mask for p in stacked]), whole.mask)
    assert torch.allclose(torch.cat([p.weight for p in stacked]), whole.weight)


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_zeros_are_shared_exactly_and_errors_are_those_of_the_operators(name, corrected):
    made = example(12, 16, corrected=corrected, correlation=2.0, dtype=torch.float32)
    problems = parts(made, 5, 7)
    before = [p.weight.clone() for p in problems]
    patterns = [Unstructured(0.3), Unstructured(0.7)]
    weights = [torch.rand(5) + 0.1, 10 * torch.rand(7)]
    stacked = prune_stacked(create_method(name), problems, patterns, weights)

    zeros = sum(int((~p.mask).sum()) for p in stacked)

    assert zeros == round(0.3 * 5 * 16) + round(0.7 * 7 * 16)
    start = 0
    for problem, pruned, dense in zip(problems, stacked, before, strict=True):
        rows = slice(start, start + len(dense))
        start += len(dense)
        assert torch.allclose(problem.weight, dense, rtol=1e-6)
        assert not pruned.weight[~pruned.mask].any()
        wanted = made.outputs[:, rows]
        error = float((made.inputs @ pruned.weight.T - wanted).norm() / wanted.norm())
        assert pruned.fit_error == pytest.approx(error, rel=1e-3)


def test_scores_are_weighted_by_the_square_root():
    made = example(8, 16)
    weights = torch.rand(8, generator=torch.Generator().manual_seed(1)).double() + 0.2
    (pruned,) = prune_stacked(create_method("wanda"), [made.problem], [HALF], [weights])

    scores = made.weight.abs() * made.problem.gram.diagonal().sqrt() * weights.sqrt()[:, None]

    assert torch.equal(pruned.mask, HALF.mask(scores))


@pytest.mark.parametrize("name", METHODS)
def test_outputs_without_gradient_lose_more_weights_and_not_all(name):
    made = example(6, 64)
    weights = torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0, 1.0])

    (pruned,) = prune_stacked(create_method(name), [made.problem], [HALF], [weights])

    assert torch.isfinite(pruned.weight).all()
    kept = pruned.mask.sum(1)
    assert (
        4
        <= int(kept[[1, 3]].min())
        <= int(kept[[1, 3]].max())
        <= 20
        < int(kept[[0, 2, 4, 5]].min())
    )


def test_without_any_gradient_all_outputs_weigh_the_same():
    made = example(6, 16)
    (pruned,) = prune_stacked(create_method("obs_admm"), [made.problem], [HALF], [torch.zeros(6)])

    whole = create_method("obs_admm").prune(made.problem, HALF)

    assert torch.equal(pruned.mask, whole.mask)
