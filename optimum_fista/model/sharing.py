"""Which linear operators of a decoder layer share an input, found by tracing one forward pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from optimum_fista.model.errors import UnsupportedArchitectureError
from optimum_fista.model.operator import LinearOperator, is_linear
from optimum_fista.model.replay import LayerCall, split_output, watching


def trace_groups(
    layer: nn.Module, operators: Mapping[str, LinearOperator], call: LayerCall, hidden_states: Tensor
) -> tuple[list[list[LinearOperator]], dict[str, str]]:
    """Group operators that are called on the same tensor, in execution order.

    Operators that are not called exactly once, or whose output is not `W x + b`, are in no group. Operators that end a
    part of the layer learn of it (`LinearOperator.ends`). The layer is called with `hidden_states` [batch, sequence,
    hidden] and the arguments of `call`.

    Returns:
        Groups in the order of their first call, inside a group in the order of the calls; and the operators that are
        in no group, with the reason.
    """
    # It holds the inputs until groups are made: memory that was freed could be that of another input.
    seen: list[tuple[LinearOperator, Tensor]] = []
    others: list[str] = []
    latest: list[tuple[LinearOperator, Tensor, int]] = []  # the output of the latest call, and its version

    def enter(operator: LinearOperator, inputs: Tensor) -> None:
        seen.append((operator, inputs))

    def leave(operator: LinearOperator, output: Tensor) -> None:
        if operator in special and not _is_product(operator, seen[-1][1], output):
            others.append(operator.name)
        latest[:] = [(operator, output, output._version)] if isinstance(output, Tensor) else []

    def end_part(part: nn.Module, output: object) -> None:
        split = split_output(output)
        for operator, own, version in latest:
            if split is not None and split[0] is own and own._version == version:  # nothing was added in place
                operator.ends = part, split[1]

    special = [operator for operator in operators.values() if _may_change_its_product(operator.module)]
    before = {operator.module: partial(enter, operator) for operator in operators.values()}
    after = {operator.module: partial(leave, operator) for operator in operators.values()}
    after |= {part: partial(end_part, part) for part in layer.children() if part not in after}
    # PyTorch counts changes in place.
    version = hidden_states._version
    with watching(before, after):
        call.run(layer, hidden_states)
    if hidden_states._version != version:
        raise UnsupportedArchitectureError(
            f"{type(layer).__name__} overwrites the hidden states that it is called with, so it can't be run on them "
            "again: have it work on a copy."
        )
    calls = Counter(operator.name for operator, _ in seen)
    where = "in a forward pass of its decoder layer"
    left_dense = {
        name: f"called {calls[name]} times {where}" if calls[name] else f"not called {where}"
        for name in operators
        if calls[name] != 1
    }
    left_dense |= dict.fromkeys(others, "returns something other than W x + b")
    groups: dict[object, list[LinearOperator]] = {}
    for operator, inputs in seen:
        if operator.name in left_dense:
            continue
        place = (inputs.untyped_storage()._cdata, inputs.storage_offset())  # data_ptr() is 0 on the meta device
        # Not the whole shape: one operator may see [batch, sequence, in], the other [tokens, in].
        key = (*place, inputs.numel(), inputs.shape[-1], inputs.stride()[-1], inputs.dtype)
        groups.setdefault(key, []).append(operator)
    return list(groups.values()), left_dense


def _may_change_its_product(module: nn.Module) -> bool:
    """Whether a linear module has another forward pass than its type's, or hooks, which may change the output."""
    forward = vars(module).get("_old_forward", module.forward)  # what the hooks of Accelerate call
    is_plain = getattr(forward, "__func__", None) in (nn.Linear.forward, Conv1D.forward)
    return is_linear(module) and (not is_plain or bool(module._forward_hooks))


def _is_product(operator: LinearOperator, inputs: Tensor, output: object) -> bool:
    """Whether an output is `W x + b`, up to rounding."""
    if not isinstance(output, Tensor) or output.shape != (*inputs.shape[:-1], operator.shape[0]):
        return False
    weight = operator.parameter.T if operator.transposed else operator.parameter
    expected = nn.functional.linear(inputs, weight.to(inputs.dtype), getattr(operator.module, "bias", None))
    distance = (output.float() - expected.float()).norm()
    return bool(distance <= 10 * torch.finfo(inputs.dtype).eps * expected.float().norm())
