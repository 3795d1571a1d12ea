"""Make modules in memory smaller by a plan: a whole model in place, or a copy of a module.

The plan (`shrinking.Shrinking`) says which tensors and decoder layers become smaller or go, and has the smaller model
without weights (`plan.model`). A *part* is what loses *groups*, such as the channels of an MLP. `kept` says which
groups stay: their numbers, by the name of the part. Names are those in the whole model, such as "model.layers.3.mlp".
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
    their memory; those that shrink lose their gradients. Removed decoder layers leave the list of layers.
    `model.config`, the configurations of modules, and `model.hf_device_map` (which device has which module) become
    other objects.
    """
    for name, tensor in tensors_of(model):
        if plan.part_of(name) is not None:
            tensor.data = plan.shrink_tensor(name, tensor.data, kept)
            tensor.grad = None
    _take_attributes(model, "", plan)

    layers: Any = model.get_submodule(plan.layers_name)
    for index in reversed(range(len(layers))):  # from the last one, so that numbers stay valid
        if index not in plan.layers:
            del layers[index]

    device_map: Mapping[str, Any] | None = getattr(model, "hf_device_map", None)
    if device_map is not None:
        new_map = {plan.new_name(name): device for name, device in device_map.items()}
        new_map.pop(None, None)  # the new name of what is in a removed decoder layer is `None`
        model.hf_device_map = new_map  # type: ignore[assignment]


def smaller_copy(plan: Shrinking, name: str, module: nn.Module, kept: Kept) -> nn.Module:
    """Copy the module called `name` without the removed groups; tensors that lose nothing are shared.

    `module` is whole, and is not changed. The copy has the attributes and configurations of the smaller model. It keeps
    all decoder layers.
    """
    shrunk = {
        full_name: plan.shrink_tensor(full_name, tensor.detach(), kept)
        for full_name, tensor in tensors_of(module, name)
        if plan.part_of(full_name) is not None
    }
    small = copied(module, name, shrunk)
    _take_attributes(small, name, plan)
    return small


def copied(module: nn.Module, name: str, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Copy the module called `name`, with other values for the tensors that `tensors` names; the rest are shared.

    `tensors` are by their names in the model. Hooks are shared, too, except those that are methods of modules inside
    `module`: the copies have hooks of their own there. `module` is not changed.
    """
    inside = list(module.modules())
    ids_of_inside = {id(child) for child in inside}
    # By the `id` of an object, what `deepcopy` takes instead of a copy.
    memo = dict[int, Any]()
    for child in inside:
        # hooks of Accelerate hold the offloaded weights of the whole model
        for alignment_hook in alignment_hooks(child):
            memo[id(alignment_hook)] = alignment_hook
        for hooks in internals.hooks_of(child):
            for hook in hooks.values():
                # hooks of the user may hold the whole model, or can't be copied
                is_method_of_module_inside = id(getattr(hook, "__self__", None)) in ids_of_inside
                if not is_method_of_module_inside:
                    memo[id(hook)] = hook
    for full_name, tensor in tensors_of(module, name):
        other = tensors.get(full_name, tensor)
        if isinstance(tensor, nn.Parameter) and other is not tensor:
            # A module takes no other tensor as a parameter.
            other = nn.Parameter(other, requires_grad=False)
        memo[id(tensor)] = other
    return copy.deepcopy(module, memo)


def tensors_of(module: nn.Module, name: str = "") -> list[tuple[str, Tensor]]:
    """List all parameters and buffers of the module called `name` ("": the model), with their names in the model."""
    return [*module.named_parameters(name), *module.named_buffers(name)]


def _take_attributes(module: nn.Module, name: str, plan: Shrinking) -> None:
    """Give the module called `name`, and those in it, the attributes and configurations of the smaller model.

    Changes the attributes of the modules that differ in the smaller model (`plan.attributes`, such as sizes and numbers
    of layers, by the name of the module), and `config` of each module that has one. No tensor changes.
    """
    small_modules = dict(plan.model.named_modules())
    for full_name, child in module.named_modules(prefix=name):
        new_name = plan.new_name(full_name)
        if new_name is None:  # in a removed decoder layer
            continue
        for word, value in plan.attributes.get(full_name, {}).items():
            setattr(child, word, copy.copy(value))
        if isinstance(getattr(child, "config", None), PreTrainedConfig):
            child.config = small_modules[new_name].config
