"""The inventory of a model's files: which tensors its class loads, as which parameters, and what becomes of the others.

`source_tensors` takes it, and returns a `SourceTensors`. Tensors that the class does not load belong to *modules* that
the model lacks, such as "mtp" or "model.layers.61". They are copied to the result, module by module, unless the result
could not hold them; then the reason is noted. No tensor is changed here, and few are read: two with one name in the
model are compared, and quantized ones that are not loaded are tried, one of each kind.

- A *stored tensor* (`StoredTensor`) is a tensor in the files, with a name such as "model.layers.3.mlp.up_proj.weight".
  Its dtype is named as in safetensors; dtypes in `PLAIN_FLOATS` need no scales, others are quantized, or integers.
- A *place* is the name of the parameter as which a stored tensor is loaded (`Naming` finds it); several stored tensors
  may have one place, such as the weights and scales of all experts.
- A *part* (`removal.parts.Part`) is a dimension of a decoder layer that a run makes smaller, for instance the attention
  heads.
- The *quantization settings* are the dictionary `quantization_config` of `config.json`.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from optimum_fista.model.layers import find_decoder_layers
from optimum_fista.packed.format import SUFFIXES, packed_names
from optimum_fista.source.formats.dequantizer import Dequantizer, dequantizer_of
from optimum_fista.source.loaded_names import Naming
from optimum_fista.source.loading import model_without_weights, read_config
from optimum_fista.source.model_folder import CONFIG_FILE, PACKED_KEY, read_json
from optimum_fista.source.prediction_layers import find_prediction_layers
from optimum_fista.source.source_tensors import CutPart, SourceTensors
from optimum_fista.source.stored_tensor import PLAIN_FLOATS, StoredTensor, read_stored

# What a module in FP8 may store for its weight.
_PARTS_IN_FP8 = ("weight", "weight_scale_inv", "weight_scale")
IS_NOT_DESCRIBED = "loads a part of the model, whose configuration does not describe them"
"""The end of the reason why tensors of a larger model are not copied, such as those of its image tower."""


def _belongs_to_no_part(_: str) -> None:
    """Say of every parameter that it is not cut: the default of `part_of`."""


def source_tensors(
    model: PreTrainedModel,
    source: Path,
    part_of: Callable[[str], CutPart | None] = _belongs_to_no_part,
    *,
    quantized: bool = True,
    layers_name: str | None = None,
) -> SourceTensors:
    """Find the tensors in the files of a loaded model, and say which are not copied. Changes nothing.

    Modules that are not loaded are not copied in three cases:

    - A run cuts parts of decoder layers, and a module has tensors of the same name and shape: the configuration has one
      number of channels, for instance, for decoder layers and for layers that predict more tokens. Such layers are
      copied if they only have to lose experts (`prediction_layers` of the result).
    - The result is not quantized and the module can't be dequantized.
    - The model is a part of that in the files, such as the text decoder alone, and its configuration does not describe
      the rest.

    Args:
        model: The model, or one of its class on the meta device.
        source: The folder of its files.
        part_of: Returns the part to which a parameter of this name belongs; `None` if the run does not cut it.
        quantized: Whether the result is quantized as the source is.
        layers_name: The name of the list of decoder layers in the model, such as "model.layers"; `None`: it is looked
            for.

    Raises:
        ValueError: Two tensors have one place and different values, or a tensor is quantized and `config.json` is not
            that of a quantized model.
    """
    stored = read_stored(source)
    config_file = source / CONFIG_FILE
    config = read_json(config_file) if config_file.exists() else {}
    dequantizer, settings = _read_quantization(source, config)

    naming = Naming(model, dequantizer)
    division = _divide(stored, naming)
    if dequantizer is None:
        _require_plain_floats(stored, division.places, naming.state, source)
    _require_one_value_each(stored, division.own_names, type(model).__name__)

    not_loaded = division.not_loaded
    still_quantized: dict[str, str] = {}
    if dequantizer is not None and not quantized:
        stored, not_loaded = _dequantized(stored, not_loaded, dequantizer, model.dtype)
        still_quantized = _modules_still_quantized(stored, not_loaded)

    if layers_name is None:
        layers_name = find_decoder_layers(model).name
    tensors = SourceTensors(
        stored=stored,
        places=division.places,
        not_loaded=not_loaded,
        layers=_prefix_of_layers(division.places, f"{layers_name}."),
        settings=settings,
    )
    with_cut_parts = _modules_with_cut_parts(tensors, part_of, naming.state)
    prediction_layers = find_prediction_layers(
        with_cut_parts,
        tensors,
        naming=naming,
        layers_name=layers_name,
        part_of=part_of,
        in_plain_floats=partial(
            _in_plain_floats, tensors, dequantizer=dequantizer, dtype=model.dtype
        ),
    )
    for layer in prediction_layers:
        del with_cut_parts[layer.module]  # they lose their experts, and are copied

    # If there are several reasons, the last one is given.
    not_copied = {
        **still_quantized,
        **with_cut_parts,
        **_modules_not_described(model, source, config, not_loaded),
    }
    return replace(
        tensors,
        not_copied=not_copied,
        prediction_layers=[layer for layer in prediction_layers if layer.module not in not_copied],
    )


def _read_quantization(
    source: Path, config: Mapping[str, Any]
) -> tuple[Dequantizer | None, dict[str, Any]]:
    """Find what dequantizes the weights in the folder `source`, and the quantization settings by which it does.

    `config` is the content of the `config.json` there. `None` and no settings if the weights are not quantized. A
    packed folder has settings, but its weights are not quantized.
    """
    settings = _quantization_settings(config)
    # `dequantizer_of` reads the configuration by its class.
    dequantizer = dequantizer_of(source) if settings else None
    if dequantizer is None:
        return None, {}
    return dequantizer, settings


def _quantization_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the quantization settings in the content of a `config.json`; empty if there are none.

    They stand at the top, or in the section of the text decoder. The first ones that are found are returned.
    """
    sections = [config, *(value for value in config.values() if isinstance(value, dict))]
    for section in sections:
        if PACKED_KEY in section:
            settings: dict[str, Any] = section[PACKED_KEY]
            return settings
    return {}


class _Division(NamedTuple):
    """The stored tensors of a model, by whether its class loads them; all are by their names in the files.

    The three parts of a packed tensor are among neither: they are no tensors of the model.
    """

    places: dict[str, str]  # of each tensor that is loaded
    # the name of each of these in the model, before it is merged with others
    own_names: dict[str, str]
    not_loaded: dict[str, str]  # the module of each tensor that is not loaded


def _divide(stored: Mapping[str, StoredTensor], naming: Naming) -> _Division:
    """Divide all stored tensors, by their names, into those that the model of `naming` loads, and the others."""
    packed_parts = {f"{name}{suffix}" for name in packed_names(stored) for suffix in SUFFIXES}
    division = _Division(places={}, own_names={}, not_loaded={})
    for name in stored:
        if name in packed_parts:
            continue
        new_names = naming.names_of(name)
        if naming.is_loaded(name, new_names.place):
            division.places[name] = new_names.place
            division.own_names[name] = new_names.own
        else:
            division.not_loaded[name] = naming.module_of(new_names.own)
    return division


def _require_plain_floats(
    stored: Mapping[str, StoredTensor],
    places: Mapping[str, str],
    state: Mapping[str, Tensor],
    source: Path,
) -> None:
    """Raise ValueError for a stored tensor that is quantized, in a folder whose `config.json` says nothing of it.

    Args:
        stored: The tensors, by their names in the files of the folder `source`.
        places: The place of each tensor that is loaded, by the tensor's name in the files.
        state: The parameters and buffers of the model, by name. If one has integers, so may its stored tensor.
        source: The folder.
    """
    for name, place in places.items():
        dtype = stored[name].dtype
        if dtype not in PLAIN_FLOATS and state[place].is_floating_point():
            raise ValueError(
                f"{name} has dtype {dtype}, and config.json has no quantization_config to read it by: copy that of "
                f"the quantized model into {str(source / CONFIG_FILE)!r}."
            )


def _require_one_value_each(
    stored: Mapping[str, StoredTensor], own_names: Mapping[str, str], model_class: str
) -> None:
    """Raise ValueError if two stored tensors have the same name in the model and different values.

    Only tensors that share a name with another are read.

    Args:
        stored: The tensors, by their names in the files.
        own_names: The name in the model of each tensor that is loaded, by its name in the files.
        model_class: The name of the model's class, for the error.
    """
    first_with: dict[str, str] = {}  # the first tensor in the files, by its name in the model
    for name, own in own_names.items():
        if own not in first_with:
            first_with[own] = name
            continue
        first = first_with[own]
        if not stored[name].equals(stored[first]):
            raise ValueError(
                f"{name} and {first} are both {own} of {model_class}, with different values: delete the wrong one from "
                "the files of the model."
            )


def _prefix_of_layers(places: Mapping[str, str], layers: str) -> str:
    """Return what most names of stored tensors of decoder layers begin with, such as "transformer.h.".

    It is what stands before the number of the layer. Returns "" if no stored name has the number of its layer.

    Args:
        places: The name of the parameter as which each tensor is loaded, by the tensor's name in the files.
        layers: What the names of these parameters begin with in decoder layers, such as "model.layers.".
    """
    num_with_prefix = Counter[str]()
    for name, place in places.items():
        if not place.startswith(layers):
            continue
        number_of_layer, _, _ = place.removeprefix(layers).partition(".")
        words = name.split(".")
        if number_of_layer in words[:-1]:
            words_before = words[: words.index(number_of_layer)]
            prefix = "".join(f"{word}." for word in words_before)
            num_with_prefix[prefix] += 1

    most_common = num_with_prefix.most_common(1)  # a list of one pair; empty if nothing was counted
    if not most_common:
        return ""
    prefix, _ = most_common[0]
    return prefix


def _name_in_layer(name: str) -> str:
    """Return the name of a stored tensor inside its decoder layer, such as "mlp.up_proj.weight"."""
    return re.sub(r"^.*?\.\d+\.", "", name)


def _layer_of(name: str) -> str:
    """Return what the name of a stored tensor in a decoder layer begins with, such as "model.layers.3."; else ""."""
    return name.removesuffix(_name_in_layer(name))


def _modules_with_cut_parts(
    tensors: SourceTensors,
    part_of: Callable[[str], CutPart | None],
    state: Mapping[str, Tensor],
) -> dict[str, str]:
    """Return the modules that are not copied because they have what decoder layers lose, each with the reason.

    A tensor that is not loaded is taken for such a part if decoder layers lose one of the same name and shape. In a
    decoder layer itself, it is also taken for one if it has an axis as long as one that the layer loses a part of. If
    experts lose channels, every module with experts is among them: the files may keep its experts in another form than
    those of decoder layers. Such a module is recognized by the name of the mixture, such as "experts" in
    "mtp.layers.0.mlp.experts.down_proj". Nothing is changed.

    Args:
        tensors: All stored tensors, with the places of those that are loaded and the modules of the others.
        part_of: Returns the part to which a parameter of this name belongs; `None` if the run does not cut it.
        state: The parameters and buffers of the model, by name.
    """
    # Of each stored tensor that the run cuts: its name in its decoder layer, and its shape, such as
    # ("mlp.gate.weight", (64, 2048)).
    shapes_of_parts = set[tuple[str, tuple[int, ...]]]()
    # What the model calls mixtures whose experts lose channels, such as "experts".
    names_of_mixtures = set[str]()
    # By what the names in a decoder layer begin with: the lengths of the axes that become shorter there.
    lengths_of_layers = defaultdict[str, set[int]](set)
    for name, place in tensors.places.items():
        part = part_of(place)
        if part is None:
            continue
        if place in part.tensors:
            axis, _ = part.tensors[place]
            lengths_of_layers[_layer_of(name)].add(state[place].shape[axis])
        shapes_of_parts.add((_name_in_layer(name), tensors.stored[name].shape))
        if part.mixture is not None:
            names_of_mixtures.add(part.mixture.rpartition(".")[2])

    num_tensors = Counter(tensors.not_loaded.values())
    reasons: dict[str, str] = {}
    for name, module in tensors.not_loaded.items():
        shape = tensors.stored[name].shape
        looks_like_a_part = any(
            name.endswith(f".{name_of_part}") and shape == shape_of_part
            for name_of_part, shape_of_part in shapes_of_parts
        )
        is_of_expert = any(f".{mixture}." in name for mixture in names_of_mixtures)
        has_such_an_axis = not lengths_of_layers[_layer_of(name)].isdisjoint(shape)
        if looks_like_a_part or is_of_expert or has_such_an_axis:
            # The module would need the same cut as the decoder layers, and only these are cut.
            reasons[module] = (
                f"{num_tensors[module]} tensors: parts that decoder layers lose would have to go there too"
            )
    return reasons


def _modules_still_quantized(
    stored: Mapping[str, StoredTensor], not_loaded: Mapping[str, str]
) -> dict[str, str]:
    """Return the modules that are not copied because they are still quantized, each with the reason.

    `not_loaded` has the module of each stored tensor that is not loaded, by the tensor's name.
    """
    num_tensors = Counter(not_loaded.values())
    return {
        module: f"{num_tensors[module]} tensors: they are quantized, and the result is not"
        for name, module in not_loaded.items()
        if stored[name].dtype not in PLAIN_FLOATS
    }


def _modules_not_described(
    model: PreTrainedModel, source: Path, config: Mapping[str, Any], not_loaded: Mapping[str, str]
) -> dict[str, str]:
    """Return the modules that are not copied because the result's configuration does not describe them, with reasons.

    `model` may be a part of that in the files: AutoModelForCausalLM loads the text decoder of some multimodal models,
    with the section of `config.json` that describes it. What the larger model's class would load is then missing in the
    result. Tensors that neither class loads are copied.

    Args:
        model: The loaded model.
        source: The folder of its files.
        config: The content of the `config.json` there.
        not_loaded: The module of each stored tensor that `model` does not load, by the tensor's name.
    """
    sections = [value for value in config.values() if isinstance(value, dict)]
    own_type = model.config.model_type  # such as "llama"
    is_whole_model = config.get("model_type") == own_type
    is_section = any(section.get("model_type") == own_type for section in sections)
    if is_whole_model or not is_section:
        return {}

    larger_model = model_without_weights(read_config(str(source)))
    naming = Naming(larger_model, dequantizer=None)
    num_tensors = Counter(not_loaded.values())
    reasons: dict[str, str] = {}
    for name, module in not_loaded.items():
        # `state` has the parameters and buffers of the larger model, by name.
        larger_model_has_it = naming.names_of(name).place in naming.state
        if larger_model_has_it:
            reasons[module] = (
                f"{num_tensors[module]} tensors: {type(model).__name__} {IS_NOT_DESCRIBED}"
            )
    return reasons


def _dequantized(
    stored: Mapping[str, StoredTensor],
    not_loaded: Mapping[str, str],
    dequantizer: Dequantizer,
    dtype: torch.dtype,
) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Return copies of `stored` and `not_loaded` in which weights in FP8 that are not loaded are dequantized.

    In the copy of `stored` these weights have `dtype`: they are dequantized when they are written. In the copy of
    `not_loaded` their scales are missing. Weights in other formats stay as they are, because they have other shapes.
    The arguments do not change.

    Args:
        stored: All stored tensors, by name.
        not_loaded: The module of each stored tensor that is not loaded, by the tensor's name.
        dequantizer: What has loaded the model, or one of the same format. It knows its conversions already (`Naming`).
        dtype: The dtype of the result.
    """
    dense = dict(stored)
    remaining = dict(not_loaded)
    # Whether weights of a kind can be dequantized. Those of a kind have names that differ only in numbers.
    can_be_read: dict[str, bool] = {}
    for name in not_loaded:
        is_in_fp8 = name.endswith(".weight") and stored[name].dtype.startswith("F8")
        if not is_in_fp8:
            continue
        module = name.removesuffix(".weight")
        names = {part: f"{module}.{part}" for part in _PARTS_IN_FP8}
        # For each part that is stored: the method of `StoredTensor` that reads its values from the file.
        readers = {part: stored[key].tensor for part, key in names.items() if key in remaining}
        dequantize = partial(dequantizer.dense, module, readers, dtype)
        shape = stored[name].shape
        kind = re.sub(r"\d+", "*", name)
        if kind not in can_be_read:
            # The first weight of each kind is tried now, so that an error does not come at the end.
            has_scales = len(readers) > 1
            can_be_read[kind] = has_scales and _makes_shape(dequantize, shape)
        if can_be_read[kind]:
            description = torch.empty(shape, dtype=dtype, device="meta")
            dense[name] = StoredTensor.of(description, dequantize)
            for part in _PARTS_IN_FP8:
                if part != "weight":
                    remaining.pop(names[part], None)
    return dense, remaining


def _in_plain_floats(
    tensors: SourceTensors, name: str, *, dequantizer: Dequantizer | None, dtype: torch.dtype
) -> StoredTensor | None:
    """Return the stored tensor `name`, dequantized to `dtype` if it is in FP8; `None` if it stays quantized.

    `tensors` are all stored tensors, with the modules of those that are not loaded. `dequantizer` is what has loaded
    the model; `None` if it is not quantized. A tensor that is quantized is read once.
    """
    tensor = tensors.stored[name]
    if dequantizer is not None and tensor.dtype not in PLAIN_FLOATS:
        owner = name.removesuffix("weight")  # such as "model.layers.61.eh_proj."
        of_owner = {
            other: module for other, module in tensors.not_loaded.items() if other.startswith(owner)
        }
        dense, _ = _dequantized(tensors.stored, of_owner, dequantizer, dtype)
        tensor = dense[name]
    return tensor if tensor.dtype in PLAIN_FLOATS else None


def _makes_shape(dequantize: Callable[[], Tensor], shape: tuple[int, ...]) -> bool:
    """Tell whether `dequantize`, which reads a tensor and dequantizes it, succeeds and makes this shape."""
    try:
        return tuple(dequantize().shape) == shape
    except Exception:  # the operations of formats raise many kinds of errors
        return False
