"""Perplexity of a causal language model on windows of tokens.

This is the protocol of the pruning literature: windows do not overlap, and each is scored without the text before it.
Perplexities are comparable only on the same windows, so a result has their number and length. Bits per
byte compare models with different vocabularies, on windows of the same stretch of text.
"""

import math
import time
from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from optimum_fista.memory import is_out_of_memory
from optimum_fista.model.hooks import evaluation_mode
from optimum_fista.model.layers import token_limits
from optimum_fista.model.offload import execution_device
from optimum_fista.text.sources import TextSource
from optimum_fista.text.windows import count_bytes

POSITIONS_PER_CHUNK = (
    256  # copied to float32 at a time: 131 MB of logits for a vocabulary of 128 thousand
)


@dataclass(frozen=True)
class PerplexityResult:
    """Perplexity and what it was measured on."""

    perplexity: float  # exp(mean negative log-likelihood of a predicted token)
    num_windows: int  # N
    num_tokens: int  # N (T - 1): the first token of a window is not predicted
    sequence_length: int  # T
    seconds: float
    num_bytes: int | None = (
        None  # of the text, in UTF-8, that the predicted tokens stand for (`count_bytes`)
    )

    @property
    def bits_per_byte(self) -> float | None:
        """Sum of -log2 p over the predicted tokens / `num_bytes`; `None` if these are not known."""
        return (
            math.log2(self.perplexity) * self.num_tokens / self.num_bytes
            if self.num_bytes
            else None
        )


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

    Log-likelihoods are computed in float32 and summed in float64. The model's modes (training or evaluation) are
    restored afterwards.

    Args:
        model: Causal language model, on any device.
        windows: Token ids, integer, [N, T].
        batch_size: Windows per forward pass. The logits of a batch are held at once.
        progress: Show a progress bar.
        text: Where the windows come from, for the result's `bits_per_byte`.
        tokenizer: The one that made the windows of `text`.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}; pass 1 or more.")
    _check_windows(model, windows)
    device = execution_device(model.get_input_embeddings())
    num_windows, sequence_length = windows.shape
    started = time.perf_counter()
    total = 0.0
    with (
        evaluation_mode(model),
        torch.no_grad(),
        tqdm(total=num_windows, desc="Perplexity", unit="window", disable=not progress) as bar,
    ):
        for first in range(0, num_windows, batch_size):
            ids = windows[first : first + batch_size].to(device=device, dtype=torch.int64)
            try:
                total += _negative_log_likelihood(model, ids, first)
            except (IndexError, RuntimeError) as error:
                _, limit = token_limits(
                    model
                )  # only after a failure: without a table of positions longer windows work
                if limit is None or sequence_length <= limit or is_out_of_memory(error):
                    raise
                raise ValueError(
                    f"windows holds sequences of {sequence_length} tokens, and the model fails on them ({error}): pass "
                    f"at most {limit}, its max_position_embeddings (--sequence-length {limit})."
                ) from error
            bar.update(len(ids))
    num_tokens = num_windows * (sequence_length - 1)
    return PerplexityResult(
        perplexity=torch.tensor(total / num_tokens, dtype=torch.float64).exp().item(),
        num_windows=num_windows,
        num_tokens=num_tokens,
        sequence_length=sequence_length,
        seconds=time.perf_counter() - started,
        num_bytes=None
        if text is None or tokenizer is None
        else count_bytes(tokenizer, text, windows),
    )


def _check_windows(model: PreTrainedModel, windows: torch.Tensor) -> None:
    if (
        windows.ndim != 2
        or windows.shape[0] < 1
        or windows.shape[1] < 2
        or windows.is_floating_point()
    ):
        found = f"windows has shape {list(windows.shape)} and dtype {windows.dtype}"
        raise ValueError(
            f"{found}; pass integer token ids [N, T] of at least one window of at least two tokens."
        )
    vocabulary, _ = token_limits(model)
    smallest, largest = int(windows.min()), int(windows.max())
    if smallest < 0 or largest >= vocabulary:
        found = f"windows holds token ids from {smallest} to {largest}, the model knows 0 to {vocabulary - 1}"
        raise ValueError(f"{found}; pass windows made with the tokenizer of this model.")


def _negative_log_likelihood(model: PreTrainedModel, ids: torch.Tensor, first: int) -> float:
    """Sum of -log p over the predicted tokens of `ids` [B, T], whose first row is window number `first`."""
    logits = model(input_ids=ids, use_cache=False).logits  # [B, T, vocabulary]
    total = torch.zeros((), dtype=torch.float64, device=logits.device)
    for start in range(0, ids.shape[1] - 1, POSITIONS_PER_CHUNK):
        end = min(start + POSITIONS_PER_CHUNK, ids.shape[1] - 1)
        targets = ids[:, start + 1 : end + 1].to(logits.device)
        rows = (
            logits[:, start:end].flatten(0, 1).float()
        )  # [B, chunk, vocabulary] -> [B * chunk, vocabulary]
        losses = cross_entropy(
            rows, targets.flatten(), reduction="none"
        )  # position t predicts token t + 1
        total += losses.double().sum()
    if total.isnan():  # once a batch: each look waits for the device
        where = f"windows {first} to {first + len(ids) - 1}"
        raise ValueError(
            f"model gives NaN logits in {where}: look for NaN in its weights, or for overflow in float16."
        )
    return total.item()
