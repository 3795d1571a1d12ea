"""Which tensors of a model's files its class loads, as which parameters, and what becomes of the others.

A folder may hold tensors that the loaded class has no place for: layers that predict more tokens (`mtp.*`, or decoder
layers beyond `num_hidden_layers`), buffers, unknown names. Other programs use them, so a pruned folder gets them too.
`source_tensors` sorts the tensors of a folder into a `SourceTensors`. A run that removes decoder layers calls `renamed`
on it, a run that writes tensors as they are stored calls `smaller` for each decoder layer, and the tensors that are not
loaded are written at the end (`unplaced`).

A *place* is the name of the parameter as which a stored tensor is loaded; several stored tensors may have one place,
such as the weights and scales of all experts. A *part* (`removal.parts.Part`) is a dimension of a decoder layer that
a run makes smaller, for instance the attention heads: it has groups, of which some are kept.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from optimum_fista.model.layers import find_decoder_layers
from optimum_fista.packed.format import SUFFIXES, packed_names
from optimum_fista.source.formats.dequantizer import Dequantizer, dequantizer_of
from optimum_fista.source.loading import described, read_config
from optimum_fista.source.model_folder import CONFIG_FILE, PACKED_KEY, read_json
from optimum_fista.source.stored_tensor import ACTIVATION_SCALE, DENSE, StoredTensor, read_stored

T = TypeVar("T")
_EXPERT = re.compile(r"(.*\.experts\.)(\d+)(\..*)")
# What a module in FP8 may store for its weight.
_PARTS_IN_FP8 = ("weight", "weight_scale_inv", "weight_scale")
IS_NOT_DESCRIBED = "loads a part of the model, whose configuration does not describe them"
"""The end of the reason why tensors of a larger model are not copied, such as those of its image tower."""


class CutPart(Protocol):
    """What is asked here of a part that is made smaller; `removal.parts.Part` is one."""

    @property
    def name(self) -> str:
        """Its name, such as "model.layers.3.self_attn"."""

    @property
    def groups(self) -> int:
        """How many groups it has before any is removed, such as key-value heads."""

    @property
    def is_mixture(self) -> bool:
        """Whether its groups are experts."""

    @property
    def tensors(self) -> Mapping[str, tuple[int, int]]:
        """For each parameter that is cut, by name: the axis, and how many runs of all groups that axis holds."""

    def entries(self, size: int, repeats: int, kept: Sequence[int]) -> Tensor:
        """Return the indices of the entries of `kept` groups, int64, on an axis of this size."""


@dataclass(frozen=True)
class SourceTensors:
    """The tensors in a model's files: those that its class loads, and the others, which are copied as they are.

    Attributes:
        stored: All tensors, by their names in the files.
        places: For each stored tensor that is loaded: the parameter of the model as which it is loaded.
        others: For each stored tensor that is not loaded: its module, for people to read.
        lost: Modules of `others` that are not copied, with the reason.
        layers: What the names of stored tensors of decoder layers begin with, such as "model.layers.".
        settings: The quantization settings of `config.json`; empty if the weights are dense.
    """

    stored: Mapping[str, StoredTensor] = field(default_factory=dict)
    places: Mapping[str, str] = field(default_factory=dict)
    others: Mapping[str, str] = field(default_factory=dict)
    lost: Mapping[str, str] = field(default_factory=dict)
    layers: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def unplaced(self) -> dict[str, StoredTensor]:
        """The tensors that are not loaded, and are copied."""
        return {
            name: self.stored[name]
            for name, module in self.others.items()
            if module not in self.lost
        }

    def loaded_in(self, dtype: torch.dtype) -> dict[str, StoredTensor]:
        """Return the tensors that are loaded; none if `dtype` is not that of most values: somebody asked for it."""
        loaded = {name: self.stored[name] for name in self.places if name in self.stored}
        num_values = Counter[str]()
        for tensor in loaded.values():
            num_values[tensor.dtype] += math.prod(tensor.shape) if tensor.dtype in DENSE else 0
        name_of_dtype = StoredTensor.of(torch.empty(0, dtype=dtype)).dtype
        is_usual = num_values[name_of_dtype] == max(num_values.values(), default=0)
        return loaded if is_usual else {}

    @property
    def copied(self) -> dict[str, int]:
        """How many tensors of each module are copied; modules of all decoder layers are one entry."""
        modules = [re.sub(r"\.\d+\.", ".*.", self.others[name]) for name in self.unplaced]
        return dict(Counter(modules))

    @property
    def blocks(self) -> list[int]:
        """Sizes of blocks of rows or columns that share a scale. The last block of a weight may be smaller."""
        values = re.findall(
            r'"(?:weight_block_size|block_structure|group_size)": ([^"]*)',
            json.dumps(self.settings),
        )
        sizes = {int(number) for text in values for number in re.findall(r"\d+", text)}
        return sorted(sizes)

    def smaller(
        self,
        model: PreTrainedModel,
        part_of: Callable[[str], CutPart | None],
        kept: Mapping[str, Sequence[int]],
        strict: bool,
    ) -> dict[str, StoredTensor]:
        """Describe the tensors that are loaded, cut to the groups that stay.

        Args:
            model: The dense model.
            part_of: Returns the part to which a parameter belongs, if it is cut.
            kept: The groups that stay, in order, by the name of the part.
            strict: Whether a tensor that can't be cut raises ValueError; otherwise it is left out.

        Returns:
            Stored tensors by their names in the result: experts that have tensors of their own get new numbers.
        """
        tensors: dict[str, StoredTensor] = {}
        for name, place in self.places.items():
            part = part_of(place)
            if part is None:
                tensors[name] = self.stored[name]
                continue
            groups = kept[part.name]
            expert = _EXPERT.fullmatch(name) if part.is_mixture else None
            if expert is not None:  # every expert has tensors of its own
                number = int(expert[2])
                if number in groups:
                    tensors[f"{expert[1]}{groups.index(number)}{expert[3]}"] = self.stored[name]
                continue
            cut = self._cut(name, place, model, part, groups, strict)
            if cut is not None:
                tensors[name] = cut
        return tensors

    def _cut(
        self,
        name: str,
        place: str,
        model: PreTrainedModel,
        part: CutPart,
        groups: Sequence[int],
        strict: bool,
    ) -> StoredTensor | None:
        """Describe the stored tensor `name` with the `groups` of a part that stay; arguments as in `smaller`.

        The tensor is the parameter itself or has a value for a block of it, such as a scale.
        """
        tensor = self.stored[name]
        # Scales of inputs of experts are no parameters: they have one value for each expert.
        axis, repeats = part.tensors.get(place, (0, 1))
        whole = tensor.shape if part.is_mixture else model.get_parameter(place).shape
        has_axis = len(tensor.shape) == len(whole)
        size = tensor.shape[axis] if has_axis else 0

        is_shared_by_all_groups = math.prod(tensor.shape) == 1 or size == 1
        if is_shared_by_all_groups:
            return tensor

        # How many rows or columns of the parameter share one value of this tensor.
        span = math.ceil(whole[axis] / size) if size else whole[axis]
        if span != 1:
            span = min((block for block in self.blocks if block >= span), default=span)
        has_whole_groups = size % (part.groups * repeats) == 0 and span * size == whole[axis]
        if has_whole_groups and not name.endswith("_packed"):
            return tensor.selected(axis, part.entries(size, repeats, groups))
        if not strict:
            return None

        if re.search("_(packed|shape)$", name):
            raise ValueError(
                f"{name} is of a packed weight, which can't be cut: pass another pattern, or a dtype (--dtype), and it "
                "is written in that."
            )
        group_size = whole[axis] // (part.groups * repeats)
        raise ValueError(
            f"{name} stores one value for {span} rows or columns of {place}, and groups of {group_size} are removed: "
            "pass another pattern, or a dtype (--dtype), and it is written in that."
        )

    def require_no_numbers(self) -> None:
        """Refuse quantization settings with patterns that name decoder layers by number: plain names are renumbered."""
        plain = re.escape(self.layers)
        word = re.escape(self.layers.removesuffix(".").rpartition(".")[2])  # such as "layers"
        numbered = re.compile(rf"^(?!{plain}).*\b{word}\\?\.[^.a-zA-Z]*\d")
        outside = [name for name in self.stored if not name.startswith(self.layers)]
        outside += [self.places[name] for name in outside if name in self.places]

        waiting: list[Any] = list(self.settings.values())
        waiting = [value for value in waiting if isinstance(value, dict | list)]
        while waiting:
            value = waiting.pop()
            if isinstance(value, dict):
                waiting += value.values()
            elif isinstance(value, list):
                waiting += value
            else:
                is_other_module = any(name.startswith(f"{value}.") for name in outside)
                if not is_other_module and numbered.search(str(value).replace("[0-9]", "")):
                    raise ValueError(
                        f"quantization_config names decoder layers by number in {value!r}, and other layers get these "
                        "numbers: pass another pattern, or a dtype (--dtype), in which the result is then written."
                    )

    def renamed(self, stay: Sequence[int], total: int) -> SourceTensors:
        """Return the tensors by their names in a model that keeps the decoder layers `stay` of `total`.

        Tensors of removed layers go. Layers that predict more tokens come after the last decoder layer, so they move.
        """
        new_numbers = {old: new for new, old in enumerate(stay)}

        def new_name(name: str) -> str | None:
            """Return the name with the new number of its layer; `None` if the layer is removed."""
            match = re.match(rf"({re.escape(self.layers)})(\d+)(\..*|)", name)
            if match is None or not self.layers:
                return name
            old = int(match[2])
            new = new_numbers.get(old) if old < total else old - total + len(stay)
            return None if new is None else f"{match[1]}{new}{match[3]}"

        def with_new_names(values: Mapping[str, T]) -> dict[str, T]:
            """Return the values by new names, without those of removed layers."""
            result: dict[str, T] = {}
            for name, value in values.items():
                new = new_name(name)
                if new is not None:
                    result[new] = value
            return result

        def in_lists(value: Any) -> Any:
            """Rename modules in all lists of the settings, such as the modules that are not quantized."""
            if isinstance(value, dict):
                return {key: in_lists(inner) for key, inner in value.items()}
            if not isinstance(value, list):
                return value
            names = [
                new_name(entry) if isinstance(entry, str) else in_lists(entry) for entry in value
            ]
            return [name for name in names if name is not None]

        return SourceTensors(
            stored=with_new_names(self.stored),
            places=with_new_names(self.places),
            others=with_new_names(self.others),
            lost=self.lost,
            layers=self.layers,
            settings=in_lists(self.settings),
        )


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
    """Find the tensors in the files of a loaded model, and say which are not copied.

    Other modules are not copied in three cases:

    - A run cuts parts of decoder layers, and a module has tensors of the same name and shape: the configuration has one
      number of experts, for instance, for decoder layers and for layers that predict more tokens.
    - The result is not quantized and the module can't be dequantized.
    - The model is a part of that in the files, such as the text decoder alone, and its configuration does not describe
      the rest.

    Args:
        model: The model, or one of its class on the meta device.
        source: The folder of its files.
        part_of: Returns the part to which a parameter belongs, if the run cuts it.
        quantized: Whether the result is quantized as the source is.
        layers_name: The name of the list of decoder layers in the model, such as "model.layers"; `None`: it is looked
            for.

    Raises:
        ValueError: Two tensors have one place and different values, or a tensor is quantized and `config.json` is not
            that of a quantized model.
    """
    stored = read_stored(source)
    config = read_json(source / CONFIG_FILE) if (source / CONFIG_FILE).exists() else {}
    settings = _quantization_settings(config)
    # It reads the configuration by its class, and packed weights are not quantized.
    dequantizer = dequantizer_of(source) if settings else None
    if dequantizer is None:
        settings = {}

    naming = _Naming(model, dequantizer)
    packed = {f"{name}{suffix}" for name in packed_names(stored) for suffix in SUFFIXES}
    names = {name: naming.names_of(name) for name in stored if name not in packed}
    places = {name: place for name, (_, place) in names.items() if naming.is_loaded(name, place)}
    others = {name: naming.module_of(own) for name, (own, _) in names.items() if name not in places}
    if dequantizer is None:
        for name, place in places.items():
            _require_dense(name, stored[name], naming.state[place], source)
    own_names = {name: names[name][0] for name in places}
    _require_one_value_each(stored, own_names, type(model).__name__)

    shapes_of_parts = {
        (_name_in_layer(name), stored[name].shape)
        for name, place in places.items()
        if part_of(place) is not None
    }
    if dequantizer is not None and not quantized:
        stored, others = _dequantized(stored, others, dequantizer, model.dtype)
    lost = _lost_with_parts(stored, others, shapes_of_parts)
    if settings and not quantized:
        lost = _lost_in_8_bits(stored, others) | lost
    lost |= _lost_of_larger_model(model, source, config, others)
    if layers_name is None:
        layers_name = find_decoder_layers(model).name
    return SourceTensors(
        stored=stored,
        places=places,
        others=others,
        lost=lost,
        layers=_prefix_of_layers(places, f"{layers_name}."),
        settings=settings,
    )


def _quantization_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return `quantization_config` of the content of a `config.json`, which the text decoder's section may have."""
    sections = [config, *(value for value in config.values() if isinstance(value, dict))]
    for section in sections:
        if PACKED_KEY in section:
            settings: dict[str, Any] = section[PACKED_KEY]
            return settings
    return {}


class _Naming:
    """Names of stored tensors as this version of Transformers changes them when it loads a model.

    Attributes:
        state: The parameters and buffers of the model, by name.
    """

    def __init__(self, model: PreTrainedModel, dequantizer: Dequantizer | None) -> None:
        self.state = model.state_dict()
        self._modules = dict(model.named_modules())
        self._prefix = model.base_model_prefix
        self._is_quantized = dequantizer is not None
        transforms = get_model_conversion_mapping(model, hf_quantizer=dequantizer)
        self._renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
        self._converters = [one for one in transforms if isinstance(one, WeightConverter)]

    def names_of(self, name: str) -> tuple[str, str]:
        """Return the name of a stored tensor in the model, and its place.

        Tensors that Transformers merges into one parameter have the place in common, and each has a name of its own.
        """
        own = self._renamed(name, self._renamings, [])
        place = self._renamed(name, self._renamings, self._converters)
        if place in self.state:
            return own, place
        # Transformers tries the name in the files, too, with or without the prefix of the base model.
        plain = self._renamed(name, [], [])
        return (plain if plain in self.state else own), plain

    def _renamed(
        self, name: str, renamings: list[WeightRenaming], converters: list[WeightConverter]
    ) -> str:
        """Return what Transformers makes of a name by these rules."""
        new_name: str = rename_source_key(
            name,
            renamings,
            converters,
            base_model_prefix=self._prefix,
            meta_state_dict=self.state,
        )[0]
        return new_name

    def is_loaded(self, name: str, place: str) -> bool:
        """Tell whether a stored tensor is loaded; scales of activations count, because they belong to a weight."""
        is_scale = self._is_quantized and ACTIVATION_SCALE.search(name) is not None
        return place in self.state or is_scale

    def module_of(self, own: str) -> str:
        """Return the outermost module of a tensor that the model lacks; the tensor's name if it lacks none."""
        first_word = own.partition(".")[0]
        if f"{self._prefix}.{first_word}" in self._modules:
            own = f"{self._prefix}.{own}"  # it is stored without the prefix
        words = own.split(".")
        for count in range(1, len(words)):
            module = ".".join(words[:count])
            if module not in self._modules:
                return module
        return own


def _require_dense(name: str, tensor: StoredTensor, parameter: Tensor, source: Path) -> None:
    """Refuse a quantized tensor for a floating-point parameter, if `config.json` says nothing of quantization."""
    if tensor.dtype not in DENSE and parameter.is_floating_point():
        raise ValueError(
            f"{name} has dtype {tensor.dtype}, and config.json has no quantization_config to read it by: copy that of "
            f"the quantized model into {str(source / CONFIG_FILE)!r}."
        )


def _require_one_value_each(
    stored: Mapping[str, StoredTensor], own_names: Mapping[str, str], model_class: str
) -> None:
    """Refuse two stored tensors with the same name in the model and different values.

    `own_names` has the names in the model, by the names in the files, of all tensors that are loaded.
    """
    first_with: dict[str, str] = {}
    for name, own in own_names.items():
        other = first_with.setdefault(own, name)
        if other != name and not stored[name].equals(stored[other]):
            raise ValueError(
                f"{name} and {other} are both {own} of {model_class}, with different values: delete the wrong one from "
                "the files of the model."
            )


def _prefix_of_layers(places: Mapping[str, str], layers: str) -> str:
    """Return what most names of stored tensors of decoder layers begin with; `layers` is that of their places."""
    prefixes = Counter[str]()
    for name, place in places.items():
        if not place.startswith(layers):
            continue
        number = place.removeprefix(layers).partition(".")[0]
        before, separator, _ = f".{name}".partition(f".{number}.")
        if separator:
            prefixes[f"{before}.".removeprefix(".")] += 1
    most_common = prefixes.most_common(1)
    return most_common[0][0] if most_common else ""


def _name_in_layer(name: str) -> str:
    """Return the name of a stored tensor inside its decoder layer, such as "mlp.up_proj.weight"."""
    return re.sub(r"^.*?\.\d+\.", "", name)


def _lost_with_parts(
    stored: Mapping[str, StoredTensor],
    others: Mapping[str, str],
    shapes_of_parts: set[tuple[str, tuple[int, ...]]],
) -> dict[str, str]:
    """Return the modules that are not copied because they have what decoder layers lose, with the reason.

    `shapes_of_parts` has name inside the decoder layer and shape of each stored tensor that is cut.
    """
    counts = Counter(others.values())
    lost: dict[str, str] = {}
    for name, module in others.items():
        shape = stored[name].shape
        if any(
            name.endswith(f".{ending}") and shape == shape_of_part
            for ending, shape_of_part in shapes_of_parts
        ):
            lost[module] = (
                f"{counts[module]} tensors: parts that decoder layers lose would have to go there too"
            )
    return lost


def _lost_in_8_bits(
    stored: Mapping[str, StoredTensor], others: Mapping[str, str]
) -> dict[str, str]:
    """Return the modules that are not copied because they are still quantized, with the reason."""
    counts = Counter(others.values())
    return {
        module: f"{counts[module]} tensors: they are quantized, and the result is not"
        for name, module in others.items()
        if stored[name].dtype not in DENSE
    }


def _lost_of_larger_model(
    model: PreTrainedModel, source: Path, config: Mapping[str, Any], others: Mapping[str, str]
) -> dict[str, str]:
    """Return the modules that are not copied because the result's configuration does not describe them.

    `model` may be a part of that in the files: AutoModelForCausalLM loads the text decoder of some multimodal models,
    with the section of `config.json` that describes it. What the larger model's class would load is then missing in the
    result. Tensors that neither class loads are copied.
    """
    sections = [value for value in config.values() if isinstance(value, dict)]
    own_type = model.config.model_type
    is_section = any(section.get("model_type") == own_type for section in sections)
    if config.get("model_type") == own_type or not is_section:
        return {}

    whole = _Naming(described(read_config(str(source))), None)
    counts = Counter(others.values())
    lost: dict[str, str] = {}
    for name, module in others.items():
        _, place = whole.names_of(name)
        if place in whole.state:
            lost[module] = f"{counts[module]} tensors: {type(model).__name__} {IS_NOT_DESCRIBED}"
    return lost


def _dequantized(
    stored: Mapping[str, StoredTensor],
    others: Mapping[str, str],
    dequantizer: Dequantizer,
    dtype: torch.dtype,
) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Return `stored` and `others` with weights in FP8 that are not loaded as dense ones, without their scales.

    They are dequantized when they are written. Other formats have other shapes, and stay as they are.
    """
    dense = dict(stored)
    remaining = dict(others)
    can_be_read: dict[str, bool] = {}  # by the name without numbers
    for name in others:
        if not name.endswith(".weight") or not stored[name].dtype.startswith("F8"):
            continue
        module = name.removesuffix(".weight")
        names = {part: f"{module}.{part}" for part in _PARTS_IN_FP8}
        readers = {part: stored[key].tensor for part, key in names.items() if key in remaining}
        read = partial(dequantizer.dense, module, readers, dtype)
        shape = stored[name].shape
        kind = re.sub(r"\d+", "*", name)
        if kind not in can_be_read:  # one of each is tried, before the first decoder layer
            has_scales = len(readers) > 1
            can_be_read[kind] = has_scales and _makes_shape(read, shape)
        if can_be_read[kind]:
            dense[name] = StoredTensor.of(torch.empty(shape, dtype=dtype, device="meta"), read)
            for part in _PARTS_IN_FP8:
                if part != "weight":
                    remaining.pop(names[part], None)
    return dense, remaining


def _makes_shape(read: Callable[[], Tensor], shape: tuple[int, ...]) -> bool:
    """Tell whether a tensor can be dequantized, and then has this shape."""
    try:
        return tuple(read().shape) == shape
    except Exception:  # of the format's operations
        return False
