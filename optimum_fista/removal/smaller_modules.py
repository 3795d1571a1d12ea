"""Make modules in memory smaller by a plan (`shrinking.Shrinking`): a whole model in place, or a copy of a module.

`kept` says which groups stay: their numbers, by the name of the part that loses the others.
"""

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from optimum_fista import internals
from optimum_fista.model.offload import alignment_hooks
from optimum_fista.removal.shrinking import Kept, Shrinking


def shrink_model(model: PreTrainedModel, plan: Shrinking, kept: Kept) -> None:
    """Make a model in memory smaller, in place, with the groups `kept` of each part.

    Modules and parameters stay the same objects, with their devices, modes and hooks. Tensors that lose nothing keep
    their memory; those that shrink lose their gradients. `model.config` becomes another object.
    """
    for name, tensor in tensors_of(model):
        if plan.part_of(name) is not None:
            tensor.data = plan.shrink_tensor(name, tensor.data, kept)
            tensor.grad = None
    _describe(model, "", plan)

    layers: Any = model.get_submodule(plan.layers_name)
    for index in reversed(range(len(layers))):  # from the last one, so that numbers stay valid
        if index not in plan.layers:
            del layers[index]

    device_map: Mapping[str, Any] | None = getattr(model, "hf_device_map", None)
    if device_map is not None:
        new_map = {plan.new_name(name): device for name, device in device_map.items()}
        new_map.pop(None, None)  # of removed decoder layers
        model.hf_device_map = new_map  # type: ignore[assignment]


def smaller_copy(plan: Shrinking, name: str, module: nn.Module, kept: Kept) -> nn.Module:
    """Copy the module called `name` without the removed groups; tensors that lose nothing are shared."""
    shrunk = {
        full_name: plan.shrink_tensor(full_name, tensor.detach(), kept)
        for full_name, tensor in tensors_of(module, name)
        if plan.part_of(full_name) is not None
    }
    small = copied(module, name, shrunk)
    _describe(small, name, plan)
    return small


def copied(module: nn.Module, name: str, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Copy the module called `name`; the copy shares its tensors, except for those given by their names in the model.

    Hooks are shared, too, except those that are methods of modules inside.
    """
    inside = list(module.modules())
    # `deepcopy` takes objects whose `id` is in here as they are.
    memo = dict[int, Any]()
    for child in inside:
        # hooks of Accelerate hold the offloaded weights of the whole model
        memo |= {id(hook): hook for hook in alignment_hooks(child)}
        for hooks in internals.hooks_of(child):
            for hook in hooks.values():
                # hooks of the user may hold the whole model, or can't be copied
                if getattr(hook, "__self__", None) not in inside:
                    memo[id(hook)] = hook
    for full_name, tensor in tensors_of(module, name):
        other = tensors.get(full_name, tensor)
        is_new_parameter = isinstance(tensor, nn.Parameter) and other is not tensor
        memo[id(tensor)] = nn.Parameter(other, requires_grad=False) if is_new_parameter else other
    return copy.deepcopy(module, memo)


def tensors_of(module: nn.Module, name: str = "") -> list[tuple[str, Tensor]]:
    """All parameters and buffers of the module called `name`, with their names in the model."""
    return [*module.named_parameters(name), *module.named_buffers(name)]


def _describe(module: nn.Module, name: str, plan: Shrinking) -> None:
    """Give the module called `name`, and those in it, the attributes and configurations of the smaller model."""
    small_modules = dict(plan.model.named_modules())
    for full_name, child in module.named_modules(prefix=name):
        new_name = plan.new_name(full_name)
        if new_name is None:
            continue
        for word, value in plan.attributes.get(full_name, {}).items():
            setattr(child, word, copy.copy(value))
        if isinstance(getattr(child, "config", None), PreTrainedConfig):
            child.config = small_modules[new_name].config
