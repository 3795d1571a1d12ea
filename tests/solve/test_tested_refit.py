"""A refit is taken by the greatest share that helps on every part of the tokens that was left out of the fit."""

import pytest
import torch
from layer_problems import example

from optimum_fista.solve.problem import InputStatistics, LayerProblem
from optimum_fista.solve.refit import refit_columns
from optimum_fista.solve.tested_refit import refit_that_helps, refit_to_all

SHARES = (1.0, 0.5, 0.25)
ROWS, COLUMNS, TOKENS = 3, 5, 40


def problem_of(weight, inputs, outputs):
    """The problem of a weight [out, in] on inputs [tokens, in] and the outputs [tokens, out] that are wanted."""
    statistics = InputStatistics(inputs.T @ inputs, len(inputs))
    return LayerProblem(weight, statistics, outputs.T @ inputs, outputs.square().sum(0))


def parts_of(targets, noise=0.0, seed=0):
    """A weight of zeros, and a part for each target weight: its inputs, and the outputs of that weight with noise."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.zeros(ROWS, COLUMNS, dtype=torch.float64)
    activations = []
    for target in targets:
        inputs = torch.randn(TOKENS, COLUMNS, generator=generator, dtype=torch.float64)
        outputs = inputs @ target.T
        outputs += noise * torch.randn(outputs.shape, generator=generator, dtype=torch.float64)
        activations.append((inputs, outputs))
    return weight, activations


def problems_of(weight, activations):
    return [problem_of(weight, *part) for part in activations]


def fitted(weight, activations):
    """The refit to all tokens of some parts, from the activations."""
    inputs = torch.cat([inputs for inputs, _ in activations])
    outputs = torch.cat([outputs for _, outputs in activations])
    every_column = torch.ones(COLUMNS, dtype=torch.bool)
    return refit_columns(problem_of(weight, inputs, outputs), every_column)[0]


def expected_share(weight, activations):
    """The share that a plain loop over shares and left-out parts finds, from the activations; None if there is none."""
    for share in SHARES:
        helps = []
        for number, (inputs, outputs) in enumerate(activations):
            others = activations[:number] + activations[number + 1 :]
            moved = weight + share * (fitted(weight, others) - weight)
            error = (inputs @ moved.T - outputs).norm()
            helps.append(bool(error < (inputs @ weight.T - outputs).norm()))
        if all(helps):
            return share
    return None


def test_the_share_is_that_of_a_plain_loop_over_shares_and_left_out_parts():
    direction = torch.randn(ROWS, COLUMNS, dtype=torch.float64)
    found = set()
    for seed in range(40):
        scales = torch.rand(3, generator=torch.Generator().manual_seed(seed)) * 1.2 - 0.1
        targets = [float(scale) * direction for scale in scales]
        weight, activations = parts_of(targets, noise=0.3, seed=seed)

        refit = refit_that_helps(problems_of(weight, activations), SHARES)

        share = expected_share(weight, activations)
        found.add(share)
        taken = None if refit is None else refit.share
        assert taken == share
        if refit is not None:
            moved = weight + share * (fitted(weight, activations) - weight)
            assert torch.allclose(refit.weight, moved, rtol=1e-9)
    assert found >= {None, 1.0, 0.5}


@pytest.mark.parametrize(
    ("scale", "share"),
    [
        (1.0, 1.0),
        (0.4, 0.5),
        (0.2, 0.25),
        (-0.1, None),
    ],
)
def test_a_part_that_wants_less_of_a_change_shrinks_it(scale, share):
    """A fit to the first part moves all the way: on the second one, a share s leaves the error (s - scale)^2."""
    direction = torch.randn(ROWS, COLUMNS, dtype=torch.float64)
    problems = problems_of(*parts_of([direction, scale * direction]))

    refit = refit_that_helps(problems, SHARES)

    taken = None if refit is None else refit.share
    assert taken == share


def test_the_whole_refit_of_two_parts_has_the_bits_of_a_refit_to_their_sums():
    direction = torch.randn(ROWS, COLUMNS, dtype=torch.float64)
    first, last = problems_of(*parts_of([direction, direction], noise=0.1))
    sums = InputStatistics(first.gram + last.gram, 2 * TOKENS)
    problem = LayerProblem(
        first.weight,
        sums,
        first.target + last.target,
        first.output_energies + last.output_energies,
    )

    weight, _ = refit_columns(problem, torch.ones(COLUMNS, dtype=torch.bool))

    assert torch.equal(refit_that_helps([first, last], (1.0,)).weight, weight)
    assert torch.equal(refit_to_all([first, last]).weight, weight)


def test_a_refit_changes_no_part():
    direction = torch.randn(ROWS, COLUMNS, dtype=torch.float64)
    problems = problems_of(*parts_of([direction, 0.4 * direction, direction]))
    before = [(problem.gram.clone(), problem.target.clone()) for problem in problems]

    refit_that_helps(problems, SHARES)

    for problem, (gram, target) in zip(problems, before, strict=True):
        assert torch.equal(problem.gram, gram)
        assert torch.equal(problem.target, target)
        assert not problem.weight.any()


@pytest.mark.parametrize("seed", range(5))
def test_a_strong_input_does_not_hide_in_float32_that_a_refit_helps(seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(16, 64, generator=generator) / 8
    # what all parts ask for: a small change of the weights, but for those of the strong input
    better = weight + 0.02 * torch.randn(16, 64, generator=generator) / 8
    better[:, 0] = weight[:, 0]
    parts, exact_parts = [], []
    for _ in range(3):
        inputs = torch.randn(512, 64, generator=generator)
        inputs[:, 0] *= 1000
        outputs = inputs @ better.T + 0.1 * torch.randn(512, 16, generator=generator)
        parts.append(problem_of(weight, inputs, outputs))
        exact_parts.append(problem_of(weight.double(), inputs.double(), outputs.double()))

    refit = refit_that_helps(parts, SHARES)

    exact = refit_that_helps(exact_parts, SHARES)
    assert (refit and refit.share) == (exact and exact.share)


@pytest.mark.parametrize("corrected", [False, True])
def test_the_change_of_the_error_is_the_difference_of_two_errors(corrected):
    made = example(3, 8, corrected=corrected)
    changed = made.weight + 0.1 * torch.randn(made.weight.shape, dtype=made.weight.dtype)

    change = made.problem.change_of_error(changed)

    before = made.problem.squared_error(made.weight)
    assert change == pytest.approx(made.problem.squared_error(changed) - before)


def test_the_change_of_the_error_of_a_decoupled_problem_is_that_of_its_original():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(TOKENS, COLUMNS, generator=generator, dtype=torch.float64)
    inputs[:, 0] *= 1e-4  # nearly dead
    weight = torch.randn(ROWS, COLUMNS, generator=generator, dtype=torch.float64)
    problem = problem_of(weight, inputs, inputs @ weight.T + inputs[:, 1:4])
    changed = weight + torch.randn(ROWS, COLUMNS, generator=generator, dtype=torch.float64)
    changed[:, 0] *= 1e4  # so that its products with other inputs count

    decoupled = problem.decoupled()

    assert not torch.equal(decoupled.gram, problem.gram)
    expected = problem.squared_error(changed) - problem.squared_error(weight)
    assert decoupled.change_of_error(changed) == pytest.approx(expected)
    assert decoupled.output_error(changed) == problem.output_error(changed)
