import math

import pytest
import torch
from layer_problems import Example, example

from optimum_fista.solve.methods.fista import search_penalty
from optimum_fista.solve.methods.wanda import Wanda
from optimum_fista.solve.patterns import Unstructured, parse_pattern
from optimum_fista.solve.proximal_gradient import FistaSolution, fista
from optimum_fista.solve.refit import refit

PATTERNS = [Unstructured(0.5), Unstructured(0.5, "row"), parse_pattern("2:4")]


def fista_solver(made: Example):
    problem = made.problem

    def solve(start, l1_penalty):
        return fista(problem.gram, problem.target, start, l1_penalty, problem.statistics.lipschitz)

    return solve


class Solver:
    """Answers with whatever `answer(start, l1_penalty)` gives, and remembers what it was asked."""

    def __init__(self, answer) -> None:
        self.answer = answer
        self.starts: list[torch.Tensor] = []
        self.penalties: list[float] = []

    def __call__(self, start, l1_penalty) -> FistaSolution:
        self.starts.append(start)
        self.penalties.append(l1_penalty)
        return FistaSolution(self.answer(start, l1_penalty), 7, False)


def start():
    """A problem, and what Wanda makes of it in the first pattern."""
    made = example(6, 8)
    return made, Wanda().prune(made.problem, PATTERNS[0])


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("corrected", [False, True])
def test_improves_on_the_start(pattern, corrected):
    ratios = []
    for seed in range(6):
        made = example(12, 16, corrected=corrected, seed=seed)
        rounded = Wanda().prune(made.problem, pattern)
        before = math.sqrt(made.problem.squared_error(rounded.weight))
        found = search_penalty(made.problem, pattern, rounded.weight, rounded, fista_solver(made))
        assert found.error <= before
        assert found.error**2 == pytest.approx(made.squared_error(found.weight), rel=1e-6)
        assert pattern.violation(found.mask) is None
        assert (found.weight[~found.mask] == 0).all()
        assert (found.l1_penalty is None) is (found.error == before)
        assert found.l1_penalty is None or 1e-6 <= found.l1_penalty / float(made.problem.target.abs().max()) <= 1
        assert found.iterations > 0
        ratios.append(found.error / before)
    assert sum(ratios) / len(ratios) < 0.98


@pytest.mark.parametrize("patience", [1, 3])
@pytest.mark.parametrize("damage", [-1.0, math.nan])
def test_a_solver_that_never_improves_returns_the_start(patience, damage):
    made, rounded = start()
    solver = Solver(lambda start, _: start * damage)
    found = search_penalty(made.problem, PATTERNS[0], rounded.weight, rounded, solver, patience=patience)
    assert found.weight is rounded.weight
    assert found.mask is rounded.mask
    assert found.l1_penalty is None
    assert found.converged, "no trial was kept, so none that was cut short was"
    assert len(solver.penalties) == patience
    assert found.error == math.sqrt(made.problem.squared_error(rounded.weight))
    assert found.iterations == 7 * patience


def test_failures_count_from_the_last_improvement_and_trials_start_from_it():
    (made, rounded), pattern = start(), PATTERNS[0]
    better = refit(made.problem.gram, made.problem.target, rounded.weight, rounded.mask)[0]
    answers = iter([-better, -better, better, -better, -better, -better, better])
    solver = Solver(lambda start, _: next(answers))
    found = search_penalty(made.problem, pattern, made.weight, rounded, solver, patience=3)
    assert len(solver.penalties) == 6
    assert all(start is made.weight for start in solver.starts[:3])
    assert all(torch.equal(start, found.weight) for start in solver.starts[3:])
    assert found.l1_penalty == solver.penalties[2]
    assert not found.converged
    assert torch.equal(found.weight, better)


@pytest.mark.parametrize("share", [0.05, 0.95])
def test_rounding_share_is_the_threshold_between_the_two(share):
    (made, rounded), pattern = start(), PATTERNS[0]
    # Rounding moves these weights by about half of their total error.
    answer = rounded.weight * 1.6 + 0.25 * made.weight * ~rounded.mask
    mask = pattern.mask(answer.abs())
    ratio = made.problem.seminorm(answer * ~mask) / math.sqrt(made.problem.squared_error(answer * mask))
    assert 0.05 < ratio < 0.95
    solver = Solver(lambda start, _: answer)
    search_penalty(made.problem, pattern, rounded.weight, rounded, solver, rounding_share=share)
    assert (solver.penalties[1] > solver.penalties[0]) is (share == 0.05)


def test_bisection_is_on_a_logarithmic_scale_below_the_critical_penalty():
    made, rounded = start()
    solver = Solver(lambda start, _: -rounded.weight)
    search_penalty(made.problem, PATTERNS[0], rounded.weight, rounded, solver)
    critical = float(made.problem.target.abs().max())
    assert [penalty / critical for penalty in solver.penalties] == pytest.approx([1e-3, 10**-4.5, 10**-5.25])


def test_number_of_trials_is_limited():
    made, rounded = start()
    solver = Solver(lambda start, _: -rounded.weight)
    search_penalty(made.problem, PATTERNS[0], rounded.weight, rounded, solver, patience=100, max_trials=4)
    assert len(solver.penalties) == 4


def test_zero_target_needs_no_trial():
    made = example(4, 8)
    made.problem.target.zero_()
    rounded = Wanda().prune(made.problem, PATTERNS[0])
    solver = Solver(lambda start, _: start)
    found = search_penalty(made.problem, PATTERNS[0], rounded.weight, rounded, solver)
    assert found.weight is rounded.weight
    assert solver.penalties == []
