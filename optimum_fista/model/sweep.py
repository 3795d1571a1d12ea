"""Run hidden states through decoder layers one after the other, and measure the loss of a language model at the end.

A `Sweep` serves two callers. `model.held_out` runs the dense and the pruned network side by side: it calls `run` for
every decoder layer of both, then `loss`. `removal.layers` chooses decoder layers to remove: it calls `losses`, which
runs all models that lack one layer at once, so that a layer is brought to its device only once.

Hidden states are kept in an `ActivationStore`: one tensor [batch, tokens, hidden] for each calibration batch.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from optimum_fista.bars import tqdm
from optimum_fista.model.activations import ActivationStore, Storage
from optimum_fista.model.calibration import CalibrationBatch
from optimum_fista.model.hooks import replaced_forwards
from optimum_fista.model.inputs import LayerCall, RecordedInputs
from optimum_fista.model.layers import DecoderLayers
from optimum_fista.model.media import targets_of
from optimum_fista.model.offload import execution_device, onloaded
from optimum_fista.model.precision import quick_products
from optimum_fista.model.predictor import positions_per_chunk


@dataclass
class Sweep:
    """One sweep of batches through the decoder layers of a model.

    `returned_besides` may be set later, because it is recorded together with the hidden states that enter the first
    layer.
    """

    layers: DecoderLayers
    remaining: Sequence[int]  # numbers of the decoder layers that the model still has, rising
    sequences: Sequence[CalibrationBatch]
    storage: Storage | None  # of hidden states; None: the device on which each layer computes
    # What the last decoder layer returns besides hidden states (`RecordedInputs.returned_besides`); None: nothing.
    returned_besides: tuple[Any, ...] | None = None
    first: int = 0  # number of the first layer that `losses` may leave out

    def losses(self, recorded: RecordedInputs, bar: tqdm) -> dict[int | None, float]:
        """Measure the loss of the model, and of every model that lacks one of its decoder layers.

        `recorded` has the hidden states that enter the first layer, and the other arguments of all layers
        (`record_inputs`). Its hidden states keep their values, but come to the storage of the layers that they enter.
        `bar` is updated after each layer. Each layer is on its device while it runs, and is not changed.

        `self.remaining` are the numbers of the layers that the model has, and `self.first` is the first one that may be
        left out. Returns losses in nats per token, by the number of the layer that is left out; `None` stands for no
        layer.
        """
        # Hidden states that enter the next layer, by the layer that is left out. A model that lacks layer i returns the
        # same as the whole model until layer i. So its stream begins there, with the hidden states of the whole model.
        streams: dict[int | None, ActivationStore] = {None: recorded.hidden_states}
        for index in self.remaining:
            layer = self.layers.modules[index]
            entering = streams[None]
            with onloaded(layer.modules(), read_only=True):
                for left_out in list(streams):
                    # `run` makes a new store. The old one is freed, but `entering` holds that of the whole model.
                    streams[left_out] = self.run(layer, streams[left_out], recorded.calls[index])
            if index >= self.first:
                # A model without this layer: what enters the layer also leaves it. The stream begins only now, so that
                # the layer did not run on it.
                streams[index] = entering
            bar.update()
        return {left_out: self.loss(stream) for left_out, stream in streams.items()}

    def run(
        self, layer: nn.Module, stream: ActivationStore, calls: Sequence[LayerCall]
    ) -> ActivationStore:
        """Run a decoder layer, which must be on its device, and return the hidden states that leave it, in a new store.

        `calls` has the other arguments of the layer for each batch. `stream` has the hidden states that enter the
        layer, [batch, tokens, hidden]. The stream comes to the storage of this layer, and keeps its values.
        """
        device = execution_device(layer)
        storage = self.storage or device  # `None`: the layer's own device
        stream.move(storage, device)
        leaving = ActivationStore(storage, device)
        for hidden_states, call in zip(stream, calls, strict=True):
            with quick_products():  # in the precision that the run has chosen
                leaving.append(call.run(layer, hidden_states))
        return leaving

    def loss(
        self, stream: ActivationStore, together: int = sys.maxsize, removed: Tensor | None = None
    ) -> float:
        """Measure the cross-entropy of the next token, in nats per token, after the model's own norm and head.

        `stream` has the hidden states that leave the last decoder layer, of `self.sequences`. The logits of at most
        `together` tokens are in memory at once, and of fewer if the vocabulary is large (`positions_per_chunk`).
        `removed` are ids, int64, that the model can't predict, as if it had no such tokens. Returns NaN if there is no
        token to predict. The model's own forward pass runs, with its decoder layers replaced until it ends.
        """
        config = self.layers.model.config
        total = torch.zeros((), dtype=torch.float64, device=stream.device)
        count = 0  # of tokens that are predicted
        # tokens of all sequences of a batch together
        most = min(together, positions_per_chunk(self.layers.model))
        for hidden_states, batch in zip(stream, self.sequences, strict=True):
            ids = batch.input_ids  # [batch, tokens], on the CPU
            step = max(1, most // len(ids))  # tokens of each sequence
            for start in range(0, ids.shape[1] - 1, step):
                part = slice(start, start + step)
                next_tokens = slice(start + 1, start + 1 + step)
                targets = targets_of(ids[:, next_tokens], config)  # -100 for tokens without a loss
                count += int((targets >= 0).sum())  # on the CPU: the device is not waited for
                # A function of its own, so that no logits are held while the next tokens have theirs.
                loss = self._sum_of_losses(
                    ids[:, part], hidden_states[..., part, :], targets, removed
                )
                total += loss.to(total.device)
        return float(total) / count if count else math.nan

    def _sum_of_losses(
        self, input_ids: Tensor, hidden_states: Tensor, targets: Tensor, removed: Tensor | None
    ) -> Tensor:
        """Sum the cross-entropies of `targets`, ids [batch, next tokens]; returns a float64 scalar.

        Targets of -100 are left out. `input_ids` [batch, tokens] are the tokens before them, and `hidden_states`
        [batch, tokens, hidden] what the last decoder layer returns for these. `removed` are ids, int64,
        that can't be predicted; `None`: there are none.
        """
        # The model runs on the ids, but its layers return the hidden states: only its norm and head compute.
        logits = self._logits(input_ids, hidden_states)
        predicted = logits[:, : targets.shape[1]]  # the last token of a sequence has no next one
        predicted = predicted.flatten(0, 1).float()  # [batch * tokens, vocabulary]
        if removed is not None:
            predicted = predicted.index_fill(1, removed.to(logits.device), -math.inf)
        loss = nn.functional.cross_entropy(
            predicted, targets.flatten().to(logits.device), reduction="sum"
        )
        return loss.double()

    def _logits(self, input_ids: Tensor, hidden_states: Tensor) -> Tensor:
        """Run only the norm and the head of the model, on hidden states [batch, tokens, hidden] of its last layer.

        The model runs on `input_ids` [batch, tokens] with decoder layers that return these hidden states for any
        arguments. If the layers return a tuple, `self.returned_besides` is the rest of it. Their forward functions are
        put back afterwards.
        """
        model = self.layers.model
        settings: dict[str, bool] = {"use_cache": False}
        if getattr(model.config.get_text_config(decoder=True), "output_router_logits", False):
            # routers do not run here, and their loss is not part of this one
            settings["output_router_logits"] = False
        output = (
            hidden_states
            if self.returned_besides is None
            else (hidden_states, *self.returned_besides)
        )

        def return_output(*_: Any, **__: Any) -> Any:
            """Return what the last decoder layer returned, in place of the forward pass of each layer."""
            return output

        place = execution_device(model.get_input_embeddings())
        forwards = [return_output] * len(self.layers)
        # `quick_products`: in the precision that the run has chosen
        with replaced_forwards(self.layers.modules, forwards), quick_products():
            logits: Tensor = model(input_ids=input_ids.to(place), **settings).logits
        return logits
