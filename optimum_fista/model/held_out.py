"""Perplexities of the dense and of the pruned network on tokens that no weight is fitted to.

The calls of `HeldOut` come in this order: `begin` while the whole model is dense (after `resume`, if an earlier start
has saved what `to_save` returned), then for each decoder layer `run` with "dense" before it is pruned and with "pruned"
afterwards, then `measure` and `perplexity`.
"""

import math
from collections.abc import Mapping, MutableMapping, Sequence
from itertools import chain
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

# tokens whose logits are held at a time, or fewer if the vocabulary is large (`Sweep.loss`)
LOGITS_TOGETHER = 512
_NETWORKS = ("dense", "pruned")


class HeldOut:
    """Held-out sequences that run through the decoder layers of the dense and of the pruned network.

    A decoder layer runs on the hidden states of the dense network while it is dense, and on those of the pruned network
    after it is pruned. After the last layer come the model's own norm and head.
    """

    def __init__(
        self, layers: DecoderLayers, batches: Sequence[CalibrationBatch], storage: Storage | None
    ) -> None:
        """Take sequences of the held-out batches, in their order, until they have `LEAST_TOKENS` tokens.

        `batches` are those that the run holds out; there may be none. The text of the first one counts as that of all.
        Hidden states will be kept at `storage`; `None`: on the device of each layer. Nothing runs yet, and nothing is
        allocated.
        """
        self.sequences = _sequences_to_measure(batches)
        self.text: str | None = None  # the name of the text, such as "c4"
        self.bytes_per_token: float | None = None
        if batches:
            self.text = batches[0].text
            self.bytes_per_token = batches[0].bytes_per_token
        # nats per token, by "dense" and "pruned"; empty until the last decoder layer has run
        self.losses: dict[str, float] = {}
        # hidden states that enter the next decoder layer, by "dense" and "pruned"
        self._streams: dict[str, ActivationStore] = {}
        # All arguments of the decoder layers but the hidden states: calls["dense"][layer][batch].
        self._calls: dict[str, list[list[LayerCall]]] = {}
        self._sweep = Sweep(
            layers, remaining=range(len(layers)), sequences=self.sequences, storage=storage
        )

    def begin(self) -> bool:
        """Record the arguments of the decoder layers, while the whole model is dense; False: losses can't be measured.

        They can't if no sequence has two tokens, if layers pass arguments other than hidden states to the next one, or
        if a run resumes and earlier layers have written to a dictionary that layers share.

        The model runs for this, and is not changed. For each network, `self._calls` get the arguments, and
        `self._streams` the hidden states that enter the first layer, unless `resume` has set those of a later layer.
        `self._sweep` learns what else a layer returns.
        """
        resumes = bool(self._streams)  # `resume` has filled them
        # once for each network, because each writes to its own dictionaries
        for network in _NETWORKS:
            recorded = record_inputs(self._sweep.layers, self.sequences, self._sweep.storage)
            self._calls[network] = recorded.calls
            self._sweep.returned_besides = recorded.returned_besides
            self._streams.setdefault(network, recorded.hidden_states)  # a resumed run has its own

        # All arguments of layers, as recorded for the last network: both have arguments of the same kinds.
        values: list[Any] = []
        for call in chain.from_iterable(recorded.calls):
            values += [*call.arguments, *call.keywords.values()]
        shares_dictionary = any(isinstance(value, MutableMapping) for value in values)
        if recorded.layers_pass_more or (shares_dictionary and resumes):
            return False
        return bool(self.sequences)

    def resume(self, saved: Mapping[str, Sequence[Tensor]]) -> bool:
        """Resume with the tensors that `to_save` returned after a decoder layer; `False` if they are missing.

        `saved` has them by name: "losses" after the last layer, otherwise "held_out_dense" and "held_out_pruned". Sets
        `self.losses` if they were saved, and the hidden states that enter the next layer (`self._streams`).
        """
        device = execution_device(self._sweep.layers.model.get_input_embeddings())
        if "losses" in saved:  # one tensor [2]: dense, pruned
            losses_of_networks = saved["losses"][0].tolist()
            self.losses = dict(zip(_NETWORKS, losses_of_networks, strict=True))
        for network in _NETWORKS:
            self._streams[network] = ActivationStore(self._sweep.storage or device, device)
            for hidden in saved.get(f"held_out_{network}", ()):
                self._streams[network].append(hidden)
        is_measured = bool(self.losses)
        # `to_save` returns the states of both networks together, so one network tells it for both.
        has_all_states = len(self._streams["pruned"]) == len(self.sequences)
        return is_measured or has_all_states

    def to_save(self) -> dict[str, list[Tensor]]:
        """The tensors to save after a decoder layer, by name; `resume` takes them.

        They are the hidden states that enter the next layer ("held_out_dense", "held_out_pruned"). After the last layer
        they are the losses ("losses"): one tensor [2], float64, of the dense and of the pruned network. Changes
        nothing; hidden states are not copied, and stay where they are kept.
        """
        is_measured = bool(self.losses)
        if is_measured:
            losses = [self.losses[network] for network in _NETWORKS]
            return {"losses": [torch.tensor(losses, dtype=torch.float64)]}
        return {
            f"held_out_{network}": stream.stored_tensors()
            for network, stream in self._streams.items()
        }

    def run(self, index: int, network: str) -> None:
        """Run the decoder layer with the number `index`, which must be on its device, as it is now.

        `network` is "dense" or "pruned", as the layer is. The hidden states of this network (`self._streams`) are
        replaced by those after the layer. `self._calls` has the layer's other arguments.
        """
        layer = self._sweep.layers.modules[index]
        self._streams[network] = self._sweep.run(
            layer, self._streams[network], self._calls[network][index]
        )

    def measure(self) -> None:
        """Measure the losses of both networks after the last decoder layer has run, and set `self.losses`.

        `self._streams` are the hidden states that have left this layer. The model's norm and head run on them, and are
        on their device meanwhile.
        """
        layers = self._sweep.layers
        norm_and_head = [*layers.around, layers.model.get_output_embeddings()]
        with onloaded(norm_and_head, read_only=True):
            self.losses = {
                network: self._sweep.loss(self._streams[network], LOGITS_TOGETHER)
                for network in _NETWORKS
            }

    def perplexity(self) -> dict[str, Any] | None:
        """Perplexities of both networks, and bits per byte if known; `None` if a loss is not measured or not finite.

        `self.losses` are in nats per token. The result is a part of the report: it also has the number of tokens, and
        the digest of the sequences. Changes nothing.
        """
        are_finite = all(math.isfinite(loss) for loss in self.losses.values())
        if not self.losses or not are_finite:
            return None
        # limited, because the exponential of more than 709 is no float64
        perplexities: dict[str, Any] = {
            network: math.exp(min(loss, 700.0)) for network, loss in self.losses.items()
        }
        if self.bytes_per_token:
            nats_per_bit = math.log(2)
            perplexities["bits_per_byte"] = {
                network: loss / (nats_per_bit * self.bytes_per_token)
                for network, loss in self.losses.items()
            }
        perplexities["num_tokens"] = sum(batch.num_tokens for batch in self.sequences)
        perplexities["sha256"] = tokens_sha256(self.sequences)
        return perplexities


def _sequences_to_measure(batches: Sequence[CalibrationBatch]) -> list[CalibrationBatch]:
    """Take sequences of two tokens and more, without padding, until there are `LEAST_TOKENS` tokens.

    They are returned in new batches. Sequences that follow each other, have one length, and have at most
    `LOGITS_TOGETHER` tokens together, share a batch unless they have images. `batches` are not changed.
    """
    groups: list[list[CalibrationBatch]] = []  # of sequences that share a batch
    num_tokens = 0
    # a batch for each sequence, made when the loop asks for it
    sequences = chain.from_iterable(batch.sequences_without_padding() for batch in batches)
    for sequence in sequences:
        if num_tokens >= LEAST_TOKENS:
            break
        if sequence.num_tokens < 2:  # nothing is predicted
            continue
        num_tokens += sequence.num_tokens
        if groups and _fits(groups[-1], sequence):
            groups[-1].append(sequence)
        else:
            groups.append([sequence])
    # only a group of one sequence has media
    return [
        CalibrationBatch(
            torch.cat([sequence.input_ids for sequence in group]), media=group[0].media
        )
        for group in groups
    ]


def _fits(group: Sequence[CalibrationBatch], sequence: CalibrationBatch) -> bool:
    """Tell whether a sequence can join a group of sequences in one batch; each is a batch of its own, without padding.

    All must have one length, and at most `LOGITS_TOGETHER` tokens together. A sequence with images stays alone.
    """
    has_media = bool(group[0].media or sequence.media)
    has_length = group[0].num_tokens == sequence.num_tokens
    is_small = (len(group) + 1) * sequence.num_tokens <= LOGITS_TOGETHER
    return has_length and is_small and not has_media
