"""How long a run takes, found out by a trial.

A model with one decoder layer of each kind gets random weights and is really pruned on random tokens: the seconds of a
layer, times the layers of its kind. If all tokens would take long, a part of them is taken, and the time besides
solving grows in proportion. No formula knows the speed of a machine, but a trial needs the device, the memory of a
layer and less than half a minute to solve it; otherwise a run shows the time left once its first layer is pruned.

In all functions, `run` is the planned run (`RunSizes`); no function changes it. `run.layers` are the decoder layers, on
the meta device, with their names; `run.operators` the shapes [out, in] of the operators to prune, by names such as
"model.layers.3.mlp.up_proj", and `run.weights` their numbers of weights. `run.num_samples` sequences have `run.length`
tokens each. The embedding is [`run.vocabulary`, `run.hidden`].
"""

import time
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.utils.benchmark import Timer

from optimum_fista.devices import usable_device
from optimum_fista.estimate.peak_memory import LIBRARIES
from optimum_fista.estimate.run_sizes import RunSizes
from optimum_fista.memory import available_bytes
from optimum_fista.pruner import FistaPruner
from optimum_fista.removal.model_outline import ModelOutline
from optimum_fista.removal.shrinking import plan_shrinking
from optimum_fista.report import PruningReport
from optimum_fista.source import loading

_TRIED_SECONDS = 10  # of a trial, without solving
_SOLVING_SECONDS = 30  # of solving in a trial, at most


@dataclass(frozen=True)
class _Trial:
    """A run on random weights and tokens."""

    report: PruningReport
    seconds: float  # of the whole run
    num_samples: int  # sequences of random tokens


def seconds_by_stage(run: RunSizes, memory: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Estimate the seconds of a run by stage, such as "solving". Imports, and text that the model writes, do not count.

    Prunes a small random model with the first decoder layer of each kind, in a temporary folder. The random state of
    PyTorch moves on. `memory` has the bytes that the run holds at most, by place ("device" and "host") and by part.
    ValueError if the run removes decoder layers, or the trial would take too long or too much memory.
    """
    if run.num_removed_layers:
        raise ValueError(
            f"pattern={run.config.pattern!r} chooses decoder layers by the loss of the whole model, and a trial has "
            "only a few layers."
        )
    device = usable_device(run.place)  # `place` is the device as the user named it
    layers_by_kind = _layers_by_kind(run)
    firsts = [numbers[0] for numbers in layers_by_kind]
    _require_quick_trial(run, device, firsts, memory)
    trial = _try(run, firsts)

    layer_seconds = [layer.seconds for layer in trial.report.layers]  # one of each kind
    all_layers = sum(
        seconds * len(numbers)
        for seconds, numbers in zip(layer_seconds, layers_by_kind, strict=True)
    )
    # Methods solve from sums over the tokens. So solving takes as long for any number of tokens, and all else in a
    # decoder layer takes longer for more of them.
    solving = trial.report.totals["solve_seconds"]
    solving_share = solving / sum(layer_seconds)
    times_as_many_tokens = run.num_samples / trial.num_samples
    allocation_of_trial = trial.report.seconds.get("allocation", 0.0)  # a stage of its own
    return {
        "solving": all_layers * solving_share,
        "forward passes, statistics, files": (
            all_layers * (1 - solving_share) * times_as_many_tokens
        ),
        "allocation": _allocation_seconds(run, trial, firsts),
        # Counted as it was in the trial.
        "around the layers": trial.seconds - allocation_of_trial - sum(layer_seconds),
    }


def _allocation_seconds(run: RunSizes, trial: _Trial, firsts: Iterable[int]) -> float:
    """Estimate how long a run takes to share the zeros among its operators by gradients of the loss; 0 if it does not.

    This is a pass over the whole model. Its time is assumed to grow in proportion to the weights, and to the tokens
    of the pass. `firsts` are the numbers of the decoder layers that the model of the trial has.
    """
    seconds_of_trial = trial.report.seconds.get("allocation", 0.0)
    layer_sizes = [sum(p.numel() for p in layer.parameters()) for _, layer in run.layers]
    head = run.vocabulary * run.hidden
    weights = head + sum(layer_sizes)
    weights_tried = head + sum(layer_sizes[first] for first in firsts)

    # The pass takes the sequences that hold `allocation_tokens` tokens, or all sequences if these hold fewer. The trial
    # has one text.
    assert run.config.allocation_tokens is not None  # the configuration is resolved
    length_tried = run.length_of_loss_with(trial.num_samples)
    tokens_tried = min(run.config.allocation_tokens, trial.num_samples * length_tried)
    tokens_of_run = run.sequences_of_loss * run.length_of_loss
    times_as_many_tokens = tokens_of_run / tokens_tried
    return seconds_of_trial * (weights / weights_tried) * times_as_many_tokens


def _layers_by_kind(run: RunSizes) -> list[list[int]]:
    """Return the numbers of the decoder layers of each kind: the same class, shapes, attention and operators to prune.

    A model of two kinds of attention, such as sliding and full, needs a layer of each, and their times differ.
    """
    text_config = ModelOutline(run.layers).text_config
    # of all layers, such as "full_attention"; None or missing if all have the same
    attention_types = getattr(text_config, "layer_types", None) or [None] * len(run.layers)

    kinds: dict[object, list[int]] = {}
    for number, (layer_name, layer) in enumerate(run.layers):
        shapes = tuple(parameter.shape for parameter in layer.parameters())
        names = run.operators_of_layers[number]
        names_in_layer = tuple(name.removeprefix(layer_name) for name in names)
        kind = type(layer), shapes, attention_types[number], names_in_layer
        kinds.setdefault(kind, []).append(number)
    return list(kinds.values())


def _require_quick_trial(
    run: RunSizes,
    device: torch.device,
    firsts: Iterable[int],
    memory: Mapping[str, Mapping[str, float]],
) -> None:
    """Refuse to try the decoder layers with the numbers `firsts` if that takes long, or more memory than is free.

    Times a product of random matrices on `device`; the random state of PyTorch moves on. What else the machine does
    must not decide: on a CPU, the time of this thread counts, and not that of the clock. `memory` has the bytes that
    the run holds at most, by place ("device" and "host") and by part.
    """
    square = torch.randn(1024, 1024, device=device)
    clock: dict[str, Any] = {"timer": time.thread_time} if run.on_cpu else {}  # or the default
    timer = Timer("square @ square", globals={"square": square}, **clock)
    seconds_of_product = timer.timeit(5).median
    # A bound on the work, in multiplications: a hundred products of weights [out, in] with a matrix [in, in].
    work = 0
    for first in firsts:
        for name in run.operators_of_layers[first]:
            _, columns = run.operators[name]
            work += 100 * run.weights[name] * columns
    solving_seconds = work / 1024**3 * seconds_of_product  # the timed product has 1024**3 of them

    place = "host" if run.on_cpu else "device"
    needed = sum(memory[place].values())
    if run.on_cpu:
        needed -= LIBRARIES  # bytes of Python, torch and Transformers, which are loaded already
    free = available_bytes(device)
    is_too_large = free is not None and 0 < free < needed  # None: the device does not say
    if solving_seconds > _SOLVING_SECONDS or is_too_large:
        raise ValueError("one decoder layer takes too much time or memory here to be tried.")


def _try(run: RunSizes, firsts: list[int]) -> _Trial:
    """Prune a random model that has only the decoder layers with the numbers `firsts`, and return the trial.

    It is pruned twice in a temporary folder, without warnings: on few sequences, and on as many as fit into the
    time. `run.model` stays as it is. The random state of PyTorch moves on.
    """
    without_weights = run.model
    if len(firsts) < len(run.layers):
        without_weights = plan_shrinking(ModelOutline(run.layers), layers=firsts).model
    config = without_weights.config
    num_tried = min(run.num_samples, run.batch_size + run.config.held_out)
    with (
        TemporaryDirectory(prefix="optimum-fista-") as folder,
        warnings.catch_warnings(action="ignore"),
    ):
        # Pruned from files to files, as the run will be, so that reading and writing count.
        dense = loading.model_class(config).from_config(config, dtype=run.model.dtype)
        dense.save_pretrained(f"{folder}/dense")
        first = _prune_randomly(run, folder, "first", num_tried)
        # The first attempt says how many sequences fit into the time.
        layer_seconds = sum(layer.seconds for layer in first.report.layers)
        seconds_of_tokens = layer_seconds - first.report.totals["solve_seconds"]
        fitting = int(num_tried * _TRIED_SECONDS / seconds_of_tokens)
        num_tried = max(num_tried, min(run.num_samples, fitting))
        return _prune_randomly(run, folder, "second", num_tried)


def _prune_randomly(run: RunSizes, folder: str, attempt: str, num_samples: int) -> _Trial:
    """Prune the model in the folder FOLDER/dense on random tokens, and write the result to FOLDER/ATTEMPT.

    FOLDER is `folder`, and ATTEMPT is `attempt`, such as "first". `num_samples` is the number of sequences. Returns the
    report and the time. The random state of PyTorch moves on.

    `run.place` is the device that computes and `run.storage_device` the place where activations wait, both as the user
    named them (`None`: by default). A batch has `run.batch_size` sequences.
    """
    tokens = torch.randint(0, run.vocabulary, (num_samples, run.length))
    pruner = FistaPruner(run.config, progress=False, storage_device=run.storage_device)
    started = time.perf_counter()
    report = pruner.prune(
        f"{folder}/dense",
        tokens.split(run.batch_size),
        output_dir=f"{folder}/{attempt}",
        device=run.place,
    )
    return _Trial(report, time.perf_counter() - started, num_samples)
