"""Pruning a model in one call, and what its linear operators see."""

from contextlib import ExitStack
from typing import Any

import torch
from tiny_llama import tiny_llama
from torch import Tensor, nn

from optimum_fista import FistaPruner, FistaPruningConfig, PruningReport
from optimum_fista.model.layers import prunable_layers
from optimum_fista.prune.plan import Plan, plan_run
from optimum_fista.removal.planning import plan_removal


def prune(model, batches, **options) -> PruningReport:
    return FistaPruner(FistaPruningConfig(**options), progress=False).prune(model, batches)


def plan_of(model, config: FistaPruningConfig, **options) -> Plan:
    """The plan of a run on a model in memory, whose files are not known; `options` are those of `plan_run`."""
    return plan_run(plan_removal(prunable_layers(model), config), **options)


def weights(model) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        torch.equal(left[name], right[name]) for name in left
    )


def inputs_of(model, tokens: Tensor) -> dict[str, Tensor]:
    """Input [tokens, in] of every linear operator, by the name of its weight."""
    seen = {}
    with torch.no_grad(), ExitStack() as handles:
        for name, module in model.model.layers.named_modules(prefix="model.layers"):
            if isinstance(module, nn.Linear):

                def keep(_, inputs, name=name):
                    seen[f"{name}.weight"] = inputs[0].flatten(0, 1).float()

                handles.enter_context(module.register_forward_pre_hook(keep))
        model(tokens)
    return seen


def hidden_states_of(model, tokens: Tensor, mask: Tensor | None = None) -> list[Tensor]:
    """Outputs [batch, sequence, hidden] of every decoder layer."""
    seen: list[Any] = []
    with torch.no_grad(), ExitStack() as handles:
        for layer in model.model.layers:
            handles.enter_context(layer.register_forward_hook(lambda *given: seen.append(given[2])))
        model(input_ids=tokens, attention_mask=mask)
    return [h[0] if isinstance(h, tuple) else h for h in seen]


def error_of(pruned: Tensor, dense: Tensor, inputs: Tensor, dense_inputs: Tensor) -> float:
    wanted = dense_inputs.double() @ dense.double().T
    return float((inputs.double() @ pruned.double().T - wanted).norm() / wanted.norm())


def inputs_seen(
    pruned, tokens: Tensor, error_correction: str | float
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Inputs of all operators in the dense tiny Llama, and those on which a correction says they are pruned."""
    dense_inputs = inputs_of(tiny_llama(), tokens)
    inputs = dict(dense_inputs) if error_correction == "none" else inputs_of(pruned, tokens)
    if error_correction == "intra":  # one decoder layer is pruned, the others are dense
        for index, layer in enumerate(pruned.model.layers):
            mixed = tiny_llama()
            mixed.model.layers[index] = layer
            seen = inputs_of(mixed, tokens)
            inputs |= {
                name: value
                for name, value in seen.items()
                if name.startswith(f"model.layers.{index}.")
            }
    return dense_inputs, inputs
