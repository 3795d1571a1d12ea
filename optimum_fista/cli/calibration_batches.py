"""The batches of a run of `optimum-fista prune`: calibration text, and more text to measure the perplexity on.

A batch is a tensor of token ids, [sequences, tokens], or a dictionary of arguments of the model. A dictionary with
`held_out`, the name of a text, is not calibrated on: the perplexity is measured on it. A *source* is what the user
passed as `--calibration`: "self" (the model writes the text), a file, or the name of a text such as "c4".
"""

from __future__ import annotations

import math
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from optimum_fista.cli.prune_request import PruneRequest
from optimum_fista.source.loading import read_config, require_processor, require_tokenizer
from optimum_fista.text.calibration_tokens import calibration_tokens_by_name, usual_length
from optimum_fista.text.images import image_sequences
from optimum_fista.text.sources import load_text, require_source
from optimum_fista.text.windows import calibration_windows
from optimum_fista.verdict import LEAST_TOKENS

# Sequences with images that the perplexity is measured on: they have 300 tokens or more.
_MEASURED_IMAGES = 16


def calibration_batches(
    request: PruneRequest, device: str | None, keep_in: Path
) -> list[Tensor | dict[str, Any]]:
    """Return the calibration batches, and a last batch to measure the perplexity on if the text is long enough.

    Args:
        request: What the user asked for, with a source and a batch size (`PruneRequest.with_choices`).
        device: Where the model writes the text, if the source is "self".
        keep_in: Folder in which such a text is written to a file, for a run that resumes.
    """
    assert request.source is not None
    assert request.batch_size is not None
    if request.source == "self":
        tokens, measured = _own_text(request, device, keep_in)
        measured_source = "pydoc"
    elif require_source(request.source, with_images=True):
        return _image_batches(request)
    else:
        tokens, measured = _drawn_text(request)
        measured_source = request.source

    batches: list[Tensor | dict[str, Any]] = list(tokens.split(request.batch_size))
    if measured is not None:
        tokenizer = require_tokenizer(request.model)
        batches.append(
            {
                "input_ids": measured,
                "held_out": measured_source,
                "bytes_per_token": _bytes_per_token(tokenizer, measured),
            }
        )
    return batches


def _bytes_per_token(tokenizer: PreTrainedTokenizerBase, sequences: Tensor) -> float:
    """Count the bytes of text in UTF-8, and divide them by the number of ids in `sequences` [sequences, tokens].

    Special tokens have no bytes, but count as tokens.
    A sequence may begin or end inside a character. Such a part of a character, which is no text, has no bytes here.
    """
    texts = tokenizer.batch_decode(sequences, skip_special_tokens=True)
    # U+FFFD is what a part of a character becomes.
    num_bytes = sum(len(text.strip("\ufffd").encode()) for text in texts)
    return num_bytes / sequences.numel()


def _own_text(
    request: PruneRequest, device: str | None, keep_in: Path
) -> tuple[Tensor, Tensor | None]:
    """Let the model write text, and draw Python's documentation to measure the perplexity on.

    The model's own text would be too easy for that. Returns token ids [sequences, tokens] of both; `None` instead of
    the documentation if it is too short for the sequence length. The text is also kept in a file in `keep_in`.
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
    measured = None
    with suppress(ValueError):
        measured = calibration_windows(
            require_tokenizer(request.model),
            load_text("pydoc", "test"),
            _num_measured(request),
            length,
            request.config.seed,
        )
    return tokens, measured


def _drawn_text(request: PruneRequest) -> tuple[Tensor, Tensor | None]:
    """Draw sequences of the request's text to calibrate on, and if possible some more to measure the perplexity on.

    Returns token ids [sequences, tokens] of both; `None` instead of the second ones if there are none.
    """
    assert request.source is not None
    tokenizer = require_tokenizer(request.model)
    text = load_text(request.source, "calibration")
    num_wanted = request.num_sequences

    def draw(number: int) -> Tensor:
        """Draw `number` sequences at random places of `text`, as the `request` says; token ids [number, tokens].

        `tokenizer` is that of the model. ValueError if the text is too short.
        """
        return calibration_windows(tokenizer, text, number, _length(request), request.config.seed)

    for num_more in _numbers_to_try(request, _num_measured(request)):
        with suppress(ValueError):  # the text may be long enough for fewer sequences
            tokens = draw(num_wanted + num_more)
            return tokens[:num_wanted], tokens[num_wanted:]
    return draw(num_wanted), None


def _image_batches(request: PruneRequest) -> list[Tensor | dict[str, Any]]:
    """Draw sequences with images to calibrate on, and if possible some more to measure the perplexity on.

    Each sequence is a batch of its own: a dictionary of arguments of the model. Those to measure on have `held_out`.
    """
    assert request.source is not None
    processor = require_processor(request.model)
    lines = load_text(request.source, "calibration", with_images=True)
    num_wanted = request.num_sequences

    def draw(number: int) -> list[dict[str, Any]]:
        """Draw `number` sequences of random `lines`, as the `request` says; ValueError if there are too few lines.

        Each is a dictionary of arguments, as `processor`, which is that of the model, makes them.
        """
        return image_sequences(
            processor,
            read_config(request.model),
            lines,
            number,
            _length(request),
            request.config.seed,
        )

    for num_more in _numbers_to_try(request, _MEASURED_IMAGES):
        with suppress(ValueError):  # there may be enough lines for fewer sequences
            batches = draw(num_wanted + num_more)
            measured = [{**batch, "held_out": request.source} for batch in batches[num_wanted:]]
            return [*batches[:num_wanted], *measured]
    return [*draw(num_wanted)]


def _numbers_to_try(request: PruneRequest, number: int) -> tuple[int, ...]:
    """Return the numbers of sequences to measure the perplexity on that are tried in turn: `number`, then 1.

    Returns none if no further sequences are drawn: if experts are removed (the model that is measured would be gone by
    then), or if the user's `held_out` asks for sequences to measure errors on, which then serve for both.
    """
    has_held_out = request.config.held_out > 0
    if _num_measured(request) == 0 or has_held_out:
        return ()
    return (number, 1)


def _num_measured(request: PruneRequest) -> int:
    """Count the sequences that have enough tokens for a perplexity; 0 if experts are removed: it is not measured."""
    whole_parts = request.config.whole_parts
    if whole_parts is not None and any(part.kind == "experts" for part in whole_parts.shares):
        return 0
    return math.ceil(LEAST_TOKENS / _length(request))  # tokens that a perplexity needs


def _length(request: PruneRequest) -> int:
    """Return the number of tokens in a sequence: the user's, or what is usual for the model."""
    if request.sequence_length is not None:
        return request.sequence_length
    return usual_length(read_config(request.model))
