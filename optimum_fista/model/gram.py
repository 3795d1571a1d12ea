"""Gram and cross-Gram matrices accumulated over tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from optimum_fista.solve.statistics import InputStatistics

_LEAF = 256


class GramAccumulator:
    """Sum of `x x^T` over tokens, in float32; only half of each product is formed, in memory taken when tokens come.

    Attributes:
        num_tokens: Tokens summed so far.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self._shape, self._device = (size, size), device
        self._upper: Tensor | None = None
        self._sum = torch.zeros(size, device=device)
        self.num_tokens = 0

    def add(self, inputs: Tensor) -> None:
        """Add inputs [tokens, in], float32."""
        if self._upper is None:
            self._upper = torch.zeros(self._shape, device=self._device)
        _add_upper(self._upper, inputs)
        self._sum += inputs.sum(0)
        self.num_tokens += inputs.shape[0]

    def finish(self) -> InputStatistics:
        """Statistics with the symmetric Gram matrix; the accumulator is used up."""
        gram = torch.zeros(self._shape, device=self._device) if self._upper is None else self._upper
        for start in range(0, gram.shape[0], _LEAF):
            end = start + _LEAF
            corner = gram[start:end, start:end].triu_()
            corner += corner.triu(1).T
            gram[end:, start:end] = gram[start:end, end:].T
        return InputStatistics(gram, self.num_tokens, self._sum / max(1, self.num_tokens))


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
