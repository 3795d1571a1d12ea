"""Finding the decoder layers of a model and the linear operators in them, by structure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import Tensor, nn
from transformers import PreTrainedModel

from optimum_fista.model.errors import UnsupportedArchitectureError
from optimum_fista.model.experts import FusedExperts, can_be_split, is_fused_experts
from optimum_fista.model.operator import LinearOperator, is_linear


@dataclass(frozen=True)
class DecoderLayers:
    """The decoder layers of a model.

    Attributes:
        name: Name of their `nn.ModuleList` in the model, such as `model.layers`.
        modules: The decoder layers in execution order.
    """

    name: str
    modules: tuple[nn.Module, ...]

    def __len__(self) -> int:
        return len(self.modules)

    def __iter__(self) -> Iterator[tuple[str, nn.Module]]:
        """Names and modules, in execution order."""
        return iter((f"{self.name}.{i}", module) for i, module in enumerate(self.modules))


def find_decoder_layers(model: PreTrainedModel) -> DecoderLayers:
    """Find the `nn.ModuleList` whose elements are the model's `_no_split_modules`.

    Raises:
        UnsupportedArchitectureError: If there is none or more than one.
    """
    wanted = set(getattr(model, "_no_split_modules", None) or ())
    lists = {name: m for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)}
    found = {name: m for name, m in lists.items() if type(m[0]).__name__ in wanted}
    if len(found) != 1:
        seen = ", ".join(f"{name} ({len(m)} x {type(m[0]).__name__})" for name, m in lists.items()) or "none"
        raise UnsupportedArchitectureError(
            f"{type(model).__name__} can't be pruned: looked for one nn.ModuleList of "
            f"{' or '.join(sorted(wanted)) or 'decoder layers (the model declares no _no_split_modules)'} "
            f"and found {len(found)}; its module lists are: {seen}."
        )
    ((name, modules),) = found.items()
    return DecoderLayers(name, tuple(modules))


def find_operators(layer_name: str, layer: nn.Module, dense_experts: Sequence[str] = ()) -> dict[str, LinearOperator]:
    """Find the linear operators of a decoder layer by module type; every matrix of every expert is one.

    Args:
        layer_name: Name of the decoder layer in the model.
        layer: The decoder layer.
        dense_experts: Name patterns of fused experts that are to stay dense.

    Returns:
        Operators by their full names.

    Raises:
        UnsupportedArchitectureError: If the layer holds fused experts in an unknown form that `dense_experts` doesn't
            name.
    """
    operators: dict[str, LinearOperator] = {}
    passed_over = left_out(layer_name, layer, dense_experts)
    for name, module in layer.named_modules(prefix=layer_name):
        if name in passed_over:
            continue
        if is_linear(module):
            operators[name] = LinearOperator(name, module)
        elif is_fused_experts(module):
            if not can_be_split(module):
                raise UnsupportedArchitectureError(
                    f"{name} ({type(module).__name__}) keeps the weights of its experts in a form that can't be "
                    "pruned: looked for 3-D parameters gate_up_proj (or up_proj) and down_proj. To prune the rest of "
                    f"the model and leave the experts dense, pass exclude=['*.{name.rsplit('.', 1)[-1]}']."
                )
            operators |= {operator.name: operator for operator in FusedExperts(name, module).operators}
    return operators


def left_out(layer_name: str, layer: nn.Module, dense_experts: Sequence[str] = ()) -> dict[str, str]:
    """What `find_operators` passes over in a mixture of experts, with the reason.

    Routers decide by small differences and hold few weights, so they stay dense: linear modules beside fused experts
    with an output for each expert, or a single output.
    """
    found: dict[str, str] = {}
    for name, module in layer.named_modules(prefix=layer_name):
        if is_fused_experts(module) and matches(name, dense_experts):
            found[name] = "exclude"
        experts = [child for child in module.children() if is_fused_experts(child)]
        sizes = {1, *(parameter.shape[0] for child in experts for parameter in child.parameters(recurse=False))}
        for child_name, child in module.named_children() if experts else ():
            if is_linear(child) and child.weight.shape[0] in sizes:
                found[f"{name}.{child_name}"] = "router"
    return found


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether `name` matches one of the shell-style patterns, case included."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def input_embedding(model: PreTrainedModel) -> Tensor:
    """Weight of the input embedding [vocabulary, hidden]; its device is where token ids go."""
    weight = model.get_input_embeddings().weight
    if not isinstance(weight, Tensor):
        raise UnsupportedArchitectureError(f"{type(model).__name__} has no input embedding with a weight.")
    return weight
