"""Errors of models on sequences explained: sequences that are too long, gradients that can't be computed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from optimum_fista.model.architecture import position_limit
from optimum_fista.run.memory import is_out_of_memory


@contextmanager
def explained_length(model: PreTrainedModel, length: int, name: str) -> Iterator[None]:
    """Explain the error of a model that fails inside on sequences of `length` tokens, which the argument `name` holds.

    None is refused beforehand: models without a table of positions can be measured on longer ones than they were
    trained on.
    """
    try:
        yield
    except (IndexError, RuntimeError) as error:
        limit = position_limit(model)
        if limit is None or length <= limit or is_out_of_memory(error):
            raise
        raise ValueError(
            f"{name} holds sequences of {length} tokens, and the model fails on them ({error}): pass at most "
            f"{limit}, its max_position_embeddings (--sequence-length {limit})."
        ) from error


@contextmanager
def explained_gradients(taker: str, instead: str) -> Iterator[None]:
    """Explain errors of a model whose gradients are taken, and what to pass instead of what takes them."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise ValueError(
                f"{taker} takes gradients of the loss, and they can't be computed: {error}. If the model runs but "
                f"can't be differentiated, pass {instead}."
            ) from error
        # It is one sequence at a time already.
        raise torch.OutOfMemoryError(
            f"the device ran out of memory in the gradients of the loss on one sequence: pass {instead} or shorter "
            f"sequences (--sequence-length) [{error}]"
        ) from error
