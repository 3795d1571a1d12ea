import itertools
import math

import pytest
import torch
from layer_problems import example

from optimum_fista.solve.allocation import (
    LEAST_DENSITY,
    REACH,
    SLOPE,
    allocate,
    prune_weighted,
    removal_cost,
)
from optimum_fista.solve.method import ProblemGroup
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
    if ties:
        saliency = (saliency * 4).round()
    count = max(1, round(sparsity * saliency.numel()))

    cost = removal_cost(saliency, sparsity)

    smallest = saliency.flatten().sort().values[:count]
    assert cost == pytest.approx(float(smallest.double().sum()), rel=1e-5)


@pytest.mark.parametrize("sparsity", [0.2, 0.5, 0.8])
def test_moving_zeros_from_one_operator_to_another_never_lowers_the_cost(sparsity):
    costs = {"a": 1.0, "b": 2.5, "c": 0.7}
    sizes = {"a": 40_000, "b": 90_000, "c": 50_001}

    shared = allocate(costs, sizes, sparsity)

    best = total_cost(costs, shared, sparsity)
    assert best < total_cost(costs, dict.fromkeys(costs, sparsity), sparsity)
    for giver, taker in itertools.permutations(costs, 2):
        moved = dict(shared)
        moved[giver] -= 500 / sizes[giver]
        moved[taker] += 500 / sizes[taker]
        assert best < total_cost(costs, moved, sparsity)


@pytest.mark.parametrize("sparsity", [0.2, 0.5, 0.8])
def test_zeros_of_operators_are_whole_numbers_and_add_up(sparsity):
    sizes = {"a": 40_000, "b": 90_000, "c": 50_001}

    shared = allocate({"a": 1.0, "b": 2.5, "c": 0.7}, sizes, sparsity)

    zeros = [shared[name] * size for name, size in sizes.items()]
    assert zeros == pytest.approx([round(count) for count in zeros], abs=1e-6)
    assert sum(round(count) for count in zeros) == round(sparsity * 180_001)


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.9, 0.97])
def test_extreme_costs_move_sparsities_no_further_than_the_limits(sparsity):
    sizes = {"costly": 1000, "free": 1000, "usual": 10_000}
    costs = {"costly": 1e9, "free": 0.0, "usual": 1.0}

    shared = allocate(costs, sizes, sparsity)

    assert max(0, sparsity - REACH) - 1e-9 <= shared["costly"] <= sparsity
    assert shared["free"] == pytest.approx(1 - LEAST_DENSITY * (1 - sparsity), abs=1e-3)
    assert average(sizes, shared) == pytest.approx(round(sparsity * 12_000) / 12_000, abs=1e-12)


HALF = Unstructured(0.5)


def split_by_outputs(made, *sizes):
    """The problem of an example as several operators, one after another, of `sizes` outputs each."""
    problem = made.problem
    cut = []
    start = 0
    for size in sizes:
        rows = slice(start, start + size)
        cut.append(
            LayerProblem(
                problem.weight[rows],
                problem.statistics,
                target=problem.target[rows] if problem.corrected else None,
                output_energies=problem.output_energies[rows] if problem.corrected else None,
                name=f"part{start}",
            )
        )
        start += size
    return cut


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_equal_weights_prune_the_operators_as_one(name, corrected):
    made = example(12, 16, corrected=corrected, correlation=2.0)
    method = create_method(name)
    equal_weights = [torch.full((4,), 7.0), torch.full((8,), 7.0)]
    group = ProblemGroup(split_by_outputs(made, 4, 8), [HALF, HALF])

    (together,) = prune_weighted(method, [group], [equal_weights])

    whole = method.prune(made.problem, HALF)
    assert torch.equal(torch.cat([pruned.mask for pruned in together]), whole.mask)
    assert torch.allclose(torch.cat([pruned.weight for pruned in together]), whole.weight)


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_zeros_are_shared_exactly_and_errors_are_those_of_the_operators(name, corrected):
    made = example(12, 16, corrected=corrected, correlation=2.0, dtype=torch.float32)
    problems = split_by_outputs(made, 5, 7)
    dense_weights = [problem.weight.clone() for problem in problems]
    patterns = [Unstructured(0.3), Unstructured(0.7)]
    output_weights = [torch.rand(5) + 0.1, 10 * torch.rand(7)]
    group = ProblemGroup(problems, patterns)

    (together,) = prune_weighted(create_method(name), [group], [output_weights])

    zeros = sum(int((~pruned.mask).sum()) for pruned in together)
    assert zeros == round(0.3 * 5 * 16) + round(0.7 * 7 * 16)
    outputs_of_parts = made.outputs.split([5, 7], dim=1)
    for problem, pruned, dense, outputs in zip(
        problems, together, dense_weights, outputs_of_parts, strict=True
    ):
        assert torch.allclose(problem.weight, dense, rtol=1e-6)
        assert not pruned.weight[~pruned.mask].any()
        error = float((made.inputs @ pruned.weight.T - outputs).norm() / outputs.norm())
        assert pruned.fit_error == pytest.approx(error, rel=1e-3)


def test_scores_are_multiplied_by_the_square_roots_of_output_weights():
    made = example(8, 16)
    weights = torch.rand(8, generator=torch.Generator().manual_seed(1)).double() + 0.2
    scores = made.weight.abs() * made.problem.gram.diagonal().sqrt() * weights.sqrt()[:, None]

    ((pruned,),) = prune_weighted(
        create_method("wanda"), [ProblemGroup([made.problem], [HALF])], [[weights]]
    )

    assert torch.equal(pruned.mask, HALF.mask(scores))


@pytest.mark.parametrize("name", METHODS)
def test_outputs_without_gradient_lose_more_weights_and_not_all(name):
    made = example(6, 64)
    weights = torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0, 1.0])

    ((pruned,),) = prune_weighted(
        create_method(name), [ProblemGroup([made.problem], [HALF])], [[weights]]
    )

    assert torch.isfinite(pruned.weight).all()
    num_kept = pruned.mask.sum(1)  # of the 64 weights of each output
    without_gradient = num_kept[weights == 0]
    with_gradient = num_kept[weights > 0]
    assert int(without_gradient.min()) >= 4
    assert int(without_gradient.max()) <= 20 < int(with_gradient.min())


def test_without_any_gradient_all_outputs_weigh_the_same():
    made = example(6, 16)

    ((pruned,),) = prune_weighted(
        create_method("obs_admm"), [ProblemGroup([made.problem], [HALF])], [[torch.zeros(6)]]
    )

    whole = create_method("obs_admm").prune(made.problem, HALF)
    assert torch.equal(pruned.mask, whole.mask)
