"""The loss of a model before and after pruning."""

from __future__ import annotations

import copy
from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from optimum_fista.model.activation_store import ActivationStore, Storage
from optimum_fista.model.architecture import DecoderLayers, modules_around
from optimum_fista.model.calibration import CalibrationBatch
from optimum_fista.model.hidden_states import record_inputs
from optimum_fista.model.losses import Sweep
from optimum_fista.model.offload import execution_device, onloaded
from optimum_fista.model.replay import LayerCall

PROBED_TOGETHER = 512
"""Tokens whose logits are held at a time."""


class LossProbe:
    """The loss of a model before and after it is pruned, on sequences that no weight is fitted to.

    It goes along with a run over the decoder layers, which have to come in order: each is run on the hidden states of
    the dense network while it is dense, and on those of the pruned network once it is pruned. That takes two forward
    passes of these sequences.

    Attributes:
        next: Number of the decoder layer that is to come.
        streams: Hidden states that enter it, by network.
        losses: By network, in nats a token; empty before the last decoder layer is through.
    """

    def __init__(self, model: PreTrainedModel, layers: DecoderLayers, tokens: Tensor, storage: Storage | None) -> None:
        """Take token ids int64 [sequences, length], which are cut to at most 512 a sequence: logits take memory."""
        length = min(tokens.shape[1], PROBED_TOGETHER)
        rows = tokens[:, : tokens.shape[1] // length * length].reshape(-1, 1, length)
        self.next = 0
        self.streams: dict[str, ActivationStore] = {}
        self.losses: dict[str, float] = {}
        self.tokens = rows[:, 0]
        self._calls: dict[str, list[list[LayerCall]]] = {}
        self._sweep = Sweep(model, layers, range(len(layers)), [CalibrationBatch(ids) for ids in rows], storage)

    def begin(self) -> bool:
        """Record what the decoder layers are called with, while the whole model is dense.

        Returns:
            Whether the losses can be measured: not if layers hand on more than hidden states as arguments, nor if a run
            resumes and they share a dictionary that layers before have written to.
        """
        recorded = record_inputs(self._sweep.model, self._sweep.layers, self._sweep.sequences, self._sweep.storage)
        shared = {
            id(value): value
            for calls in recorded.calls
            for call in calls
            for value in (*call.arguments, *call.keywords.values())
            if isinstance(value, MutableMapping)
        }
        for network in ("dense", "pruned"):  # each writes to dictionaries of its own
            own = {key: copy.copy(value) for key, value in shared.items()}
            self._calls[network] = [[_with_own(call, own) for call in calls] for calls in recorded.calls]
            self.streams.setdefault(network, recorded.hidden_states)
        return not recorded.handed_on and not (shared and 0 < self.next < len(self._sweep.layers))

    def resume(self, index: int, kept: Mapping[str, Tensor]) -> bool:
        """Go on before a decoder layer with what `kept` returned then; `False` if that was of other tokens."""
        found = {name: tensor for name, tensor in kept.items() if name != "tokens"}
        if not torch.equal(kept["tokens"], self.tokens.cpu()):
            return False
        self.next = index
        if index == len(self._sweep.layers):
            self.losses = {name: value.item() for name, value in found.items()}
            return True
        for name, hidden in found.items():
            device = execution_device(self._sweep.model.get_input_embeddings())
            self.streams[name] = ActivationStore(self._sweep.storage or device, device)
            for row in hidden:
                self.streams[name].append(row[None])
        return True

    def kept(self) -> dict[str, Tensor]:
        """The tokens, and what goes on before the next decoder layer; after the last one what was found."""
        tokens = {"tokens": self.tokens.cpu().contiguous()}
        if self.losses:
            return tokens | {name: torch.tensor(value, dtype=torch.float64) for name, value in self.losses.items()}
        hidden = {name: torch.cat([row.cpu() for row in stream.kept()]) for name, stream in self.streams.items()}
        return tokens | hidden

    def run(self, index: int, network: str) -> None:
        """Run a decoder layer, which is on its device, as it is now: `"dense"`, or `"pruned"`."""
        layer = self._sweep.layers.modules[index]
        self.streams[network] = self._sweep.run(layer, self.streams[network], self._calls[network][index])

    def leave(self, index: int) -> None:
        """A decoder layer is through; after the last one the losses are measured."""
        self.next, sweep = index + 1, self._sweep
        if self.next == len(sweep.layers):
            around = modules_around(sweep.model, sweep.layers)
            with onloaded([*around, sweep.model.get_output_embeddings()], copy=False):
                self.losses = {name: sweep.loss(stream) for name, stream in self.streams.items()}


def _with_own(call: LayerCall, own: Mapping[int, Any]) -> LayerCall:
    """A call with other dictionaries, by the `id` of those that it has."""
    keywords = {name: own.get(id(value), value) for name, value in call.keywords.items()}
    return LayerCall(tuple(own.get(id(value), value) for value in call.arguments), keywords)
