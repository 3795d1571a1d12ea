"""Perplexity of a causal language model on windows of tokens.

This is the protocol of the pruning literature: windows do not overlap, and each is scored without the text before it.
Perplexities are comparable only on the same windows, so a result has their number and length. Bits per
byte compare models with different vocabularies, on windows of the same stretch of text.

`text.windows.evaluation_windows` cuts a text into windows: token ids [N, T], N windows of T tokens.
"""

import math
import time
from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from optimum_fista.bars import tqdm
from optimum_fista.memory import is_out_of_memory
from optimum_fista.model.hooks import evaluation_mode
from optimum_fista.model.layers import token_limits
from optimum_fista.model.offload import execution_device, onloaded
from optimum_fista.model.predictor import Predictor, positions_per_chunk
from optimum_fista.text.text_source import TextSource
from optimum_fista.text.windows import count_bytes

POSITIONS_PER_CHUNK = 256
"""Positions whose logits are copied to float32 at a time, at most."""


@dataclass(frozen=True)
class PerplexityResult:
    """Perplexity and what it was measured on."""

    # exp(mean negative log-likelihood of a predicted token)
    perplexity: float
    # N
    num_windows: int
    # N (T - 1): the first token of a window is not predicted
    num_tokens: int
    # T
    sequence_length: int
    # Wall time.
    seconds: float
    # Of the text, in UTF-8, that the predicted tokens stand for (`count_bytes`); None if it is not known.
    num_bytes: int | None = None

    @property
    def bits_per_byte(self) -> float | None:
        """Sum of -log2 p over the predicted tokens / `num_bytes`; `None` if these are not known."""
        if not self.num_bytes:
            return None
        return math.log2(self.perplexity) * self.num_tokens / self.num_bytes


def evaluate_perplexity(
    model: PreTrainedModel,
    windows: torch.Tensor,
    *,
    batch_size: int = 1,
    progress: bool = True,
    text: TextSource | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> PerplexityResult:
    """Measure exp(-1 / (N (T - 1)) sum_n sum_{t >= 1} log p(w_nt | w_n0 ... w_n,t-1)).

    Log-likelihoods are computed in float32 and summed in float64. The model is in evaluation mode meanwhile; its modes
    (training or evaluation) are restored afterwards. Nothing else is changed.

    Args:
        model: Causal language model, on any device.
        windows: Token ids, integer, [N, T].
        batch_size: Windows per forward pass. If they have many logits, these are in memory for a few positions at a
            time (`Predictor`).
        progress: Show a progress bar.
        text: Where the windows come from, for the result's `bits_per_byte`; `None`: it is not computed.
        tokenizer: The one that made the windows of `text`.

    Raises:
        ValueError: If `windows` has another shape, or ids or lengths that the model can't take, or if the model gives
            NaN.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}; pass 1 or more.")
    _check_windows(model, windows)

    started = time.perf_counter()
    device = execution_device(model.get_input_embeddings())
    num_windows, sequence_length = windows.shape
    total = 0.0  # of -log p over all predicted tokens
    head = model.get_output_embeddings()
    has_few_logits = batch_size * sequence_length <= positions_per_chunk(model)
    with (
        evaluation_mode(model),
        torch.no_grad(),
        onloaded([head], read_only=True),
        tqdm(total=num_windows, desc="Perplexity", unit="window", disable=not progress) as bar,
    ):
        predictor = Predictor(model, whole=has_few_logits)
        for first in range(0, num_windows, batch_size):
            ids = windows[first : first + batch_size].to(device=device, dtype=torch.int64)
            total += _checked_log_likelihood(model, predictor, ids, first)
            bar.update(len(ids))

    num_tokens = num_windows * (sequence_length - 1)
    num_bytes = None
    if text is not None and tokenizer is not None:
        num_bytes = count_bytes(tokenizer, text, windows)
    return PerplexityResult(
        # `math.exp` would raise an error for a large number, for which this gives infinity.
        perplexity=torch.tensor(total / num_tokens, dtype=torch.float64).exp().item(),
        num_windows=num_windows,
        num_tokens=num_tokens,
        sequence_length=sequence_length,
        seconds=time.perf_counter() - started,
        num_bytes=num_bytes,
    )


def _check_windows(model: PreTrainedModel, windows: torch.Tensor) -> None:
    """Refuse windows that are no token ids [N, T] of the model (ValueError)."""
    is_matrix = windows.ndim == 2 and windows.shape[0] >= 1 and windows.shape[1] >= 2
    if not is_matrix or windows.is_floating_point():
        raise ValueError(
            f"windows has shape {list(windows.shape)} and dtype {windows.dtype}; pass integer token ids [N, T] of at "
            "least one window of at least two tokens."
        )
    vocabulary, _ = token_limits(model)
    smallest = int(windows.min())
    largest = int(windows.max())
    if smallest < 0 or largest >= vocabulary:
        raise ValueError(
            f"windows holds token ids from {smallest} to {largest}, the model knows 0 to {vocabulary - 1}; pass "
            "windows made with the tokenizer of this model."
        )


def _checked_log_likelihood(
    model: PreTrainedModel, predictor: Predictor, ids: torch.Tensor, first: int
) -> float:
    """Sum -log p over the predicted tokens of a batch (`_negative_log_likelihood`).

    If the model fails because it can't take so many tokens, the error says so (ValueError).

    Args:
        model: In evaluation mode.
        predictor: That of the model.
        ids: Token ids of B windows, int64 [B, T], on the model's device.
        first: Number of the first of these windows, for errors.
    """
    try:
        return _negative_log_likelihood(predictor, ids, first)
    except (IndexError, RuntimeError) as error:
        # The limit is asked only after a failure: a model without a table of positions takes longer windows, too.
        _, limit = token_limits(model)
        length = ids.shape[1]
        is_too_long = limit is not None and length > limit
        if not is_too_long or is_out_of_memory(error):
            raise
        raise ValueError(
            f"windows holds sequences of {length} tokens, and the model fails on them ({error}): pass "
            f"at most {limit}, its max_position_embeddings (--sequence-length {limit})."
        ) from error


def _negative_log_likelihood(predictor: Predictor, ids: torch.Tensor, first: int) -> float:
    """Run the model of a predictor and sum -log p over the predicted tokens, in float64.

    Args:
        predictor: Its model is in evaluation mode.
        ids: Token ids of B windows, int64 [B, T], on the model's device.
        first: Number of the first of these windows, for errors.
    """
    # [B * (T - 1), hidden]: nothing comes after the last position of a window, so it predicts nothing.
    entering_head = predictor.hidden_states(ids)
    # Position t predicts token t + 1.
    targets = ids[:, 1:].flatten().to(entering_head.device)
    total = torch.zeros((), dtype=torch.float64, device=entering_head.device)
    for chunk in predictor.chunks(len(targets)):  # slices of a few positions
        total += _sum_of_losses(predictor, entering_head[chunk], targets[chunk])
    # Once for a batch, because each look at a number waits for the device.
    if total.isnan():
        raise ValueError(
            f"model gives NaN logits in windows {first} to {first + len(ids) - 1}: look for NaN in its weights, or for "
            "overflow in float16."
        )
    return total.item()


def _sum_of_losses(
    predictor: Predictor, entering_head: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    """Run the head of a model at some positions, and sum -log p of the tokens that follow; a scalar, float64.

    The logits of all these positions are in memory until this returns. Their copies in float32 are made for a few
    positions at a time.

    Args:
        predictor: Its model has the head.
        entering_head: [positions, hidden]: what `predictor.hidden_states` has returned for these positions.
        targets: The token that follows each position, int64 [positions], on the device of `entering_head`.
    """
    logits = predictor.logits(entering_head)  # [positions, vocabulary], on the device of the head
    total = torch.zeros((), dtype=torch.float64, device=entering_head.device)
    for start in range(0, len(logits), POSITIONS_PER_CHUNK):
        rows = slice(start, start + POSITIONS_PER_CHUNK)
        targets_of_rows = targets[rows].to(logits.device)  # the head may be on another device
        losses = cross_entropy(logits[rows].float(), targets_of_rows, reduction="none")
        total += losses.double().sum().to(total.device)
    return total
