"""Trials of the l1 penalty on one layer problem, and ways to choose the next one.

A trial takes FISTA steps at one penalty and rounds the iterate to the pattern. It starts from SparseGPT's weights
or, in a chain, from the best rounded weights so far, as in FISTAPruner's Algorithm 1.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from optimum_fista.solve.methods.sparsegpt import SparseGPT
from optimum_fista.solve.pattern import SparsityPattern
from optimum_fista.solve.penalty import search_penalty
from optimum_fista.solve.problem import LayerProblem
from optimum_fista.solve.proximal_gradient import FistaSolution, fista
from optimum_fista.solve.refit import refit

STEPS = 20
"""FISTA steps of a trial, the paper's K."""
RUNGS = (10, STEPS, 40, 80)
"""Steps after which Hyperband may stop a trial."""
DECADES = 6
"""The interval of `search_penalty`: from `1e-6 max |C|` to `max |C|`."""
PER_DECADE = 2
EXPONENTS = tuple(i / PER_DECADE - DECADES for i in range(DECADES * PER_DECADE + 1))
"""Decimal logarithms of the penalties tried, in units of `max |C|`."""


@dataclass(frozen=True)
class Data:
    """A layer problem on calibration and on fresh tokens, and the wanted pattern."""

    problem: LayerProblem
    fresh: LayerProblem
    pattern: SparsityPattern


class Rounded:
    """Weights [out, in] rounded to the pattern; `error` is their squared relative error on calibration tokens."""

    def __init__(self, data: Data, weight: Tensor, mask: Tensor | None = None) -> None:
        self.data = data
        self.mask = data.pattern.mask(weight.abs()) if mask is None else mask
        self.weight = weight * self.mask
        self.error = data.problem.fit_error(self.weight) ** 2

    @cached_property
    def refitted(self) -> dict[str, float]:
        """Squared relative errors on both texts after the refit of `method="fista"`."""
        problem = self.data.problem
        weight, _ = refit(problem.gram, problem.target, self.weight, self.mask, max_iterations=20)
        errors = {"calibration": problem, "fresh": self.data.fresh}
        return {name: text.fit_error(weight) ** 2 for name, text in errors.items()}


@dataclass(frozen=True)
class Trial:
    """Where FISTA at one penalty was after some steps."""

    steps: int
    rounded: Rounded


class Task:
    """One operator to be pruned, and what all ways share: the start, and trials from it."""

    def __init__(self, data: Data) -> None:
        self.data, self.problem, self.pattern = data, data.problem, data.pattern
        self.pruned = SparseGPT().prune(data.problem, data.pattern)
        self.start = Rounded(data, self.pruned.weight, self.pruned.mask)

    def solve(
        self, start: Tensor, penalty: float, steps: int, see: Callable[[int, Tensor], None] | None = None
    ) -> FistaSolution:
        """FISTA on the task's LASSO."""
        problem = self.problem
        lipschitz = problem.statistics.lipschitz
        return fista(problem.gram, problem.target, start, penalty, lipschitz, max_iterations=steps, see=see)

    def penalty(self, exponent: float) -> float:
        """`10^exponent max |C|`."""
        return 10**exponent * float(self.problem.target.abs().max())

    def trials(self, exponent: float, start: Tensor, rungs: tuple[int, ...]) -> list[Trial]:
        """One run of FISTA, rounded at every rung."""
        found: list[Trial] = []

        def see(step: int, weight: Tensor) -> None:
            if step in rungs:
                found.append(Trial(step, Rounded(self.data, weight)))

        solution = self.solve(start, self.penalty(exponent), rungs[-1], see)
        if len(found) < len(rungs):  # converged between two rungs
            last = Trial(solution.iterations, Rounded(self.data, solution.weight))
            found += [last] * (len(rungs) - len(found))
        return found

    @cached_property
    def table(self) -> dict[float, list[Trial]]:
        """Trials from the start by exponent, one a rung. All ways without a chain read them here."""
        return {exponent: self.trials(exponent, self.start.weight, RUNGS) for exponent in EXPONENTS}


class Search:
    """The best rounded weights that a way has found on one task, and what they have cost so far."""

    def __init__(self, task: Task, chained: bool = False) -> None:
        self.task, self.chained = task, chained
        self.best = task.start
        self.steps = 0
        self.curve: list[tuple[int, Rounded]] = [(0, task.start)]

    def spend(self, steps: int, rounded: Rounded) -> None:
        """Account for a trial, or a part of one, and keep its result if it is the best."""
        self.steps += steps
        if rounded.error < self.best.error:
            self.best = rounded
            self.curve.append((self.steps, rounded))

    def attempt(self, exponent: float) -> float:
        """The error of a trial of `STEPS` steps."""
        if self.best is self.task.start or not self.chained:
            trial = self.task.table[exponent][RUNGS.index(STEPS)]
        else:
            (trial,) = self.task.trials(exponent, self.best.weight, (STEPS,))
        self.spend(trial.steps, trial.rounded)
        return trial.rounded.error

    def attempt_by_rungs(self, exponent: float) -> Iterator[tuple[int, float]]:
        """The rung and the error there of a trial from the start that continues as long as it is asked to."""
        spent = 0
        for rung, trial in zip(RUNGS, self.task.table[exponent], strict=True):
            self.spend(trial.steps - spent, trial.rounded)
            yield rung, trial.rounded.error
            spent = trial.steps


def bisection(task: Task, patience: int, max_trials: int, highest: float = 0.0) -> Search:
    """Algorithm 1, by the package's own function; `highest` is the exponent of the interval's upper end."""
    search = Search(task, chained=True)

    def solve(start: Tensor, penalty: float) -> FistaSolution:
        solution = task.solve(start, penalty, STEPS)
        search.spend(solution.iterations, Rounded(task.data, solution.weight))
        return solution

    ends = {"patience": patience, "max_trials": max_trials, "penalty_range": (10**-DECADES, 10**highest)}
    search_penalty(task.problem, task.pattern, task.start.weight, task.pruned, solve, **ends)
    return search


def constant(task: Task, budget: int) -> Search:
    """A chain of trials at one penalty, the best of the grid after `STEPS` steps; finding it isn't counted."""
    search, rung = Search(task, chained=True), RUNGS.index(STEPS)
    exponent = min(EXPONENTS, key=lambda e: task.table[e][rung].rounded.error)
    while search.steps < budget:
        search.attempt(exponent)
    return search


def random_search(task: Task, budget: int, seed: int, chained: bool = False) -> Search:
    """Penalties drawn evenly from the logarithmic interval."""
    search, generator = Search(task, chained), random.Random(seed)
    while search.steps < budget:
        search.attempt(generator.choice(EXPONENTS))
    return search


def grid(task: Task, rungs: tuple[int, ...], after_refit: bool = False) -> Search:
    """Every penalty, at those rungs: the best that a search without a chain can find.

    `after_refit` judges by the refitted error; what rounding makes twice as bad as the start isn't refitted.
    """
    search, judged = Search(task), [task.start]
    for exponent in EXPONENTS:
        trials = [task.table[exponent][RUNGS.index(rung)] for rung in rungs]
        kept = min(trials, key=lambda trial: trial.rounded.error)
        search.spend(trials[-1].steps, kept.rounded)
        judged += [trial.rounded for trial in trials if trial.rounded.error < 2 * task.start.error]
    if after_refit:
        search.best = min(judged, key=lambda rounded: rounded.refitted["calibration"])
    return search


def optuna_search(task: Task, budget: int, seed: int, chained: bool = False, hyperband: bool = False) -> Search:
    """Optuna's tree-structured Parzen estimator after four random trials; with Hyperband, trials may end early."""
    optuna, search = import_optuna(), Search(task, chained)
    study = optuna.create_study(
        study_name="penalty",  # Hyperband assigns brackets by it
        sampler=optuna.samplers.TPESampler(seed=seed, n_startup_trials=4),
        pruner=optuna.pruners.HyperbandPruner(RUNGS[0], RUNGS[-1], 2) if hyperband else optuna.pruners.NopPruner(),
    )
    while search.steps < budget:
        asked = study.ask()
        exponent = asked.suggest_float("exponent", EXPONENTS[0], EXPONENTS[-1], step=1 / PER_DECADE)
        error: float | None = None
        if not hyperband:
            error = search.attempt(exponent)
        else:
            for rung, error in search.attempt_by_rungs(exponent):
                asked.report(error, rung)
                if asked.should_prune() and rung < RUNGS[-1]:
                    error = None
                    break
        state = optuna.trial.TrialState.PRUNED if error is None else optuna.trial.TrialState.COMPLETE
        study.tell(asked, error, state)
    return search


def import_optuna():
    """Optuna, or an error that says how to install it."""
    try:
        import optuna
    except ImportError:
        raise SystemExit(
            "penalty_search.py compares with Optuna, which is not installed: pip install '.[benchmarks]'"
        ) from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
