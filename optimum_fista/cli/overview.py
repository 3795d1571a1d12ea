"""What `optimum-fista prune` says before a run and after it: what it will take, what it cost, and what to do next."""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optimum_fista.run.config import FistaPruningConfig
    from optimum_fista.run.estimate.estimate import Estimate
    from optimum_fista.run.reports.report import PruningReport


def say_before(arguments: argparse.Namespace, config: FistaPruningConfig) -> int:
    """Say what the run will do and take; returns the size of its batches."""
    import torch

    from optimum_fista.run.checkpoints.output import unfinished_folder
    from optimum_fista.run.estimate.estimate import size
    from optimum_fista.run.estimate.memory import LIBRARIES
    from optimum_fista.run.memory import available_bytes
    from optimum_fista.run.streamed.journal import begun_batch_size

    chosen: int | None = arguments.batch_size or begun_batch_size(unfinished_folder(arguments.output))
    try:
        estimate = estimate_of(arguments, config, chosen)
        overview, memory = estimate.overview(), estimate.memory["host"]
    except ValueError:
        raise  # what the run would refuse, before text is drawn: a model may write it for hours
    except OSError:
        return chosen or 1  # the run says what is wrong
    except Exception as error:  # a model without weights can't be run in every family
        print(f"note: memory and time could not be estimated: {error}", file=sys.stderr)
        return chosen or 1
    needed, free = memory.total - LIBRARIES, available_bytes(torch.device("cpu"))
    print(overview, file=sys.stderr)
    if free is not None:
        print(f"{'':<13}{size(free)} of memory are free", file=sys.stderr)
    print(f"{'output':<13}{arguments.output}", file=sys.stderr)
    if free is not None and needed > free:
        print(
            f"warning: this run is estimated to need {size(needed)} of memory, and {size(free)} are free: it may be "
            f"killed ({memory.moment}). Pass --storage-device disk, a smaller --batch-size, a shorter "
            "--sequence-length or fewer --num-samples; --dry-run shows what they need.",
            file=sys.stderr,
        )
    return estimate.batch_size


def estimate_of(arguments: argparse.Namespace, config: FistaPruningConfig, batch_size: int | None) -> Estimate:
    """What the run will take, with batches of this size; `None`: of the best size for the device."""
    from optimum_fista.run.checkpoints.source_files import require_no_loss
    from optimum_fista.run.estimate.estimate import Estimate
    from optimum_fista.run.texts.calibration_source import num_spare

    names = ("sequence_length", "calibration", "device", "dtype", "storage_device", "packed")
    numbers = {"num_samples": arguments.num_samples + config.held_out, "batch_size": arguments.batch_size or 1}
    options = {name: getattr(arguments, name) for name in names}
    numbers["num_unseen"] = num_spare(config, arguments.num_samples)
    estimate = Estimate(arguments.model, config, **numbers, **options)
    if Path(arguments.model).is_dir():
        require_no_loss(estimate.model, Path(arguments.model), arguments.drop_unused)
    return estimate.with_batch_size(batch_size or _best_batch_size(estimate))


def _best_batch_size(estimate: Estimate) -> int:
    """The size of batches for the device at hand; the same if that is not in this machine, or says nothing of it."""
    import torch

    from optimum_fista.run.memory import available_bytes

    try:
        return estimate.best_batch_size(None if estimate.on_cpu else available_bytes(torch.device(estimate.device)))
    except (RuntimeError, AssertionError):
        return estimate.best_batch_size(None)


def verdicts(report: PruningReport) -> Iterator[str]:
    """What a run cost, and whether that is much; docs/report.md says where the words begin."""
    if report.perplexity is not None:
        found = report.perplexity
        yield (
            f"perplexity {found['dense']:.2f} before and {found['pruned']:.2f} after ({_verdict(found)}), on "
            f"{report.measured_on}"
        )
    if report.operators:
        worst = max(report.operators, key=lambda o: o.fit_error)
        word = "low" if worst.fit_error < 0.2 else "usual" if worst.fit_error < 0.5 else "high"
        yield f"largest fit error {worst.fit_error:.2f} ({word}): {worst.name.removesuffix('.weight')}"


def _verdict(found: Mapping[str, Any]) -> str:
    """Whether the perplexity after is much more than before, if it rests on enough text."""
    from optimum_fista.model.held_out import LEAST_TOKENS

    if found["num_tokens"] < LEAST_TOKENS:
        return f"no verdict on fewer than {LEAST_TOKENS:,} tokens"
    if found["text"] == "self":
        return "no verdict on text of its own"
    if found["dense"] > found["vocabulary"] / 2:
        return "the dense model is no better than chance"
    words = {1.1: "close to the dense model", 1.5: "usable as it is", 3.0: "clearly worse, training would help"}
    return next(
        (word for most, word in words.items() if found["pruned"] <= most * found["dense"]), "broken: prune less"
    )


def argument(path: str | Path) -> str:
    """A path as it is typed in a command: quoted, and no option if it begins with a dash."""
    return shlex.quote(f"./{path}" if str(path).startswith("-") else str(path))


def next_commands(model: str, folder: Path, calibration: str) -> str:
    """What to do with a pruned model."""
    name, dense = argument(folder), argument(model)
    unseen, trained = ("wikitext2", "c4") if find_spec("datasets") else ("pydoc", "pydoc")  # of Python's own pages
    text = trained if calibration == "self" else argument(calibration)  # a model would write for hours
    commands = {
        f"chat {name} --beside {dense}": "talk to the pruned and to the dense model",
        f"evaluate {name} --text {unseen}": "perplexity; run it on the dense model too, to compare",
        f"recover {name} --teacher {dense} --calibration {text}": "train it to be more like the dense model",
        f"report {name}": "a page about every operator",
        f"verify {name}": "counts the zeros in the files again",
    }
    lines = [f"optimum-fista {command}    # {why}" for command, why in commands.items()]
    repository = re.sub(r"[^\w.]+", "-", folder.name, flags=re.ASCII).strip("-.")  # letters that the Hub takes
    lines.append(f"hf upload YOUR-NAME/{repository} {name}    # put it on the Hub, after hf auth login")
    return "\n".join(["next:", *(f"  {line}" for line in lines)])
