"""What the removal of tokens costs: bits per byte of a text, with all tokens and with those that stay.

Perplexities of different vocabularies can't be compared, because their tokens are of different lengths. Bits per byte
can: the negative log-likelihood of a text, divided by its bytes in UTF-8.

The smaller model has rows of the embedding and the head of the dense one, and else the same weights. So one model
computes both: the smaller one is the dense model on the ids of the tokens that the smaller tokenizer writes, and it
can predict these tokens only. Its decoder layers are read from their files one after the other, once.

*Dense* and *pruned* are the two ways to write the same texts: in all tokens, and in those that stay. A *sequence* is
the list of ids of the beginning of one text.
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
from optimum_fista.model.inputs import LayerCall, record_inputs
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
    """Beginnings of texts in the tokens of one tokenizer."""

    sequences: Sequence[Sequence[int]]  # ids of each beginning, which are those of the dense model
    num_tokens: int  # of the beginnings, without BOS
    # that the predicted tokens stand for: without BOS, the first token of a sequence is not predicted
    num_bytes: int


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
        name: The dense model, a folder or a Hub id. Its weights stay in its files, which are only read, until they
            are needed.
        texts: Pieces of text that no token was counted on. Of each at most `_LONGEST_SEQUENCE` tokens are measured,
            and of all together about `LEAST_TOKENS`.
        dense_tokenizer: That of the dense model.
        smaller_tokenizer: The one with the tokens that stay.
        kept: int64 [rows that stay]: the old id of each token of the smaller tokenizer and, after these, of rows of the
            embedding that stay although no token has them.
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
    model = load_lazily(name, offload_folder, device=device).model
    num_rows, num_positions = token_limits(model)
    beginnings = _beginnings_of_texts(texts, dense_tokenizer, smaller_tokenizer, num_positions)
    dense = _tokenized(beginnings, dense_tokenizer, old_ids=None, bos=bos)
    pruned = _tokenized(beginnings, smaller_tokenizer, old_ids=kept.tolist(), bos=bos)
    if not dense.sequences or not pruned.sequences:
        raise ValueError("the held-out text has no sequence of two tokens")

    is_removed = torch.ones(num_rows, dtype=torch.bool)
    is_removed[kept] = False
    removed = is_removed.nonzero().flatten()  # ids, int64
    main_device = execution_device(model.get_input_embeddings())
    with products_as(choose_products(compute_dtype, main_device, model.dtype)):
        bits = _bits_per_byte(model, {"dense": dense, "pruned": pruned}, removed, progress)
    return bits | {
        "num_bytes": dense.num_bytes,
        "num_tokens": dense.num_tokens,
        "num_tokens_pruned": pruned.num_tokens,
    }


def _beginnings_of_texts(
    texts: Sequence[str],
    dense_tokenizer: Tokenizer,
    smaller_tokenizer: Tokenizer,
    num_positions: int | None,
) -> list[str]:
    """Beginnings of texts that are short enough for the model in both tokenizers' tokens.

    They have about `LEAST_TOKENS` tokens in all, or less if the texts are short. `num_positions` is the number of
    tokens that the model takes, `None` if it is not known.
    """
    needed_per_text = math.ceil(_MARGIN * LEAST_TOKENS / len(texts))
    per_text = min(_LONGEST_SEQUENCE, max(2, needed_per_text))
    longest: float = math.inf
    if num_positions is not None:
        longest = num_positions - 1  # one position is for BOS
        per_text = min(per_text, num_positions - 1)

    beginnings = list[str]()
    num_tokens = 0
    for text in texts:
        if num_tokens >= LEAST_TOKENS:
            break
        beginning = _first_tokens(text, dense_tokenizer, per_text)
        # A smaller vocabulary makes longer sequences. A text of which nothing fits becomes empty.
        while beginning and len(_ids(smaller_tokenizer, beginning)) > longest:
            beginning = beginning[: len(beginning) // 2]
        beginnings.append(beginning)
        num_tokens += len(_ids(dense_tokenizer, beginning))
    return beginnings


def _first_tokens(text: str, tokenizer: Tokenizer, num_tokens: int) -> str:
    """The beginning of a text that has at most `num_tokens` tokens."""
    encoding = tokenizer.encode(text, add_special_tokens=False)
    if len(encoding.ids) <= num_tokens:
        return text
    # If a character is several tokens, each of them has its place: the text ends before a character that would be torn.
    first_place, _ = encoding.offsets[num_tokens]  # of the first token that is cut off
    return text[:first_place]


def _tokenized(
    beginnings: Sequence[str],
    tokenizer: Tokenizer,
    *,
    old_ids: Sequence[int] | None,
    bos: int | None,
) -> TokenizedText:
    """Write beginnings of texts in the tokens of a tokenizer; sequences of less than two tokens are left out.

    `old_ids` has the dense model's id of each id of the tokenizer; `None`: they are the same. `bos` is the dense
    model's id of the token that every sequence starts with; `None`: sequences start with text.
    """
    sequences = list[list[int]]()
    num_tokens = 0
    num_bytes = 0
    for beginning in beginnings:
        encoding = tokenizer.encode(beginning, add_special_tokens=False)
        ids = encoding.ids if old_ids is None else [old_ids[index] for index in encoding.ids]
        num_tokens += len(ids)
        predicted = beginning
        if bos is not None:
            ids = [bos, *ids]
        elif ids:
            _, end_of_first = encoding.offsets[0]  # nothing predicts the first token
            predicted = beginning[end_of_first:]
        if len(ids) > 1:
            sequences.append(ids)
            # surrogatepass: a text that was made in Python may hold half of a surrogate pair
            num_bytes += len(predicted.encode("utf-8", "surrogatepass"))
    return TokenizedText(sequences, num_tokens, num_bytes)


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a text, without special tokens around it."""
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids


def _bits_per_byte(
    model: PreTrainedModel, texts: Mapping[str, TokenizedText], removed: Tensor, progress: bool
) -> dict[str, float]:
    """Compute bits per byte of the texts called "dense" and "pruned", by these names.

    In "pruned", the model can't predict the ids `removed`, int64. The weights of `model` stay in its files, and one
    decoder layer at a time is brought to the device. Afterwards, the model is as it was. ValueError if the loss is NaN
    or Inf.
    """
    layers = find_decoder_layers(model)
    sweeps = dict[str, Sweep]()  # each runs decoder layers on the sequences of one text
    streams = dict[str, ActivationStore]()  # hidden states that enter the next decoder layer
    calls = dict[str, list[list[LayerCall]]]()  # other arguments, calls[network][layer][sequence]
    with evaluation_mode(model), torch.no_grad():
        for network, text in texts.items():
            batches = [CalibrationBatch(torch.tensor([ids])) for ids in text.sequences]
            recorded = record_inputs(layers, batches)
            sweeps[network] = Sweep(
                layers,
                range(len(layers)),
                batches,
                storage=None,
                returned_besides=recorded.returned_besides,
            )
            streams[network] = recorded.hidden_states
            calls[network] = recorded.calls

        bar = tqdm(layers.modules, desc="Measuring", unit="layer", disable=not progress)
        for index, layer in enumerate(bar):
            with onloaded(layer.modules(), writable=False):
                for network, sweep in sweeps.items():
                    streams[network] = sweep.run(layer, streams[network], calls[network][index])

        bits = dict[str, float]()
        with onloaded([*layers.around, model.get_output_embeddings()], writable=False):
            for network, sweep in sweeps.items():
                impossible = removed if network == "pruned" else None
                loss = sweep.loss(streams[network], LOGITS_TOGETHER, impossible)
                text = texts[network]
                num_predicted = sum(len(ids) - 1 for ids in text.sequences)
                # nats per token -> nats -> bits -> bits per byte
                bits[network] = loss * num_predicted / math.log(2) / text.num_bytes
    if not all(map(math.isfinite, bits.values())):
        raise ValueError("the loss of the model on the held-out text is NaN or Inf")
    return bits
