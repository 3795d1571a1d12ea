"""Gram and cross-Gram matrices accumulated over tokens."""

from __future__ import annotations

import torch
from torch import Tensor

_LEAF = 256


class GramAccumulator:
    """Sum of `x x^T` over tokens, in float32; only half of each product is formed.

    Attributes:
        num_tokens: Tokens summed so far.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self._upper = torch.zeros(size, size, device=device)
        self.num_tokens = 0

    def add(self, inputs: Tensor) -> None:
        """Add inputs [tokens, in], float32."""
        _add_upper(self._upper, inputs)
        self.num_tokens += inputs.shape[0]

    def finish(self) -> Tensor:
        """The symmetric Gram matrix [in, in]; the accumulator is used up."""
        upper = self._upper
        upper.triu_()
        upper += upper.triu(1).T
        return upper


def _add_upper(out: Tensor, inputs: Tensor) -> None:
    """Add the upper block triangle of `inputs^T inputs` to `out`, halving recursively."""
    size = inputs.shape[1]
    if size <= _LEAF:
        out.addmm_(inputs.T, inputs)
        return
    half = (size // 2 + 31) // 32 * 32
    left, right = inputs[:, :half], inputs[:, half:]
    _add_upper(out[:half, :half], left)
    out[:half, half:].addmm_(left.T, right)
    _add_upper(out[half:, half:], right)
