"""Speed and memory of a pruned model, dense, packed, and before it was pruned, measured in turn in one run."""

from __future__ import annotations

import shutil
import statistics
import tempfile
from collections.abc import Callable, Mapping, Set
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from optimum_fista.packed.kernels import kernels
from optimum_fista.run.environment import processor_name
from optimum_fista.run.packed_folders.packed_folder import pack_folder, unpack_folder
from optimum_fista.run.packed_folders.unpacking import is_packed
from optimum_fista.run.reports.report import device_name, library_versions
from optimum_fista.run.speed.speed_report import SpeedReport, SpeedSettings, VariantSpeed
from optimum_fista.run.speed.worker import Worker


def measure_speed(
    folder: Path,
    settings: SpeedSettings | None = None,
    progress: Callable[[str], None] = lambda _: None,
    original: Path | None = None,
) -> SpeedReport:
    """Measure a pruned model dense, packed, and before it was pruned, each variant in a process of its own, in turn.

    The prompts are random tokens. Dense variants are those of the same weights.

    Args:
        folder: Pruned model folder, packed or not; what is missing of the two is written to a temporary folder first,
            if a variant needs it.
        settings: What to measure.
        progress: Called with a line before each step.
        original: Folder of the model before it was pruned, for the variants called `"original ..."`.

    Raises:
        ValueError: If the folder holds no pruned model, or if variants and `original` don't go together.
        RuntimeError: If a variant can't be loaded or run.
    """
    settings = settings or SpeedSettings()
    runtimes = {name.split()[0] for name in settings.variants}
    if ("original" in runtimes) != (original is not None):
        raise ValueError(
            f"original={str(original)!r} and variants={', '.join(settings.variants)!r}: pass the folder of the model "
            "before it was pruned together with variants such as 'original bfloat16', or neither."
        )
    with tempfile.TemporaryDirectory(prefix="optimum-fista-") as temporary, ExitStack() as opened:
        folders = _folders(folder, runtimes, Path(temporary), progress)
        if original is not None:
            folders["original"] = original
        workers = {}
        for name in settings.variants:
            workers[name] = Worker(name, folders[name.split()[0]], settings.device, settings.threads)
            opened.callback(workers[name].close)
        sizes = {}
        for name, worker in workers.items():
            progress(f"loading {name}")
            sizes[name] = worker.ask("parameters")
        # All models are loaded: if the run is killed from now on, no copy of the model is left.
        shutil.rmtree(temporary, ignore_errors=True)
        vocabulary = min(found for found, _ in sizes.values())
        seconds, outputs = _measure(workers, settings, vocabulary, progress)
        variants = {
            name: _speed(name, settings, seconds[name], outputs, worker.ask("memory"), sizes[name][1])
            for name, worker in workers.items()
        }
    compiled = kernels()
    machine = {
        "processor": processor_name(),
        "device": device_name(torch.device(settings.device)),
        "threads": settings.threads,
        "kernels": compiled.path if compiled else "none",
    }
    name = folder.resolve().name  # "." and ".." have one too
    return SpeedReport(name, settings, variants, machine, library_versions())


def _folders(folder: Path, runtimes: Set[str], temporary: Path, progress: Callable[[str], None]) -> dict[str, Path]:
    """The pruned model as a dense and as a packed folder, as far as `runtimes` need them."""
    made = temporary / "model"
    given, missing = ("packed", "dense") if is_packed(folder) else ("dense", "packed")
    if missing in runtimes:
        progress(f"{'unpacking' if missing == 'dense' else 'packing'} {folder}")
        (unpack_folder if missing == "dense" else pack_folder)(folder, made)
    return {given: folder, missing: made}


def _measure(
    workers: Mapping[str, Worker], settings: SpeedSettings, vocabulary: int, progress: Callable[[str], None]
) -> tuple[dict[str, dict[str, list[float]]], dict[str, dict[str, Tensor]]]:
    """Seconds by variant and measurement, and the last output of each."""
    generator = torch.Generator().manual_seed(0)

    def prompt(batch: int, length: int) -> Tensor:
        return torch.randint(0, vocabulary, (batch, length), generator=generator)

    asked: dict[str, tuple[Any, ...]] = {
        f"batch {size}": ("generate", prompt(size, settings.prompt_tokens), settings.new_tokens)
        for size in settings.batch_sizes
    }
    asked["prefill"] = ("prefill", prompt(1, settings.prefill_tokens))
    seconds: dict[str, dict[str, list[float]]] = {name: {key: [] for key in asked} for name in workers}
    outputs: dict[str, dict[str, Tensor]] = {name: {} for name in workers}
    for turn in range(settings.rounds + 1):  # the first one warms up
        for key, question in asked.items():
            progress(f"round {turn} of {settings.rounds}, {key}" if turn else f"warming up, {key}")
            for name, worker in workers.items():
                took, outputs[name][key] = worker.ask(*question)
                if turn:
                    seconds[name][key].append(took)
    return seconds, outputs


def _speed(
    name: str,
    settings: SpeedSettings,
    seconds: dict[str, list[float]],
    outputs: dict[str, dict[str, Tensor]],
    memory: int,
    weights: int,
) -> VariantSpeed:
    median = {key: statistics.median(values) for key, values in seconds.items()}
    dense = outputs.get(name.replace("packed", "dense")) if name.startswith("packed") else None
    same = difference = None
    if dense is not None:
        pairs = [(outputs[name][f"batch {size}"], dense[f"batch {size}"]) for size in settings.batch_sizes]
        same = sum(int((a == b).sum()) for a, b in pairs) / sum(a.numel() for a, _ in pairs)
        logits = dense["prefill"]
        difference = float((outputs[name]["prefill"] - logits).abs().max() / logits.abs().max())
    return VariantSpeed(
        {size: size * settings.new_tokens / median[f"batch {size}"] for size in settings.batch_sizes},
        settings.prefill_tokens / median["prefill"],
        memory,
        weights,
        same,
        difference,
        seconds,
    )
