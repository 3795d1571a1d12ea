import itertools
import math
from dataclasses import replace

import pytest
import torch
from layer_problems import Example, example

from optimum_fista.solve.methods.fista import Fista
from optimum_fista.solve.methods.sparsegpt import SparseGPT
from optimum_fista.solve.methods.wanda import Wanda
from optimum_fista.solve.pattern import SparsityPattern
from optimum_fista.solve.patterns import Unstructured, parse_pattern
from optimum_fista.solve.proximal_gradient import FistaSolution
from optimum_fista.solve.refit import refit

STARTS = {"wanda": Wanda, "sparsegpt": SparseGPT}
PATTERNS = [Unstructured(0.5), Unstructured(0.7, "row"), parse_pattern("2:4")]


def least_error(made: Example, row: int, kept: tuple[int, ...]) -> float:
    """Smallest squared error of one output that uses the inputs `kept` only."""
    target = made.outputs[:, [row]]
    if not kept:
        return float(target.square().sum())
    inputs = made.inputs[:, list(kept)]
    return float((target - inputs @ torch.linalg.lstsq(inputs, target).solution).square().sum())


def best_subset(made: Example, pattern: SparsityPattern) -> float:
    """Least squared error over every mask of the pattern: all subsets are tried."""
    rows, columns = made.weight.shape
    if pattern.span == columns:
        subsets = list(itertools.combinations(range(columns), 2))
        return sum(min(least_error(made, row, kept) for kept in subsets) for row in range(rows))

    # Budget shared by the rows: the best error of a row for every size, then the best way to share.
    errors_by_size = [
        [least_error_of_size(made, row, size) for size in range(columns + 1)] for row in range(rows)
    ]
    total = pattern.num_kept((rows, columns))
    return min(
        sum(errors_by_size[row][size] for row, size in enumerate(sizes))
        for sizes in itertools.product(range(columns + 1), repeat=rows)
        if sum(sizes) == total
    )


def least_error_of_size(made: Example, row: int, size: int) -> float:
    """Smallest squared error of one output that uses so many inputs."""
    subsets = itertools.combinations(range(made.weight.shape[1]), size)
    return min(least_error(made, row, kept) for kept in subsets)


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("warm_start", list(STARTS))
@pytest.mark.parametrize("refit_iterations", [0, 20])
def test_fista_is_never_worse_than_its_warm_start(warm_start, pattern, corrected, refit_iterations):
    method = Fista(warm_start=warm_start, refit_iterations=refit_iterations)
    counts_by_row = warm_start == "wanda" and pattern.span is None
    pattern_of_start = replace(pattern, scope="row") if counts_by_row else pattern

    ratios = []
    for seed in range(3):
        made = example(12, 20, corrected=corrected, seed=seed)
        pruned = method.prune(made.problem, pattern)
        start = STARTS[warm_start]().prune(made.problem, pattern_of_start)
        ratios.append(pruned.fit_error / start.fit_error)

        assert pattern.violation(pruned.mask) is None
        assert (pruned.weight[~pruned.mask] == 0).all()
        expected = math.sqrt(made.squared_error(pruned.weight)) / float(made.outputs.norm())
        assert pruned.fit_error == pytest.approx(expected, rel=1e-7)

    assert max(ratios) <= 1 + 1e-9
    assert refit_iterations == 0 or max(ratios) < 0.999


@pytest.mark.parametrize("pattern", [Unstructured(0.5), parse_pattern("2:4")])
@pytest.mark.parametrize("corrected", [False, True])
def test_the_error_of_fista_is_near_that_of_the_best_mask_of_all_and_never_below(
    pattern, corrected
):
    method = Fista(max_iterations=200, patience=8, refit_iterations=50)

    of_method = 0.0
    of_best = 0.0
    of_wanda = 0.0
    for seed in range(8):
        made = example(3, 4, tokens=30, corrected=corrected, seed=seed)
        pruned = method.prune(made.problem, pattern)
        error = made.squared_error(pruned.weight)
        bound = best_subset(made, pattern)
        assert error >= bound * (1 - 1e-9)

        # The refit leaves nothing to gain on the mask it was given.
        error_on_mask = sum(
            least_error(made, row, tuple(mask_of_row.nonzero().flatten().tolist()))
            for row, mask_of_row in enumerate(pruned.mask)
        )
        assert error == pytest.approx(error_on_mask, rel=1e-6)

        of_method += error
        of_best += bound
        of_wanda += made.squared_error(Wanda().prune(made.problem, pattern).weight)

    assert of_method - of_best < 0.25 * (of_wanda - of_best)


@pytest.mark.parametrize("columns", [20, 21])
def test_wanda_as_a_warm_start_keeps_only_weights_that_it_keeps_row_by_row(columns, solved_by):
    made = example(12, columns)
    pattern = Unstructured(0.5)
    asked = solved_by(lambda start, _: -start)  # never better than the start

    Fista(warm_start="wanda").prune(made.problem, pattern)

    start, _ = asked[0]
    mask = start != 0
    by_row = Wanda().prune(made.problem, Unstructured(0.5, "row"))
    assert not (mask & ~by_row.mask).any()
    assert int(by_row.mask.sum()) - int(mask.sum()) <= 12 * (columns % 2)
    assert pattern.num_kept((12, columns)) >= int(mask.sum())


@pytest.mark.parametrize("tokens", [1, 2, 8])
def test_fewer_tokens_than_weights_kept_in_a_row_do_not_blow_the_weights_up(tokens):
    made = example(24, 32, tokens=tokens, dtype=torch.float32)

    pruned = Fista().prune(made.problem, Unstructured(0.5))

    energy = float(made.outputs.double().square().sum())
    assert pruned.weight.abs().max() < 10 * made.weight.abs().max()
    assert math.sqrt(made.squared_error(pruned.weight) / energy) < 1e-4
    assert pruned.fit_error < 1e-3


def test_a_result_states_its_penalty_and_that_an_iteration_limit_ended_it():
    made = example(10, 20, corrected=True)
    critical = float(made.problem.target.abs().max())

    pruned = Fista(max_iterations=2, warm_start="wanda").prune(made.problem, PATTERNS[0])

    assert 0 < pruned.l1_penalty < critical
    assert not pruned.converged
    assert "max_iterations=2" in pruned.message


def test_a_result_states_its_penalty_and_that_it_converged():
    made = example(10, 20, corrected=True)
    critical = float(made.problem.target.abs().max())
    method = Fista(max_iterations=100_000, tolerance=1e-5, warm_start="wanda")

    pruned = method.prune(made.problem, PATTERNS[0])

    assert 0 < pruned.l1_penalty < critical
    assert pruned.converged
    assert pruned.message == ""


def test_a_result_states_that_its_warm_start_needed_more_damping():
    made = example(4, 8)
    gram = made.problem.statistics.gram
    mean = gram.diagonal().mean()
    gram.diagonal().sub_(torch.linalg.eigvalsh(gram)[0] + 0.02 * mean)
    method = Fista(warm_start="sparsegpt", tolerance=1e9)  # FISTA itself converges

    pruned = method.prune(made.problem, PATTERNS[0])

    assert not pruned.converged
    assert pruned.message == "the Gram matrix needed damping 0.1 instead of 0.01"


@pytest.mark.parametrize("pattern", [Unstructured(0.0), Unstructured(0.0, "row")])
def test_a_sparsity_of_zero_changes_no_weight(pattern):
    made = example(4, 8)

    pruned = Fista().prune(made.problem, pattern)

    assert pruned.mask.all()
    assert torch.allclose(pruned.weight, made.weight)
    assert pruned.fit_error < 1e-7


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("warm_start", "zero"),
        ("patience", 0),
        ("refit_iterations", -1),
        ("tolerance", -1e-6),
        ("rounding_share", 1.0),
    ],
)
def test_bad_options_are_refused_when_the_method_is_constructed(option, value):
    with pytest.raises(ValueError, match=rf"{option}={value!r}: pass"):
        Fista(**{option: value})


@pytest.fixture
def solved_by(monkeypatch):
    """Lets whatever `answer(start, l1_penalty)` gives take the place of FISTA's solution, and records the questions."""

    def solve(answer):
        asked = []

        def solver(gram, target, start, l1_penalty, lipschitz, **options):
            asked.append((start, l1_penalty))
            return FistaSolution(answer(start, l1_penalty), 7, False)

        monkeypatch.setattr("optimum_fista.solve.methods.fista.fista", solver)
        return asked

    return solve


def problem_and_start():
    """A problem, and what Wanda makes of it in the first pattern, for the search to start from."""
    made = example(6, 8)
    return made, Wanda().prune(made.problem, PATTERNS[0])


@pytest.mark.parametrize("patience", [1, 3])
@pytest.mark.parametrize("damage", [-1.0, math.nan])
def test_a_search_that_never_improves_returns_the_start(solved_by, patience, damage):
    made, rounded = problem_and_start()
    asked = solved_by(lambda start, _: start * damage)

    best = Fista(patience=patience).search_penalty(made.problem, PATTERNS[0], rounded)

    assert best.weight is rounded.weight
    assert best.mask is rounded.mask
    assert best.l1_penalty is None
    assert best.converged, "no trial was kept, so none that was cut short was"
    assert len(asked) == patience
    assert best.error == math.sqrt(made.problem.squared_error(rounded.weight))
    assert best.iterations == 7 * patience


def test_patience_counts_failures_since_the_last_improvement_and_trials_start_from_that(solved_by):
    made, rounded = problem_and_start()
    better, _ = refit(made.problem.gram, made.problem.target, rounded.weight, rounded.mask)
    answers = iter([-better, -better, better, -better, -better, -better, better])
    asked = solved_by(lambda start, _: next(answers))

    best = Fista(patience=3, max_trials=30).search_penalty(made.problem, PATTERNS[0], rounded)

    assert len(asked) == 6
    assert all(start is rounded.weight for start, _ in asked[:3])
    assert all(torch.equal(start, best.weight) for start, _ in asked[3:])
    assert best.l1_penalty == asked[2][1]
    assert not best.converged
    assert torch.equal(best.weight, better)


@pytest.mark.parametrize("share", [0.05, 0.95])
def test_the_penalty_rises_if_the_share_of_rounding_in_the_error_is_above_rounding_share(
    solved_by, share
):
    made, rounded = problem_and_start()
    # Rounding moves these weights by about half of their total error.
    answer = rounded.weight * 1.6 + 0.25 * made.weight * ~rounded.mask
    mask = PATTERNS[0].mask(answer)
    rounding_error = made.problem.seminorm(answer * ~mask)
    total_error = math.sqrt(made.problem.squared_error(answer * mask))
    assert 0.05 < rounding_error / total_error < 0.95
    asked = solved_by(lambda start, _: answer)

    Fista(rounding_share=share).search_penalty(made.problem, PATTERNS[0], rounded)

    (_, first_penalty), (_, second_penalty), *_ = asked
    assert (second_penalty > first_penalty) is (share == 0.05)


def test_penalties_are_bisected_on_a_logarithmic_scale_below_the_critical_one(solved_by):
    made, rounded = problem_and_start()
    asked = solved_by(lambda start, _: -rounded.weight)  # so that every trial fails
    critical = float(made.problem.target.abs().max())

    Fista(patience=100, max_trials=3).search_penalty(made.problem, PATTERNS[0], rounded)

    assert [penalty / critical for _, penalty in asked] == pytest.approx(
        [1e-3, 10**-4.5, 10**-5.25]
    )


def test_a_target_of_zero_returns_the_start_without_a_trial(solved_by):
    made = example(4, 8)
    made.problem.target.zero_()
    rounded = Wanda().prune(made.problem, PATTERNS[0])
    asked = solved_by(lambda start, _: start)

    best = Fista().search_penalty(made.problem, PATTERNS[0], rounded)

    assert best.weight is rounded.weight
    assert asked == []
