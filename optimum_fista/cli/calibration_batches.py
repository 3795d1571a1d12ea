"""The batches of a run of `optimum-fista prune`: calibration text, and more text to measure the perplexity on.

A batch is a tensor of token ids, int64 [sequences, tokens], or a dictionary of arguments of the model. A dictionary
with `held_out`, the name of a text, is not calibrated on: the perplexity is measured on it. A *source* is what the user
passed as `--calibration`: "self" (the model writes the text), a file, or the name of a text such as "c4". If there are
several, each batch is a dictionary whose `source` names the text that all its sequences are of.

In all functions, `request` is what the user asks for (`PruneRequest`); no function changes it. Texts, tokenizers and
models of the Hub are downloaded into its cache.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from optimum_fista.cli.prune_request import PruneRequest
from optimum_fista.model.calibration import equal_shares
from optimum_fista.source.loading import read_config, require_processor, require_tokenizer
from optimum_fista.text.calibration_tokens import calibration_tokens_by_name, usual_length
from optimum_fista.text.images import image_sequences
from optimum_fista.text.one_text import require_different_texts
from optimum_fista.text.sources import load_text, require_source
from optimum_fista.text.text_source import TextSource
from optimum_fista.text.windows import calibration_windows
from optimum_fista.verdict import LEAST_TOKENS

# Sequences with images that the perplexity is measured on: they have 300 tokens or more.
_MEASURED_IMAGES = 16


def calibration_batches(
    request: PruneRequest, device: str | None, keep_in: Path
) -> list[Tensor | dict[str, Any]]:
    """Return the calibration batches, and after them one to measure the perplexity on if the text is long enough.

    If the text has images, each sequence is a batch. Several texts give equal shares of the sequences, and their
    batches take turns. Texts of the Hub are downloaded into its cache.

    Args:
        request: What the user asked for, with a source and a batch size (`PruneRequest.with_choices`).
        device: Where the model writes the text, if the source is "self", such as "cuda:0"; `None`: the accelerator if
            there is one.
        keep_in: Folder in which such a text is written to a file, for a run that resumes.
    """
    assert request.source is not None
    assert request.batch_size is not None
    if len(request.sources) > 1:
        return _batches_of_several_texts(request)
    if request.source == "self":
        tokens, measured = _own_text(request, device, keep_in)
        measured_source = "pydoc"
    elif require_source(request.source, with_images=True):  # True if its lines have images
        return list(_image_batches(request))
    else:
        tokens, measured = _drawn_text(request)
        measured_source = request.source

    batches: list[Tensor | dict[str, Any]] = list(tokens.split(request.batch_size))
    if measured is not None:
        batches.append(_measured_batch(request, measured, measured_source))
    return batches


def _measured_batch(request: PruneRequest, sequences: Tensor, text: str) -> dict[str, Any]:
    """Make the batch that the perplexity is measured on.

    `sequences` are ids [sequences, tokens], and `text` is the name of what they are of.
    """
    tokenizer = require_tokenizer(request.model)
    return {
        "input_ids": sequences,
        "held_out": text,
        "bytes_per_token": _bytes_per_token(tokenizer, sequences),
    }


def _batches_of_several_texts(request: PruneRequest) -> list[Tensor | dict[str, Any]]:
    """Return batches of all sources of the request: each is of one source, and the sources take turns.

    The last batch is to measure the perplexity on: it has as many further sequences of each source. It is missing if no
    perplexity is measured, or if a text is too short for them. ValueError that names the source if a text is too short
    to calibrate on. Texts of the Hub are downloaded into its cache.
    """
    assert request.batch_size is not None
    shares = equal_shares(request.num_sequences, len(request.sources))
    drawn = _drawn_texts(request, shares)

    batches_of_sources = []
    for source, share, tokens in zip(request.sources, shares, drawn, strict=True):
        to_calibrate_on = tokens[:share].split(request.batch_size)
        batches_of_sources.append([{"input_ids": ids, "source": source} for ids in to_calibrate_on])
    # The first batch of each source, then the second of each, ...
    turns = itertools.zip_longest(*batches_of_sources)
    batches: list[Tensor | dict[str, Any]] = [
        batch for turn in turns for batch in turn if batch is not None
    ]

    further = [tokens[share:] for share, tokens in zip(shares, drawn, strict=True)]
    measured = torch.stack(further, dim=1).flatten(0, 1)  # the sources take turns here, too
    if len(measured):
        batches.append(_measured_batch(request, measured, request.public_sources))
    return batches


def _drawn_texts(request: PruneRequest, shares: Sequence[int]) -> list[Tensor]:
    """Draw sequences of each source of the request: ids [sequences, tokens], the first ones to calibrate on.

    `shares` are how many sequences of each source are calibrated on. After these come further ones to measure the
    perplexity on, equally many of each source, if the run measures it and all texts are long enough. ValueError if a
    text is too short to calibrate on, or two are equal; of several, it names the source.
    """
    tokenizer = require_tokenizer(request.model)
    texts = [load_text(source, split="calibration") for source in request.sources]
    require_different_texts(request.sources, texts)

    draw = partial(_windows_of_texts, request, tokenizer, texts, shares)
    # All sources together give as many as a perplexity needs.
    wanted = math.ceil(_num_measured(request) / len(request.sources))
    for num_more in _numbers_to_try(request, wanted):
        with suppress(ValueError):  # the texts may be long enough for fewer sequences
            return draw(num_more)
    return draw(0)


def _windows_of_texts(
    request: PruneRequest,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[TextSource],
    shares: Sequence[int],
    num_more: int,
) -> list[Tensor]:
    """Draw the share of each of the request's texts, and `num_more` sequences of each besides, ids [sequences, tokens].

    ValueError if a text is too short; of several, it names the source.
    """
    drawn = []
    for source, text, share in zip(request.sources, texts, shares, strict=True):
        try:
            tokens = calibration_windows(
                tokenizer, text, share + num_more, _length(request), request.config.seed
            )
        except ValueError as error:
            if len(request.sources) == 1:
                raise
            raise ValueError(
                f"--calibration {source} gives {share} of {request.num_sequences} sequences: {error}"
            ) from error
        drawn.append(tokens)
    return drawn


def _bytes_per_token(tokenizer: PreTrainedTokenizerBase, sequences: Tensor) -> float:
    """Count the bytes of text in UTF-8, and divide them by the number of ids in `sequences`, int64 [sequences, tokens].

    `tokenizer` has made them; it is that of the model.
    Special tokens have no bytes, but count as tokens. A sequence may begin or end inside a character. Such a part of a
    character is no text, and has no bytes here.
    """
    texts = tokenizer.batch_decode(sequences, skip_special_tokens=True)
    # U+FFFD is what a part of a character becomes when it is decoded.
    num_bytes = sum(len(text.strip("\ufffd").encode()) for text in texts)
    return num_bytes / sequences.numel()


def _own_text(
    request: PruneRequest, device: str | None, keep_in: Path
) -> tuple[Tensor, Tensor | None]:
    """Let the model write text to calibrate on, and draw Python's documentation ("pydoc") to measure the perplexity on.

    The model's own text would be too easy to measure on. `device` is where the model writes, such as "cuda:0"; `None`:
    it is chosen. What it writes is also kept in a file in the folder `keep_in`.

    Returns:
        Token ids of both, int64 [sequences, tokens]; `None` instead of the second if no perplexity is measured, or the
        documentation is too short for it.
    """
    length = _length(request)
    tokens = calibration_tokens_by_name(
        request.model,
        "self",
        request.num_sequences,
        length,
        request.config.seed,
        device=device,
        dtype=request.dtype,
        keep_in=keep_in,
    )
    num_measured = _num_measured(request)
    if num_measured == 0:
        return tokens, None
    try:
        measured = calibration_windows(
            require_tokenizer(request.model),
            load_text("pydoc", split="test"),
            num_measured,
            length,
            request.config.seed,
        )
    except ValueError:  # the documentation is too short
        return tokens, None
    return tokens, measured


def _drawn_text(request: PruneRequest) -> tuple[Tensor, Tensor | None]:
    """Draw sequences of the request's text to calibrate on, and if possible some more to measure the perplexity on.

    Returns token ids of both, int64 [sequences, tokens]; `None` instead of the second ones if there are none. A text of
    the Hub is downloaded into its cache. ValueError if the text is too short to calibrate on.
    """
    (tokens,) = _drawn_texts(request, [request.num_sequences])
    to_calibrate_on = tokens[: request.num_sequences]
    further = tokens[request.num_sequences :]
    return to_calibrate_on, further if len(further) else None


def _image_batches(request: PruneRequest) -> list[dict[str, Any]]:
    """Draw sequences with images to calibrate on, and if possible some more to measure the perplexity on.

    Each sequence is a batch of its own: a dictionary of arguments of the model, such as `input_ids` [1, tokens] and
    `pixel_values`. Those to measure on come last, and have `held_out`. ValueError if there are too few lines to
    calibrate on. A warning says how many lines were skipped, because their images would have been cut.
    """
    assert request.source is not None
    processor = require_processor(request.model)
    lines = load_text(request.source, split="calibration", with_images=True)
    num_wanted = request.num_sequences

    draw = partial(
        image_sequences,
        processor,
        read_config(request.model),
        lines,
        length=_length(request),
        seed=request.config.seed,
    )
    for num_more in _numbers_to_try(request, _MEASURED_IMAGES):
        try:
            batches = draw(num_wanted + num_more)
        except ValueError:
            continue  # there may be enough lines for fewer sequences
        measured = [{**batch, "held_out": request.source} for batch in batches[num_wanted:]]
        return batches[:num_wanted] + measured
    return draw(num_wanted)


def _numbers_to_try(request: PruneRequest, number: int) -> tuple[int, ...]:
    """Return how many more sequences are drawn to measure the perplexity on: `number`, or 1 if these are too many.

    Empty if no more are drawn: if no perplexity is measured, or if the user's `held_out` asks for sequences to measure
    errors on, which then serve for both.
    """
    measures_perplexity = _num_measured(request) > 0
    has_held_out = request.config.held_out > 0
    if not measures_perplexity or has_held_out:
        return ()
    return (number, 1)


def _num_measured(request: PruneRequest) -> int:
    """Return how many sequences have the tokens that a perplexity needs; 0 if none is measured.

    None is measured if experts are removed: the perplexity of the dense model is measured at the end of the run, and
    its decoder layers are gone by then. `whole_parts` are the parts that the pattern removes, such as "experts:0.25";
    `None` if it removes none.
    """
    whole_parts = request.config.whole_parts
    if whole_parts is not None and any(part.kind == "experts" for part in whole_parts.shares):
        return 0
    return math.ceil(LEAST_TOKENS / _length(request))


def _length(request: PruneRequest) -> int:
    """Return the number of tokens in a sequence: the user's, or what is usual for the model."""
    if request.sequence_length is not None:
        return request.sequence_length
    return usual_length(read_config(request.model))
