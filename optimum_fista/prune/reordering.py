"""Reordering of MLP channels before they are pruned, so that n:m patterns keep larger weights.

The `Plan` of a run has the operators to prune with their patterns, and the `Part`s whose channels may change places. A
`Part` says which tensors have an entry for each channel: the columns of the down projection, and the rows
that compute their inputs. If all of them get the same new order, the decoder layer returns the same.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from optimum_fista.model import UnsupportedArchitectureError
from optimum_fista.model.hooks import operator_input
from optimum_fista.model.inputs import LayerActivations
from optimum_fista.model.operators import LinearOperator
from optimum_fista.prune.plan import Plan
from optimum_fista.prune.sink import Sink
from optimum_fista.removal.proof import difference_beyond_rounding, scaled_down
from optimum_fista.solve.patterns.n_of_m import best_order

# Tokens that are not held out, to the end of their batch; as many as in docs/ablations.md.
_TOKENS_OF_ORDER = 8192


def reorder_channels(
    plan: Plan,
    sink: Sink,
    layer_name: str,
    activations: LayerActivations,
    hidden_states: Sequence[Tensor],
) -> dict[str, tuple[int, ...]]:
    """Reorder the channels of a decoder layer's MLPs if their down projections get an n:m pattern.

    The weights are overwritten through the sink. A layer that then returns something else is refused
    (UnsupportedArchitectureError).

    Args:
        plan: The plan of the run.
        sink: Gets the reordered weights.
        layer_name: Such as "model.layers.3".
        activations: The layer, on its device, with the arguments of its calls.
        hidden_states: What enters the layer, [batch, sequence, hidden], a batch each.

    Returns:
        The old numbers of the inputs of each down projection, in the new order, by the name of its weight.
    """
    layer = activations.layer
    call = activations.calls[0]
    orders: dict[str, tuple[int, ...]] = {}
    for name, operator in plan.removal.operators[layer_name].items():
        # The channels that the operator reads: only down projections have such a part.
        part = plan.removal.channels.get(name)
        pattern = plan.removal.patterns[name]
        is_n_of_m = pattern.span is not None and pattern.width == 1  # single weights, not pairs
        if part is None or not is_n_of_m:
            continue

        # |W_ij| * rms(x_j) measures the importance of a weight, as in Wanda (arXiv 2306.11695)
        energies = _input_energies(operator, activations, hidden_states)  # sums of x_j^2, [in]
        scores = operator.read().abs_().mul_(energies.sqrt())
        order = best_order(scores, pattern).tolist()

        # A permutation of channels must not change what the layer returns. Small hidden states: the rounding of large
        # ones would hide a difference.
        hidden = scaled_down(hidden_states[0].to(activations.device))
        expected = call.run(layer, hidden)  # before the weights are overwritten
        for tensor in part.tensors:
            # Such as "model.layers.3.mlp.up_proj" and "weight".
            owner, _, leaf = tensor.rpartition(".")
            module = layer.get_submodule(owner.removeprefix(f"{layer_name}."))
            # "Shrunk" to all groups of the part, in another order.
            reordered = part.shrink(tensor, getattr(module, leaf).detach(), order)
            sink.replace(module, leaf, reordered)
        difference = difference_beyond_rounding(call.run(layer, hidden), expected)
        if difference is not None:
            raise UnsupportedArchitectureError(
                f"{layer_name} does not return the same after its channels were reordered (relative difference "
                f"{difference:.1e}): its rows are in another order. Leave out reorder_channels for this model."
            )
        orders[f"{name}.weight"] = tuple(order)
    return orders


def _input_energies(
    operator: LinearOperator, activations: LayerActivations, hidden_states: Sequence[Tensor]
) -> Tensor:
    """Sum the squares of each input of an operator over the first tokens that are not held out: [in], float32.

    The layer of `activations` runs up to the operator, on `hidden_states` that enter the layer, a batch each. Changes
    no weight.
    """
    energies = torch.zeros(operator.shape[1], device=activations.device)
    num_tokens = 0
    arguments_of_batches = activations.arguments_of(operator.module, hidden_states)
    for batch, (arguments, keywords) in enumerate(arguments_of_batches):
        if not activations.held_out[batch]:
            inputs = activations.rows(operator_input(arguments, keywords), batch, operator)
            energies += inputs.float().square().sum(0)  # [tokens, in] -> [in]
            num_tokens += len(inputs)
        if num_tokens >= _TOKENS_OF_ORDER:
            break
    return energies
