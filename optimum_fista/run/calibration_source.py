"""Calibration tokens from any source a user can name."""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from optimum_fista.run.self_sampling import sample_text_from_model
from optimum_fista.run.text import load_text
from optimum_fista.run.windows import calibration_windows

_USUAL_LENGTH = 2048


def calibration_tokens(
    source: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    num_samples: int,
    sequence_length: int | None = None,
    seed: int = 0,
) -> Tensor:
    """Token ids int64 [num_samples, sequence_length] to calibrate a model with.

    Args:
        source: `"self"` (the model samples its own text), or a source of `run.text.load_text`.
        model: The model to prune, still dense.
        tokenizer: Its tokenizer.
        num_samples: Number of sequences.
        sequence_length: Tokens a sequence; `None`: 2048, or the model's maximum where that is shorter.
        seed: Seed of the sampling.

    Raises:
        ValueError: If the source is unknown, too short, or a number is not positive.
    """
    if sequence_length is None:
        sequence_length = min(_USUAL_LENGTH, getattr(model.config, "max_position_embeddings", None) or _USUAL_LENGTH)
    for name, value in (("num_samples", num_samples), ("sequence_length", sequence_length)):
        if value < 1:
            raise ValueError(f"{name}={value}: pass at least 1.")
    if source == "self":
        return sample_text_from_model(model, tokenizer, num_samples, sequence_length, seed)
    return calibration_windows(tokenizer, load_text(source, "calibration"), num_samples, sequence_length, seed)
