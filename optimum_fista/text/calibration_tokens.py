"""Calibration tokens from any source a user can name, for a model in memory or for one given by its name.

A model may need hours to write its text. So the text is kept in the unfinished run, under a name made from the model's
files and the settings, and a run that is started again reads it there. What is written of an unfinished text is kept in
files beside it (`self_sampling`), until the text is whole.
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
    keep_as: Path | None = None,
) -> Tensor:
    """Make tokens to calibrate a dense model with: ids, int64 [num_samples, sequence_length], on the CPU.

    `source` is `"self"` (the model samples its own text), or one of `load_text`, such as "c4" or "notes.txt".
    `sequence_length=None` is 2048, or the model's maximum if that is shorter. The seed decides what is sampled or
    drawn; the global random state and the model stay as they are. The first `held_out` of the sequences are the same
    for every `num_samples`: the caller does not calibrate on these, but measures on them. `progress` shows a bar while
    the model writes. With a path `keep_as`, an interrupted call that samples resumes: what is written is kept in files
    whose names begin so, which the caller deletes. A text of the Hub is downloaded into its cache.
    """
    length = usual_length(model.config) if sequence_length is None else sequence_length
    if source != "self":
        text = load_text(source, split="calibration")
        return calibration_windows(tokenizer, text, num_samples, length, seed, held_out=held_out)

    # Number of sequences that are sampled with each seed: the held-out ones have a seed of their own.
    num_sampled = {seed: num_samples}
    if held_out:
        other_seed = seed ^ 1
        num_sampled = {seed: held_out, other_seed: num_samples - held_out}
    sampled = []
    for seed_of_part, number in num_sampled.items():
        kept_file = None if keep_as is None else _file_of_part(keep_as, seed_of_part)
        sequences = sample_text_from_model(
            model,
            tokenizer,
            num_samples=number,
            sequence_length=length,
            seed=seed_of_part,
            progress=progress,
            kept_file=kept_file,
        )
        sampled.append(sequences)
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

    `name` is a folder or a Hub id, `source` "self" or one of `load_text`. The first `held_out` of the `num_samples`
    sequences are to measure on, not to calibrate on, and are the same for every `num_samples`. Only if `source` is
    "self", the model is loaded, on `device` in `dtype`, and its text is written into the folder `keep_in`, which is
    made if it is missing. A run that is started again on the same files with the same settings reads the text there.
    Tokenizer, text and model of the Hub are downloaded into its cache.
    """
    if source != "self":
        tokenizer = require_tokenizer(name)
        text = load_text(source, split="calibration")
        return calibration_windows(
            tokenizer, text, num_samples, sequence_length, seed, held_out=held_out
        )

    # If the model's files change, the key does. A Hub id has no files here.
    files = sorted(
        (file.name, file.stat().st_size, file.stat().st_mtime_ns)
        for file in Path(name).glob("*")
        if file.is_file()
    )
    settings = [name, files, source, num_samples, sequence_length, seed, held_out, dtype]
    # Other settings have another file, so they do not overwrite this text.
    key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]
    kept_text = keep_in / SAMPLED_TEXTS.replace("*", key)  # "calibration-KEY.safetensors"
    # If the file is missing or damaged, the model writes.
    with suppress(FileNotFoundError, SafetensorError):
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
        keep_as=kept_text.with_suffix(""),
    )
    keep_in.mkdir(parents=True, exist_ok=True)
    write_file(kept_text, {"tokens": tokens})
    for part in keep_in.glob(f"{kept_text.stem}-*"):
        part.unlink()
    return tokens


def _file_of_part(beginning: Path, seed: int) -> Path:
    """Return the file for what is written of the sequences of a seed; `beginning` is what its name begins with."""
    return beginning.with_name(f"{beginning.name}-{seed}.safetensors")


def usual_length(config: PreTrainedConfig) -> int:
    """Default number of tokens in a sequence: 2048, or the model's context if that is shorter."""
    longest = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    if not longest:  # some configurations do not say it, or say 0
        return _USUAL_LENGTH
    return min(_USUAL_LENGTH, longest)
