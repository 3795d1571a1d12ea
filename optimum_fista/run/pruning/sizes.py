"""Sizes of a model that loses channels, heads and decoder layers: bytes, weights that a token meets, or time."""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from optimum_fista.model.architecture import DecoderLayers, find_decoder_layers, modules_around
from optimum_fista.model.calibration import CalibrationBatch
from optimum_fista.model.errors import UnsupportedArchitectureError
from optimum_fista.model.experts import is_fused_experts
from optimum_fista.model.hidden_states import record_inputs
from optimum_fista.model.offload import execution_device, onloaded
from optimum_fista.model.parts import Kind, Part, Parts, find_parts, text_config
from optimum_fista.model.replay import replaced_forwards
from optimum_fista.model.shrinking import plan_shrinking, takes
from optimum_fista.solve.pattern import SparsityPattern
from optimum_fista.solve.patterns import PartShare, WholeParts

_KINDS: tuple[Kind, ...] = ("channels", "heads")
"""What goes besides decoder layers. Experts do not: what is left of a mixture is refitted too much to foretell."""


class Sizes:
    """The sizes of a model that keeps a part of its channels, heads and decoder layers.

    Every decoder layer has a size, less that of every group that it loses. Times are taken to be so as well.

    Attributes:
        model: The model.
        measure: What sizes are measured by.
        parts: What it can lose, by kind.
        reasons: Why it can't lose others.
        counts: How many groups of each kind a decoder layer may keep, fewer than it has, in rising order. If zeros
            follow, their pattern `then` fits what stays.
    """

    def __init__(
        self, model: PreTrainedModel, layers: DecoderLayers, measure: str, then: SparsityPattern | None = None
    ) -> None:
        self.model, self.measure = model, measure
        self.parts: dict[Kind, Parts] = {}
        self.reasons: list[str] = []
        for kind in _KINDS:
            try:
                self.parts[kind] = find_parts(model, kind)
            except UnsupportedArchitectureError as error:
                self.reasons.append(str(error))
        self.counts = {
            kind: [count for count in _counts(model, parts) if then is None or _fits(then, parts, count)]
            for kind, parts in self.parts.items()
        }
        self._groups = {kind: np.zeros(len(layers)) for kind in self.parts}
        if measure == "latency":
            self._rest, self._layers = self._time(layers)
        else:
            self._rest, self._layers = self._count(layers)
        self._whole = self._rest + float(self._layers.sum())

    def of(self, kept: Mapping[Kind, int], removed: Collection[int] = ()) -> float:
        """Share of the dense model's size that is left with so many groups, without some decoder layers."""
        left = self._layers.copy()
        for kind, count in kept.items():
            left -= (self.parts[kind].groups - count) * self._groups[kind]
        left[list(removed)] = 0.0
        return float(self._rest + left.sum()) / self._whole

    def layers_needed(self, size: float) -> int:
        """How many decoder layers bring the model to a size by themselves, whichever they are; all but one at most."""
        smallest = self._layers.argsort(kind="stable")
        numbers = range(1, len(smallest))
        return next((count for count in numbers if self.of({}, smallest[:count].tolist()) <= size), len(smallest) - 1)

    def require(self, pattern: WholeParts) -> None:
        """Refuse a size that is too small to be had.

        Raises:
            ValueError: If it is.
        """
        total = len(self._layers)
        fewest = {kind: counts[0] for kind, counts in self.counts.items() if counts}
        smallest = self.of(fewest, range(1, total))
        if smallest > pattern.size:
            most = pattern_of(self, fewest, total - 1) if fewest or total > 1 else "nothing can go"
            why = f" ({'; '.join(self.reasons)})" if self.reasons else ""
            raise ValueError(
                f"pattern={pattern.text!r}: the smallest possible size is {smallest:.4f} of the model's "
                f"{_UNITS[self.measure]}, with {most!r}{why}: pass at least {math.ceil(smallest * 1e4) / 1e4:g}."
            )

    def fitting(
        self, size: float, removed: Sequence[int], steps: Mapping[Kind, Sequence[int]]
    ) -> Iterator[dict[Kind, int]]:
        """The numbers of groups to keep, all or one of `steps` of each kind, that bring the model to a size.

        Of channels as many stay as may, whatever `steps` says of them.
        """
        choices: list[dict[Kind, int]] = [{}]
        for kind in (kind for kind in self.counts if kind != "channels"):
            choices += [chosen | {kind: count} for chosen in choices for count in steps[kind]]
        for chosen in choices:
            if self.of(chosen, removed) <= size:
                yield chosen
                continue
            fits = [c for c in self.counts.get("channels", ()) if self.of({**chosen, "channels": c}, removed) <= size]
            if fits:
                yield {**chosen, "channels": fits[-1]}

    def _count(self, layers: DecoderLayers) -> tuple[float, np.ndarray]:
        """Bytes, or weights that a token meets, of all that is no decoder layer, and of every decoder layer."""
        config = text_config(self.model.config)
        chosen = getattr(config, "num_experts_per_tok", None) or getattr(config, "moe_topk", None) or 1
        seen = {
            id(p): min(1.0, chosen / len(p))  # of its experts, a token is sent to some
            for module in filter(is_fused_experts, self.model.modules())
            for p in module.parameters(recurse=False)
            if p.ndim == 3
        }
        embedding, head = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        if head is None or getattr(embedding, "weight", None) is not getattr(head, "weight", None):
            seen[id(getattr(embedding, "weight", None))] = 0.0  # a token meets one row

        def weigh(parameter: Tensor) -> float:
            return (
                float(parameter.nbytes) if self.measure == "bytes" else parameter.numel() * seen.get(id(parameter), 1.0)
            )

        named = dict(self.model.named_parameters())
        for kind, parts in self.parts.items():
            for part in parts.parts:
                index = layer_of(part, layers)
                tensors = [named[name] for name in part.tensors if name in named]
                self._groups[kind][index] += sum(map(weigh, tensors)) / part.groups
        by_layer = np.array([sum(map(weigh, layer.parameters())) for layer in layers.modules])
        return sum(map(weigh, named.values())) - float(by_layer.sum()), by_layer

    def _time(self, layers: DecoderLayers) -> tuple[float, np.ndarray]:
        """Seconds for one token of all that is no decoder layer, and of every decoder layer, with random weights.

        A decoder layer of each kind is timed as it is and with the fewest groups of each kind of part.
        """
        device = execution_device(self.model.get_input_embeddings())
        ids = torch.zeros(1, 1, dtype=torch.long)
        recorded = record_inputs(self.model, layers, [CalibrationBatch(ids)])
        fewest = {kind: counts[0] for kind, counts in self.counts.items() if counts}
        plans: dict[Kind | None, PreTrainedModel] = {None: plan_shrinking(self.model).model}
        for kind, count in fewest.items():
            channels, heads = (count if kind == wanted else None for wanted in ("channels", "heads"))
            plans[kind] = plan_shrinking(self.model, channels=channels, heads=heads).model
        known: dict[object, dict[Kind | None, float]] = {}
        seconds = np.zeros(len(layers))
        rest: tuple[Any, ...] | None = None
        hidden = recorded.hidden_states[0]
        for index, layer in enumerate(layers.modules):
            shapes = type(layer), *((name, tuple(p.shape)) for name, p in layer.named_parameters())
            if shapes not in known:
                known[shapes] = {}
                for smaller, plan in plans.items():
                    random = _with_random_weights(find_decoder_layers(plan).modules[index], device, self.model.dtype)
                    call = recorded.calls[index][0]
                    run = partial(random, hidden.to(device), *call.arguments, **call.keywords)
                    output = run()
                    rest = tuple(output[1:]) if isinstance(output, tuple) else None
                    known[shapes][smaller] = median_seconds(run, device)
            times = known[shapes]
            seconds[index] = times[None]
            for kind, count in fewest.items():
                gone = self.parts[kind].groups - count
                self._groups[kind][index] = max(0.0, times[None] - times[kind]) / gone
        skipped = [lambda h, *_, **__: h if rest is None else (h, *rest)] * len(layers)
        around = [*modules_around(self.model, layers), self.model.get_output_embeddings()]
        with onloaded(around, copy=False), replaced_forwards(layers.modules, skipped):
            return median_seconds(lambda: self.model(input_ids=ids.to(device), use_cache=False), device), seconds


_UNITS = {"bytes": "bytes", "active": "weights that a token meets", "latency": "time to decode a token"}


def _counts(model: PreTrainedModel, parts: Parts) -> list[int]:
    """How many groups a decoder layer may keep, fewer than it has, in rising order."""
    step = PartShare.usual_step(parts.kind, parts.groups, parts.parts[0].equal_runs)
    found = [count for count in range(step, parts.groups, step) if count >= parts.at_least]
    return found if parts.kind == "channels" else [count for count in found if takes(model.config, parts, count)]


def _fits(then: SparsityPattern, parts: Parts, count: int) -> bool:
    """Whether the columns that stay of the operators that lose some can have a pattern of zeros."""
    try:
        for width in {part.width for part in parts.parts}:
            then.require_shape((1, count * width))
    except ValueError:
        return False
    return True


def layer_of(part: Part, layers: DecoderLayers) -> int:
    """The number of the decoder layer that holds a part."""
    return int(part.name.removeprefix(f"{layers.name}.").partition(".")[0])


def _with_random_weights(layer: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A layer without weights, in memory with random ones."""
    made = copy.deepcopy(layer).to_empty(device=device).to(dtype).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in made.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    for buffer in made.buffers():
        buffer.zero_()
    return made


def median_seconds(call: Callable[[], object], device: torch.device, about: float = 0.2) -> float:
    """The median time of some calls, after two to warm up; they take about so many seconds together."""
    times: list[float] = []
    until = time.perf_counter() + about
    while len(times) < 7 or time.perf_counter() < until:
        started = time.perf_counter()
        call()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times[2:])


def pattern_of(sizes: Sizes, kept: Mapping[Kind, int], num_removed: int = 0) -> str:
    """The pattern that keeps so many groups of each kind and removes so many decoder layers."""
    total = len(find_decoder_layers(sizes.model))
    shares = [PartShare.keeping(kind, kept[kind], parts.groups) for kind, parts in sizes.parts.items() if kind in kept]
    shares += [PartShare.keeping("layers", total - num_removed, total)] if num_removed else []
    return "+".join(map(str, shares))


def even_mixture(model: PreTrainedModel, pattern: WholeParts) -> str:
    """A pattern for a size that takes about the same share of everything, for a model whose values are not known.

    Latency is taken to be in proportion to the weights that a token meets.

    Raises:
        ValueError: If the size can't be had.
    """
    assert pattern.measure is not None
    layers = find_decoder_layers(model)
    sizes = Sizes(model, layers, "active" if pattern.measure == "latency" else pattern.measure, pattern.then)
    sizes.require(pattern)

    def largest_share(kept: Mapping[Kind, int]) -> float:
        return max((1 - count / sizes.parts[kind].groups for kind, count in kept.items()), default=0.0)

    for num_removed in range(len(layers)):
        removed = range(1, 1 + num_removed)
        found = list(sizes.fitting(pattern.size, removed, sizes.counts))
        if found:
            return pattern_of(sizes, min(found, key=largest_share), num_removed)
    raise AssertionError("the smallest size was checked")
