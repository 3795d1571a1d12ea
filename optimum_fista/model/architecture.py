"""Finding the decoder layers of a model and the linear operators in them, by structure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from transformers import PreTrainedModel

from optimum_fista.model.operator import LinearOperator, is_linear


class UnsupportedArchitectureError(ValueError):
    """The model has a structure that can't be pruned; the message says what was looked for and found."""


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
    """Find the linear operators of a decoder layer by module type.

    Args:
        layer_name: Name of the decoder layer in the model.
        layer: The decoder layer.
        dense_experts: Name patterns of fused experts that are to stay dense.

    Returns:
        Operators by their full names.

    Raises:
        UnsupportedArchitectureError: If the layer holds fused experts that `dense_experts` doesn't name.
    """
    operators = {}
    for name, module in layer.named_modules(prefix=layer_name):
        if is_linear(module):
            operators[name] = LinearOperator(name, module)
        elif _is_fused_experts(module) and not matches(name, dense_experts):
            raise UnsupportedArchitectureError(
                f"{name} ({type(module).__name__}) keeps the weights of all its experts in one 3-D parameter; "
                f"experts can't be pruned yet. To prune the rest of the model and leave the experts dense, pass "
                f"exclude=['*.{name.rsplit('.', 1)[-1]}']."
            )
    return operators


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether `name` matches one of the shell-style patterns, case included."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _is_fused_experts(module: nn.Module) -> bool:
    return not isinstance(module, _ConvNd) and any(
        p.ndim == 3 and min(p.shape) > 1 for p in module.parameters(recurse=False)
    )


def input_embedding(model: PreTrainedModel) -> Tensor:
    """Weight of the input embedding [vocabulary, hidden]; its device is where token ids go."""
    weight = model.get_input_embeddings().weight
    if not isinstance(weight, Tensor):
        raise UnsupportedArchitectureError(f"{type(model).__name__} has no input embedding with a weight.")
    return weight
