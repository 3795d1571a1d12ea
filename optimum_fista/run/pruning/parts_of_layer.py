"""What happens to one decoder layer besides pruning: channels that change places, experts that go."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from optimum_fista.model import UnsupportedArchitectureError
from optimum_fista.model.activations import LayerActivations
from optimum_fista.model.correction import LayerTargets
from optimum_fista.model.expert_removal import SmallerMixture, experts_of, experts_to_keep, score_experts
from optimum_fista.model.experts import FusedExperts
from optimum_fista.model.forward import operator_input
from optimum_fista.model.shrinking import difference_beyond_rounding, small_hidden_states, smaller_copy
from optimum_fista.run.pruning.model_pruning import ModelPruning
from optimum_fista.run.pruning.removal import Removal
from optimum_fista.run.pruning.sink import ModelSink
from optimum_fista.run.reports.report import MixtureReport

_TOKENS_OF_ORDER = 8192
"""Tokens, and those to the end of their batch, that sizes of inputs are measured on; docs/ablations.md had as many."""


def reorder_channels(
    run: ModelPruning, sink: ModelSink, layer_name: str, activations: LayerActivations, hidden_states: Sequence[Tensor]
) -> dict[str, tuple[int, ...]]:
    """Let the channels of a decoder layer's MLPs change places, so that patterns keep more of the down projections.

    What counts of a weight is its size times the root mean square of its input, as Wanda has it (arXiv 2306.11695), on
    the first `_TOKENS_OF_ORDER` tokens that are not held out. MLPs whose down projection is not among the operators to
    prune stay as they are. The hidden states are those that enter the layer, a batch each, [batch, tokens, hidden].

    Returns:
        The numbers that the inputs of each of these down projections had before, in their new order, by the names of
        the weights.
    """
    call, layer, orders = activations.calls[0], activations.layer, dict[str, tuple[int, ...]]()
    for name, operator in run.operators[layer_name].items():
        part, pattern = run.channels.get(name), run.config.pattern_for(name)
        if part is None or not pattern.orders_inputs:
            continue
        energies, tokens = torch.zeros(operator.shape[1], device=activations.device), 0
        for batch, (arguments, keywords) in enumerate(activations.arguments_of(operator.module, hidden_states)):
            if not activations.held_out[batch]:
                inputs = activations.rows(operator_input(arguments, keywords), batch, operator)
                energies += inputs.float().square().sum(0)
                tokens += len(inputs)
            if tokens >= _TOKENS_OF_ORDER:
                break
        order = pattern.best_order(operator.read().abs_().mul_(energies.sqrt())).tolist()
        hidden = small_hidden_states(hidden_states[0].to(activations.device))
        expected = call.run(layer, hidden)
        for tensor in part.tensors:
            owner, _, leaf = tensor.rpartition(".")
            module = layer.get_submodule(owner.removeprefix(f"{layer_name}."))
            sink.replace(module, leaf, part.shrink(tensor, getattr(module, leaf).detach(), order))
        found = call.run(layer, hidden)
        difference = difference_beyond_rounding(found, expected)
        if difference is not None:
            raise UnsupportedArchitectureError(
                f"{layer_name} does not return the same after its channels changed places (relative difference "
                f"{difference:.1e}): its rows are in another order. Leave out reorder_channels for this model."
            )
        orders[f"{name}.weight"] = tuple(order)
    return orders


def remove_experts(
    removal: Removal, sink: ModelSink, layer_name: str, experts: FusedExperts, targets: LayerTargets
) -> tuple[MixtureReport, nn.Module]:
    """Choose the experts of a decoder layer that stay, and refit them, so that they return its targets together.

    Returns:
        What to report, and the layer without the experts that go.
    """
    started, asked, part = time.perf_counter(), removal.asked, removal.plan.parts[experts.name]
    scores, wanted = score_experts(experts, targets)
    saliency = scores.saliency
    kept = experts_to_keep(saliency, removal.plan.counts[part.name], part.equal_runs)
    smaller = smaller_copy(removal.experts, layer_name, targets.activations.layer, {part.name: kept})
    left = experts_of(part, layer_name, smaller)
    mixture = SmallerMixture(left, replace(targets.activations, layer=smaller), targets.entering.entering, wanted)
    before, unseen = mixture.errors()
    fit_error, num_refitted, message = before, 0, ""
    if asked.expert_refit:
        down = [operator for operator in experts.operators if operator.kind == "down_proj"]
        num_refitted, message = mixture.refit(lambda expert, weight: sink.overwrite(down[kept[expert]], weight))
        fit_error, unseen = mixture.errors()
    report = MixtureReport(
        name=part.name,
        groups_kept=kept,
        saliency=tuple(saliency.tolist()),
        expert_tokens=tuple(scores.num_tokens.tolist()),
        fit_error=fit_error,
        fit_error_before=before,
        num_refitted=num_refitted,
        solve_seconds=time.perf_counter() - started,
        message=message,
        held_out_fit_error=unseen,
        residual_corrected=targets.adds_experts,
    )
    return report, smaller
