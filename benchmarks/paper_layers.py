"""What `paper.py` measures on single linear operators, without pruning a whole model.

A *layer problem* (`LayerProblem`) has the dense weights `W` [out, in] of one linear operator and statistics of its
inputs on some tokens, of which the Gram matrix `G` is the most important. Pruned weights shall give the outputs that
`W` gives. `operators_of` makes the problems of some operators of a model on several texts. Each function after it
measures one operator and yields rows; an error in a row is the squared relative error of the outputs.

- `descents`: FISTA and gradient descent with momentum on the same LASSO
- `searches`: ways to choose the l1 penalty, by the FISTA steps that they spend
- `starts`: warm starts of FISTAPruner
- `sample_counts`: methods by the amount of calibration text
- `swaps`: DSnoT after other methods
"""

from __future__ import annotations

import itertools
import math
import random
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, cast

import torch
from shared import calibration_of, pattern_of
from solvers import layer_problems, parse_method
from torch import Tensor

from optimum_fista.solve.method import PrunedOperator
from optimum_fista.solve.methods import create_method, method_class
from optimum_fista.solve.methods.dsnot import Dsnot
from optimum_fista.solve.methods.fista import Fista
from optimum_fista.solve.pattern import SparsityPattern
from optimum_fista.solve.problem import InputStatistics, LayerProblem
from optimum_fista.solve.proximal_gradient import fista, soft_threshold
from optimum_fista.solve.refit import refit
from optimum_fista.source.loading import load_model
from optimum_fista.text.sources import load_text
from optimum_fista.text.windows import evaluation_windows

Row = dict[str, Any]

PUBLISHED = Fista(warm_start="wanda", max_trials=30, refit_iterations=0)
"""FISTAPruner as published for Llama-like models, of which SmolLM2 is one."""
STEPS = 20
"""FISTA steps of a trial, the paper's K."""


@dataclass(frozen=True)
class Operator:
    """The layer problems of one linear operator of the dense model.

    Attributes:
        name: Such as "model.layers.3.mlp.down_proj.weight".
        sequences: The problems of the calibration sequences, each alone.
        by_count: The problems of so many sequences together.
        fresh: The problem of further tokens of the calibration text.
        other: The problem of another text.
    """

    name: str
    sequences: list[LayerProblem]
    by_count: dict[int, LayerProblem]
    fresh: LayerProblem
    other: LayerProblem

    @property
    def problem(self) -> LayerProblem:
        """The problem of the calibration sequences together."""
        return self.by_count[len(self.sequences)]

    def errors(self, weight: Tensor) -> dict[str, float]:
        """Return the errors of weights [out, in] on the three texts."""
        return {
            "calibration": self.problem.fit_error(weight) ** 2,
            "fresh": self.fresh.fit_error(weight) ** 2,
            "other": self.other.fit_error(weight) ** 2,
        }


def operators_of(arguments: Namespace, *, counts: Sequence[int]) -> list[Operator]:
    """Make the operators of `arguments.layers` whose names end with one of `arguments.operators`.

    The text is always cut into as many windows as `arguments.sample_counts` needs, so that every call draws the same.

    Args:
        arguments: Those of the command line.
        counts: Numbers of sequences whose problems are wanted besides `arguments.num_samples`.
    """
    model, tokenizer = load_model(arguments.model, dtype="float32", device="cpu")
    num_drawn = max(arguments.num_samples, *arguments.sample_counts)
    windows = calibration_of(arguments, tokenizer, num_drawn + arguments.num_fresh)
    other_text = load_text(arguments.other, "test")
    other = evaluation_windows(
        tokenizer, other_text, arguments.sequence_length, arguments.num_fresh
    )

    # The calibration sequences one by one, then those that each larger count adds.
    larger_counts = sorted(count for count in counts if count > arguments.num_samples)
    bounds = [*range(arguments.num_samples + 1), *larger_counts]
    token_sets = [windows[first:last] for first, last in itertools.pairwise(bounds)]
    token_sets += [windows[num_drawn:], other]

    operators = []
    for texts in layer_problems(model, token_sets, set(arguments.layers)):
        for problems in zip(*texts, strict=True):
            name = problems[0].name
            if not name.removesuffix(".weight").endswith(tuple(arguments.operators)):
                continue
            *calibration, fresh, other_problem = problems
            wanted = {arguments.num_samples, *counts}
            by_count = {
                bounds[number]: merged(calibration[:number])
                for number in range(1, len(bounds))
                if bounds[number] in wanted
            }
            sequences = calibration[: arguments.num_samples]
            operators.append(Operator(name, sequences, by_count, fresh, other_problem))
    return operators


def merged(problems: Sequence[LayerProblem]) -> LayerProblem:
    """Make the problem of all tokens of several problems of one operator; its target outputs are the dense ones."""
    gram = torch.stack([problem.gram for problem in problems]).sum(0)
    tokens = [problem.statistics.num_tokens for problem in problems]
    sums = [problem.statistics.mean * problem.statistics.num_tokens for problem in problems]
    mean = torch.stack(sums).sum(0) / max(1, sum(tokens))
    statistics = InputStatistics(gram, sum(tokens), mean)
    return LayerProblem(problems[0].weight, statistics, name=problems[0].name)


# --- FISTA against gradient descent ---------------------------------------------------------------------------------

CHECKPOINTS = (20, 80)
"""Steps after which an iterate is judged; one step takes one product with a Gram matrix."""
RATES = (0.1, 0.3, 1.0)
"""Learning rates that are tried, in units of one over the Lipschitz constant."""


@dataclass(frozen=True)
class Descent:
    """Gradient descent on the LASSO `1/2 || W* X - W X ||^2 + l1 sum |W*_ij|`.

    Attributes:
        proximal: Whether the l1 norm is handled by soft-thresholding; otherwise by its subgradient, the sign.
        momentum: Share of the last step that is taken again (heavy ball).
        stochastic: Whether each step sees one sequence, in turn; otherwise all of them.
        rates: Learning rates to try, of which the one with the lowest objective counts.
    """

    proximal: bool
    momentum: float
    stochastic: bool
    rates: tuple[float, ...] = RATES

    def run(
        self, operator: Operator, start: Tensor, l1_penalty: float, rate: float
    ) -> Iterator[Tensor]:
        """Yield the iterates [out, in] after each of `CHECKPOINTS`. `rate` is one of `self.rates`."""
        step_length = rate / operator.problem.statistics.lipschitz
        weight = start
        previous = start
        for step in range(1, max(CHECKPOINTS) + 1):
            problem = operator.problem
            scale = 1.0
            if self.stochastic:
                problem = operator.sequences[step % len(operator.sequences)]
                # So that the mean over the sequences is the gradient of all of them.
                scale = float(len(operator.sequences))
            gradient = torch.addmm(problem.target, weight, problem.gram, beta=-scale, alpha=scale)
            if not self.proximal:
                gradient.add_(weight.sign(), alpha=l1_penalty)
            following = weight + self.momentum * (weight - previous) - step_length * gradient
            if self.proximal:
                following = soft_threshold(following, step_length * l1_penalty)
            previous = weight
            weight = following
            if step in CHECKPOINTS:
                yield weight


DESCENTS: dict[str, Descent] = {
    "proximal gradient": Descent(proximal=True, momentum=0.0, stochastic=False, rates=(1.0,)),
    "proximal gradient, momentum": Descent(proximal=True, momentum=0.9, stochastic=False),
    "subgradient, momentum": Descent(proximal=False, momentum=0.9, stochastic=False),
    "proximal SGD, momentum": Descent(proximal=True, momentum=0.9, stochastic=True),
    "SGD, momentum": Descent(proximal=False, momentum=0.9, stochastic=True),
}


PENALTIES = ("found", "first trial")
"""Where the penalty of a LASSO is from: found by FISTAPruner's search in four trials, or that of its first trial."""


def descents(operator: Operator, penalty: str) -> Iterator[Row]:
    """Compare FISTA with `DESCENTS` on one LASSO, from Wanda's weights at 50%.

    `penalty` is one of `PENALTIES`. If the search finds no penalty that is better than Wanda's weights, the penalty is
    tiny. In rows, `fall` is how much of the objective at the start is gone. `calibration` and the other errors are of
    the iterate after rounding to 50%, without a refit.
    """
    problem = operator.problem
    pattern = pattern_of("0.5")
    wanda = create_method("wanda").prune(problem, pattern_of("0.5", "row"))
    start = wanda.weight
    largest = float(problem.target.abs().max())
    l1_penalty = 1e-3 * largest  # the middle of the interval of the search
    if penalty == "found":
        searched = Fista(max_trials=4).search_penalty(problem, pattern, wanda)
        l1_penalty = 1e-6 * largest
        if searched.l1_penalty is not None:
            l1_penalty = searched.l1_penalty

    lasso = _Lasso(operator, pattern, start, l1_penalty)
    yield lasso.row_of("Wanda, no step", 0, start, None)
    for steps in CHECKPOINTS:
        solution = fista(
            problem.gram,
            problem.target,
            start,
            l1_penalty,
            problem.statistics.lipschitz,
            max_iterations=steps,
        )
        yield lasso.row_of("FISTA", steps, solution.weight, None)
    for way, descent in DESCENTS.items():
        iterates = {
            rate: list(descent.run(operator, start, l1_penalty, rate)) for rate in descent.rates
        }
        for number, steps in enumerate(CHECKPOINTS):
            rows = [
                lasso.row_of(way, steps, iterates[rate][number], rate) for rate in descent.rates
            ]
            yield max(rows, key=lambda row: row["fall"])


@dataclass(frozen=True)
class _Lasso:
    """The LASSO of an operator at one penalty, to compare ways to solve it.

    Attributes:
        operator: The operator, with its problem.
        pattern: What iterates are rounded to.
        start: The weights at which all ways begin, [out, in].
        l1_penalty: The penalty.
    """

    operator: Operator
    pattern: SparsityPattern
    start: Tensor
    l1_penalty: float

    def objective(self, weight: Tensor) -> float:
        """Return the objective at some weights."""
        squared_error = self.operator.problem.squared_error(weight)
        return squared_error / 2 + self.l1_penalty * float(weight.abs().sum())

    def row_of(self, way: str, steps: int, weight: Tensor, rate: float | None) -> Row:
        """Make the row of an iterate: how much of the objective is gone, and the errors after rounding.

        `rate` is the learning rate of a way that has one.
        """
        fall = 1 - self.objective(weight) / self.objective(self.start)
        if not math.isfinite(fall):
            fall = -math.inf
        # The penalty is given in units of the largest entry of the target.
        relative_penalty = self.l1_penalty / float(self.operator.problem.target.abs().max())
        row: Row = {
            "way": way,
            "steps": steps,
            "rate": rate,
            "fall": fall,
            "relative_penalty": relative_penalty,
        }
        return row | self.operator.errors(weight * self.pattern.mask(weight))


# --- the search of the penalty --------------------------------------------------------------------------------------

BUDGETS = (20, 40, 80, 160, 240)
"""FISTA steps after which a search is judged."""
DECADES = 6.0
"""Searches choose from `1e-6 max |C|` to `max |C|`, as `Fista.search_penalty` does."""
RUNGS = (5, 10, 20)
"""Steps after which Hyperband may end a trial."""


class Chain:
    """Trials of the penalty, each from the best rounded weights so far, as in FISTAPruner's Algorithm 1.

    Attributes:
        steps: FISTA steps that were spent.
        error: The lowest error after rounding.
        curve: Pairs of both, one for each improvement.
    """

    def __init__(self, problem: LayerProblem, pattern: SparsityPattern, start: Tensor) -> None:
        """Begin at pruned weights `start` [out, in]."""
        self._problem = problem
        self._pattern = pattern
        self._best = start
        self.steps = 0
        self.error = problem.fit_error(start) ** 2
        self.curve = [(0, self.error)]

    def trial(self, exponent: float, rungs: Sequence[int] = (STEPS,)) -> Iterator[float]:
        """Take FISTA steps at the penalty `10^exponent max |C|`; yield the error after each of `rungs` steps.

        A caller that reads no further pays for the steps until there.
        """
        problem = self._problem
        start = self._best
        before = 0
        for steps in rungs:
            # From the start anew, because momentum is lost between calls. Only the new steps are counted.
            solution = fista(
                problem.gram,
                problem.target,
                start,
                10**exponent * float(problem.target.abs().max()),
                problem.statistics.lipschitz,
                max_iterations=steps,
            )
            weight = solution.weight * self._pattern.mask(solution.weight)
            error = problem.fit_error(weight) ** 2
            self.steps += steps - before
            before = steps
            if error < self.error:
                self.error = error
                self._best = weight
                self.curve.append((self.steps, error))
            yield error

    def whole_trial(self, exponent: float) -> None:
        """Take all steps of a trial at the penalty `10^exponent max |C|`."""
        for _ in self.trial(exponent):
            pass

    def error_after(self, steps: int) -> float:
        """Return the lowest error that was reached within so many steps."""
        return [error for spent, error in self.curve if spent <= steps][-1]


def by_bayes(chain: Chain, seed: int, *, with_hyperband: bool) -> None:
    """Let Optuna's tree-structured Parzen estimator choose; with Hyperband, which may end trials, this is BOHB."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    pruner: optuna.pruners.BasePruner = optuna.pruners.NopPruner()
    rungs: Sequence[int] = (STEPS,)
    if with_hyperband:
        rungs = RUNGS
        pruner = optuna.pruners.HyperbandPruner(RUNGS[0], RUNGS[-1], reduction_factor=2)
    sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=4)
    study = optuna.create_study(study_name="penalty", sampler=sampler, pruner=pruner)
    while chain.steps < max(BUDGETS):
        asked = study.ask()
        exponent = asked.suggest_float("exponent", -DECADES, 0.0)
        result: float | None = None
        for rung, error in zip(rungs, chain.trial(exponent, rungs), strict=True):
            asked.report(error, rung)
            if rung < STEPS and asked.should_prune():
                break
            result = error if rung == STEPS else None
        state = optuna.trial.TrialState.COMPLETE
        if result is None:
            state = optuna.trial.TrialState.PRUNED
        study.tell(asked, result, state)


def at_random(chain: Chain, seed: int) -> None:
    """Draw exponents evenly."""
    generator = random.Random(seed)
    while chain.steps < max(BUDGETS):
        chain.whole_trial(generator.uniform(-DECADES, 0.0))


def on_a_grid(chain: Chain, _: int) -> None:
    """Take evenly spaced exponents, from the smallest penalty on; nothing is drawn."""
    number = max(BUDGETS) // STEPS
    for place in range(number):
        chain.whole_trial(-DECADES + DECADES * (place + 0.5) / number)


SEARCHES: dict[str, Callable[[Chain, int], None]] = {
    "TPE": lambda chain, seed: by_bayes(chain, seed, with_hyperband=False),
    "TPE with Hyperband (BOHB)": lambda chain, seed: by_bayes(chain, seed, with_hyperband=True),
    "random": at_random,
    "grid": on_a_grid,
}


def searches(operator: Operator, pattern: str, seeds: Sequence[int]) -> Iterator[Row]:
    """Compare the bisection of FISTAPruner with `SEARCHES`, from Wanda's weights, by errors after rounding.

    A row has the lowest error within each of `BUDGETS`, as "20" and so on. Every search has as many steps as the
    largest budget, but bisection ends after three trials without improvement.
    """
    problem = operator.problem
    by_rows = pattern_of(pattern, "row")
    start = create_method("wanda").prune(problem, by_rows)
    sparsity_pattern = pattern_of(pattern)

    bisection: Row = {"way": "bisection (Algorithm 1)", "seed": 0}
    for budget in BUDGETS:
        method = Fista(max_trials=budget // STEPS)
        found = method.search_penalty(problem, sparsity_pattern, start)
        bisection[str(budget)] = problem.fit_error(found.weight) ** 2
    yield bisection

    for way, search in SEARCHES.items():
        seeds_of_way = seeds[:1] if way == "grid" else seeds  # a grid draws nothing
        for seed in seeds_of_way:
            chain = Chain(problem, sparsity_pattern, start.weight)
            search(chain, seed)
            row: Row = {"way": way, "seed": seed}
            yield row | {str(budget): chain.error_after(budget) for budget in BUDGETS}


# --- warm starts ----------------------------------------------------------------------------------------------------


def starts(operator: Operator, pattern: str) -> Iterator[Row]:
    """Compare warm starts of FISTAPruner: their cost, and the errors of the start, after the search, after a refit.

    The search is the published one. Seconds are of the processor.
    """
    problem = operator.problem
    sparsity_pattern = pattern_of(pattern)
    for name in ("nothing", "magnitude", "wanda", "sparsegpt"):
        began = time.process_time()
        if name == "nothing":
            nothing = torch.zeros_like(problem.weight)
            start = PrunedOperator(nothing, sparsity_pattern.mask(problem.weight), fit_error=1.0)
        else:
            scope = "row" if name == "wanda" else "matrix"
            start = create_method(name).prune(problem, pattern_of(pattern, scope))
        started = time.process_time()
        found = PUBLISHED.search_penalty(problem, sparsity_pattern, start)
        ended = time.process_time()
        refitted, _ = refit(
            problem.gram,
            problem.target,
            found.weight,
            found.mask,
            max_iterations=20,
            singular=True,
        )
        yield {
            "way": name,
            "start_seconds": started - began,
            "search_seconds": ended - started,
            "steps": found.iterations,
            "start": operator.errors(start.weight),
            "searched": operator.errors(found.weight),
            "refitted": operator.errors(refitted),
        }


# --- calibration text -----------------------------------------------------------------------------------------------

METHODS_BY_SAMPLES = {
    "default": "obs_admm",
    "FISTAPruner, four trials": 'fista:warm_start="wanda":refit_iterations=0',
    "SparseGPT": "sparsegpt",
    "Wanda": "wanda",
}


def sample_counts(operator: Operator, pattern: str) -> Iterator[Row]:
    """Prune on each number of sequences that `operator` has, and judge all on the same tokens."""
    for count, problem in operator.by_count.items():
        for way, text in METHODS_BY_SAMPLES.items():
            method = parse_method(text)
            scope = method_class(method.name).defaults.scope
            pruned = method.prune(problem, pattern_of(pattern, scope))
            errors = operator.errors(pruned.weight)
            del errors["calibration"]  # which has other tokens than `problem`
            yield {"way": way, "samples": count} | errors


# --- DSnoT ----------------------------------------------------------------------------------------------------------


def swaps(operator: Operator, pattern: str) -> Iterator[Row]:
    """Prune by several methods, and let DSnoT swap weights in the mask of each.

    A weight that comes back has its dense value, since DSnoT trains nothing.
    """
    problem = operator.problem
    methods = {
        "Wanda": create_method("wanda"),
        "FISTAPruner, four trials": replace(PUBLISHED, max_trials=4),
        "default": create_method("obs_admm"),
    }
    for way, method in methods.items():
        scope = method_class(method.name).defaults.scope
        sparsity_pattern = pattern_of(pattern, scope)
        pruned = method.prune(problem, sparsity_pattern)
        yield {"way": way, "swapped": 0.0} | operator.errors(pruned.weight)

        # The problem of a matrix whose removed weights have their dense values.
        filled = torch.where(pruned.mask, pruned.weight, problem.weight)
        candidates = LayerProblem(filled, problem.statistics, name=problem.name)
        swapped = Dsnot().prune(candidates, _beginning_at(pruned.mask, sparsity_pattern))
        came_back = swapped.mask & ~pruned.mask
        share = float(came_back.sum() / pruned.mask.sum())
        yield {"way": f"{way}, then DSnoT", "swapped": share} | operator.errors(swapped.weight)


def _beginning_at(mask: Tensor, pattern: SparsityPattern) -> SparsityPattern:
    """Make what DSnoT reads of a pattern, with a mask [out, in] to begin at instead of Wanda's."""
    beginning = SimpleNamespace(
        mask=lambda _: mask.clone(),
        width=pattern.width,
        span=pattern.span,
        whole_columns=False,
    )
    return cast(SparsityPattern, beginning)
