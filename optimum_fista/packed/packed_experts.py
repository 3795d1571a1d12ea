"""Mixtures of experts whose matrices stay packed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


def packed_experts_forward(experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Forward pass of Transformers' fused experts, one expert after another, for its interface of implementations.

    Args:
        experts: The module. `gate_up_proj` or `up_proj`, and `down_proj`, are each an `nn.ModuleList` of a layer
            [out, in] an expert, such as `PackedLinear`, or the parameter [experts, ...] as Transformers has it.
        hidden_states: [tokens, hidden].
        top_k_index: int64 [tokens, k], experts of each token; numbers after the last expert stand for none.
        top_k_weights: [tokens, k], their weights.

    Returns:
        [tokens, hidden].
    """
    tokens, hidden = hidden_states.shape
    chosen = top_k_index.reshape(-1)
    order = torch.argsort(chosen, stable=True)
    inputs = hidden_states[order // top_k_index.shape[-1]]
    counts = torch.bincount(chosen, minlength=experts.num_experts)[: experts.num_experts].tolist()
    found = inputs.new_zeros(inputs.shape)
    start = 0
    for expert, count in enumerate(counts):
        if count:
            found[start : start + count] = _expert(experts, expert, inputs[start : start + count])
            start += count
    weighted = found * top_k_weights.reshape(-1)[order, None]
    outputs = torch.empty_like(weighted).index_copy_(0, order, weighted)
    return outputs.view(tokens, top_k_index.shape[-1], hidden).sum(1).to(hidden_states.dtype)


def _expert(experts: Any, expert: int, inputs: Tensor) -> Tensor:
    """One expert of its tokens [tokens, hidden]."""
    if experts.has_gate:
        middle = experts._apply_gate(_multiply(experts, "gate_up_proj", expert, inputs))
    else:
        middle = experts.act_fn(_multiply(experts, "up_proj", expert, inputs))
    output = _multiply(experts, "down_proj", expert, middle)
    return experts.post_expert_norm(output) if experts.has_post_expert_norm else output


def _multiply(experts: Any, name: str, expert: int, inputs: Tensor) -> Tensor:
    held = getattr(experts, name)
    bias = getattr(experts, f"{name}_bias")[expert] if experts.has_bias else None
    if isinstance(held, nn.ModuleList):
        product: Tensor = held[expert](inputs)
        return product if bias is None else product + bias
    weight = held[expert]
    return functional.linear(inputs, weight.T if experts.is_transposed else weight, bias)
