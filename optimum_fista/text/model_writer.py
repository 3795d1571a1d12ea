"""A model that writes: it draws every next token from its own distribution.

`self_sampling` makes one `ModelWriter` for all text of a model, and calls `write` for each batch of beginnings.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
)
from transformers.generation.streamers import BaseStreamer

from optimum_fista.bars import tqdm
from optimum_fista.model.offload import execution_device


class ModelWriter:
    """Lets a model continue texts at temperature 1, from the whole distribution; EOS does not end a text.

    `generator` draws, on the CPU, so the same seed gives the same draws on every device. `bar` counts the tokens.
    """

    def __init__(self, model: PreTrainedModel, generator: torch.Generator, bar: tqdm) -> None:
        """Keep the arguments. The state of `generator` and the number of `bar` will move on with every token."""
        self._model = model
        self._generator = generator
        self._bar = bar

    def write(self, ids: Tensor, num_new_tokens: int) -> Tensor:
        """Continue each row of `ids`, int64 [texts, ids]; returns int64 [texts, ids + new tokens], on the CPU.

        The model's generation config is as before at the end. ValueError if the model's logits are NaN.
        """
        if num_new_tokens == 0:
            return ids
        ids = ids.to(execution_device(self._model.get_input_embeddings()))
        with _default_generation(self._model):
            written: Tensor = self._model.generate(  # type: ignore[operator]
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                # The draw leaves one token that `generate` can take. Its own draw (do_sample) makes a random number
                # for every token of the vocabulary, which takes longer than the forward pass of a small model.
                logits_processor=LogitsProcessorList([_Draw(self._generator)]),
                do_sample=False,
                max_new_tokens=num_new_tokens,
                use_cache=True,
                streamer=_Counter(self._bar),
            )
        return written.cpu()


class _Draw(LogitsProcessor):
    """Draws the next token of each text, and leaves only that one to `generate`."""

    def __init__(self, generator: torch.Generator) -> None:
        """Draw with `generator`, on the CPU."""
        self._generator = generator

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return `scores`, float32 [texts, vocabulary], overwritten: 0 at the token that was drawn, else -infinity.

        ValueError if the model's logits are NaN.
        """
        sums = scores.softmax(dim=-1).cumsum(dim=-1)
        if bool(sums[:, -1].isnan().any()):
            raise ValueError(
                "the model's logits are NaN or Inf, so it can't write a text: look for NaN in its weights, load it in "
                "float32 (--dtype float32), or pass a text (--calibration)."
            )

        # A token is drawn if the random number falls between the sum of the probabilities before it and the sum with
        # it. The number is above 0, so a token of probability 0 is never drawn.
        uniform = 1 - torch.rand(len(scores), 1, generator=self._generator)
        # Rounded sums do not end at 1 exactly.
        drawn = torch.searchsorted(sums, uniform.to(scores.device) * sums[:, -1:])
        return scores.fill_(-torch.inf).scatter_(dim=1, index=drawn, value=0.0)


class _Counter(BaseStreamer):
    """Shows how many tokens `generate` has written."""

    def __init__(self, bar: tqdm) -> None:
        """Count on `bar`, which stays open."""
        self._bar = bar
        self._has_prompt = False  # whether `put` was called with the prompt

    def put(self, value: Tensor) -> None:
        """Count the new tokens; the first call brings the prompt."""
        if self._has_prompt:
            self._bar.update(value.numel())
        self._has_prompt = True

    def end(self) -> None:
        """Nothing to do: one bar serves all batches."""


@contextmanager
def _default_generation(model: PreTrainedModel) -> Iterator[None]:
    """Have `generate` ignore the model's EOS, penalties and lengths, inside the context."""
    settings = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = settings
