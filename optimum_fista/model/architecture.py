"""Finding the decoder layers of a model and the linear operators in them, by structure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from optimum_fista.model import UnsupportedArchitectureError
from optimum_fista.model.operator import LINEAR, FusedExperts, LinearOperator, can_be_split, is_fused_experts


@dataclass(frozen=True)
class DecoderLayers:
    """The decoder layers of a model in execution order, and the name of their `nn.ModuleList`: `model.layers`."""

    name: str
    modules: tuple[nn.Module, ...]

    def __len__(self) -> int:
        return len(self.modules)

    def __iter__(self) -> Iterator[tuple[str, nn.Module]]:
        """Names and modules, in execution order."""
        return iter((f"{self.name}.{i}", module) for i, module in enumerate(self.modules))


def find_decoder_layers(model: PreTrainedModel) -> DecoderLayers:
    """Find the `nn.ModuleList` of decoder layers of a causal language model.

    These are the model's `_no_split_modules`, or else modules made for gradient checkpointing. If a model has
    several such lists, as beside a vision encoder, it is the one that belongs to `model.get_decoder()`.
    """
    config, not_causal = model.config, None
    if not model.can_generate():
        not_causal = "it can't generate text (it has no causal language-model head)"
    elif getattr(config, "is_encoder_decoder", False):
        not_causal = "it is an encoder-decoder model"
    elif getattr(config, "is_decoder", None) is False and hasattr(config, "add_cross_attention"):
        not_causal = "it is an encoder, in which every token sees all others (config.is_decoder is False)"
    if not_causal is not None:
        raise UnsupportedArchitectureError(
            f"{type(model).__name__} can't be pruned: {not_causal}. Pass a decoder-only model, loaded by "
            "AutoModelForCausalLM."
        )
    # Names of classes that Transformers does not split over devices, because they hold a residual connection.
    wanted = set(getattr(model, "_no_split_modules", None) or ())
    lists = {name: m for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)}
    # PyTorch's fully_shard puts FSDP before the name of a layer's class.
    found = {n: m for n, m in lists.items() if wanted & {type(layer).__name__.removeprefix("FSDP") for layer in m}}
    if not found:
        found = {name: m for name, m in lists.items() if isinstance(m[0], GradientCheckpointingLayer)}
    # Such as the layers of a vision encoder.
    if len(found) > 1:
        found = _own_lists(model.get_decoder(), found)
    if len(found) != 1:
        seen = ", ".join(f"{name} ({len(m)} x {type(m[0]).__name__})" for name, m in lists.items()) or "none"
        raise UnsupportedArchitectureError(
            f"{type(model).__name__} can't be pruned: looked for one nn.ModuleList of "
            f"{' or '.join(sorted(wanted)) or 'decoder layers (the model declares no _no_split_modules)'} "
            f"and found {len(found)}; its module lists are: {seen}."
        )
    ((name, modules),) = found.items()
    return DecoderLayers(name, tuple(modules))


def modules_around(model: PreTrainedModel, layers: DecoderLayers) -> list[nn.Module]:
    """Modules of the decoder that are in none of its layers and not the head: embeddings, norms and the like."""
    others = {module for layer in layers.modules for module in layer.modules()} | {model.get_output_embeddings()}
    return [module for module in model.get_decoder().modules() if module not in others]


def names_around(model: PreTrainedModel, layers: DecoderLayers) -> list[str]:
    """Names of the tensors of a model that are in no decoder layer; of those that are tied, one."""
    tied = model.all_tied_weights_keys
    return [name for name in model.state_dict() if not name.startswith(f"{layers.name}.") and name not in tied]


def _own_lists(decoder: nn.Module, lists: Mapping[str, nn.ModuleList]) -> dict[str, nn.ModuleList]:
    """Those of the lists that a decoder holds, but no model inside it."""
    inner = [m for m in decoder.modules() if isinstance(m, PreTrainedModel) and m is not decoder]
    others = {module for model in inner for module in model.modules()}
    own = set(decoder.modules()) - others
    return {name: modules for name, modules in lists.items() if modules in own}


def find_operators(layer_name: str, layer: nn.Module, dense_experts: Sequence[str] = ()) -> dict[str, LinearOperator]:
    """Find the linear operators of a decoder layer, by their full names; every matrix of every expert is one.

    `layer_name` is the layer's name in the model; fused experts whose names match `dense_experts` are passed over.
    """
    operators: dict[str, LinearOperator] = {}
    passed_over = left_out(layer_name, layer, dense_experts)
    for name, module in layer.named_modules(prefix=layer_name):
        if name in passed_over:
            continue
        if isinstance(module, LINEAR):
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
        experts = [child for child in module.children() if is_fused_experts(child) and can_be_split(child)]
        # One output for each expert is a router, a single one the gate of a shared expert.
        sizes = {1, *(parameter.shape[0] for child in experts for parameter in child.parameters(recurse=False))}
        for child_name, child in module.named_children() if experts else ():
            if isinstance(child, LINEAR) and child.weight.shape[0] in sizes:
                found[f"{name}.{child_name}"] = "router"
    return found


def shared_weights(layers: DecoderLayers) -> dict[str, str]:
    """Modules of the decoder layers whose weight is another one's too, by name, with the reason to leave them dense."""
    names: dict[int, list[str]] = {}
    for layer_name, layer in layers:
        for name, parameter in layer.named_parameters(prefix=layer_name, remove_duplicate=False):
            if name.endswith(".weight"):
                names.setdefault(id(parameter), []).append(name.removesuffix(".weight"))
    shared = [group for group in names.values() if len(group) > 1]
    return {name: f"shares its weight with {group[name == group[0]]}" for group in shared for name in group}


def require_bare(model: nn.Module) -> None:
    """Refuse compiled models, whose hooks may not run, and adapters, whose matrices look like operators."""
    for name, module in model.named_modules():
        where = f"model.{name}" if name else "model"
        forward: Any = module.forward
        # By torch.compile(module.forward), by torch.compile(module), and by module.compile().
        by_dynamo = hasattr(forward, "_torchdynamo_orig_callable") and not hasattr(forward, "_torchdynamo_disable")
        if by_dynamo or "_orig_mod" in module._modules or module._compiled_call_impl is not None:
            raise UnsupportedArchitectureError(
                f"{where} is compiled (torch.compile): prune the model before it is compiled, and compile the pruned "
                "one. What torch.compile was given is the attribute _orig_mod of what it returned."
            )
        if isinstance(getattr(module, "base_layer", None), nn.Module):
            raise UnsupportedArchitectureError(
                f"{where} has an adapter of PEFT: prune the model first and add the adapter then, or merge it before "
                "(model = peft_model.merge_and_unload(); unload() drops it)."
            )


def require_own_weights(model: PreTrainedModel, layers: DecoderLayers) -> None:
    """Refuse parameters of the decoder layers whose memory is that of others too, unless the model declares them tied.

    Pruning one would change the other, and Transformers can't save them.
    """
    declared = getattr(model, "all_tied_weights_keys", {})
    tied = {*declared, *declared.values()}
    spans = []
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.device.type != "meta" and parameter.numel():
            sizes = zip(parameter.shape, parameter.stride(), strict=True)
            # Elements from the first to the last one in memory, whatever the strides.
            length = 1 + sum((count - 1) * step for count, step in sizes)
            first = parameter.data_ptr()
            spans.append((str(parameter.device), first, first + length * parameter.element_size(), name))
            if length < parameter.numel():
                raise UnsupportedArchitectureError(f"{name} repeats its own memory (expand): pass a model with copies.")
    before = ("", 0, 0, "")
    for span in sorted(spans):
        names = {before[3], span[3]}
        overlap = span[0] == before[0] and span[1] < before[2]
        if overlap and not names <= tied and any(name.startswith(f"{layers.name}.") for name in names):
            raise UnsupportedArchitectureError(
                f"{span[3]} and {before[3]} share memory, and {type(model).__name__} does not declare them tied: give "
                "each a tensor of its own (nn.Parameter(weight.clone())), or they could not be saved."
            )
        # The span that reaches furthest: a later one may lie inside it and not reach its end.
        before = max(before, span, key=lambda s: (s[0], s[2]))


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether `name` matches one of the shell-style patterns, case included."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def position_limit(model: PreTrainedModel) -> int | None:
    """How many tokens of a sequence have a position; `None`: any number."""
    config = model.config.get_text_config(decoder=True)
    return None if getattr(config, "alibi", False) else getattr(config, "max_position_embeddings", None)


def input_embedding(model: PreTrainedModel) -> Tensor:
    """Weight of the input embedding [vocabulary, hidden]; its device is where token ids go."""
    weight = model.get_input_embeddings().weight
    if not isinstance(weight, Tensor):
        raise UnsupportedArchitectureError(f"{type(model).__name__} has no input embedding with a weight.")
    return weight
