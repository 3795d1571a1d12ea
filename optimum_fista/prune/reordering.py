"""Reordering of MLP channels before they are pruned, so that n:m patterns keep larger weights."""

from collections.abc import Sequence

import torch
from torch import Tensor

from optimum_fista.model import UnsupportedArchitectureError
from optimum_fista.model.hooks import operator_input
from optimum_fista.model.inputs import LayerActivations
from optimum_fista.prune.plan import Plan
from optimum_fista.prune.sink import Sink
from optimum_fista.removal.proof import difference_beyond_rounding, small_hidden_states
from optimum_fista.solve.patterns.n_of_m import best_order

_TOKENS_OF_ORDER = (
    8192  # tokens that are not held out, to the end of their batch; as many as in docs/ablations.md
)


def reorder_channels(
    plan: Plan,
    sink: Sink,
    layer_name: str,
    activations: LayerActivations,
    hidden_states: Sequence[Tensor],
) -> dict[str, tuple[int, ...]]:
    """Reorder the channels of a decoder layer's MLPs if their down projections are to be pruned.

    Returns the old numbers of the inputs of each down projection, in the new order, by the name of its weight.
    """
    call, layer, orders = activations.calls[0], activations.layer, dict[str, tuple[int, ...]]()
    for name, operator in plan.removal.operators[layer_name].items():
        part, pattern = plan.removal.channels.get(name), plan.removal.patterns[name]
        if part is None or pattern.span is None or pattern.width > 1:
            continue
        # |W_ij| * rms(x_j) measures the importance of a weight, as in Wanda (arXiv 2306.11695)
        energies, tokens = torch.zeros(operator.shape[1], device=activations.device), 0
        for batch, (arguments, keywords) in enumerate(
            activations.arguments_of(operator.module, hidden_states)
        ):
            if not activations.held_out[batch]:
                inputs = activations.rows(operator_input(arguments, keywords), batch, operator)
                energies += inputs.float().square().sum(0)  # [tokens, in] -> [in]
                tokens += len(inputs)
            if tokens >= _TOKENS_OF_ORDER:
                break
        order = best_order(operator.read().abs_().mul_(energies.sqrt()), pattern).tolist()
        hidden = small_hidden_states(hidden_states[0].to(activations.device))
        expected = call.run(layer, hidden)  # a permutation of channels must not change it
        for tensor in part.tensors:
            owner, _, leaf = tensor.rpartition(".")
            module = layer.get_submodule(owner.removeprefix(f"{layer_name}."))
            sink.replace(module, leaf, part.shrink(tensor, getattr(module, leaf).detach(), order))
        found = call.run(layer, hidden)
        difference = difference_beyond_rounding(found, expected)
        if difference is not None:
            raise UnsupportedArchitectureError(
                f"{layer_name} does not return the same after its channels were reordered (relative difference "
                f"{difference:.1e}): its rows are in another order. Leave out reorder_channels for this model."
            )
        orders[f"{name}.weight"] = tuple(order)
    return orders
