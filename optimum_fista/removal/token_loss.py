"""What the removal of tokens costs: bits per byte of a text, with all tokens and with those that stay.

Perplexities of different vocabularies can't be compared, because their tokens are of different lengths. Bits per byte
can: the negative log-likelihood of a text, divided by its bytes in UTF-8.

The smaller model has rows of the embedding and the head of the dense one, and else the same weights. So one model
computes both: the smaller one is the dense model on the ids of the tokens that the smaller tokenizer writes, and it
can predict these tokens only. Its decoder layers are read from their files one after the other, once.

`measure_bits_per_byte` measures it on the text that was held out of the counting of the tokens, when the smaller model
is written. `measure_plans` measures several plans for one model (`TokensPlan`) on texts that the user names, before
anything is written.

*Dense* and *pruned* are the two ways to write the same texts: in all tokens, and in those that stay. A *sequence* is
the list of ids of the beginning of one text.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from optimum_fista.model.held_out import LEAST_TOKENS
from optimum_fista.model.layers import token_limits
from optimum_fista.model.offload import execution_device
from optimum_fista.model.precision import choose_products, products_as
from optimum_fista.records import TextReport
from optimum_fista.removal.tokens_plan import TokensPlan
from optimum_fista.source.loading import load_lazily
from optimum_fista.text.loss import (
    MeasuredText,
    TextLoss,
    Tokenized,
    bits_per_byte,
    compared,
    longest_sequence,
    tokenized_text,
)

# Tokens of a sequence, at most.
_LONGEST_SEQUENCE = 1024
# Tokens that are planned for each that is needed: some texts turn out to be shorter.
_MARGIN = 1.1


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
        name: The dense model, a folder or a Hub id (downloaded into the cache). Its weights stay in its files, which
            are only read, until they are needed.
        texts: Pieces of text that no token was counted on. Of each at most `_LONGEST_SEQUENCE` tokens are measured,
            and of all together about `LEAST_TOKENS`, which are enough for a number that can be trusted.
        dense_tokenizer: That of the dense model.
        smaller_tokenizer: The one with the tokens that stay.
        kept: int64 [rows that stay]: the old id of each token of the smaller tokenizer and, after these, of rows of the
            embedding that stay although no token has them.
        bos: Old id of the token that every sequence starts with; `None`: the model's sequences start with text.
        offload_folder: Folder for weights that are stored in another form than a model computes with.
        device: Where to compute; `None`: the accelerator if there is one.
        compute_dtype: The option of a configuration: in which dtype matrices are multiplied, such as "auto".
        progress: Show a progress bar.

    Returns:
        `dense` and `pruned` bits per byte, and `num_bytes`, `num_tokens` and `num_tokens_pruned` of the same text.

    Raises:
        ValueError: If the texts hold no sequence of two tokens, or the model writes NaN or Inf.
    """
    model = load_lazily(name, offload_folder, device=device).model
    num_rows, num_positions = token_limits(model)  # of the embedding; that a sequence may have
    beginnings = _beginnings_of_texts(texts, dense_tokenizer, smaller_tokenizer, num_positions)
    dense = _tokenized(beginnings, dense_tokenizer, old_ids=None, bos=bos)
    pruned = _tokenized(beginnings, smaller_tokenizer, old_ids=kept.tolist(), bos=bos)
    if not dense.sequences or not pruned.sequences:
        raise ValueError("the held-out text has no sequence of two tokens: pass a longer text")

    main_device = execution_device(model.get_input_embeddings())
    with products_as(choose_products(compute_dtype, main_device, model.dtype)):
        bits = bits_per_byte(
            model,
            {"dense": dense, "pruned": pruned},
            removed={"pruned": _removed_ids(num_rows, kept)},
            progress=progress,
        )
    return bits | {
        "num_bytes": dense.num_bytes,
        "num_tokens": dense.num_tokens,
        "num_tokens_pruned": pruned.num_tokens,
    }


def measure_plans(
    plans: Sequence[TokensPlan],
    texts: Sequence[MeasuredText],
    *,
    device: str | None,
    progress: bool,
) -> list[list[TextReport]]:
    """Measure what plans for one model cost on texts, before anything is written; in one pass over its decoder layers.

    Returns for each plan the losses on all texts, in their order. A Hub id is downloaded into the cache, and the
    model's files are only read; weights that are stored in another form than a model computes with are copied to a
    temporary folder for that time. ValueError if the loss is NaN or Inf. `device` is where to compute; `None`: the
    accelerator if there is one.
    """
    first_plan = plans[0]
    with tempfile.TemporaryDirectory(prefix="offload-") as offload:
        model = load_lazily(first_plan.name, Path(offload), device=device).model
        vocabulary, num_positions = token_limits(model)  # ids; tokens that a sequence may have
        longest = longest_sequence(num_positions)

        # Each text in the tokens of the dense model, and in those of each plan ("plan 0", "plan 1", ...).
        variants = {
            "dense": _texts_in_tokens(
                texts,
                first_plan.dense_tokenizer,
                bos=first_plan.bos,
                longest=longest,
                old_ids=None,
            )
        }
        removed_ids: dict[str, Tensor] = {}  # that the model can't predict; by the plan
        for number, plan in enumerate(plans):
            old_ids = list(plan.new_ids)  # in the order of the new ids
            variants[f"plan {number}"] = _texts_in_tokens(
                texts, plan.tokenizer, bos=plan.bos, longest=longest, old_ids=old_ids
            )
            removed_ids[f"plan {number}"] = _removed_ids(vocabulary, old_ids)

        # All are measured together, so each text gets a key, such as "dense/0".
        texts_by_key: dict[str, Tokenized] = {}
        removed_by_key: dict[str, Tensor] = {}
        for variant, texts_in_tokens in variants.items():
            for index, text in enumerate(texts_in_tokens):
                key = f"{variant}/{index}"
                texts_by_key[key] = text
                if variant in removed_ids:
                    removed_by_key[key] = removed_ids[variant]

        main_device = execution_device(model.get_input_embeddings())
        compute_dtype = first_plan.report.config["compute_dtype"]
        with products_as(choose_products(compute_dtype, main_device, model.dtype)):
            bits = bits_per_byte(model, texts_by_key, removed=removed_by_key, progress=progress)

    losses: dict[str, list[TextLoss]] = {}  # on all texts, by the variant
    for variant, texts_in_tokens in variants.items():
        losses[variant] = [
            TextLoss(
                bits_per_byte=bits[f"{variant}/{index}"],
                num_tokens=text.num_tokens,
                num_bytes=text.num_bytes,
                vocabulary=vocabulary,
            )
            for index, text in enumerate(texts_in_tokens)
        ]
    return [
        compared(texts, losses["dense"], losses[f"plan {number}"]) for number in range(len(plans))
    ]


def _removed_ids(num_rows: int, kept: list[int] | Tensor) -> Tensor:
    """Return the ids, int64, of the rows of an embedding of `num_rows` that are not among those `kept`."""
    is_removed = torch.ones(num_rows, dtype=torch.bool)
    is_removed[kept] = False
    return is_removed.nonzero().flatten()


def _texts_in_tokens(
    texts: Sequence[MeasuredText],
    content: Mapping[str, Any],
    *,
    bos: int | None,
    longest: int,
    old_ids: Sequence[int] | None,
) -> list[Tokenized]:
    """Write texts in the tokens of a `tokenizer.json`, whose content is `content`, with the ids of the dense model.

    `bos` is the dense model's id that every sequence starts with, if one does, `longest` the most tokens of a sequence.
    `old_ids` has the dense model's id of each id of the tokenizer; `None`: they are the same.
    """
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)))
    return [
        tokenized_text(text.stretches, tokenizer, bos=bos, longest=longest, old_ids=old_ids)
        for text in texts
    ]


def _beginnings_of_texts(
    texts: Sequence[str],
    dense_tokenizer: Tokenizer,
    smaller_tokenizer: Tokenizer,
    num_positions: int | None,
) -> list[str]:
    """Cut off beginnings of texts that are short enough for the model in the tokens of both tokenizers.

    They have about `LEAST_TOKENS` tokens of the dense tokenizer in all, or less if the texts are short; some may be
    empty. `num_positions` is the number of tokens that the model takes, `None` if it is not known.
    """
    # Some texts are shorter than others, so a bit more is taken of each (`_MARGIN`).
    needed_per_text = math.ceil(_MARGIN * LEAST_TOKENS / len(texts))
    # Tokens of a beginning. A single one would predict nothing.
    per_text = min(_LONGEST_SEQUENCE, max(2, needed_per_text))
    longest: float = math.inf  # tokens of a sequence that the model takes, without BOS
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
    """Return the beginning of a text that has at most `num_tokens` tokens; the whole text if it has no more."""
    encoding = tokenizer.encode(text, add_special_tokens=False)
    if len(encoding.ids) <= num_tokens:
        return text
    # The offsets of a token are the places in the text where it begins and ends. If one character is several tokens,
    # all of them have the place of the character. So a cut between two of them leaves out the whole character.
    first_place, _ = encoding.offsets[num_tokens]  # of the first token that is cut off
    return text[:first_place]


def _tokenized(
    beginnings: Sequence[str],
    tokenizer: Tokenizer,
    *,
    old_ids: Sequence[int] | None,
    bos: int | None,
) -> Tokenized:
    """Write beginnings of texts in the tokens of a tokenizer; sequences of less than two tokens are left out.

    `old_ids` has the dense model's id of each id of the tokenizer; `None`: they are the same. `bos` is the dense
    model's id of the token that every sequence starts with; `None`: sequences start with text. Each sequence has one
    beginning. Counts the tokens without BOS, and the bytes that the model predicts.
    """
    sequences = list[list[int]]()
    num_tokens = 0
    num_bytes = 0
    for beginning in beginnings:
        encoding = tokenizer.encode(beginning, add_special_tokens=False)
        ids = encoding.ids if old_ids is None else [old_ids[index] for index in encoding.ids]
        num_tokens += len(ids)
        predicted = beginning  # the text whose tokens the model predicts
        if bos is not None:
            ids = [bos, *ids]
        elif ids:
            _, end_of_first = encoding.offsets[0]  # nothing predicts the first token
            predicted = beginning[end_of_first:]
        if len(ids) > 1:
            sequences.append(ids)
            # surrogatepass: a text that was made in Python may hold half of a surrogate pair
            num_bytes += len(predicted.encode("utf-8", "surrogatepass"))
    return Tokenized(sequences, num_tokens, num_bytes)


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a text, without special tokens around it."""
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids
