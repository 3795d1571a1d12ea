"""Finding the decoder layers of a model, by structure.

There is no list of layers for each family, as in other tools. What Transformers declares (classes that are not split
over devices, tied weights, the head) and the shapes of parameters decide. Other models are refused, and the error says
what was found. A new quirk of an architecture belongs here, with its own test.

`find_decoder_layers` looks only. A run calls `prunable_layers` once, which also refuses models that can't be changed or
saved; all later steps get its `DecoderLayers`. Tied weights are two names of one parameter, such as those of the
embedding and of the head.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from optimum_fista import internals
from optimum_fista.model import UnsupportedArchitectureError
from optimum_fista.model.digests import combined_sha256, sha256_of
from optimum_fista.model.offload import offload_hook, settle_ties


@dataclass(frozen=True, eq=False)
class DecoderLayers:
    """The decoder layers of a model in execution order, and the modules around them."""

    model: PreTrainedModel
    name: str  # of their nn.ModuleList, such as model.layers
    modules: tuple[nn.Module, ...]
    # embeddings, norms and the like: of the decoder, in no layer, not the head
    around: tuple[nn.Module, ...]
    names_around: tuple[str, ...]  # of the model's tensors in no layer; of those that are tied, one
    # modules in the layers that share their weight, with the reason to leave them dense
    shared: dict[str, str]

    def __len__(self) -> int:
        return len(self.modules)

    def __iter__(self) -> Iterator[tuple[str, nn.Module]]:
        """Names and modules, in execution order."""
        return iter((f"{self.name}.{i}", module) for i, module in enumerate(self.modules))

    def outside(self, *, with_media: bool) -> Sequence[nn.Module]:
        """The modules around the layers, without the head; `with_media`: also encoders of images and sounds.

        `self.around` are those of the decoder only, such as embeddings and norms. Changes nothing.
        """
        if not with_media:
            return self.around
        # all modules of the model but those of the layers, and the head
        inside = {part for layer in self.modules for part in layer.modules()}
        inside.add(self.model.get_output_embeddings())
        return [module for module in self.model.modules() if module not in inside]

    def dense_digest(self, of_layers: Iterable[str | None]) -> str:
        """SHA-256 of the model before it was pruned, from those of its decoder layers, in their order.

        `of_layers` are digests of the dense layers; `None` stands for a layer without one. The tensors around the
        layers (`self.names_around`) are read now: they must still be dense.
        """
        around = sha256_of(self.model, self.names_around)
        return combined_sha256([*map(str, of_layers), around])


def find_decoder_layers(model: PreTrainedModel) -> DecoderLayers:
    """Find the `nn.ModuleList` of decoder layers of a causal language model. Changes nothing.

    Decoder layers are the model's `_no_split_modules`, or else modules made for gradient checkpointing. If there are
    several such lists (one may be of a vision encoder), the list of `model.get_decoder()` is taken.
    """
    _require_causal(model)
    name, layers, decoder = _find_list_of_layers(model)  # such as "model.layers"
    # modules of the decoder that are neither in a layer nor the head
    inside = {*layers.modules(), model.get_output_embeddings()}
    around = [module for module in decoder.modules() if module not in inside]
    # A model is on the device of its first parameter, as Transformers sees it: inputs go there, so the module with that
    # parameter is needed on the device, too.
    name_of_first, _ = next(iter(model.named_parameters()))
    path_of_first, _, _ = name_of_first.rpartition(".")  # without the parameter's own name
    owner_of_first = model.get_submodule(path_of_first)
    if owner_of_first not in inside.union(around):
        around.append(owner_of_first)

    # Of tied tensors, the keys are names that stand for another tensor, which is in the list itself.
    names_around = [
        tensor_name
        for tensor_name in model.state_dict()
        if not tensor_name.startswith(f"{name}.") and tensor_name not in model.all_tied_weights_keys
    ]
    return DecoderLayers(
        model=model,
        name=name,
        modules=tuple(layers),
        around=tuple(around),
        names_around=tuple(names_around),
        shared=_shared_weights(name, layers),
    )


def _require_causal(model: PreTrainedModel) -> None:
    """Refuse models that are no causal language models. Changes nothing."""
    config = model.config
    if not model.can_generate():
        raise UnsupportedArchitectureError(
            f"{type(model).__name__} can't be pruned: it can't generate text (it has no causal language-model head). "
            "Pass a decoder-only model, loaded by AutoModelForCausalLM."
        )
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedArchitectureError(
            f"{type(model).__name__} can't be pruned: it is an encoder-decoder model. Pass a decoder-only model, "
            "loaded by AutoModelForCausalLM."
        )
    # A class such as BertLMHeadModel is an encoder or a decoder, by its configuration.
    may_be_encoder = hasattr(config, "add_cross_attention")
    if may_be_encoder and getattr(config, "is_decoder", None) is False:
        raise UnsupportedArchitectureError(
            f"{type(model).__name__} can't be pruned: it is an encoder, in which every token sees all others "
            "(config.is_decoder is False). Pass a decoder-only model, loaded by AutoModelForCausalLM."
        )


def _find_list_of_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList, nn.Module]:
    """Find the list of decoder layers with its name, and the decoder that it is in; there must be exactly one list.

    The name is that of the list in the model, such as "model.layers". The decoder is that of the model. If several
    lists may be meant, it is the innermost one: the decoder of that decoder, and so on. Changes nothing.
    """
    decoder: nn.Module = model.get_decoder()
    # Names of classes that Transformers does not split over devices, because they hold a residual connection: decoder
    # layers.
    wanted = internals.classes_not_split(model)
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module)
    }
    # Lists with a module whose own class, not one that it is derived from, has such a name.
    candidates = {name: module for name, module in lists.items() if wanted & _class_names(module)}
    # There may be no such list, or only lists of a vision encoder (BLIP), which are not in the decoder.
    has_list_in_decoder = bool(_inside(decoder, candidates))
    if not has_list_in_decoder:
        candidates = {
            name: module
            for name, module in lists.items()
            if isinstance(module[0], GradientCheckpointingLayer)
        }

    # Other lists may be of a vision encoder: outside of the innermost decoder, or a model of its own inside it.
    if len(candidates) > 1:
        decoder = _innermost_decoder(decoder)
        candidates = _inside(decoder, candidates)
    if len(candidates) > 1:
        # without lists that are in another model inside the decoder
        candidates = {
            name: module
            for name, module in candidates.items()
            if not any(module in encoder.modules() for encoder in _models_inside(decoder))
        }

    if len(candidates) != 1:
        descriptions = [
            f"{name} ({len(module)} x {type(module[0]).__name__})" for name, module in lists.items()
        ]
        looked_for = sorted(wanted) or ["decoder layers (the model declares no _no_split_modules)"]
        raise UnsupportedArchitectureError(
            f"{type(model).__name__} can't be pruned: looked for one nn.ModuleList of {' or '.join(looked_for)} and "
            f"found {len(candidates)}; its module lists are: {', '.join(descriptions) or 'none'}."
        )
    ((name, layers),) = candidates.items()  # the only one
    return name, layers, decoder


def _class_names(layers: nn.ModuleList) -> set[str]:
    """Names of the classes of modules in a list, without the FSDP that PyTorch's fully_shard puts before them."""
    return {type(layer).__name__.removeprefix("FSDP") for layer in layers}


def _inside(module: nn.Module, lists: Mapping[str, nn.ModuleList]) -> dict[str, nn.ModuleList]:
    """Select those of the `lists` of modules, by their names, that are in a module."""
    modules = {*module.modules()}
    return {name: candidate for name, candidate in lists.items() if candidate in modules}


def _innermost_decoder(decoder: nn.Module) -> nn.Module:
    """Find the decoder of a decoder, and so on, until one is its own: it may be a language model in a multimodal one.

    Changes nothing.
    """
    while isinstance(decoder, PreTrainedModel) and decoder.get_decoder() is not decoder:
        decoder = decoder.get_decoder()
    return decoder


def _models_inside(decoder: nn.Module) -> list[PreTrainedModel]:
    """Find the models of Transformers inside a decoder, such as a vision encoder; the decoder is not one of them."""
    return [
        module
        for module in decoder.modules()
        if isinstance(module, PreTrainedModel) and module is not decoder
    ]


def _shared_weights(name: str, layers: nn.ModuleList) -> dict[str, str]:
    """Modules of the decoder layers that share their weight, by name, each with a sentence that names another one.

    `name` is that of the list of layers in the model, such as "model.layers". Changes nothing.
    """
    first_owners: dict[int, str] = {}  # the first module with a parameter, by the parameter's id
    shared: dict[str, str] = {}
    # every name of a parameter, not only the first one
    for path, parameter in layers.named_parameters(prefix=name, remove_duplicate=False):
        module = path.removesuffix(".weight")
        first = first_owners.setdefault(id(parameter), module)
        if path.endswith(".weight") and module != first:
            shared[module] = f"shares its weight with {first}"
            shared.setdefault(first, f"shares its weight with {module}")
    return shared


def prunable_layers(model: PreTrainedModel, *, loaded: bool = True) -> DecoderLayers:
    """Find the decoder layers of a model whose weights can be changed one by one and saved; refuse other models.

    The weights have to be loaded, unless `loaded` is False.

    If they are loaded, this may change the model: offloaded weights that the configuration calls tied become one
    parameter if they are equal, and are taken out of `model.all_tied_weights_keys` if not (`settle_ties`). No weight
    gets another value.
    """
    for name, module in model.named_modules():
        full_name = f"model.{name}" if name else "model"  # "" is the model itself
        _require_plain(full_name, module)
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"model is a {type(model).__name__}: pass a transformers.PreTrainedModel.")
    require_unquantized(model, loaded=loaded)
    if any(parameter.is_inference() for parameter in model.parameters()):
        raise ValueError(
            "model was loaded in inference mode, so it can't be changed: load it outside of that."
        )
    if loaded:
        settle_ties(model)
    layers = find_decoder_layers(model)
    _require_own_memory(model, layers.name)
    return layers


def _require_plain(name: str, module: nn.Module) -> None:
    """Refuse a module that is compiled or has an adapter; `name` is for the message, such as "model.lm_head"."""
    if internals.is_compiled(module):  # hooks may not run
        raise UnsupportedArchitectureError(
            f"{name} is compiled (torch.compile): prune the model before it is compiled, and compile the pruned "
            "one. The original is the attribute _orig_mod of the module that torch.compile returned."
        )
    if isinstance(getattr(module, "base_layer", None), nn.Module):
        # a layer of PEFT, whose own small matrices would be pruned like operators
        raise UnsupportedArchitectureError(
            f"{name} has a PEFT adapter: prune the model first, or merge it before "
            "(model = peft_model.merge_and_unload(); unload() drops it)."
        )


def _require_own_memory(model: PreTrainedModel, layers_name: str) -> None:
    """Refuse a model in which a parameter of a decoder layer shares memory with one that it is not tied to.

    Pruning one would change the other, and Transformers can't save them. `layers_name` is the name of the list of
    decoder layers, such as "model.layers". Changes nothing.
    """
    tied_names = {*model.all_tied_weights_keys, *model.all_tied_weights_keys.values()}
    # of each parameter: its device, its first byte, the byte after its last one, and its name
    spans = [
        (*_span_of(parameter), name)
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if parameter.device.type != "meta" and parameter.numel()
    ]
    # The spans before that reach into the next one.
    overlapped: list[tuple[str, int, int, str]] = []
    # Sorted by device and first byte, a span begins no later than those after it.
    for span in sorted(spans):
        device, start, _, name = span
        overlapped = [other for other in overlapped if other[0] == device and other[2] > start]
        for *_, other_name in overlapped:
            are_tied = {name, other_name} <= tied_names
            is_in_layers = any(n.startswith(f"{layers_name}.") for n in (name, other_name))
            if is_in_layers and not are_tied:
                raise UnsupportedArchitectureError(
                    f"{name} and {other_name} share memory, and {type(model).__name__} does not declare them tied, so "
                    "they could not be saved: give each a tensor of its own (nn.Parameter(weight.clone())), or name "
                    "both in _tied_weights_keys of the class, which counts if config.tie_word_embeddings is True."
                )
        overlapped.append(span)


def _span_of(tensor: Tensor) -> tuple[str, int, int]:
    """The device of a tensor, and the addresses of its first byte and of the one after its last element."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    # The number of elements from the first to the last one in memory, those between that are not the tensor's included.
    length = 1 + sum((size - 1) * stride for size, stride in steps)
    start = tensor.data_ptr()
    return str(tensor.device), start, start + length * tensor.element_size()


def require_unquantized(model: PreTrainedModel, *, loaded: bool = True) -> None:
    """Refuse models whose weights are not floating point of 16 bits and more, or not loaded (if `loaded` is True).

    Weights that Accelerate has offloaded count as loaded. Changes nothing.
    """
    method = _quantization_method(model)
    # The weights of GGUF files and of packed folders are dense when they are read.
    is_dense_when_read = method in ("gguf", "fista_packed")
    if method is not None and not is_dense_when_read:
        raise ValueError(
            f"model is quantized by {method!r}: prune the unquantized model, or pass the "
            "folder or Hub id, from which one decoder layer after the other is dequantized."
        )

    offloaded: set[str] = set()  # full names of parameters
    for module_name, module in model.named_modules():
        if offload_hook(module) is not None:
            parameters = module.named_parameters(prefix=module_name, recurse=False)
            offloaded.update(name for name, _ in parameters)
    for name, parameter in model.named_parameters():
        has_8_bits = parameter.element_size() < 2  # bytes; integers, or a float8
        if not parameter.is_floating_point() or has_8_bits:
            raise ValueError(
                f"{name} has dtype {parameter.dtype}: prune the model in float32, bfloat16 or float16."
            )
        if loaded and parameter.device.type == "meta" and name not in offloaded:
            raise ValueError(
                f"{name} is not loaded (device meta): load it or have Accelerate offload it (device_map)."
            )


def _quantization_method(model: PreTrainedModel) -> str | None:
    """Return how the configuration says that the model is quantized, such as "gptq"; `None`: it is not.

    "unknown" if the configuration has settings that name no method.
    """
    settings: Any = getattr(model.config, "quantization_config", None)
    if settings is None:
        return None
    # A dictionary becomes an object when Transformers loads the model.
    if isinstance(settings, dict):
        method = settings.get("quant_method", "unknown")
    else:
        method = getattr(settings, "quant_method", "unknown")
    return str(getattr(method, "value", method))  # Transformers has an Enum


def token_limits(model: PreTrainedModel) -> tuple[int, int | None]:
    """Count the token ids with an embedding, and the positions that a sequence may have; `None`: no limit.

    Changes nothing, and reads only shapes and the configuration.
    """
    embedding: Any = model.get_input_embeddings()
    config = model.config.get_text_config(decoder=True)
    # With ALiBi, attention depends on distance: a table of positions in the configuration is not used.
    uses_distance = getattr(config, "alibi", False)
    positions = None if uses_distance else getattr(config, "max_position_embeddings", None)
    return embedding.weight.shape[0], positions
