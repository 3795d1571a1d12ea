"""The layer problem of a single matrix and its inputs, without a model."""

from __future__ import annotations

import torch
from torch import Tensor

from optimum_fista.model.gram import GramAccumulator
from optimum_fista.solve.problem import LayerProblem


def single_problem(weight: Tensor, inputs: Tensor, dense_inputs: Tensor | None = None) -> LayerProblem:
    """Form the layer problem of `weight` [out, in] on `inputs` X* [tokens, in], dense inputs X [tokens, in].

    Raises:
        ValueError: If shapes disagree, a value is NaN or Inf, or the inputs overflow when squared.
    """
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
    outputs = dense_inputs.detach().float() @ weight.T
    return LayerProblem(weight, statistics, outputs.T @ inputs, outputs.square().sum(0))
