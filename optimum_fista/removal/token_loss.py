"""What the removal of tokens costs: bits per byte of a text, with all tokens and with those that stay.

Perplexities of different vocabularies can't be compared, because their tokens are of different lengths. Bits per byte
can: the negative log-likelihood of a text, divided by its bytes in UTF-8.

The smaller model has rows of the embedding and the head of the dense one, and else the same weights. So one model
computes both: the smaller one is the dense model on the ids of the tokens that the smaller tokenizer writes, and it
can predict these tokens only. Its decoder layers are read from their files one after the other, once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedModel

from optimum_fista.bars import tqdm
from optimum_fista.model.activations import ActivationStore
from optimum_fista.model.calibration import CalibrationBatch
from optimum_fista.model.held_out import LEAST_TOKENS, LOGITS_TOGETHER
from optimum_fista.model.hooks import evaluation_mode
from optimum_fista.model.inputs import record_inputs
from optimum_fista.model.layers import find_decoder_layers, token_limits
from optimum_fista.model.offload import execution_device, onloaded
from optimum_fista.model.precision import choose_products, products_as
from optimum_fista.model.sweep import Sweep
from optimum_fista.source.loading import load_lazily

# Tokens of a sequence, at most.
_LONGEST_SEQUENCE = 1024
# Tokens that are planned for each that is needed: some texts turn out to be shorter.
_MARGIN = 1.1


@dataclass(frozen=True)
class TokenizedText:
    """The same stretches of a text in the tokens of one tokenizer."""

    sequences: Sequence[Sequence[int]]  # ids of each stretch, which are those of the dense model
    num_tokens: int  # of the text, without BOS
    num_bytes: (
        int  # that the predicted tokens stand for: the first one is not predicted without BOS
    )


def measure_bits_per_byte(
    name: str,
    texts: Sequence[str],
    *,
    dense_tokenizer: Tokenizer,
    smaller_tokenizer: Tokenizer,
    kept: Tensor,
    bos: int | None,
    offload_folder: Path,
    device: str | None,
    compute_dtype: str,
    progress: bool,
) -> dict[str, Any]:
    """Measure how well a model predicts texts with all its tokens, and with those that stay.

    Args:
        name: The dense model, a folder or a Hub id. It is loaded lazily, and its files are only read.
        texts: Pieces of text that no token was counted on. Of each at most `_LONGEST_SEQUENCE` tokens are measured,
            and of all together about `LEAST_TOKENS`.
        dense_tokenizer: That of the dense model.
        smaller_tokenizer: The one with the tokens that stay.
        kept: int64 [tokens that stay]: the old id of each token of the smaller tokenizer, and of further rows.
        bos: Old id of the token that every sequence starts with; `None`: the model's sequences start with text.
        offload_folder: Folder for weights that are stored in another form than a model computes with.
        device: Where to compute; `None`: the accelerator if there is one.
        compute_dtype: The option of a configuration: in which dtype matrices are multiplied.
        progress: Show a progress bar.

    Returns:
        `dense` and `pruned` bits per byte, and `num_bytes`, `num_tokens` and `num_tokens_pruned` of the same text.

    Raises:
        ValueError: If the texts hold no sequence of two tokens, or the model writes NaN or Inf.
    """
    model, _, _ = load_lazily(name, offload_folder, device=device)
    num_rows, num_positions = token_limits(model)
    stretches = _stretches(texts, dense_tokenizer, smaller_tokenizer, num_positions)
    dense = _tokenized(stretches, dense_tokenizer, None, bos)
    pruned = _tokenized(stretches, smaller_tokenizer, kept.tolist(), bos)
    if not dense.sequences or not pruned.sequences:
        raise ValueError("the held-out text has no sequence of two tokens")

    is_removed = torch.ones(num_rows, dtype=torch.bool)
    is_removed[kept] = False
    removed = is_removed.nonzero().flatten()
    place = execution_device(model.get_input_embeddings())
    with products_as(choose_products(compute_dtype, place, model.dtype)):
        bits = _bits_per_byte(model, {"dense": dense, "pruned": pruned}, removed, progress)
    return bits | {
        "num_bytes": dense.num_bytes,
        "num_tokens": dense.num_tokens,
        "num_tokens_pruned": pruned.num_tokens,
    }


def _stretches(
    texts: Sequence[str],
    dense_tokenizer: Tokenizer,
    smaller_tokenizer: Tokenizer,
    num_positions: int | None,
) -> list[str]:
    """Beginnings of texts that both tokenizers write as sequences for the model, of about `LEAST_TOKENS` tokens in all.

    `num_positions` is the number of tokens that the model takes, `None` if it is not known.
    """
    per_text = min(_LONGEST_SEQUENCE, max(2, math.ceil(_MARGIN * LEAST_TOKENS / len(texts))))
    longest = None if num_positions is None else num_positions - 1  # one position is for BOS
    if longest is not None:
        per_text = min(per_text, longest)

    stretches = list[str]()
    num_tokens = 0
    for text in texts:
        if num_tokens >= LEAST_TOKENS:
            break
        stretch = _first_tokens(text, dense_tokenizer, per_text)
        # fewer tokens make longer sequences: a text of which nothing fits is left out
        while longest is not None and stretch and len(_ids(smaller_tokenizer, stretch)) > longest:
            stretch = stretch[: len(stretch) // 2]
        stretches.append(stretch)
        num_tokens += len(_ids(dense_tokenizer, stretch))
    return stretches


def _first_tokens(text: str, tokenizer: Tokenizer, num_tokens: int) -> str:
    """The beginning of a text that has at most `num_tokens` tokens."""
    encoding = tokenizer.encode(text, add_special_tokens=False)
    if len(encoding.ids) <= num_tokens:
        return text
    # All tokens of one character have its place: the text ends before a character that would be torn.
    return text[: encoding.offsets[num_tokens][0]]


def _tokenized(
    stretches: Sequence[str], tokenizer: Tokenizer, old_ids: Sequence[int] | None, bos: int | None
) -> TokenizedText:
    """Write stretches of text in the tokens of a tokenizer; stretches of less than two tokens are left out.

    `old_ids` has the dense model's id of each id of the tokenizer; `None`: they are the same.
    """
    sequences = list[list[int]]()
    num_tokens = num_bytes = 0
    for stretch in stretches:
        encoding = tokenizer.encode(stretch, add_special_tokens=False)
        ids = encoding.ids if old_ids is None else [old_ids[index] for index in encoding.ids]
        num_tokens += len(ids)
        predicted = stretch
        if bos is not None:
            ids = [bos, *ids]
        elif ids:
            predicted = stretch[encoding.offsets[0][1] :]
        if len(ids) > 1:
            sequences.append(ids)
            num_bytes += len(predicted.encode("utf-8", "surrogatepass"))
    return TokenizedText(sequences, num_tokens, num_bytes)


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a text, without special tokens around it."""
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids


def _bits_per_byte(
    model: PreTrainedModel, texts: Mapping[str, TokenizedText], removed: Tensor, progress: bool
) -> dict[str, float]:
    """Bits per byte of the texts called "dense" and "pruned"; the latter can't predict the ids `removed`, int64.

    The model, lazily loaded, is on its device for one decoder layer at a time.
    """
    layers = find_decoder_layers(model)
    sweeps, streams, calls = {}, dict[str, ActivationStore](), {}
    with evaluation_mode(model), torch.no_grad():
        for network, text in texts.items():
            batches = [CalibrationBatch(torch.tensor([ids])) for ids in text.sequences]
            recorded = record_inputs(layers, batches)
            sweeps[network] = Sweep(
                layers, range(len(layers)), batches, storage=None, rest=recorded.rest
            )
            streams[network] = recorded.hidden_states
            calls[network] = recorded.calls

        bar = tqdm(layers.modules, desc="Measuring", unit="layer", disable=not progress)
        for index, layer in enumerate(bar):
            with onloaded(layer.modules(), copy=False):
                for network, sweep in sweeps.items():
                    streams[network] = sweep.run(layer, streams[network], calls[network][index])

        bits = dict[str, float]()
        with onloaded([*layers.around, model.get_output_embeddings()], copy=False):
            for network, sweep in sweeps.items():
                impossible = removed if network == "pruned" else None
                loss = sweep.loss(streams[network], LOGITS_TOGETHER, impossible)  # nats per token
                text = texts[network]
                num_predicted = sum(len(ids) - 1 for ids in text.sequences)
                bits[network] = loss * num_predicted / math.log(2) / text.num_bytes
    if not all(map(math.isfinite, bits.values())):
        raise ValueError("the loss of the model on the held-out text is NaN or Inf")
    return bits
