"""Which tensors of a model's files its class loads, as which parameters, and what becomes of the others.

A folder may hold tensors that the loaded class has no place for: layers that predict more tokens (`mtp.*`, or decoder
layers beyond `num_hidden_layers`), buffers, unknown names. Other programs use them, so a pruned folder gets them too.
`source_tensors` sorts the tensors of a folder into a `SourceTensors`. A run that removes decoder layers calls `renamed`
on it, a run that writes tensors as they are stored calls `cut_tensors` for each decoder layer, and the tensors that are
not loaded are written at the end (`tensors_to_copy`).

- A *stored tensor* (`StoredTensor`) is a tensor in the files, with a name such as "model.layers.3.mlp.up_proj.weight".
  Its dtype is named as in safetensors; dtypes in `PLAIN_FLOATS` need no scales, others are quantized, or integers.
- A *place* is the name of the parameter as which a stored tensor is loaded; several stored tensors may have one place,
  such as the weights and scales of all experts.
- A *part* (`removal.parts.Part`) is a dimension of a decoder layer that a run makes smaller, for instance the attention
  heads: it has groups, of which some stay. What is used of it here is `CutPart`.
- The *quantization settings* are the dictionary `quantization_config` of `config.json`.
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
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from optimum_fista.model.layers import find_decoder_layers
from optimum_fista.packed.format import SUFFIXES, packed_names
from optimum_fista.source.formats.dequantizer import Dequantizer, dequantizer_of
from optimum_fista.source.loading import model_without_weights, read_config
from optimum_fista.source.model_folder import CONFIG_FILE, PACKED_KEY, read_json
from optimum_fista.source.stored_tensor import (
    ACTIVATION_SCALE,
    PLAIN_FLOATS,
    StoredTensor,
    name_of_dtype,
    read_stored,
)

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
        """For each parameter that is cut, by its name in the model: the axis, and how often all groups follow there.

        A parameter that holds gate and up projection has all groups twice, one time after the other.
        """

    def entries(self, size: int, repeats: int, kept: Sequence[int]) -> Tensor:
        """Return the indices of the entries of the groups `kept`, int64, on an axis of `size` entries.

        All groups follow there `repeats` times (`tensors`).
        """


@dataclass(frozen=True)
class SourceTensors:
    """The tensors in a model's files: those that its class loads, and the others, which are copied as they are.

    Attributes:
        stored: All tensors, by their names in the files.
        places: For each stored tensor that is loaded: the parameter of the model as which it is loaded.
        not_loaded: For each stored tensor that is not loaded: its module, for people to read, such as "mtp".
        not_copied: The modules of `not_loaded` that are not copied, each with the reason, a sentence.
        layers: What the names of stored tensors of decoder layers begin with, such as "model.layers.".
        settings: The quantization settings; empty if the weights are not quantized.
    """

    stored: Mapping[str, StoredTensor] = field(default_factory=dict)
    places: Mapping[str, str] = field(default_factory=dict)
    not_loaded: Mapping[str, str] = field(default_factory=dict)
    not_copied: Mapping[str, str] = field(default_factory=dict)
    layers: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def tensors_to_copy(self) -> dict[str, StoredTensor]:
        """The tensors that are not loaded and are copied (not those of `not_copied` modules), by names in the files."""
        return {
            name: self.stored[name]
            for name, module in self.not_loaded.items()
            if module not in self.not_copied
        }

    def loaded_if_mostly(self, dtype: torch.dtype) -> dict[str, StoredTensor]:
        """Return the tensors that are loaded if `dtype`, that of the model, is also that of most of their values.

        If it is not, somebody has asked for another dtype when the model was loaded, and the result is empty: nothing
        is to be written in the dtypes of the files. Only plain floats count. The tensors are by their names in the
        files.
        """
        loaded = {name: self.stored[name] for name in self.places if name in self.stored}
        num_values = Counter[str]()  # by dtype
        for tensor in loaded.values():
            if tensor.dtype in PLAIN_FLOATS:
                num_values[tensor.dtype] += math.prod(tensor.shape)
        has_most_values = num_values[name_of_dtype(dtype)] == max(num_values.values(), default=0)
        return loaded if has_most_values else {}

    @property
    def num_copied(self) -> dict[str, int]:
        """How many tensors of each module are copied, by module; "*" stands for the numbers of layers in its name."""
        modules = [
            re.sub(r"\.\d+\.", ".*.", self.not_loaded[name]) for name in self.tensors_to_copy
        ]
        return dict(Counter(modules))

    @property
    def block_sizes(self) -> list[int]:
        """How many rows or columns share a scale, as the quantization settings say: all sizes there, in order.

        Methods name them in different ways, as in `"weight_block_size": [128, 128]` or `"group_size": 32`. The last
        block of a weight may be smaller.
        """
        texts = re.findall(
            r'"(?:weight_block_size|block_structure|group_size)": ([^"]*)',
            json.dumps(self.settings),
        )
        sizes = set[int]()
        for text in texts:
            sizes.update(int(number) for number in re.findall(r"\d+", text))
        return sorted(sizes)

    def cut_tensors(
        self,
        model: PreTrainedModel,
        part_of: Callable[[str], CutPart | None],
        kept: Mapping[str, Sequence[int]],
        strict: bool,
    ) -> dict[str, StoredTensor]:
        """Describe the tensors that are loaded, cut to the groups that stay. Changes nothing, and reads no values.

        Args:
            model: The dense model, of which only the shapes of parameters are read.
            part_of: Returns the part to which a parameter of this name belongs; `None` if it is not cut.
            kept: The numbers of the groups that stay, in order, by the name of the part.
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
                before, number, after = expert.groups()
                if int(number) in groups:
                    new_number = groups.index(int(number))
                    tensors[f"{before}{new_number}{after}"] = self.stored[name]
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
        """Describe one stored tensor of a part, cut to the groups that stay. Changes nothing.

        The tensor is the parameter itself, or has one value for a block of it, such as a scale.

        Args:
            name: Its name in the files, such as "model.layers.3.mlp.up_proj.weight_scale".
            place: The name of the parameter to which it belongs.
            model: The dense model, of which only the shape of that parameter is read.
            part: The part to which that parameter belongs.
            groups: The numbers of the groups that stay, in order.
            strict: Whether ValueError is raised if it can't be cut; otherwise `None` is returned.
        """
        tensor = self.stored[name]
        # Scales of inputs of experts are no parameters: they have one value for each expert.
        axis, repeats = part.tensors.get(place, (0, 1))
        # An axis of experts has one entry for each, in a weight as in its scales.
        whole = tensor.shape if part.is_mixture else model.get_parameter(place).shape
        has_axis = len(tensor.shape) == len(whole)
        size = tensor.shape[axis] if has_axis else 0

        is_shared_by_all_groups = math.prod(tensor.shape) == 1 or size == 1
        if is_shared_by_all_groups:
            return tensor

        # How many rows or columns of the parameter share one value of this tensor.
        span = math.ceil(whole[axis] / size) if size else whole[axis]
        if span != 1:
            # The last block may be smaller, so the size of a block is the next one that the settings name.
            possible_sizes = [block for block in self.block_sizes if block >= span]
            span = min(possible_sizes, default=span)

        divides_into_groups = size % (part.groups * repeats) == 0
        has_equal_blocks = span * size == whole[axis]
        is_packed = name.endswith("_packed")  # several numbers in each integer
        if divides_into_groups and has_equal_blocks and not is_packed:
            return tensor.selected(axis, part.entries(size, repeats, groups))
        if not strict:
            return None

        if re.search("_(packed|shape)$", name):
            raise ValueError(
                f"{name} is of a packed weight, which can't be cut: pass a pattern that does not cut it, such as "
                "'2:4', or a dtype (--dtype bfloat16), in which the result is written without quantization."
            )
        group_size = whole[axis] // (part.groups * repeats)
        raise ValueError(
            f"{name} stores one value for {span} rows or columns of {place}, and groups of {group_size} are removed, "
            f"so it can't be cut: pass a pattern that does not cut {place}, such as '2:4', or a dtype (--dtype "
            "bfloat16), in which the result is written without quantization."
        )

    def require_no_numbers(self) -> None:
        """Raise ValueError if a pattern in the quantization settings names decoder layers by number.

        A run that removes decoder layers gives others their numbers. Plain names, such as "model.layers.3.mlp", are
        allowed, because `renamed` renumbers them. Only values in lists and dictionaries of the settings are read.
        Changes nothing.
        """
        prefix = re.escape(self.layers)  # such as "model.layers."
        word = re.escape(self.layers.removesuffix(".").rpartition(".")[2])  # such as "layers"
        # Matches r"re:.*layers\.(3|5)\..*", but not the plain name "model.layers.3.mlp".
        numbered = re.compile(rf"^(?!{prefix}).*\b{word}\\?\.[^.a-zA-Z]*\d")
        # Such as those of an image tower, whose layers keep their numbers.
        names_outside = [name for name in self.stored if not name.startswith(self.layers)]
        places_outside = [self.places[name] for name in names_outside if name in self.places]
        outside = names_outside + places_outside

        waiting: list[Any] = []  # values that are still to be looked at
        for value in self.settings.values():
            if isinstance(value, dict | list):
                waiting.append(value)
        while waiting:
            value = waiting.pop()
            if isinstance(value, dict):
                waiting += value.values()
            elif isinstance(value, list):
                waiting += value
            else:
                is_other_module = any(name.startswith(f"{value}.") for name in outside)
                pattern = str(value).replace("[0-9]", "")  # any digit: it names no number
                if not is_other_module and numbered.search(pattern):
                    raise ValueError(
                        f"quantization_config names decoder layers by number in {value!r}, and if decoder layers are "
                        "removed, others get these numbers: pass a pattern that removes no layers, or a dtype (--dtype "
                        "bfloat16), in which the result is written without quantization."
                    )

    def renamed(self, stay: Sequence[int], total: int) -> SourceTensors:
        """Return these tensors by their names in a model with fewer decoder layers; `self` does not change.

        Tensors of removed layers are left out, and names in the quantization settings get the new numbers, too. Layers
        that predict more tokens are numbered after the last decoder layer, so their numbers change as well.

        Args:
            stay: The numbers of the decoder layers that stay, in order.
            total: How many decoder layers there are now.
        """
        new_numbers = {old: new for new, old in enumerate(stay)}
        in_a_layer = re.compile(rf"({re.escape(self.layers)})(\d+)(\..*|)")

        def new_name(name: str) -> str | None:
            """Return a name, such as "model.layers.3.mlp", with its layer's new number; `None` if the layer goes."""
            match = in_a_layer.match(name)
            if match is None or not self.layers:
                return name
            before, number, after = match.groups()
            old = int(number)
            is_decoder_layer = old < total
            new = new_numbers.get(old) if is_decoder_layer else old - total + len(stay)
            return None if new is None else f"{before}{new}{after}"

        def with_new_names(values: Mapping[str, T]) -> dict[str, T]:
            """Return `values`, which are by name, under the new names, without those of removed layers."""
            result: dict[str, T] = {}
            for name, value in values.items():
                new = new_name(name)
                if new is not None:
                    result[new] = value
            return result

        def renamed_in_lists(value: Any) -> Any:
            """Return a value of the settings with new names in all lists, such as that of the modules to skip."""
            if isinstance(value, dict):
                return {key: renamed_in_lists(inner) for key, inner in value.items()}
            if not isinstance(value, list):
                return value
            entries = []
            for entry in value:
                new = new_name(entry) if isinstance(entry, str) else renamed_in_lists(entry)
                if new is not None:  # the layer stays
                    entries.append(new)
            return entries

        return SourceTensors(
            stored=with_new_names(self.stored),
            places=with_new_names(self.places),
            not_loaded=with_new_names(self.not_loaded),
            not_copied=self.not_copied,
            layers=self.layers,
            settings=renamed_in_lists(self.settings),
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
    """Find the tensors in the files of a loaded model, and say which are not copied. Changes nothing.

    Modules that are not loaded are not copied in three cases:

    - A run cuts parts of decoder layers, and a module has tensors of the same name and shape: the configuration has one
      number of experts, for instance, for decoder layers and for layers that predict more tokens.
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
    config = read_json(source / CONFIG_FILE) if (source / CONFIG_FILE).exists() else {}
    settings = _quantization_settings(config)
    # It reads the configuration by its class. A packed folder has settings, but its weights are not quantized.
    dequantizer = dequantizer_of(source) if settings else None
    if dequantizer is None:
        settings = {}

    naming = _Naming(model, dequantizer)
    packed = {f"{name}{suffix}" for name in packed_names(stored) for suffix in SUFFIXES}
    names = {name: naming.names_of(name) for name in stored if name not in packed}
    places: dict[str, str] = {}
    not_loaded: dict[str, str] = {}
    for name, new_names in names.items():
        if naming.is_loaded(name, new_names.place):
            places[name] = new_names.place
        else:
            not_loaded[name] = naming.module_of(new_names.own)

    if dequantizer is None:
        for name, place in places.items():
            _require_plain_floats(name, stored[name], naming.state[place], source)
    own_names = {name: names[name].own for name in places}
    _require_one_value_each(stored, own_names, type(model).__name__)

    shapes_of_parts = {
        (_name_in_layer(name), stored[name].shape)
        for name, place in places.items()
        if part_of(place) is not None
    }
    if dequantizer is not None and not quantized:
        stored, not_loaded = _dequantized(stored, not_loaded, dequantizer, model.dtype)

    not_copied: dict[str, str] = {}
    if settings and not quantized:
        not_copied |= _modules_still_quantized(stored, not_loaded)
    not_copied |= _modules_with_cut_parts(stored, not_loaded, shapes_of_parts)
    not_copied |= _modules_not_described(model, source, config, not_loaded)

    if layers_name is None:
        layers_name = find_decoder_layers(model).name
    return SourceTensors(
        stored=stored,
        places=places,
        not_loaded=not_loaded,
        not_copied=not_copied,
        layers=_prefix_of_layers(places, f"{layers_name}."),
        settings=settings,
    )


def _quantization_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the quantization settings in the content of a `config.json`; empty if there are none.

    They stand at the top, or in the section of the text decoder.
    """
    sections = [config, *(value for value in config.values() if isinstance(value, dict))]
    for section in sections:
        if PACKED_KEY in section:
            settings: dict[str, Any] = section[PACKED_KEY]
            return settings
    return {}


class _NewNames(NamedTuple):
    """The names that a stored tensor gets when a model is loaded.

    Attributes:
        own: Its name in the model, before it is merged with others, such as "layers.3.mlp.experts.7.up_proj.weight".
        place: The name of the parameter of which it becomes a part, such as "layers.3.mlp.experts.gate_up_proj".
    """

    own: str
    place: str


class _Naming:
    """Names of stored tensors as this version of Transformers changes them when it loads a model.

    Attributes:
        state: The parameters and buffers of the model, by name.
    """

    def __init__(self, model: PreTrainedModel, dequantizer: Dequantizer | None) -> None:
        """Read the rules of `model`'s class, and those of its quantized format if there is a `dequantizer`."""
        self.state = model.state_dict()
        self._modules = dict(model.named_modules())
        self._prefix = model.base_model_prefix
        self._is_quantized = dequantizer is not None
        transforms = get_model_conversion_mapping(model, hf_quantizer=dequantizer)
        self._renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
        self._converters = [one for one in transforms if isinstance(one, WeightConverter)]

    def names_of(self, name: str) -> _NewNames:
        """Return the names that the stored tensor `name` gets in the model.

        Tensors that Transformers merges into one parameter have the place in common, and each has a name of its own.
        If no parameter or buffer (`self.state`) has the place as its name, the model lacks the tensor.
        """
        own = self._renamed(name, self._renamings, [])
        place = self._renamed(name, self._renamings, self._converters)
        if place in self.state:
            return _NewNames(own, place)

        # Transformers tries the name in the files, too, with or without the prefix of the base model.
        only_prefix_changed = self._renamed(name, [], [])
        if only_prefix_changed in self.state:
            own = only_prefix_changed
        return _NewNames(own, place=only_prefix_changed)

    def _renamed(
        self, name: str, renamings: list[WeightRenaming], converters: list[WeightConverter]
    ) -> str:
        """Return what Transformers makes of the name of a stored tensor by these rules.

        It also adds or removes the prefix of the base model, such as "model.", if a tensor of the model (`self.state`)
        then has the name. Transformers notes in the rules that they have matched.
        """
        new_name: str
        new_name, *_ = rename_source_key(  # besides, the pattern that matches
            name,
            renamings,
            converters,
            base_model_prefix=self._prefix,
            meta_state_dict=self.state,
        )
        return new_name

    def is_loaded(self, name: str, place: str) -> bool:
        """Tell whether the model loads the stored tensor `name`; `place` is that of `names_of`.

        Scales of the activations of a quantized model count, because they belong to a weight, although only a model
        that computes with quantized numbers loads them.
        """
        is_scale = self._is_quantized and ACTIVATION_SCALE.search(name) is not None
        return place in self.state or is_scale

    def module_of(self, own: str) -> str:
        """Return the name of the outermost module that the model lacks, of a tensor that is not loaded.

        `own` is the tensor's name in the model, such as "model.layers.61.eh_proj.weight": if the model has 61 decoder
        layers, the result is "model.layers.61". If the model lacks none of its modules, `own` is returned.
        """
        first_word = own.partition(".")[0]
        if f"{self._prefix}.{first_word}" in self._modules:
            own = f"{self._prefix}.{own}"  # it is stored without the prefix
        words = own.split(".")
        for count in range(1, len(words)):
            module = ".".join(words[:count])
            if module not in self._modules:
                return module
        return own


def _require_plain_floats(name: str, tensor: StoredTensor, parameter: Tensor, source: Path) -> None:
    """Raise ValueError for a stored tensor that is quantized, in a folder whose `config.json` says nothing of it.

    `name` is the name of `tensor` in the files of the folder `source`, and `parameter` is what it is loaded as: if that
    has integers, so may the tensor.
    """
    if tensor.dtype not in PLAIN_FLOATS and parameter.is_floating_point():
        raise ValueError(
            f"{name} has dtype {tensor.dtype}, and config.json has no quantization_config to read it by: copy that of "
            f"the quantized model into {str(source / CONFIG_FILE)!r}."
        )


def _require_one_value_each(
    stored: Mapping[str, StoredTensor], own_names: Mapping[str, str], model_class: str
) -> None:
    """Raise ValueError if two stored tensors have the same name in the model and different values.

    Args:
        stored: The tensors, by their names in the files.
        own_names: The name in the model of each tensor that is loaded, by its name in the files.
        model_class: The name of the model's class, for the error.
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
    """Return what most names of stored tensors of decoder layers begin with, such as "transformer.h."; "" if none has.

    Args:
        places: The name of the parameter as which each tensor is loaded, by the tensor's name in the files.
        layers: What the names of these parameters begin with in decoder layers, such as "model.layers.".
    """
    num_with_prefix = Counter[str]()
    for name, place in places.items():
        if not place.startswith(layers):
            continue
        number, _, _ = place.removeprefix(layers).partition(".")  # of the decoder layer
        words = name.split(".")
        if number in words[:-1]:
            prefix_words = words[: words.index(number)]
            num_with_prefix["".join(f"{word}." for word in prefix_words)] += 1

    most_common = num_with_prefix.most_common(1)
    if not most_common:
        return ""
    prefix, _ = most_common[0]
    return prefix


def _name_in_layer(name: str) -> str:
    """Return the name of a stored tensor inside its decoder layer, such as "mlp.up_proj.weight"."""
    return re.sub(r"^.*?\.\d+\.", "", name)


def _modules_with_cut_parts(
    stored: Mapping[str, StoredTensor],
    not_loaded: Mapping[str, str],
    shapes_of_parts: set[tuple[str, tuple[int, ...]]],
) -> dict[str, str]:
    """Return the modules that are not copied because they have what decoder layers lose, each with the reason.

    Args:
        stored: All stored tensors, by name.
        not_loaded: The module of each stored tensor that is not loaded, by the tensor's name.
        shapes_of_parts: Of each stored tensor that the run cuts: its name inside the decoder layer, and its shape.
    """
    num_tensors = Counter(not_loaded.values())
    reasons: dict[str, str] = {}
    for name, module in not_loaded.items():
        shape = stored[name].shape
        looks_like_a_part = any(
            name.endswith(f".{name_of_part}") and shape == shape_of_part
            for name_of_part, shape_of_part in shapes_of_parts
        )
        if looks_like_a_part:
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
    own_type = model.config.model_type
    is_section = any(section.get("model_type") == own_type for section in sections)
    if config.get("model_type") == own_type or not is_section:
        return {}

    larger_model = model_without_weights(read_config(str(source)))
    naming = _Naming(larger_model, None)
    num_tensors = Counter(not_loaded.values())
    reasons: dict[str, str] = {}
    for name, module in not_loaded.items():
        if naming.names_of(name).place in naming.state:
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

    In the first copy these weights have `dtype`: they are dequantized when they are written. Their scales are missing
    in the second. Weights in other formats stay as they are, because they have other shapes.

    Args:
        stored: All stored tensors, by name.
        not_loaded: The module of each stored tensor that is not loaded, by the tensor's name.
        dequantizer: What has loaded the model, or one of the same format.
        dtype: The dtype of the result.
    """
    dense = dict(stored)
    remaining = dict(not_loaded)
    can_be_read: dict[str, bool] = {}  # by the name without numbers
    for name in not_loaded:
        if not name.endswith(".weight") or not stored[name].dtype.startswith("F8"):
            continue
        module = name.removesuffix(".weight")
        names = {part: f"{module}.{part}" for part in _PARTS_IN_FP8}
        # `StoredTensor.tensor` reads the values from the file.
        readers = {part: stored[key].tensor for part, key in names.items() if key in remaining}
        read = partial(dequantizer.dense, module, readers, dtype)
        shape = stored[name].shape
        kind = re.sub(r"\d+", "*", name)
        if (
            kind not in can_be_read
        ):  # one of each kind is tried now, so that an error does not come at the end
            has_scales = len(readers) > 1
            can_be_read[kind] = has_scales and _makes_shape(read, shape)
        if can_be_read[kind]:
            dense[name] = StoredTensor.of(torch.empty(shape, dtype=dtype, device="meta"), read)
            for part in _PARTS_IN_FP8:
                if part != "weight":
                    remaining.pop(names[part], None)
    return dense, remaining


def _makes_shape(read: Callable[[], Tensor], shape: tuple[int, ...]) -> bool:
    """Tell whether `read`, which dequantizes a tensor, succeeds and makes a tensor of this shape."""
    try:
        return tuple(read().shape) == shape
    except Exception:  # of the format's operations
        return False
