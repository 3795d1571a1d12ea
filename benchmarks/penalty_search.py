"""The adaptive penalty of FISTAPruner against hyper-parameter search: error by FISTA steps spent.

Every way of choosing the l1 penalty gets the same operators of a real model, the same interval, SparseGPT's weights
to start from, and the same rounding. Prints one table of geometric means over operators of the squared
relative error, and writes every curve as JSON; `--plot` draws them with the range over seeds.

    python benchmarks/penalty_search.py MODEL --calibration TEXT --plot docs/penalty_search.png
"""

from __future__ import annotations

import json
import statistics
from argparse import Namespace
from collections.abc import Callable, Iterator
from operator import itemgetter
from pathlib import Path
from zlib import crc32

import torch
from penalty_trials import (
    RUNGS,
    STEPS,
    Data,
    Search,
    Task,
    bisection,
    constant,
    grid,
    import_optuna,
    optuna_search,
    random_search,
)
from shared import calibration_of, parse_arguments, pattern_of, save
from solvers import geometric_mean, layer_problems
from tqdm.auto import tqdm

from optimum_fista.run.checkpoints.loading import load_model
from optimum_fista.run.reports.report import library_versions

EARLY = 80
"""Steps that the package's default spends at most: four trials of 20."""
Way = Callable[[Task, int], Search]


def ways(budget: int, chained: int) -> dict[str, Way]:
    """Functions of a task and a seed; `budget` and `chained` limit the steps of those that have no end of their own."""
    return {
        "SparseGPT, no trial": lambda task, _: Search(task),
        "bisection, four trials (default)": lambda task, _: bisection(task, 3, 4),
        "bisection, published": lambda task, _: bisection(task, 3, 30),
        "bisection, four trials, half the interval": lambda task, _: bisection(task, 3, 4, highest=-3.0),
        "best single penalty, chained": lambda task, _: constant(task, chained),
        "TPE, chained": lambda task, seed: optuna_search(task, chained, seed, chained=True),
        "random, chained": lambda task, seed: random_search(task, chained, seed, chained=True),
        "TPE": lambda task, seed: optuna_search(task, budget, seed),
        "TPE with Hyperband": lambda task, seed: optuna_search(task, budget, seed, hyperband=True),
        "random": lambda task, seed: random_search(task, budget, seed),
        "grid, 20 steps": lambda task, _: grid(task, (STEPS,)),
        "grid, up to 80 steps": lambda task, _: grid(task, RUNGS),
        "grid, up to 80 steps, judged after the refit": lambda task, _: grid(task, RUNGS, after_refit=True),
    }


def seeds_of(way: str, seeds: int) -> int:
    return seeds if "TPE" in way or "random" in way else 1


_HELP = {
    "calibration": "text source; its windows are split into two sets",
    "operators": "ends of names",
    "budget": "FISTA steps of the searches without a chain",
    "chained_budget": "FISTA steps of the searches in a chain",
    "seeds": "runs of the random ways",
    "seed": "of the calibration windows",
}


def tasks(arguments: Namespace) -> Iterator[Task]:
    """One an operator and pattern."""
    model, tokenizer = load_model(arguments.model, dtype="float32", device="cpu")
    windows = calibration_of(arguments, tokenizer, arguments.num_samples + arguments.num_fresh)
    sets = [windows[: arguments.num_samples], windows[arguments.num_samples :]]
    for group in layer_problems(model, sets, set(arguments.layers)):
        for problem, fresh in zip(*group, strict=True):
            if problem.name.endswith(tuple(arguments.operators)):
                for pattern in arguments.patterns:
                    yield Task(Data(problem, fresh, pattern_of(pattern)))


def compare(task: Task, found: dict[str, Way], seeds: int) -> list[dict]:
    """One row a way and seed; the draws differ from operator to operator."""
    rows = []
    for name, way in found.items():
        for seed in range(seeds_of(name, seeds)):
            search = way(task, crc32(f"{task.problem.name} {seed}".encode()))
            row = {"pattern": str(task.pattern), "way": name, "operator": task.problem.name, "seed": seed}
            row |= {"steps": search.steps, "rounded": search.best.error}
            row |= {"refitted": search.best.refitted["calibration"], "fresh": search.best.refitted["fresh"]}
            rows.append(row | {"curve": [(steps, kept.error) for steps, kept in search.curve]})
    return rows


def by_penalty(task: Task) -> dict:
    """Errors of single trials from the start: by exponent, one a rung."""
    errors = {exponent: [trial.rounded.error for trial in trials] for exponent, trials in task.table.items()}
    return {"pattern": str(task.pattern), "operator": task.problem.name, "rungs": RUNGS, "errors": errors}


def error_at(curve: list[tuple[int, float]], steps: float) -> float:
    return [error for spent, error in curve if spent <= steps][-1]


def over_seeds(rows: list[dict], value: Callable[[dict], float]) -> list[float]:
    """Geometric mean over operators, one a seed."""
    seeds = sorted({row["seed"] for row in rows})
    return [geometric_mean([value(row) for row in rows if row["seed"] == seed]) for seed in seeds]


def by_pattern_and_way(rows: list[dict]) -> dict[tuple[str, str], list[dict]]:
    found: dict[tuple[str, str], list[dict]] = {}
    for row in rows:
        found.setdefault((row["pattern"], row["way"]), []).append(row)
    return dict(sorted(found.items(), key=lambda item: item[0][0], reverse=True))


def table(rows: list[dict]) -> list[str]:
    """One row a way; cells have one number a pattern, errors in percent and averaged over the seeds."""
    groups = by_pattern_and_way(rows)
    patterns = list(dict.fromkeys(pattern for pattern, _ in groups))
    titles = ["search", "steps", f"after {EARLY} steps", "at the end", "refitted", "fresh"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for way in dict.fromkeys(way for _, way in groups):
        found = [groups[pattern, way] for pattern in patterns]
        cells = ["/".join(f"{statistics.fmean(row['steps'] for row in group):.0f}" for group in found)]
        for error in (lambda row: error_at(row["curve"], EARLY), *map(itemgetter, ("rounded", "refitted", "fresh"))):
            cells.append("/".join(f"{100 * statistics.fmean(over_seeds(group, error)):.3f}" for group in found))
        lines.append(f"| {way} | {' | '.join(cells)} |")
    return lines


def plot(record: dict, path: Path) -> None:
    """Error by steps for each pattern, then error by penalty for the first one."""
    import matplotlib.pyplot as plt

    groups = by_pattern_and_way(record["rows"])
    patterns = list(dict.fromkeys(pattern for pattern, _ in groups))
    figure, axes = plt.subplots(1, len(patterns) + 1, figsize=(5.2 * (len(patterns) + 1), 5), layout="constrained")
    for axis, pattern in zip(axes, patterns, strict=False):
        for (its, way), group in groups.items():
            if its == pattern:
                draw_way(axis, way, group)
        axis.set(title=pattern, xlabel="FISTA steps", ylabel="squared relative error after rounding")
    for index, rung in enumerate(record["by_penalty"][0]["rungs"]):
        chosen = [entry["errors"] for entry in record["by_penalty"] if entry["pattern"] == patterns[0]]
        means = {float(e): geometric_mean([errors[e][index] for errors in chosen]) for e in chosen[0]}
        axes[-1].plot([10**e for e in means], list(means.values()), marker=".", label=f"{rung} steps")
    axes[-1].set(title=f"one trial, {patterns[0]}", xlabel="penalty / max |C|", xscale="log", yscale="log")
    axes[-2].legend(fontsize=7, loc="upper right")
    axes[-1].legend(fontsize=8)
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def draw_way(axis, way: str, rows: list[dict]) -> None:
    """A step curve with the range over seeds, dashed without a chain; a dotted level for a grid."""
    if way.startswith("grid"):
        if "refit" not in way:
            level = geometric_mean([row["rounded"] for row in rows])
            axis.axhline(level, color="black", linestyle=":" if "80" in way else "-.", linewidth=1, label=way)
        return
    places = range(0, max(row["steps"] for row in rows) + 1, 10)
    values = [over_seeds(rows, lambda row, steps=steps: error_at(row["curve"], steps)) for steps in places]
    means = [statistics.fmean(v) for v in values]
    if "four" in way:
        axis.plot(places[-1], means[-1], "o" if "half" in way else "D", zorder=5, markersize=5, label=way)
    elif len(places) > 1:
        style = "-" if "chained" in way or "published" in way else "--"
        (line,) = axis.step(places, means, style, where="post", label=way)
        lows, highs = [min(v) for v in values], [max(v) for v in values]
        axis.fill_between(places, lows, highs, step="post", color=line.get_color(), alpha=0.12)


@torch.no_grad()
def main() -> None:
    choices = {"layers": [3, 15, 26], "operators": ["q_proj", "o_proj", "gate_proj"], "patterns": ["0.5", "2:4"]}
    sizes = {"num_samples": 24, "num_fresh": 8, "sequence_length": 1024, "seed": 0}
    budgets = {"budget": 600, "chained_budget": 160, "seeds": 3}
    files = {"output": Path("runs/penalty_search.json"), "plot": Path}
    arguments = parse_arguments(__doc__, "model", "calibration", helps=_HELP, **choices, **sizes, **budgets, **files)
    versions = library_versions() | {"optuna": import_optuna().__version__}
    rows: list[dict] = []
    penalties: list[dict] = []
    found = ways(arguments.budget, arguments.chained_budget)
    for task in tqdm(tasks(arguments), desc="Operators and patterns"):
        rows += compare(task, found, arguments.seeds)
        penalties.append(by_penalty(task))
    record = json.loads(json.dumps({"rows": rows, "by_penalty": penalties}))
    save(arguments, {"versions": versions, "threads": torch.get_num_threads()} | record)
    print("\n".join(table(record["rows"])))
    if arguments.plot:
        plot(record, arguments.plot)


if __name__ == "__main__":
    main()
