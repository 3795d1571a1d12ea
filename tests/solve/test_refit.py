from itertools import pairwise

import pytest
import torch
from layer_problems import Example, example

from optimum_fista.solve.patterns import parse_pattern
from optimum_fista.solve.problem import InputStatistics, LayerProblem
from optimum_fista.solve.refit import refit, refit_columns, refit_stack


def random_mask(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """A mask with an empty row, a full row and uneven rows between."""
    mask = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < 0.5
    mask[0] = False
    mask[1] = True
    return mask


def least_squares(made: Example, mask: torch.Tensor) -> torch.Tensor:
    """The best weights on a mask, row by row from the activations."""
    weight = torch.zeros(mask.shape, dtype=torch.float64)
    for row, kept in enumerate(mask):
        if bool(kept.any()):
            inputs = made.inputs[:, kept].double()
            outputs = made.outputs[:, [row]].double()
            weight[row, kept] = torch.linalg.lstsq(inputs, outputs).solution[:, 0]
    return weight


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("start", ["zero", "dense"])
def test_a_refit_agrees_with_least_squares_on_the_kept_inputs_of_every_row(corrected, start):
    made = example(7, 12, corrected=corrected)
    mask = random_mask(7, 12)
    start_weight = torch.zeros(7, 12).double() if start == "zero" else made.weight

    weight, steps = refit(
        made.problem.gram,
        made.problem.target,
        start_weight,
        mask,
        max_iterations=200,
        tolerance=1e-12,
    )

    assert torch.allclose(weight, least_squares(made, mask), rtol=1e-7, atol=1e-8)
    assert (weight[~mask] == 0).all()
    assert 0 < steps < 200


def test_a_refit_in_float32_comes_close_to_least_squares_in_20_iterations():
    made = example(8, 24, dtype=torch.float32)
    mask = parse_pattern("2:4").mask(made.weight.abs())
    problem = made.problem

    weight, _ = refit(problem.gram, problem.target, made.weight, mask, max_iterations=20)

    best = made.squared_error(least_squares(made, mask))
    before = made.squared_error(made.weight * mask)
    assert best * (1 - 1e-5) <= made.squared_error(weight) < best + 0.05 * (before - best)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_error_falls_in_every_step_of_a_refit(dtype):
    made = example(9, 16, corrected=True, dtype=dtype)
    mask = random_mask(9, 16, seed=4)
    problem = made.problem

    errors = []
    for iterations in range(11):
        weight, steps = refit(
            problem.gram, problem.target, made.weight, mask, max_iterations=iterations, tolerance=0
        )
        assert steps == iterations
        assert (weight[~mask] == 0).all()
        errors.append(made.squared_error(weight))

    drops = [before - after for before, after in pairwise(errors)]
    assert min(drops) > 0


def test_a_refit_changes_neither_its_start_nor_its_target():
    made = example(9, 16, corrected=True)
    start = made.weight.clone()
    target = made.problem.target.clone()

    refit(made.problem.gram, made.problem.target, made.weight, random_mask(9, 16))

    assert torch.equal(made.weight, start)
    assert torch.equal(made.problem.target, target)


@pytest.mark.parametrize("tolerance", [0.3, 1e-2, 1e-4])
def test_a_refit_stops_as_soon_as_the_preconditioned_residual_has_fallen_by_the_tolerance(
    tolerance,
):
    made = example(9, 16, corrected=True)
    mask = random_mask(9, 16)
    problem = made.problem

    def residual_after(iterations: int) -> float:
        weight, _ = refit(
            problem.gram, problem.target, made.weight, mask, max_iterations=iterations, tolerance=0
        )
        gradient = (weight @ problem.gram - problem.target) * mask
        return float((gradient / problem.gram.diagonal().sqrt()).norm())

    _, steps = refit(
        problem.gram, problem.target, made.weight, mask, max_iterations=100, tolerance=tolerance
    )

    assert 0 < steps < 100
    goal = tolerance * residual_after(0)
    assert residual_after(steps) <= goal < residual_after(steps - 1)


def least_error_of_row(made: Example, row: int, kept: torch.Tensor) -> float:
    """The smallest squared error of an output that uses the inputs `kept` alone, if there are few tokens."""
    outputs = made.outputs[:, [row]]
    num_kept = int(kept.sum())
    if num_kept == 0:
        return float(outputs.square().sum())
    if num_kept >= len(outputs):  # as many weights as tokens
        return 0.0
    return float(torch.linalg.lstsq(made.inputs[:, kept], outputs, driver="gelsd").residuals.sum())


def test_fewer_tokens_than_inputs_still_reach_the_smallest_error():
    made = example(6, 16, tokens=7, corrected=True)
    mask = random_mask(6, 16)

    weight, _ = refit(
        made.problem.gram,
        made.problem.target,
        made.weight,
        mask,
        max_iterations=300,
        tolerance=1e-12,
    )

    best = sum(least_error_of_row(made, row, kept) for row, kept in enumerate(mask))
    assert torch.isfinite(weight).all()
    assert made.squared_error(weight) == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("ridge", [1e-12, 0.3])
def test_whole_columns_are_refitted_exactly(ridge, corrected):
    made = example(7, 12, corrected=corrected)
    kept = torch.arange(12) % 3 != 1
    # The ridge as tokens: each has one input only, and wants what the dense weights make of it.
    tokens_of_ridge = (ridge * made.problem.gram.diagonal()).sqrt().diag()
    inputs = torch.cat([made.inputs, tokens_of_ridge])
    outputs = torch.cat([made.outputs, tokens_of_ridge @ made.weight.T])
    best = torch.linalg.lstsq(inputs[:, kept], outputs).solution.T

    weight, message = refit_columns(made.problem, kept, ridge)

    assert torch.allclose(weight[:, kept], best, rtol=1e-8, atol=1e-9)
    assert (weight[:, ~kept] == 0).all()
    assert message == ""


@pytest.mark.parametrize("corrected", [False, True])
def test_the_ridge_of_whole_columns_is_that_of_the_noise(corrected):
    made = example(7, 12, tokens=200, corrected=corrected)
    kept = torch.arange(12) % 3 != 1
    inputs = made.inputs[:, kept]
    rest = made.outputs - inputs @ torch.linalg.lstsq(inputs, made.outputs).solution
    error = float(rest.square().sum()) / (1 - 8 / 200)
    # 8 columns are kept of 12, and there are 200 tokens
    ridge = 8 * (8 / 200) * error / (made.squared_error(made.weight * kept) - error)
    assert 0.01 < ridge < 1

    weight, _ = refit_columns(made.problem, kept)

    with_this_ridge, _ = refit_columns(made.problem, kept, ridge)
    with_more, _ = refit_columns(made.problem, kept, 1.5 * ridge)
    assert torch.allclose(weight, with_this_ridge, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(weight, with_more, rtol=1e-3, atol=1e-4)


def test_a_copy_of_an_input_takes_over_without_a_ridge():
    made = example(7, 12, tokens=200)
    inputs = made.inputs.clone()
    inputs[:, 3] = inputs[:, 5]
    problem = LayerProblem(made.weight, InputStatistics(inputs.T @ inputs, 200))
    expected = made.weight.clone()
    expected[:, 5] += expected[:, 3]
    expected[:, 3] = 0

    weight, _ = refit_columns(problem, torch.arange(12) != 3)

    assert torch.allclose(weight, expected, atol=1e-3)


@pytest.mark.parametrize("tokens", [3, 8])
def test_fewer_tokens_than_inputs_get_the_highest_ridge(tokens):
    made = example(7, 12, tokens=tokens)
    kept = torch.arange(12) > 3

    weight, _ = refit_columns(made.problem, kept)

    expected, _ = refit_columns(made.problem, kept, 1.0)
    assert torch.equal(weight, expected)


def test_a_singular_refit_says_that_it_was_damped():
    made = example(7, 12, tokens=4)

    weight, message = refit_columns(made.problem, torch.arange(12) > 1, 1e-18)

    assert message.startswith("the Gram matrix needed damping 0.0001 instead of 0")
    assert made.squared_error(weight) < 1e-3 * float(made.outputs.square().sum())


@pytest.mark.parametrize("singular", [False, True])
@pytest.mark.parametrize("in_place", [False, True])
def test_operators_of_a_stack_end_when_they_would_end_alone(in_place, singular):
    made = [example(6, 16, seed=seed, dtype=torch.float32) for seed in range(3)]
    masks = torch.stack([random_mask(6, 16) for _ in made])
    grams = torch.stack([one.problem.gram for one in made])
    grams[1] = torch.diag(grams[1].diagonal())  # one step solves it
    targets = torch.stack([one.problem.target for one in made])
    starts = torch.stack([one.weight for one in made])
    options = {"max_iterations": 6, "tolerance": 1e-3, "in_place": in_place, "singular": singular}
    alone = [
        refit(gram, target.clone(), start.clone(), mask, **options)
        for gram, target, start, mask in zip(grams, targets, starts, masks, strict=True)
    ]

    weights, steps = refit_stack(grams, targets.clone(), starts.clone(), masks, **options)

    assert torch.equal(weights, torch.stack([weight for weight, _ in alone]))
    assert steps.tolist() == [int(steps_alone) for _, steps_alone in alone]
    assert len(set(steps.tolist())) > 1
