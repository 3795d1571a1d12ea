"""A causal language model that is cut before its head, so that logits are in memory for a few positions at a time.

With a large vocabulary, logits take more memory than a small model. So everything that needs only their loss runs the
base model, the part before the head, on all positions at once, and the head on one *chunk* of positions after the
other. The gradients of the allocation (`model.sensitivity`), the perplexity (`evaluate.perplexity`) and the recovery
(`train.divergence`) do so by a `Predictor`. `model.sweep` computes the hidden states itself, and takes the size of its
chunks from here (`positions_per_chunk`).
"""

import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from optimum_fista.model.hooks import replaced_forwards
from optimum_fista.model.layers import token_limits
from optimum_fista.model.offload import execution_device

LOGITS_PER_CHUNK = 2**24  # that are in memory at a time: 67 MB in float32, several times
POSITIONS_ON_CPU = 16  # of logits in float32: as many as the caches of a CPU hold
_ROUNDING = 0.02  # of a product in bfloat16 by another algorithm, as a share of the largest logit


def positions_per_chunk(model: PreTrainedModel) -> int:
    """Count the positions that may have logits in memory at the same time. Changes nothing."""
    vocabulary, _ = token_limits(model)
    # Rounded up: the C library returns blocks of 32 MiB and more to the system at once, such as 2^24 logits of 16 bits.
    return max(POSITIONS_ON_CPU, math.ceil(LOGITS_PER_CHUNK / vocabulary))


class Predictor:
    """A causal language model that is cut before its head, so that only a few positions have logits at a time.

    `hidden_states` runs the base model, the part before the head. `logits` is all that the model does after it: head,
    bias, scale, soft-capping. If this gives other logits for a few tokens, the model can't be cut; then the "hidden
    states" are the whole logits, and `logits` returns them as they are.
    """

    def __init__(
        self, model: PreTrainedModel, kept_tokens: Tensor | None = None, *, whole: bool = False
    ) -> None:
        """Run the model on four tokens to find out if it can be cut, unless it has to stay `whole`.

        `kept_tokens` is for a student that lost tokens: of each of its tokens, the id in this model, int64 [vocabulary
        of the student]. `None`: both have the same tokens, or there is no student. The model itself is not changed.
        """
        self._model = model
        self._device = execution_device(model.get_input_embeddings())
        self._kept_tokens = None if kept_tokens is None else kept_tokens.to(self._device)
        # The class of the base model's output; `None` if the model is not cut.
        self._output_class: type[ModelOutput] | None = None
        if whole:
            return
        # A model may be code of other people: whatever fails there, it can't be cut.
        with suppress(Exception), torch.no_grad():
            self._output_class = self._output_class_if_cut()

    @property
    def is_cut(self) -> bool:
        """Whether the model is cut before its head."""
        return self._output_class is not None

    def bytes_beyond_a_chunk(self, num_positions: int, bytes_per_logit: int) -> int:
        """Count the bytes of logits at `num_positions` that are more than those of one chunk; 0 if the model is cut.

        Positions are tokens with logits; `bytes_per_logit` is what the caller holds for each logit. Changes nothing.

        A model that can't be cut takes so much more memory than was estimated. Whether it can be cut is known only
        after it has run: its class and its configuration do not tell, and without weights no logits can be compared.
        """
        if self.is_cut:
            return 0
        vocabulary, _ = token_limits(self._model)
        num_more = max(0, num_positions - positions_per_chunk(self._model))
        return num_more * vocabulary * bytes_per_logit

    def _output_class_if_cut(self) -> type[ModelOutput] | None:
        """The class of the base model's output, or `None` if cutting the model changes the logits.

        The whole model (`self._model`) runs on four tokens, and then only its head on two of these. Changes nothing:
        `self._output_class`, by which `logits` cuts the model, is set for the comparison, and is `None` after it.
        Errors of the model are not caught.
        """
        outputs: list[Any] = []  # filled by the hook

        def keep(_: Any, __: Any, output: Any) -> None:
            """Append the output of the base model to `outputs`; a forward hook."""
            outputs.append(output)

        ids = torch.arange(4, device=self._device)[None]  # any tokens, [1, 4]
        with self._model.get_decoder().register_forward_hook(keep):
            expected = self._model(input_ids=ids, use_cache=False).logits[0]
        (output,) = outputs  # the base model has run once

        output_class: type[ModelOutput] = type(output)
        self._output_class = output_class  # from here on `logits` runs the head
        try:
            # Not from the first position on: a head that mixes positions or counts them is noticed.
            middle = slice(1, 3)
            logits = self.logits(output.last_hidden_state[0, middle])
            # If the student lost tokens of this model, `logits` has only the columns of those that it kept.
            difference = logits - self._of_kept(expected[middle])
        finally:
            self._output_class = None
        # A head that is called on two positions may round otherwise than on four.
        is_same = difference.abs().max() <= _ROUNDING * expected.abs().max()
        return output_class if is_same else None

    def hidden_states(self, ids: Tensor, wrapped: Any = None) -> Tensor:
        """Run the model, and return the hidden states that enter the head at all tokens but the last of each sequence.

        Returns [batch * (length - 1), hidden], with their graph. If the model can't be cut, these are whole logits
        [batch * (length - 1), vocabulary]. During the call the base model has a hook.

        Args:
            ids: Token ids of the student, int64 [batch, length]. If `self._kept_tokens` is set, the model runs on its
                own ids for them.
            wrapped: The model in a wrapper such as DistributedDataParallel, which is then called instead of the model.
        """
        own_ids = ids if self._kept_tokens is None else self._kept_tokens[ids]
        model = self._model if wrapped is None else wrapped
        return self.hidden_states_of(
            lambda _: model(input_ids=own_ids, use_cache=False),
        )

    def hidden_states_of(self, run: Callable[[PreTrainedModel], Any]) -> Tensor:
        """Return what enters the head at all tokens but the last of each sequence, in a pass that `run` makes.

        `run` gets the model, calls it once on any arguments, and returns its output. The result is
        [batch * (length - 1), hidden]; if the model can't be cut (`self.is_cut`), it is whole logits
        [batch * (length - 1), vocabulary]. During the call the base model has a hook.
        """
        states: list[Tensor] = []  # filled by the hook

        def keep(_: Any, __: Any, output: Any) -> Any:
            """Append all hidden states to `states`, and let the head compute logits for one token only.

            A forward hook of the base model, whose `output` it replaces.
            """
            states.append(output.last_hidden_state)  # [batch, length, hidden]
            # A copy of one sequence's first token: for a slice of several tokens, PyTorch would copy the head's weight.
            first = output.last_hidden_state[:1, :1].clone(memory_format=torch.contiguous_format)
            return type(output)(last_hidden_state=first)

        if self.is_cut:
            with self._model.get_decoder().register_forward_hook(keep):
                run(self._model)
            (all_states,) = states  # the base model has run once
        else:
            all_states = run(self._model).logits
        # [batch, length, n] -> [batch * (length - 1), n]
        return all_states[:, :-1].flatten(0, 1)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [positions, vocabulary of the student] for `hidden` [positions, hidden], rows of `hidden_states`.

        `self._output_class` is the class of what the base model returns. During the call, the forward pass of the base
        model is replaced: it returns `hidden`, so that the model runs its head alone. Of a model that can't be cut
        (`self._output_class` is `None`), `hidden` are the logits already. Columns of tokens that the student does not
        have are left out (`_of_kept`).
        """
        if self._output_class is None:
            return self._of_kept(hidden)
        # [positions, hidden] -> [1, positions, hidden], a batch of one sequence
        output = self._output_class(last_hidden_state=hidden[None])
        # any ids: nothing reads them
        any_ids = torch.zeros(1, len(hidden)).long().to(hidden.device)
        with replaced_forwards([self._model.get_decoder()], [lambda *_, **__: output]):
            logits = self._model.forward(input_ids=any_ids, use_cache=False).logits[0]
        return self._of_kept(logits)

    def _of_kept(self, logits: Tensor) -> Tensor:
        """The columns of logits [positions, vocabulary] that belong to the student's tokens."""
        return logits if self._kept_tokens is None else logits[:, self._kept_tokens]

    def chunks(self, positions: int) -> Iterator[slice]:
        """Divide a number of positions into slices (chunks) whose logits are in memory at the same time."""
        size = positions_per_chunk(self._model)
        return (slice(start, start + size) for start in range(0, positions, size))
