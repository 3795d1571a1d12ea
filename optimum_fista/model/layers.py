"""Finding the decoder layers of a model, by structure.

There is no list of layers for each family, as in other tools. What Transformers declares (classes that are not split
over devices, tied weights, the head) and the shapes of parameters decide. Other models are refused, and the error says
what was found. A new quirk of an architecture belongs here, with its own test.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from optimum_fista import internals
from optimum_fista.model import UnsupportedArchitectureError
from optimum_fista.model.offload import combined_sha256, offload_hook, settle_ties, sha256_of


@dataclass(frozen=True, eq=False)
class DecoderLayers:
    """The decoder layers of a model in execution order, and the modules around them."""

    model: PreTrainedModel
    name: str  # of their nn.ModuleList, such as model.layers
    modules: tuple[nn.Module, ...]
    around: tuple[
        nn.Module, ...
    ]  # embeddings, norms and the like: of the decoder, in no layer, not the head
    names_around: tuple[str, ...]  # of the model's tensors in no layer; of those that are tied, one
    shared: dict[
        str, str
    ]  # modules in the layers that share their weight, with the reason to leave them dense

    def __len__(self) -> int:
        return len(self.modules)

    def __iter__(self) -> Iterator[tuple[str, nn.Module]]:
        """Names and modules, in execution order."""
        return iter((f"{self.name}.{i}", module) for i, module in enumerate(self.modules))

    def outside(self, *, with_media: bool) -> Sequence[nn.Module]:
        """The modules around the layers; `with_media` those of encoders for images and sounds, too."""
        inside = {
            self.model.get_output_embeddings(),
            *(part for layer in self.modules for part in layer.modules()),
        }
        return [m for m in self.model.modules() if m not in inside] if with_media else self.around

    def dense_digest(self, of_layers: Iterable[str | None]) -> str:
        """SHA-256 of the model before it was pruned, from those of its decoder layers."""
        return combined_sha256([*map(str, of_layers), sha256_of(self.model, self.names_around)])


def find_decoder_layers(model: PreTrainedModel) -> DecoderLayers:
    """Find the `nn.ModuleList` of decoder layers of a causal language model.

    Decoder layers are the model's `_no_split_modules`, or else modules made for gradient checkpointing. If there are
    several such lists (one may be of a vision encoder), the list of `model.get_decoder()` is taken.
    """
    config, why = model.config, None
    if not model.can_generate():
        why = "it can't generate text (it has no causal language-model head)"
    elif getattr(config, "is_encoder_decoder", False):
        why = "it is an encoder-decoder model"
    elif getattr(config, "is_decoder", None) is False and hasattr(config, "add_cross_attention"):
        why = "it is an encoder, in which every token sees all others (config.is_decoder is False)"
    if why is not None:
        advice = "Pass a decoder-only model, loaded by AutoModelForCausalLM"
        raise UnsupportedArchitectureError(
            f"{type(model).__name__} can't be pruned: {why}. {advice}."
        )
    decoder = model.get_decoder()
    # Names of classes that Transformers does not split over devices, because they hold a residual connection.
    wanted = internals.classes_not_split(model)
    lists = {
        name: m for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)
    }
    # PyTorch's fully_shard puts FSDP before the name of a layer's class.
    found = {
        n: m
        for n, m in lists.items()
        if wanted & {type(layer).__name__.removeprefix("FSDP") for layer in m}
    }
    own = {*decoder.modules()}
    if not own.intersection(found.values()):  # none, or those of a vision encoder only (BLIP)
        found = {
            name: m for name, m in lists.items() if isinstance(m[0], GradientCheckpointingLayer)
        }
    if len(found) > 1:  # others may be layers of a vision encoder, which may be inside the decoder
        while isinstance(decoder, PreTrainedModel) and decoder.get_decoder() is not decoder:
            decoder = decoder.get_decoder()  # of a causal language model inside a multimodal one
        own = {*decoder.modules()}
        found = {name: m for name, m in found.items() if m in own}
    if len(found) > 1:
        inner = [
            m for m in decoder.modules() if isinstance(m, PreTrainedModel) and m is not decoder
        ]
        own = own.difference(*(m.modules() for m in inner))
        found = {name: m for name, m in found.items() if m in own}
    if len(found) != 1:
        seen = (
            ", ".join(f"{name} ({len(m)} x {type(m[0]).__name__})" for name, m in lists.items())
            or "none"
        )
        raise UnsupportedArchitectureError(
            f"{type(model).__name__} can't be pruned: looked for one nn.ModuleList of "
            f"{' or '.join(sorted(wanted)) or 'decoder layers (the model declares no _no_split_modules)'} "
            f"and found {len(found)}; its module lists are: {seen}."
        )
    ((name, layers),) = found.items()
    inside = {*layers.modules(), model.get_output_embeddings()}
    firsts, shared = dict[int, str](), dict[str, str]()
    for path, parameter in layers.named_parameters(prefix=name, remove_duplicate=False):
        one = path.removesuffix(".weight")
        first = firsts.setdefault(id(parameter), one)
        if path.endswith(".weight") and one != first:
            shared[one] = f"shares its weight with {first}"
            shared.setdefault(first, f"shares its weight with {one}")
    around = tuple(module for module in decoder.modules() if module not in inside)
    # A model is on the device of its first parameter, as Transformers sees it: inputs go there.
    foremost = model.get_submodule(
        next(path for path, _ in model.named_parameters()).rpartition(".")[0]
    )
    around = around if foremost in {*around, *inside} else (*around, foremost)
    tied = model.all_tied_weights_keys
    names_around = tuple(
        n for n in model.state_dict() if not n.startswith(f"{name}.") and n not in tied
    )
    return DecoderLayers(model, name, tuple(layers), around, names_around, shared)


def prunable_layers(model: PreTrainedModel, *, loaded: bool = True) -> DecoderLayers:
    """Find the decoder layers of a model whose weights can be changed one by one and saved; refuse other models.

    The weights have to be loaded, unless `loaded` is False.
    """
    for name, module in model.named_modules():
        where = f"model.{name}" if name else "model"
        if internals.is_compiled(module):  # hooks may not run
            raise UnsupportedArchitectureError(
                f"{where} is compiled (torch.compile): prune the model before it is compiled, and compile the pruned "
                "one. The original is the attribute _orig_mod of the module that torch.compile returned."
            )
        if isinstance(
            getattr(module, "base_layer", None), nn.Module
        ):  # its own matrices look like operators
            advice = "or merge it before (model = peft_model.merge_and_unload(); unload() drops it)"
            raise UnsupportedArchitectureError(
                f"{where} has a PEFT adapter: prune the model first, {advice}."
            )
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"model is a {type(model).__name__}: pass a transformers.PreTrainedModel.")
    require_unquantized(model, loaded=loaded)
    if any(parameter.is_inference() for parameter in model.parameters()):
        raise ValueError(
            "model was loaded in inference mode, so it can't be changed: load it outside of that."
        )
    if loaded:
        settle_ties(model)
    layers, ties = find_decoder_layers(model), model.all_tied_weights_keys
    spans = []
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.device.type != "meta" and parameter.numel():
            # All elements from the first to the last one in memory, whatever the strides.
            length = 1 + sum(
                (n - 1) * step for n, step in zip(parameter.shape, parameter.stride(), strict=True)
            )
            first = parameter.data_ptr()
            spans.append(
                (str(parameter.device), first, first + length * parameter.element_size(), name)
            )
    for (place, _, end, before), (device, first, _, name) in pairwise(sorted(spans)):
        overlap = device == place and first < end and not {before, name} <= {*ties, *ties.values()}
        # Pruning one would change the other, and Transformers can't save them.
        if overlap and any(n.startswith(f"{layers.name}.") for n in (before, name)):
            raise UnsupportedArchitectureError(
                f"{name} and {before} share memory, and {type(model).__name__} does not declare them tied, so "
                "they could not be saved: give each a tensor of its own (nn.Parameter(weight.clone())), or name both "
                "in _tied_weights_keys of the class, which counts if config.tie_word_embeddings is True."
            )
    return layers


def require_unquantized(model: PreTrainedModel, *, loaded: bool = True) -> None:
    """Refuse models whose weights are not plain floating point, or not loaded (if `loaded` is True)."""
    settings = getattr(
        model.config, "quantization_config", None
    )  # a dict until a model is loaded, then an object
    method = (
        settings.get("quant_method")
        if isinstance(settings, dict)
        else getattr(settings, "quant_method", None)
    )
    if settings is not None and method != "gguf":  # GGUF weights are dequantized when they are read
        shown = getattr(method, "value", method)
        advice = "or pass the folder or Hub id, from which one decoder layer after the other is dequantized"
        raise ValueError(f"model is quantized by {shown!r}: prune the unquantized model, {advice}.")
    kept = [(name, module) for name, module in model.named_modules() if offload_hook(module)]
    offloaded = {
        key for name, module in kept for key, _ in module.named_parameters(name, recurse=False)
    }
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point() or parameter.element_size() < 2:
            raise ValueError(
                f"{name} has dtype {parameter.dtype}: prune the model in float32, bfloat16 or float16."
            )
        if loaded and parameter.device.type == "meta" and name not in offloaded:
            raise ValueError(
                f"{name} is not loaded (device meta): load it or have Accelerate offload it (device_map)."
            )


def token_limits(model: PreTrainedModel) -> tuple[int, int | None]:
    """Count the token ids with an embedding, and the positions that a sequence may have; `None`: no limit."""
    embedding: Any = model.get_input_embeddings()
    config = model.config.get_text_config(decoder=True)
    # With ALiBi, attention depends on distance: a table of positions in the configuration is not used.
    positions = (
        None
        if getattr(config, "alibi", False)
        else getattr(config, "max_position_embeddings", None)
    )
    return embedding.weight.shape[0], positions
