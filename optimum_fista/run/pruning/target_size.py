"""A model of a given size: which mixture of channels, heads and decoder layers is to go for it."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from optimum_fista.model.architecture import DecoderLayers
from optimum_fista.model.gates import Gates, measure_gates
from optimum_fista.model.loss_gradients import DenseLoss
from optimum_fista.model.losses import Missing, choose_layers, losses_without
from optimum_fista.model.operator import LinearOperator
from optimum_fista.model.parts import Kind
from optimum_fista.run.pruning.sizes import Sizes, layer_of, pattern_of
from optimum_fista.run.texts.explained_errors import explained_gradients
from optimum_fista.solve.patterns import WholeParts

logger = logging.getLogger(__name__)

_POINTS = 8
"""Numbers of each kind that are tried alone; losses in between are interpolated."""
_FINALISTS = 5
"""Mixtures that are tried as a whole."""


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

    def __str__(self) -> str:
        """A line for people."""
        others = ", ".join(f"{m.pattern} ({m.loss:.3f})" for m in self.alternatives)
        return (
            f"pattern={self.mixture.pattern!r} was chosen for the size: it leaves {self.mixture.size:.4f} of the dense "
            f"model's, and the loss grows by {self.mixture.loss:.3f} nats a token before anything is refitted "
            f"({self.mixture.predicted:.3f} predicted); {f'also tried: {others}' if others else 'nothing else fits'}"
        )


def choose_size(loss: DenseLoss, pattern: WholeParts) -> SizeChoice:
    """Choose what goes so that a model has the size that a pattern asks for and its loss grows least.

    Within a kind those groups go whose gates cost least (`Gates.costs`). The loss is measured without some numbers of
    channels alone, of heads alone, and of decoder layers alone (`choose_layers`). A mixture is predicted to cost the
    sum, less the share of groups that go with decoder layers anyway. The mixtures with the least prediction are
    measured as a whole, and the best of them is chosen. Nothing is refitted for this.

    A mixture that removes more decoder layers is not looked at if that alone costs more than a mixture that is known.

    Raises:
        ValueError: If the size can't be had, or losses or gradients are not finite or can't be computed.
        UnsupportedArchitectureError: If decoder layers hand on more than hidden states.
    """
    assert pattern.measure is not None
    model, layers = loss.model, loss.layers
    sizes = Sizes(model, layers, pattern.measure, pattern.then)
    sizes.require(pattern)
    parts = {part.name: part for found in sizes.parts.values() for part in found.parts}
    operators = {name: LinearOperator(name, model.get_submodule(name)) for name in parts}
    gates: dict[str, Gates] = {}
    if operators:
        with explained_gradients(f"pattern={pattern.text!r}", "an explicit pattern"):
            gates = measure_gates(loss, operators, parts)
    prediction = _Prediction(sizes, layers, gates)

    def measure(missing: Sequence[Missing]) -> list[float]:
        dense, *losses = losses_without(loss, [Missing(), *missing])
        if not math.isfinite(dense):
            raise ValueError("the loss of the model on the calibration tokens is NaN or Inf: the model is damaged.")
        prediction.dense_loss = dense
        return [found - dense if math.isfinite(found) else math.inf for found in losses]

    steps = {kind: _spread(sizes, kind, pattern.size) for kind in sizes.parts}
    alone = [(kind, count) for kind, counts in steps.items() for count in counts]
    losses = measure([prediction.missing({kind: count}) for kind, count in alone])
    for (kind, count), increase in zip(alone, losses, strict=True):
        prediction.increases[kind][sizes.parts[kind].groups - count] = increase

    def candidates(num_removed: int) -> list[_Candidate]:
        removed = [index for index, _ in prediction.removed[:num_removed]]
        fitting = sizes.fitting(pattern.size, removed, steps)
        return [_Candidate(prediction.loss(kept, num_removed), kept, num_removed) for kept in fitting]

    found = candidates(0)
    best = min((candidate.predicted for candidate in found), default=math.inf)
    needed = sizes.layers_needed(pattern.size)
    try:
        prediction.removed = choose_layers(loss, needed, prediction.dense_loss + best)
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
    for increase, one in sorted(zip(losses, tried, strict=True), key=lambda pair: pair[0]):
        size = sizes.of(one.kept, [index for index, _ in prediction.removed[: one.num_removed]])
        if math.isfinite(increase):
            mixtures.append((Mixture(pattern_of(sizes, one.kept, one.num_removed), size, one.predicted, increase), one))
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
                (layer_of(p, layers), torch.cat([torch.zeros(1), gates[p.name].costs.cpu().sort().values.cumsum(0)]))
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
