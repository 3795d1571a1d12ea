"""Calibration tokens from any source a user can name, for a model in memory or for one given by its name.

A model may need hours to write its text. So the text is kept in the unfinished run, under a name made from the model's
files and the settings, and a run that is started again reads it there.
"""

import hashlib
import json
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from optimum_fista.atomic import write_file
from optimum_fista.folder.output import SAMPLED_TEXTS
from optimum_fista.source.loading import load_model, require_tokenizer
from optimum_fista.text.self_sampling import sample_text_from_model
from optimum_fista.text.sources import load_text
from optimum_fista.text.windows import calibration_windows

_USUAL_LENGTH = 2048  # as in SparseGPT and Wanda


def calibration_tokens(
    source: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    num_samples: int,
    sequence_length: int | None = None,
    seed: int = 0,
    *,
    held_out: int = 0,
    progress: bool = True,
) -> Tensor:
    """Token ids int64 [num_samples, sequence_length] to calibrate a model with, which is still dense.

    `source` is `"self"` (the model samples its own text), or one of `load_text`. `sequence_length=None` is 2048, or the
    model's maximum if that is shorter. The seed decides what is sampled or drawn. The first `held_out` sequences are
    the same for every `num_samples`.
    """
    length = usual_length(model.config) if sequence_length is None else sequence_length
    if source != "self":
        text = load_text(source, "calibration")
        return calibration_windows(tokenizer, text, num_samples, length, seed, held_out=held_out)

    # Number of sequences that are sampled with each seed: the held-out ones have a seed of their own.
    counts = {seed: num_samples}
    if held_out:
        counts = {seed: held_out, seed ^ 1: num_samples - held_out}
    sampled = [
        sample_text_from_model(model, tokenizer, count, length, seed_of_part, progress)
        for seed_of_part, count in counts.items()
    ]
    return torch.cat(sampled)


def calibration_tokens_by_name(
    name: str,
    source: str,
    num_samples: int,
    sequence_length: int,
    seed: int,
    *,
    held_out: int = 0,
    device: str | None = None,
    dtype: str = "auto",
    keep_in: Path,
    progress: bool = True,
) -> Tensor:
    """Make tokens for a model given by name: int64 [num_samples, sequence_length], as `calibration_tokens` does.

    The model is loaded, on `device` in `dtype`, only if it samples its own text. `keep_in` is a folder for sampled
    text, which is written there: a run that is started again on the same files reads it.
    """
    if source != "self":
        tokenizer = require_tokenizer(name)
        text = load_text(source, "calibration")
        return calibration_windows(
            tokenizer, text, num_samples, sequence_length, seed, held_out=held_out
        )

    files = sorted(
        (file.name, file.stat().st_size, file.stat().st_mtime_ns)
        for file in Path(name).glob("*")
        if file.is_file()
    )
    settings = [name, files, source, num_samples, sequence_length, seed, held_out, dtype]
    # other settings do not overwrite this text
    key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]
    kept_text = keep_in / SAMPLED_TEXTS.replace("*", key)
    with suppress(FileNotFoundError, SafetensorError):  # if it is damaged, the model writes again
        return load_file(kept_text)["tokens"]

    model, own_tokenizer = load_model(name, device=device, dtype=dtype)
    tokens = calibration_tokens(
        source,
        model,
        own_tokenizer,
        num_samples,
        sequence_length,
        seed,
        held_out=held_out,
        progress=progress,
    )
    keep_in.mkdir(parents=True, exist_ok=True)
    write_file(kept_text, {"tokens": tokens})
    return tokens


def usual_length(config: PreTrainedConfig) -> int:
    """Default number of tokens in a sequence: 2048, or the model's context if that is shorter."""
    longest = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return min(_USUAL_LENGTH, longest or _USUAL_LENGTH)
