"""The batches of a run of `optimum-fista prune`: calibration text, and more text to measure the perplexity on."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

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
    """Return the calibration batches, with text to measure the perplexity on if there is some.

    Args:
        request: With a source and a batch size.
        device: To write the text on, if the model writes it.
        keep_in: Folder in which text that the model writes is kept, for a run that resumes.
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

    batches: list[Tensor | dict[str, Any]] = [*tokens.split(request.batch_size)]
    if measured is not None:
        tokenizer = require_tokenizer(request.model)
        text = "".join(tokenizer.batch_decode(measured, skip_special_tokens=True))
        batches.append(
            {
                "input_ids": measured,
                "held_out": measured_source,
                "bytes_per_token": len(text.encode()) / measured.numel(),
            }
        )
    return batches


def _own_text(
    request: PruneRequest, device: str | None, keep_in: Path
) -> tuple[Tensor, Tensor | None]:
    """Text that the model writes, [sequences, tokens], and Python's documentation to measure the perplexity on.

    The model's own text would be too easy for that. None if the documentation is too short for the sequence length.
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
    """Sequences [sequences, tokens] of a text, and as many more as it has to measure the perplexity on; None: none."""
    assert request.source is not None
    tokenizer = require_tokenizer(request.model)
    text = load_text(request.source, "calibration")
    wanted = request.num_sequences

    def draw(number: int) -> Tensor:
        return calibration_windows(tokenizer, text, number, _length(request), request.config.seed)

    for num_more in _numbers_to_try(request, _num_measured(request)):
        with suppress(ValueError):  # the text may be long enough for fewer sequences
            tokens = draw(wanted + num_more)
            return tokens[:wanted], tokens[wanted:]
    return draw(wanted), None


def _image_batches(request: PruneRequest) -> list[Tensor | dict[str, Any]]:
    """Sequences with images, each a batch of its own, and some more to measure the perplexity on."""
    assert request.source is not None
    processor = require_processor(request.model)
    lines = load_text(request.source, "calibration", with_images=True)
    wanted = request.num_sequences

    def draw(number: int) -> list[dict[str, Any]]:
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
            batches = draw(wanted + num_more)
            measured = [{**batch, "held_out": request.source} for batch in batches[wanted:]]
            return [*batches[:wanted], *measured]
    return [*draw(wanted)]


def _numbers_to_try(request: PruneRequest, number: int) -> tuple[int, ...]:
    """How many sequences to measure the perplexity on, the best number first; none if that is not needed.

    It is not needed if experts are removed (the model that is measured would be gone by then), or if errors are
    measured on sequences of their own (`held_out`), which serve for both.
    """
    if _num_measured(request) == 0 or request.config.held_out:
        return ()
    return (number, 1)


def _num_measured(request: PruneRequest) -> int:
    """Sequences that have enough tokens for a perplexity; 0 if it is not measured."""
    whole_parts = request.config.whole_parts
    if whole_parts is not None and any(part.kind == "experts" for part in whole_parts.shares):
        return 0
    return -(-LEAST_TOKENS // _length(request))  # rounded up


def _length(request: PruneRequest) -> int:
    """Tokens in a sequence."""
    return request.sequence_length or usual_length(read_config(request.model))
