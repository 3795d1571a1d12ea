"""Perplexities of the dense and of the pruned network on tokens that no weight is fitted to."""

import math
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from optimum_fista.model.activations import ActivationStore, Storage
from optimum_fista.model.calibration import CalibrationBatch, tokens_sha256
from optimum_fista.model.inputs import LayerCall, record_inputs
from optimum_fista.model.layers import DecoderLayers
from optimum_fista.model.offload import execution_device, onloaded
from optimum_fista.model.sweep import Sweep
from optimum_fista.verdict import LEAST_TOKENS

LOGITS_TOGETHER = (
    512  # tokens whose logits are held at a time: a vocabulary may have 250,000 entries
)
_NETWORKS = ("dense", "pruned")


class HeldOut:
    """Held-out sequences that run through the decoder layers of the dense and of the pruned network.

    A decoder layer runs on the hidden states of the dense network while it is dense, and on those of the pruned network
    after it is pruned. After the last layer come the model's own norm and head.
    """

    def __init__(
        self, layers: DecoderLayers, batches: Sequence[CalibrationBatch], storage: Storage | None
    ) -> None:
        groups, count = (
            list[list[CalibrationBatch]](),
            0,
        )  # without padding; short ones of one length share a batch
        for row in (row for batch in batches for row in batch.rows() if row.num_tokens > 1):
            if count >= LEAST_TOKENS:
                break
            count += row.num_tokens
            last = groups[-1] if groups else [row]
            is_same = last[0].num_tokens == row.num_tokens and not (last[0].media or row.media)
            if groups and is_same and (len(last) + 1) * row.num_tokens <= LOGITS_TOGETHER:
                last.append(row)
            else:
                groups.append([row])
        self.sequences = [
            CalibrationBatch(torch.cat([row.input_ids for row in group]), media=group[0].media)
            for group in groups
        ]
        self.text = batches[0].text if batches else None
        self.bytes_per_token = batches[0].bytes_per_token if batches else None
        self.losses: dict[
            str, float
        ] = {}  # nats per token; empty until the last decoder layer has run
        self._streams: dict[str, ActivationStore] = {}
        self._calls: dict[str, list[list[LayerCall]]] = {}
        self._sweep = Sweep(layers, range(len(layers)), self.sequences, storage)

    def begin(self) -> bool:
        """Record the arguments of the decoder layers, while the whole model is dense; False: losses can't be measured.

        They can't if no sequence has two tokens, if layers pass arguments other than hidden states to the next one, or
        if a run resumes and earlier layers have written to a dictionary that layers share.
        """
        resumes, sweep = bool(self._streams), self._sweep
        for (
            network
        ) in _NETWORKS:  # once for each network, because each writes to its own dictionaries
            recorded = record_inputs(sweep.layers, self.sequences, sweep.storage)
            self._calls[network], sweep.rest = recorded.calls, recorded.rest
            self._streams.setdefault(network, recorded.hidden_states)
        given = (
            v
            for layer in recorded.calls
            for call in layer
            for v in (*call.arguments, *call.keywords.values())
        )
        shares = any(isinstance(value, MutableMapping) for value in given)
        return bool(self.sequences) and not recorded.handed_on and not (shares and resumes)

    def resume(self, kept: Mapping[str, Sequence[Tensor]]) -> bool:
        """Resume with the tensors of `kept`, saved after a decoder layer; `False` if they are missing."""
        device = execution_device(self._sweep.layers.model.get_input_embeddings())
        if "losses" in kept:
            self.losses = dict(zip(_NETWORKS, kept["losses"][0].tolist(), strict=True))
        for network in _NETWORKS:
            self._streams[network] = ActivationStore(self._sweep.storage or device, device)
            for hidden in kept.get(f"held_out_{network}", ()):
                self._streams[network].append(hidden)
        return bool(self.losses) or len(self._streams["pruned"]) == len(self.sequences)

    def kept(self) -> dict[str, list[Tensor]]:
        """Hidden states that enter the next decoder layer; after the last one, the losses."""
        if self.losses:
            return {"losses": [torch.tensor([*self.losses.values()], dtype=torch.float64)]}
        return {
            f"held_out_{network}": list(stream.kept()) for network, stream in self._streams.items()
        }

    def run(self, index: int, network: str) -> None:
        """Run a decoder layer, which must be on its device, as it is now: `"dense"` or `"pruned"`."""
        layer = self._sweep.layers.modules[index]
        self._streams[network] = self._sweep.run(
            layer, self._streams[network], self._calls[network][index]
        )

    def measure(self) -> None:
        """Measure the losses, after the last decoder layer."""
        sweep = self._sweep
        with onloaded(
            [*sweep.layers.around, sweep.layers.model.get_output_embeddings()], copy=False
        ):
            self.losses = {
                name: sweep.loss(self._streams[name], LOGITS_TOGETHER) for name in _NETWORKS
            }

    def perplexity(self) -> dict[str, Any] | None:
        """Perplexities of both networks, and bits per byte if known; `None` if one is not measured or not finite."""
        if not self.losses or not all(map(math.isfinite, self.losses.values())):
            return None
        found: dict[str, Any] = {
            network: math.exp(min(loss, 700.0)) for network, loss in self.losses.items()
        }
        if self.bytes_per_token:
            bits = math.log(2) * self.bytes_per_token
            found["bits_per_byte"] = {network: loss / bits for network, loss in self.losses.items()}
        return found | {
            "num_tokens": sum(batch.num_tokens for batch in self.sequences),
            "sha256": tokens_sha256(self.sequences),
        }
