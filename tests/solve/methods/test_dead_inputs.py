"""Inputs that are zero on all calibration tokens, or next to it: every method but magnitude does without them."""

import pytest
import torch
from layer_problems import correlated_inputs

from optimum_fista.solve.methods import METHODS, create_method, method_class
from optimum_fista.solve.patterns import Unstructured, parse_pattern
from optimum_fista.solve.problem import InputStatistics, LayerProblem

SEEING = sorted(set(METHODS) - {"magnitude"})  # magnitude pruning looks at no input
METHOD_OPTIONS = [(name, {}) for name in SEEING]
METHOD_OPTIONS += [("fista", {"warm_start": "wanda"})]
ROWS = 48
COLUMNS = 96
DEAD = 36


def inputs_and_weight():
    """Inputs [tokens, in], a weight [out, in], and the numbers of the inputs that a test makes dead."""
    generator = torch.Generator().manual_seed(0)
    inputs = correlated_inputs(600, COLUMNS, generator, torch.float32, 1.0)
    weight = torch.randn(ROWS, COLUMNS, generator=generator)
    dead = torch.randperm(COLUMNS, generator=generator)[:DEAD]
    return inputs, weight, dead


def problem_of(inputs, weight):
    return LayerProblem(weight, InputStatistics(inputs.T @ inputs, len(inputs), inputs.mean(0)))


@pytest.mark.parametrize("loudness", [0.0, 1e-6, 5e-4])
@pytest.mark.parametrize(("name", "options"), METHOD_OPTIONS, ids=str)
def test_weights_of_dead_inputs_are_removed_first(name, options, loudness):
    inputs, weight, dead = inputs_and_weight()
    inputs[:, dead] *= loudness
    live = torch.ones(COLUMNS, dtype=torch.bool)
    live[dead] = False
    scope = method_class(name).defaults.scope
    method = create_method(name, **options)

    pruned = method.prune(problem_of(inputs, weight), Unstructured(0.5, scope))

    # the live inputs alone, of whose weights as many stay
    sparsity_of_live = 1 - 0.5 * COLUMNS / (COLUMNS - DEAD)
    alone = method.prune(
        problem_of(inputs[:, live], weight[:, live]), Unstructured(sparsity_of_live, scope)
    )
    assert int(pruned.mask[:, dead].sum()) == 0
    assert pruned.fit_error < 1.1 * alone.fit_error


@pytest.mark.parametrize("loudness", [0.0, 1e-6])
@pytest.mark.parametrize("name", SEEING)
def test_in_groups_weights_of_dead_inputs_go_first_and_those_that_stay_keep_their_values(
    name, loudness
):
    inputs, weight, dead = inputs_and_weight()
    inputs[:, dead] *= loudness
    is_dead = torch.zeros(COLUMNS, dtype=torch.bool)
    is_dead[dead] = True

    pruned = create_method(name).prune(problem_of(inputs, weight), parse_pattern("2:4"))

    kept_dead = pruned.mask & is_dead
    num_kept_dead = kept_dead.view(ROWS, -1, 4).sum(-1)  # of each group
    fewest_possible = (is_dead.view(-1, 4).sum(-1) - 2).clamp_min(0)
    assert (num_kept_dead == fewest_possible).all(), (
        f"{name} scores by inputs that are nearly dead: see InputStatistics"
    )
    assert int(num_kept_dead.sum()) > 0
    change = (pruned.weight - weight)[kept_dead]
    assert change.norm() < 0.05 * weight[kept_dead].norm()  # ALPS does not converge
    outputs = inputs.double() @ pruned.weight.double().T
    dense_outputs = inputs.double() @ weight.double().T
    error = float((outputs - dense_outputs).norm() / dense_outputs.norm())
    assert pruned.fit_error == pytest.approx(error, rel=1e-3)


@pytest.mark.parametrize("name", SEEING)
def test_a_problem_of_dead_inputs_only_keeps_exactly_half(name):
    pruned = create_method(name).prune(
        problem_of(torch.zeros(40, 8), torch.ones(6, 8)), Unstructured(0.5)
    )

    assert int(pruned.mask.sum()) == 24
    assert bool(torch.isfinite(pruned.weight).all())
    assert pruned.fit_error == 0


def test_statistics_of_inputs_that_are_all_alive_are_the_plain_sums():
    inputs, _, _ = inputs_and_weight()

    statistics = InputStatistics(inputs.T @ inputs, len(inputs))

    assert torch.equal(statistics.diagonal, statistics.gram.diagonal())
    assert torch.equal(statistics.energy_ratios, torch.ones(COLUMNS))
