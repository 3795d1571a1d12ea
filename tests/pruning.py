"""Pruning a model in one call, and what its linear operators see."""

import torch
from torch import Tensor, nn

from optimum_fista import FistaPruner, FistaPruningConfig, PruningReport


def prune(model, batches, **options) -> PruningReport:
    return FistaPruner(FistaPruningConfig(**options), progress=False).prune(model, batches)


def weights(model) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def inputs_of(model, tokens: Tensor) -> dict[str, Tensor]:
    """Input [tokens, in] of every linear operator, by the name of its weight."""
    seen, handles = {}, []
    for name, module in model.model.layers.named_modules(prefix="model.layers"):
        if isinstance(module, nn.Linear):
            hook = lambda _, args, name=name: seen.update({f"{name}.weight": args[0].flatten(0, 1).float()})  # noqa: E731
            handles.append(module.register_forward_pre_hook(hook))
    with torch.no_grad():
        model(tokens)
    for handle in handles:
        handle.remove()
    return seen


def error_of(pruned: Tensor, dense: Tensor, inputs: Tensor, dense_inputs: Tensor) -> float:
    wanted = dense_inputs.double() @ dense.double().T
    return float((inputs.double() @ pruned.double().T - wanted).norm() / wanted.norm())
