"""Which linear operators of a decoder layer share an input, found by tracing one forward pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from torch import Tensor, nn

from optimum_fista.model.operator import LinearOperator
from optimum_fista.model.replay import LayerCall, watching


def trace_groups(
    layer: nn.Module, operators: Mapping[str, LinearOperator], call: LayerCall, hidden_states: Tensor
) -> tuple[list[list[LinearOperator]], dict[str, str]]:
    """Group operators that are called on the same tensor, in execution order.

    Operators that are not called exactly once are in no group: their inputs are not those of one call.

    Args:
        layer: The decoder layer.
        operators: Its operators by name.
        call: Arguments of the layer.
        hidden_states: Input of the layer [batch, sequence, hidden].

    Returns:
        Groups in the order of their first call, inside a group in the order of the calls; and the operators that are
        in no group, with the reason.
    """
    seen: list[tuple[LinearOperator, Tensor]] = []

    def record(operator: LinearOperator, inputs: Tensor) -> None:
        seen.append((operator, inputs))

    callbacks = {
        operator.module: (lambda inputs, operator=operator: record(operator, inputs)) for operator in operators.values()
    }
    with watching(callbacks):
        call.run(layer, hidden_states)
    calls = Counter(operator.name for operator, _ in seen)
    left_dense = {name: _reason(calls[name]) for name in operators if calls[name] != 1}
    groups: dict[object, list[LinearOperator]] = {}
    for operator, inputs in seen:
        if operator.name in left_dense:
            continue
        key = (inputs.data_ptr(), inputs.numel(), inputs.shape[-1], inputs.stride()[-1], inputs.dtype)
        groups.setdefault(key, []).append(operator)
    return list(groups.values()), left_dense


def _reason(calls: int) -> str:
    if not calls:
        return "not called in a forward pass of its decoder layer"
    return f"called {calls} times in a forward pass of its decoder layer"
