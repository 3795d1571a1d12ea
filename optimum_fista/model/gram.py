"""Gram and cross-Gram matrices accumulated over tokens, and the layer problem of a single matrix and its inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from optimum_fista.model.products import as_multiplied, quick_products
from optimum_fista.solve.problem import LayerProblem
from optimum_fista.solve.statistics import InputStatistics

_LEAF = 256  # inputs up to which a block is multiplied whole


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

    @quick_products()
    def add(self, inputs: Tensor) -> Tensor:
        """Add inputs [tokens, in]; returns them as they were multiplied, float32."""
        if self._upper is None:
            self._upper = torch.zeros(self._shape, device=self._device)
        inputs = as_multiplied(inputs)
        _add_upper(self._upper, inputs)
        self._sum += inputs.sum(0)
        self.num_tokens += inputs.shape[0]
        return inputs

    def finish(self) -> InputStatistics:
        """Statistics with the symmetric Gram matrix; the accumulator is used up."""
        gram = torch.zeros(self._shape, device=self._device) if self._upper is None else self._upper
        for start in range(0, gram.shape[0], _LEAF):
            end = start + _LEAF
            # Only upper blocks were summed. Copied, both halves are equal to the last bit.
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
    # A multiple of 32, so that blocks are aligned.
    half = (size // 2 + 31) // 32 * 32
    left, right = inputs[:, :half], inputs[:, half:]
    _add_upper(out[:half, :half], left)
    out[:half, half:].addmm_(left.T, right)
    _add_upper(out[half:, half:], right)


def single_problem(weight: Tensor, inputs: Tensor, dense_inputs: Tensor | None = None) -> LayerProblem:
    """Form the layer problem of `weight` [out, in] on `inputs` X* [tokens, in], dense inputs X [tokens, in]."""
    named = {"weight": weight, "inputs": inputs, "dense_inputs": dense_inputs}
    for name, tensor in named.items():
        if tensor is None:
            continue
        if tensor.ndim != 2 or tensor.shape[1] != weight.shape[-1] or tensor.numel() == 0:
            wanted = "[out, in]" if name == "weight" else f"[tokens, in] with in = {weight.shape[-1]} as in weight"
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}: pass a non-empty {wanted}.")
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name} holds NaN or Inf: pass finite values.")
    if dense_inputs is not None and dense_inputs.shape != inputs.shape:
        raise ValueError(
            f"dense_inputs has shape {tuple(dense_inputs.shape)}, inputs {tuple(inputs.shape)}: pass the same tokens."
        )
    weight, inputs = weight.detach().float(), inputs.detach().float()
    accumulator = GramAccumulator(weight.shape[1], weight.device)
    accumulator.add(inputs)
    statistics = accumulator.finish()
    if not bool(torch.isfinite(statistics.gram).all()):
        raise ValueError("inputs overflow when squared in float32: pass them scaled down; the error is relative.")
    if dense_inputs is None:
        return LayerProblem(weight, statistics)
    # Y = W X, C = Y X*^T.
    outputs = dense_inputs.detach().float() @ weight.T
    return LayerProblem(weight, statistics, outputs.T @ inputs, outputs.square().sum(0))
