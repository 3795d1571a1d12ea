"""Where the time of a run goes: processor seconds by stage, for several methods in turn.

    python benchmarks/stages.py MODEL --calibration TEXT --methods default,sparsegpt --num-samples 16 --rounds 3
    python benchmarks/stages.py runs/stages.json

The second command shows what was measured before. Each run has a process of its own with one thread, and goes from
files to files. Processor time hardly depends on other programs; wall time does. A stage is a list of functions, which
are replaced by ones that measure their time. The time of a function that calls one of another stage is without that.
"""

from __future__ import annotations

import functools
import importlib
import json
import math
import multiprocessing
import statistics
import sys
import tempfile
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from shared import calibration_of, parse_arguments, parse_config, save

from optimum_fista import FistaPruner
from optimum_fista.environment import processor_name
from optimum_fista.folder.card import markdown_lines
from optimum_fista.source.loading import require_tokenizer
from optimum_fista.verdict import LEAST_TOKENS

# Functions of each stage: the module, a colon, and the name in it.
STAGES = {
    "forward passes of decoder layers": [
        "model.inputs:record_inputs",
        "model.inputs:LayerCall.run",
        "model.groups:trace_groups",
    ],
    "Gram matrices": ["model.gram:GroupSums._add_gram", "model.gram:GroupSums.statistics"],
    "cross-Gram matrices, records of the dense network": [
        "model.gram:GroupSums.add",
        "model.gram:GroupSums.add_energies",
        "model.dense_record:DenseRecord.see_input",
        "model.dense_record:DenseRecord.see_output",
        "model.dense_record:DenseRecord.add",
    ],
    "allocation by gradients": ["prune.budgets:share_budgets"],
    "factorizations": [
        "solve.linalg:damped_choleskys",
        "solve.linalg:damped_inverse",
        "solve.linalg:inverse_in_place",
        "solve.methods.obs_admm:_RoundedInverses.of",
        "solve.methods.obs_admm:_RoundedInverses.begin_stage",
    ],
    "iterations (ADMM), columns (SparseGPT)": [
        "solve.methods.admm:SplitState.round_products",
        "solve.methods.admm:SplitState.iterate",
        "solve.methods.sparsegpt:SparseGPT.prune",
    ],
    "selection": ["solve.pattern:SparsityPattern.mask"],
    "refit": ["solve.methods.obs_admm:ObsAdmm._refit_by_rows"],
    "errors": [
        "solve.problem:LayerProblem.__init__",
        "solve.problem:LayerProblem._squared_error",
    ],
    "held-out text": [
        "model.held_out:HeldOut.begin",
        "model.held_out:HeldOut.run",
        "model.held_out:HeldOut.measure",
    ],
    "rest of the solver": ["prune.loop:solve_groups"],
}
REST = "reading, writing, all else"


class Stopwatch:
    """Seconds by stage; each moment counts for the innermost stage that runs.

    Attributes:
        seconds: By stage, or by `REST`. With a `clock` that counts something else, so much of that.
    """

    def __init__(self, clock: Callable[[], float] = time.process_time) -> None:
        """Begin with no seconds. `clock` is read whenever a stage begins or ends; the default is processor time."""
        self.seconds: Counter[str] = Counter()
        self._clock = clock
        self._running: list[str] = [REST]
        self._since = clock()

    def restart(self) -> None:
        """Forget all seconds until now."""
        self.lap()
        self.seconds.clear()

    def lap(self) -> None:
        """Add the time since the last call to the stage that runs."""
        now = self._clock()
        self.seconds[self._running[-1]] += now - self._since
        self._since = now

    def timed(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that does the same as `function`, and whose time counts for a stage."""

        @functools.wraps(function)
        def run(*arguments: Any, **keywords: Any) -> Any:
            self.lap()
            self._running.append(stage)
            try:
                return function(*arguments, **keywords)
            finally:
                self.lap()
                self._running.pop()

        return run

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Inside, the functions of all stages are replaced by timed ones, in every module of the package that has them.

        At the end all are as before.
        """
        # Imports that a run makes late would count for it otherwise, and would keep the timed functions.
        importlib.import_module("optimum_fista.prune.named")
        replaced: list[tuple[Any, str, Any]] = []  # owner, name and original function
        try:
            for stage, names in STAGES.items():
                for name in names:
                    owner, attribute = _place_of(name)
                    function = getattr(owner, attribute)
                    timed = self.timed(stage, function)
                    for holder in [owner, *_modules_with(attribute, function)]:
                        replaced.append((holder, attribute, function))
                        setattr(holder, attribute, timed)
            yield
        finally:
            for holder, attribute, function in reversed(replaced):
                setattr(holder, attribute, function)


def _place_of(name: str) -> tuple[Any, str]:
    """Import what has a function of `STAGES`, a module or a class; returns it, and the name of the function there."""
    module, _, path = name.partition(":")
    owner: Any = importlib.import_module(f"optimum_fista.{module}")
    *classes, attribute = path.split(".")
    for class_name in classes:
        owner = getattr(owner, class_name)
    return owner, attribute


def _modules_with(attribute: str, function: Callable[..., Any]) -> list[Any]:
    """Find the modules of the package in which a function has been imported under its name."""
    return [
        module
        for key, module in list(sys.modules.items())
        if key.startswith("optimum_fista") and getattr(module, attribute, None) is function
    ]


def measure(arguments: Namespace, method: str) -> dict[str, Any]:
    """Prune once, in this process; returns processor seconds in all and by stage, and wall seconds."""
    torch.set_num_threads(1)
    # As many held-out tokens as `optimum-fista prune` takes.
    num_held_out = math.ceil(LEAST_TOKENS / arguments.sequence_length)
    count = arguments.num_samples + num_held_out
    tokens = calibration_of(arguments, require_tokenizer(arguments.model), count)
    batches: list[Any] = list(tokens[: arguments.num_samples].split(1))
    batches.append({"input_ids": tokens[arguments.num_samples :], "held_out": True})
    pruner = FistaPruner(parse_config(method, arguments.pattern, arguments.seed), progress=False)
    stopwatch = Stopwatch()
    with tempfile.TemporaryDirectory() as folder, stopwatch.installed():
        wall_started = time.perf_counter()
        stopwatch.restart()
        pruner.prune(
            arguments.model,
            batches,
            output_dir=Path(folder) / "out",
            device="cpu",
            dtype=arguments.dtype,
        )
        stopwatch.lap()
        wall_seconds = time.perf_counter() - wall_started
    return {
        "method": method,
        "processor_seconds": sum(stopwatch.seconds.values()),
        "wall_seconds": wall_seconds,
        "stages": dict(stopwatch.seconds),
    }


def table(record: dict[str, Any]) -> list[str]:
    """Make a line for each stage: the median processor seconds of each method, and below them the sums."""
    by_method: dict[str, list[dict[str, Any]]] = {}
    for run in record["runs"]:
        by_method.setdefault(run["method"], []).append(run)
    lines = []
    for stage in [*STAGES, REST]:
        medians = [
            statistics.median(run["stages"].get(stage, 0.0) for run in runs)
            for runs in by_method.values()
        ]
        lines.append([stage, *(f"{seconds:.1f}" for seconds in medians)])
    for key in ("processor_seconds", "wall_seconds"):
        medians = [statistics.median(run[key] for run in runs) for runs in by_method.values()]
        lines.append([key.replace("_", " "), *(f"{seconds:.1f}" for seconds in medians)])
    return markdown_lines(["stage", *by_method], lines)


def main() -> None:
    """Measure all methods in turn, each in a process of its own, or read a record; then print the table."""
    arguments = parse_arguments(
        __doc__,
        "model",
        methods=["default", "sparsegpt"],
        calibration="c4",
        pattern="0.5",
        num_samples=16,
        sequence_length=1024,
        dtype="auto",
        seed=0,
        rounds=3,
        output=Path("runs/stages.json"),
    )
    file = Path(arguments.model)
    if not file.is_file():
        file = arguments.output
        runs: list[dict[str, Any]] = []
        for _ in range(arguments.rounds):
            for method in arguments.methods:
                with multiprocessing.get_context("spawn").Pool(1) as process:
                    runs.append(process.apply(measure, (arguments, method)))
                print(
                    f"{method}: {runs[-1]['processor_seconds']:.1f} processor seconds", flush=True
                )
                save(arguments, {"runs": runs, "processor": processor_name()})
    print("\n".join(table(json.loads(file.read_text()))))


if __name__ == "__main__":
    main()
