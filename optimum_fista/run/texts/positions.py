"""Sequences that are longer than a model has positions for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PreTrainedModel

from optimum_fista.run.memory import is_out_of_memory


@contextmanager
def explained_length(model: PreTrainedModel, length: int, name: str) -> Iterator[None]:
    """Explain the error of a model that fails inside on sequences that are too long for it.

    None is refused beforehand: models without a table of positions may run on longer ones than they were trained on.

    Args:
        model: The model.
        length: Tokens of the longest sequence.
        name: The argument that holds it.

    Raises:
        ValueError: If the model fails and the sequence is longer than its `max_position_embeddings`.
    """
    try:
        yield
    except (IndexError, RuntimeError) as error:
        limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        if limit is None or length <= limit or is_out_of_memory(error):
            raise
        raise ValueError(
            f"{name} holds sequences of {length} tokens, and the model fails on them ({error}): pass at most "
            f"{limit}, its max_position_embeddings (--sequence-length {limit})."
        ) from error
