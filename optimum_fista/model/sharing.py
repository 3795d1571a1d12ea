"""Which linear operators of a decoder layer share an input, found by tracing one forward pass."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from optimum_fista.model.architecture import UnsupportedArchitectureError
from optimum_fista.model.operator import LinearOperator
from optimum_fista.model.replay import LayerCall, watching


def trace_groups(
    layer: nn.Module, operators: Mapping[str, LinearOperator], call: LayerCall, hidden_states: Tensor
) -> list[list[LinearOperator]]:
    """Group operators that are called on the same tensor, in execution order.

    Args:
        layer: The decoder layer.
        operators: Its operators by name.
        call: Arguments of the layer.
        hidden_states: Input of the layer [batch, sequence, hidden].

    Returns:
        Groups in the order of their first call; inside a group, the order of the calls.

    Raises:
        UnsupportedArchitectureError: If an operator is not called, or is called more than once.
    """
    seen: list[tuple[LinearOperator, Tensor]] = []

    def record(operator: LinearOperator, inputs: Tensor) -> None:
        seen.append((operator, inputs))

    callbacks = {
        operator.module: (lambda inputs, operator=operator: record(operator, inputs)) for operator in operators.values()
    }
    with watching(callbacks):
        call.run(layer, hidden_states)
    names = [operator.name for operator, _ in seen]
    for name in operators:
        if names.count(name) != 1:
            raise UnsupportedArchitectureError(
                f"{name} was called {names.count(name)} times in one forward pass of its decoder layer; exactly "
                f"one call can be pruned. Pass exclude=['{name}'] to leave it dense."
            )
    groups: dict[object, list[LinearOperator]] = {}
    for operator, inputs in seen:
        place = (inputs.untyped_storage()._cdata, inputs.storage_offset())  # data_ptr() is 0 on the meta device
        key = (*place, inputs.numel(), inputs.shape[-1], inputs.stride()[-1], inputs.dtype)
        groups.setdefault(key, []).append(operator)
    return list(groups.values())
