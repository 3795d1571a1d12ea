"""Recording the inputs of every decoder layer: hidden states of the first, arguments of all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from optimum_fista.model import UnsupportedArchitectureError
from optimum_fista.model.activation_store import ActivationStore, Storage
from optimum_fista.model.architecture import DecoderLayers, modules_around
from optimum_fista.model.calibration import CalibrationBatch
from optimum_fista.model.forward import LayerCall, StopForward, replaced_forwards
from optimum_fista.model.offload import execution_device, onloaded


@dataclass
class RecordedInputs:
    """What the decoder layers are called with.

    Attributes:
        hidden_states: Input of the first decoder layer, a batch each, [batch, sequence, hidden], as it is stored.
        calls: Other arguments, `calls[layer][batch]`, where the layer computes; equal tensors are stored once a device.
        token_masks: bool [batch, sequence] on the model's device, a batch each; `None` when all are real.
        held_out: Whether a batch is held out, a batch each.
        handed_on: Whether all decoder layers had to run, because they hand more to the next than hidden states.
    """

    hidden_states: ActivationStore
    calls: list[list[LayerCall]]
    token_masks: list[Tensor | None]
    held_out: list[bool]
    handed_on: bool = False


def record_inputs(
    model: PreTrainedModel, layers: DecoderLayers, batches: Sequence[CalibrationBatch], storage: Storage | None = None
) -> RecordedInputs:
    """Run the model on every batch with its decoder layers skipped, and record what each is called with.

    The first layer runs once, to learn the form of its output; nothing after the last layer runs. If decoder layers
    hand more to the next than hidden states (indices that attention shares, the state of a router), all of them run,
    and what is handed on is recorded as it is in the dense network. Hidden states are kept at `storage`; `None`: on the
    device.
    """
    # Skipping the layers is cheap; only the recording itself shows that a model hands on more.
    try:
        return _record(model, _Recorder(layers), batches, storage)
    except _HandsOnMore:
        return _record(model, _Recorder(layers, runs_layers=True), batches, storage)


def _record(
    model: PreTrainedModel, recorder: _Recorder, batches: Sequence[CalibrationBatch], storage: Storage | None
) -> RecordedInputs:
    device, layers = execution_device(model.get_input_embeddings()), recorder.layers
    hidden_states, token_masks = ActivationStore(storage or device, device), list[Tensor | None]()
    forwards = [partial(recorder.forward, index, layer.forward) for index, layer in enumerate(layers.modules)]
    with onloaded(modules_around(model, layers), copy=False), replaced_forwards(layers.modules, forwards):
        for batch in batches:
            mask = None if batch.attention_mask is None else batch.attention_mask.to(device)
            recorder.hidden_states, recorder.expected, recorder.next = None, None, 0
            recorder.met.clear()
            with suppress(StopForward):
                model(
                    input_ids=batch.input_ids.to(device),
                    attention_mask=None if mask is None else mask.long(),
                    use_cache=False,
                )
            first = recorder.hidden_states
            if first is None or not bool(torch.isfinite(first).all()):
                raise ValueError(
                    "the inputs of the first decoder layer hold NaN or Inf: the embeddings of the model are damaged."
                )
            hidden_states.append(first)
            token_masks.append(mask)
    held_out = [batch.held_out for batch in batches]
    return RecordedInputs(hidden_states, recorder.calls, token_masks, held_out, recorder.runs_layers)


class _HandsOnMore(Exception):
    """A decoder layer takes more from the one before it than hidden states."""


class _Recorder:
    """Its forward pass takes the place of that of every decoder layer: it records, and hands hidden states on or runs.

    Attributes:
        hidden_states: What enters the first layer in this batch; `None` before it does.
        expected: What should enter the next one.
        next: Number of the next one.
        met: Tensors of this batch's arguments and what stands for them, by their id and the device.
    """

    def __init__(self, layers: DecoderLayers, runs_layers: bool = False) -> None:
        self.layers = layers
        self.runs_layers = runs_layers
        self.calls: list[list[LayerCall]] = [[] for _ in layers.modules]
        self.hidden_states: Tensor | None = None
        self.expected: Tensor | None = None
        self.next = 0
        self.met: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = {}
        self._rest: tuple[Any, ...] = ()
        self._is_tuple: bool | None = None
        self._interned: dict[tuple[Any, ...], Tensor] = {}

    def forward(self, index: int, original: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
        """Stands for the forward pass of a decoder layer."""
        if arguments:
            hidden_states, *others = arguments
        else:
            first = "hidden_states" if "hidden_states" in keywords else next(iter(keywords))
            hidden_states, others = keywords.pop(first), []
        # The first layer of a batch.
        if self.hidden_states is None:
            self.hidden_states = hidden_states
        self._require_next(index, hidden_states, (*others, *keywords.values()))
        layer = self.layers.modules[index]
        device = execution_device(layer)
        kept = {name: self._intern(value, device) for name, value in keywords.items()}
        self.calls[index].append(LayerCall(tuple(self._intern(value, device) for value in others), kept))
        # Final norm and head are not needed.
        if index == len(self.layers) - 1:
            raise StopForward
        if self.runs_layers:
            with onloaded(layer.modules()):
                output = original(hidden_states, *others, **keywords)
            self.expected = output[0] if isinstance(output, tuple) else output
            return output
        # The layer is skipped: what enters it is handed on.
        self.expected = hidden_states
        if self._is_tuple is None:
            with onloaded(layer.modules()):
                output = original(hidden_states, *others, **keywords)
            self._is_tuple = isinstance(output, tuple)
            # Whoever takes one of these as an argument takes more than hidden states: `_require_next`.
            self._rest = tuple(output[1:]) if isinstance(output, tuple) else ()
        return (hidden_states, *self._rest) if self._is_tuple else hidden_states

    def _require_next(self, index: int, hidden_states: Tensor, others: tuple[Any, ...]) -> None:
        """Refuse layers that are called out of order, or not with the hidden states that the one before returned."""
        name, expected, reason = f"{self.layers.name}.{index}", self.expected, None
        if index != self.next:
            reason = f"the model calls decoder layer {name} but it should call {self.layers.name}.{self.next}"
        elif expected is not None and (
            hidden_states.data_ptr() != expected.data_ptr() or hidden_states.shape != expected.shape
        ):
            reason = f"the model changes the hidden states in front of decoder layer {name}"
        if reason is not None:
            raise UnsupportedArchitectureError(
                f"{reason}: only models that run every decoder layer once, in order, on the output of the one before, "
                "can be pruned."
            )
        if any(other is carried for other in others for carried in self._rest if carried is not None):
            raise _HandsOnMore
        self.next += 1

    def _intern(self, value: Any, device: torch.device) -> Any:
        """Share equal tensors (masks, position embeddings) between the layers of a device, and between batches."""
        if isinstance(value, tuple | list):
            return type(value)(self._intern(item, device) for item in value)
        if not isinstance(value, Tensor):
            return value
        if (id(value), device) not in self.met:  # most layers of a batch get the same tensor: compare it once
            moved = value.to(device)
            # The last value tells most unequal tensors apart, so that few are compared whole.
            key = (device, tuple(moved.shape), moved.dtype, moved.flatten()[-1].item() if moved.numel() else 0.0)
            known = self._interned.setdefault(key, moved)
            self.met[id(value), device] = (value, known if known is moved or torch.equal(known, moved) else moved)
        return self.met[id(value), device][1]
