"""Choose the decoder layers to remove, by the loss of the model without them.

SLEB (arXiv 2402.09025) runs a whole model for every candidate. Here all candidates of a round share one sweep: a
decoder layer is brought to its device once, and runs on the hidden states of each candidate, which take memory.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from optimum_fista.model import UnsupportedArchitectureError
from optimum_fista.model.activations import ActivationStore, Storage
from optimum_fista.model.calibration import CalibrationBatch
from optimum_fista.model.hooks import replaced_forwards
from optimum_fista.model.inputs import LayerCall, RecordedInputs, record_inputs
from optimum_fista.model.layers import DecoderLayers
from optimum_fista.model.media import targets_of
from optimum_fista.model.offload import execution_device, onloaded
from optimum_fista.model.precision import quick_products
from optimum_fista.model.sensitivity import DenseLoss
from optimum_fista.removal.shrinking import plan_shrinking, require_same_outputs


def choose_layers(loss: DenseLoss, count: int) -> list[tuple[int, float]]:
    """Choose decoder layers to remove, as SLEB does (arXiv 2402.09025, Algorithm 1).

    In every round, each remaining layer is left out once. The layer without which the loss is smallest is removed,
    unless no configuration describes the model without it. A round costs about as many forward passes as half of the
    layers: a layer runs on the hidden states of the model as it is, and of all models that lack one layer before it.

    Returns the numbers of the layers in the order of their removal, each with the loss after it, in nats per token.
    """
    layers, model = loss.layers, loss.layers.model
    sequences = loss.sequences()
    if not sequences:
        raise ValueError(
            "calib_dataloader holds no sequence of two tokens, so there is no loss: pass longer ones."
        )
    recorded = record_inputs(layers, sequences, loss.storage)
    if recorded.handed_on:
        why = f"the decoder layers of {type(model).__name__} pass more than hidden states to the next one"
        raise UnsupportedArchitectureError(f"{why}, so none can be removed: use another pattern.")
    # What a model adds between two layers depends on how many layers came before, so these all stay.
    last = max(
        (i for i, calls in enumerate(recorded.calls) if any(call.added for call in calls)),
        default=-1,
    )
    left, removed = list(range(len(layers))), list[tuple[int, float]]()
    num_runs = sum(len(layers) - done for done in range(count))
    with (
        tqdm(
            total=num_runs, desc="Choosing decoder layers", unit="layer", disable=not loss.progress
        ) as bar,
        onloaded([*layers.around, model.get_output_embeddings()], copy=False),
    ):
        for _ in range(count):
            losses = Sweep(layers, left, sequences, loss.storage, recorded.rest, last + 1).losses(
                recorded, bar
            )
            if not math.isfinite(losses.pop(None)):
                raise ValueError(
                    "the loss of the model on the calibration tokens is NaN or Inf: the model is damaged."
                )
            index = _cheapest(model, left, losses)
            left.remove(index)
            removed.append((index, losses[index]))
            bar.set_postfix_str(
                f"loss {losses[index]:.4f} without {', '.join(str(i) for i, _ in removed)}"
            )
    moved = [old for new, old in enumerate(left) if new != old]
    if moved:  # prove that the first layer with a new number still returns the same
        layer, call, plan = (
            layers.modules[moved[0]],
            recorded.calls[moved[0]][0],
            plan_shrinking(model, layers=left),
        )
        hidden = recorded.hidden_states.kept()[0].to(execution_device(layer))
        with onloaded(layer.modules(), copy=False):
            require_same_outputs(
                plan,
                f"{layers.name}.{moved[0]}",
                layer,
                {},
                lambda module: call.run(module, hidden),
            )
    return removed


@dataclass
class Sweep:
    """One sweep over the decoder layers `left`, each on the hidden states of several models that lack one layer."""

    layers: DecoderLayers
    left: Sequence[int]
    sequences: Sequence[CalibrationBatch]
    storage: Storage | None
    rest: tuple[Any, ...] | None = None  # as in `RecordedInputs`
    first: int = 0  # layers with smaller numbers are never left out

    def losses(self, recorded: RecordedInputs, bar: tqdm) -> dict[int | None, float]:
        """Losses in nats per token, by the number of the layer that is left out; `None`: no layer is."""
        streams: dict[int | None, ActivationStore] = {None: recorded.hidden_states}
        for index in self.left:
            layer = self.layers.modules[index]
            before = streams[None]
            with onloaded(layer.modules(), copy=False):
                for out in list(streams):
                    streams[out] = self.run(
                        layer, streams[out], recorded.calls[index]
                    )  # frees the layer's inputs
            if index >= self.first:
                streams[index] = before  # without this layer, its input is its output
            bar.update()
        return {out: self.loss(stream) for out, stream in streams.items()}

    def run(
        self, layer: nn.Module, stream: ActivationStore, calls: Sequence[LayerCall]
    ) -> ActivationStore:
        """The hidden states after a layer."""
        device = execution_device(layer)
        storage = self.storage or device
        stream.move(storage, device)
        leaving = ActivationStore(storage, device)
        for hidden, call in zip(stream, calls, strict=True):
            with quick_products():
                leaving.append(call.run(layer, hidden))
        return leaving

    def loss(self, stream: ActivationStore, together: int = sys.maxsize) -> float:
        """Cross-entropy of the next token, in nats per token, after the model's own norm and head.

        The logits of `together` tokens are in memory at once.
        """
        model, total, count = (
            self.layers.model,
            torch.zeros((), dtype=torch.float64, device=stream.device),
            0,
        )
        place = execution_device(model.get_input_embeddings())
        settings: dict[str, bool] = {"use_cache": False}
        if getattr(model.config.get_text_config(decoder=True), "output_router_logits", False):
            settings["output_router_logits"] = (
                False  # routers do not run here, and their loss is not part of this one
            )
        for hidden, batch in zip(stream, self.sequences, strict=True):
            ids, step = batch.input_ids, max(1, together // len(batch.input_ids))
            for start in range(0, ids.shape[1] - 1, step):
                part = hidden[..., start : start + step, :]
                output = part if self.rest is None else (part, *self.rest)
                # The model runs with decoder layers that return these hidden states for any arguments.
                forwards = [lambda *_, output=output, **__: output] * len(self.layers)
                with replaced_forwards(self.layers.modules, forwards), quick_products():
                    logits = model(
                        input_ids=ids[:, start : start + step].to(place), **settings
                    ).logits
                targets = targets_of(ids[:, start + 1 : start + 1 + step], model.config)
                count += int(
                    (targets >= 0).sum()
                )  # ids are on the CPU: the device is not waited for
                found = (
                    logits[:, : targets.shape[1]].flatten(0, 1).float()
                )  # [batch * tokens, vocabulary]
                loss = nn.functional.cross_entropy(
                    found, targets.flatten().to(found.device), reduction="sum"
                )
                total += loss.double().to(total.device)
        return float(total) / count if count else math.nan


def _cheapest(model: PreTrainedModel, left: Sequence[int], losses: dict[int | None, float]) -> int:
    """Find the layer without which the loss is smallest, if a configuration describes the model without it.

    The last layer of its kind stays, such as the only attention layer between state-space layers: caches need one.
    """
    refused, candidates = (
        ValueError("the model adds features of images there"),
        [i for i in left if i in losses],
    )
    kinds = getattr(model.config.get_text_config(decoder=True), "layer_types", None) or [None] * (
        max(left) + 1
    )
    # A loss that is not finite counts as the largest.
    for index in sorted(
        candidates, key=lambda i: losses[i] if math.isfinite(losses[i]) else math.inf
    ):
        try:
            if kinds[index] is not None and [kinds[i] for i in left].count(kinds[index]) == 1:
                raise ValueError(
                    f"decoder layer {index} is the last of its kind ({kinds[index]}): remove fewer"
                )
            plan_shrinking(model, layers=[i for i in left if i != index])
            return index
        except ValueError as error:
            refused = error
    raise ValueError(
        f"none of the decoder layers {list(left)} can be removed: {refused}"
    ) from refused
