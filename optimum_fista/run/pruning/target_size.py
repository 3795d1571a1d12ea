"""A model of a given size: which mixture of channels, heads and decoder layers is to go for it."""

from __future__ import annotations

import copy
import logging
import math
import statistics
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from optimum_fista.model.activation_store import Storage
from optimum_fista.model.architecture import DecoderLayers, find_decoder_layers, modules_around
from optimum_fista.model.calibration import CalibrationBatch
from optimum_fista.model.errors import UnsupportedArchitectureError
from optimum_fista.model.experts import is_fused_experts
from optimum_fista.model.gates import Gates, measure_gates
from optimum_fista.model.hidden_states import record_inputs
from optimum_fista.model.layer_choice import Missing, choose_layers, losses_without
from optimum_fista.model.offload import execution_device, onloaded
from optimum_fista.model.operator import LinearOperator
from optimum_fista.model.parts import Kind, Part, Parts, find_parts, text_config
from optimum_fista.model.replay import replaced_forwards
from optimum_fista.model.shrinking import plan_shrinking, takes
from optimum_fista.run.config import FistaPruningConfig
from optimum_fista.run.texts.positions import explained_gradients
from optimum_fista.solve.pattern import SparsityPattern
from optimum_fista.solve.patterns import PartShare, WholeParts

logger = logging.getLogger(__name__)

_KINDS: tuple[Kind, ...] = ("channels", "heads")
"""What goes besides decoder layers. Experts do not: what is left of a mixture is refitted too much to foretell."""
_POINTS = 8
"""Numbers of each kind that are tried alone; losses in between are interpolated."""
_FINALISTS = 5
"""Mixtures that are tried as a whole."""
_TIMED_SECONDS = 0.2


@dataclass(frozen=True)
class Mixture:
    """What is to go for a size.

    Attributes:
        pattern: The pattern that stands for it.
        size: Share of the dense model's size that is left.
        predicted: Increase of the loss as the losses without its kinds alone predict it, nats a token.
        loss: Increase of the loss as it was measured, nats a token, before anything is refitted.
    """

    pattern: str
    size: float
    predicted: float
    loss: float


@dataclass(frozen=True)
class SizeChoice:
    """The mixture that is chosen for a size.

    Attributes:
        mixture: The mixture.
        alternatives: Others that were tried, from the least loss on.
        removed_layers: The decoder layers that go, in the order in which they were chosen, each with the loss without
            it and those before.
    """

    mixture: Mixture
    alternatives: list[Mixture]
    removed_layers: list[tuple[int, float]] = field(default_factory=list)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SizeChoice:
        """Inverse of `dataclasses.asdict`, read from JSON."""
        alternatives = [Mixture(**one) for one in values["alternatives"]]
        removed = [(index, loss) for index, loss in values["removed_layers"]]
        return cls(Mixture(**values["mixture"]), alternatives, removed)

    def __str__(self) -> str:
        """A line for people."""
        others = ", ".join(f"{m.pattern} ({m.loss:.3f})" for m in self.alternatives)
        return (
            f"pattern={self.mixture.pattern!r} was chosen for the size: it leaves {self.mixture.size:.4f} of the dense "
            f"model's, and the loss grows by {self.mixture.loss:.3f} nats a token before anything is refitted "
            f"({self.mixture.predicted:.3f} predicted); {f'also tried: {others}' if others else 'nothing else fits'}"
        )


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
                index = _layer_of(part, layers)
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


def _layer_of(part: Part, layers: DecoderLayers) -> int:
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


def median_seconds(call: Any, device: torch.device) -> float:
    """The median time of some calls, after two to warm up."""
    times: list[float] = []
    until = time.perf_counter() + _TIMED_SECONDS
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
    for num_removed in range(len(layers)):
        removed = range(1, 1 + num_removed)
        found = list(sizes.fitting(pattern.size, removed, sizes.counts))
        if found:
            shares = [[1 - count / sizes.parts[kind].groups for kind, count in kept.items()] for kept in found]
            return pattern_of(
                sizes, found[min(range(len(found)), key=lambda i: max(shares[i], default=0))], num_removed
            )
    raise AssertionError("the smallest size was checked")


def choose_size(
    model: PreTrainedModel,
    layers: DecoderLayers,
    batches: Sequence[CalibrationBatch],
    config: FistaPruningConfig,
    progress: bool = False,
    storage: Storage | None = None,
) -> SizeChoice:
    """Choose what goes so that a model has the size that `config` asks for and its loss grows least.

    Within a kind those groups go whose gates cost least (`Gates.costs`). The loss is measured without some numbers of
    channels alone, of heads alone, and of decoder layers alone (`choose_layers`). A mixture is predicted to cost the
    sum, less the share of groups that go with decoder layers anyway. The mixtures with the least prediction are
    measured as a whole, and the best of them is chosen. Nothing is refitted for this.

    All losses are on the first `allocation_tokens` calibration tokens. A mixture that removes more decoder layers is
    not looked at if that alone costs more than a mixture that is known.

    Raises:
        ValueError: If the size can't be had, or losses or gradients are not finite or can't be computed.
        UnsupportedArchitectureError: If decoder layers hand on more than hidden states.
    """
    pattern = config.whole_parts
    assert pattern is not None
    assert pattern.measure is not None
    sizes = Sizes(model, layers, pattern.measure, pattern.then)
    sizes.require(pattern)
    tokens = config.allocation_tokens
    how_much = batches, tokens, progress, storage
    parts = {part.name: part for found in sizes.parts.values() for part in found.parts}
    operators = {name: LinearOperator(name, model.get_submodule(name)) for name in parts}
    gates: dict[str, Gates] = {}
    if operators:
        with explained_gradients(model, batches, f"pattern={pattern.text!r}", "an explicit pattern"):
            gates = measure_gates(model, layers, operators, parts, *how_much)
    prediction = _Prediction(sizes, layers, gates)

    def measure(missing: Sequence[Missing]) -> list[float]:
        dense, *losses = losses_without(model, layers, [Missing(), *missing], *how_much)
        if not math.isfinite(dense):
            raise ValueError("the loss of the model on the calibration tokens is NaN or Inf: the model is damaged.")
        prediction.dense_loss = dense
        return [loss - dense if math.isfinite(loss) else math.inf for loss in losses]

    steps = {kind: _spread(sizes, kind, pattern.size) for kind in sizes.parts}
    alone = [(kind, count) for kind, counts in steps.items() for count in counts]
    losses = measure([prediction.missing({kind: count}) for kind, count in alone])
    for (kind, count), loss in zip(alone, losses, strict=True):
        prediction.increases[kind][sizes.parts[kind].groups - count] = loss

    def candidates(num_removed: int) -> list[_Candidate]:
        removed = [index for index, _ in prediction.removed[:num_removed]]
        fitting = sizes.fitting(pattern.size, removed, steps)
        return [_Candidate(prediction.loss(kept, num_removed), kept, num_removed) for kept in fitting]

    found = candidates(0)
    best = min((candidate.predicted for candidate in found), default=math.inf)
    needed = next((k for k in range(1, len(layers)) if sizes.of({}, range(1, 1 + k)) <= pattern.size), len(layers) - 1)
    try:
        prediction.removed = choose_layers(model, layers, batches, needed, *how_much[1:], prediction.dense_loss + best)
    except ValueError as error:  # no configuration without a layer, or it depends on the number of layers
        if not found:
            raise
        logger.info("decoder layers stay: %s", error)
    for num_removed in range(1, 1 + len(prediction.removed)):
        found += candidates(num_removed)
    found.sort(key=lambda candidate: candidate.predicted)
    tried = found[:_FINALISTS]
    alone_best = {kinds[0]: one for one in reversed(found) if len(kinds := one.kinds) == 1}  # for comparison
    tried += [one for one in alone_best.values() if one not in tried]
    losses = measure([prediction.missing(one.kept, one.num_removed) for one in tried])
    mixtures = []
    for loss, one in sorted(zip(losses, tried, strict=True), key=lambda pair: pair[0]):
        size = sizes.of(one.kept, [index for index, _ in prediction.removed[: one.num_removed]])
        if math.isfinite(loss):
            mixtures.append((Mixture(pattern_of(sizes, one.kept, one.num_removed), size, one.predicted, loss), one))
    if not mixtures:
        raise ValueError(f"pattern={pattern.text!r}: without these parts the loss is NaN or Inf: pass a larger size.")
    (chosen, candidate), *others = mixtures
    choice = SizeChoice(chosen, [mixture for mixture, _ in others], prediction.removed[: candidate.num_removed])
    logger.info("%s", choice)
    return choice


class _Candidate(NamedTuple):
    """What may go, with the increase of the loss that is predicted."""

    predicted: float
    kept: dict[Kind, int]
    num_removed: int

    @property
    def kinds(self) -> list[str]:
        """What goes."""
        return [*self.kept, *["layers"] * bool(self.num_removed)]


def _spread(sizes: Sizes, kind: Kind, size: float) -> list[int]:
    """At most `_POINTS` numbers of groups to keep, down to that which brings the model to a size by itself."""
    counts = sizes.counts[kind]
    enough = [i for i, count in enumerate(counts) if sizes.of({kind: count}) <= size]
    useful = counts[enough[-1] if enough else 0 :]
    places = np.linspace(0, len(useful) - 1, min(_POINTS, len(useful))).round().astype(int)
    return [useful[place] for place in dict.fromkeys(places.tolist())]


class _Prediction:
    """How much the loss grows without some parts.

    Attributes:
        removed: Decoder layers in the order in which they go, each with the loss without it and those before.
        dense_loss: The loss of the dense model, nats a token.
        increases: By kind, how much the loss grows if so many groups alone go from every decoder layer.
    """

    def __init__(self, sizes: Sizes, layers: DecoderLayers, gates: Mapping[str, Gates]) -> None:
        self.removed: list[tuple[int, float]] = []
        self.dense_loss = 0.0
        self.increases: dict[Kind, dict[int, float]] = {kind: {0: 0.0} for kind in sizes.parts}
        self._sizes = sizes
        self._order = {name: found.costs.cpu().argsort(stable=True) for name, found in gates.items()}
        # What it costs to close the cheapest 0, 1, 2, ... gates of a part, and the decoder layer that it is in.
        self._costs: dict[Kind, list[tuple[int, Tensor]]] = {
            kind: [
                (_layer_of(p, layers), torch.cat([torch.zeros(1), gates[p.name].costs.cpu().sort().values.cumsum(0)]))
                for p in parts.parts
            ]
            for kind, parts in sizes.parts.items()
        }

    def loss(self, kept: Mapping[Kind, int], num_removed: int = 0) -> float:
        """The increase of the loss without some decoder layers and groups, nats a token."""
        gone = {index for index, _ in self.removed[:num_removed]}
        total = self.removed[num_removed - 1][1] - self.dense_loss if num_removed else 0.0
        for kind, count in kept.items():
            closed = self._sizes.parts[kind].groups - count
            known = sorted(self.increases[kind].items())
            alone = float(np.interp(closed, [count for count, _ in known], [loss for _, loss in known]))
            costs = [(index, float(cost[closed])) for index, cost in self._costs[kind]]
            whole = sum(cost for _, cost in costs)
            total += alone * (sum(cost for index, cost in costs if index not in gone) / whole if whole else 1.0)
        return total if math.isfinite(total) else math.inf

    def missing(self, kept: Mapping[Kind, int], num_removed: int = 0) -> Missing:
        """What a model lacks that keeps so many groups, those whose gates cost most, and loses decoder layers."""
        columns = {}
        for kind, count in kept.items():
            for part in self._sizes.parts[kind].parts:
                read = torch.ones(part.groups, dtype=torch.bool)
                read[self._order[part.name][: part.groups - count]] = False
                columns[part.name] = read.repeat_interleave(part.width)
        return Missing(frozenset(index for index, _ in self.removed[:num_removed]), columns)
