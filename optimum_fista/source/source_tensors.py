"""The tensors of a model's files, sorted (`SourceTensors`): those that its class loads, and the others.

A folder may hold tensors that the loaded class has no place for: layers that predict more tokens (`mtp.*`, or decoder
layers beyond `num_hidden_layers`), buffers, unknown names. Other programs use them, so a pruned folder gets them too.
`source_tensors` (`source.inventory`) makes a `SourceTensors` of a folder. A run that removes decoder layers calls
`refuse_numbered_layers` and `renamed` on it, a run that writes tensors as they are stored calls `cut_tensors` for each
decoder layer, and the tensors that are not loaded are written at the end (`tensors_to_copy`).

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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from optimum_fista.source.stored_tensor import PLAIN_FLOATS, StoredTensor, name_of_dtype

if TYPE_CHECKING:
    from optimum_fista.source.prediction_layers import PredictionLayer

T = TypeVar("T")
EXPERT = re.compile(r"(.*\.experts\.)(\d+)(\..*)")
"""Names of tensors of a single expert, such as "model.layers.3.mlp.experts.7.up_proj.weight"."""


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

    @property
    def table(self) -> str | None:
        """The name in the model of a table that names experts, and keeps its shape; `None` if there is none."""

    @property
    def expert(self) -> int | None:
        """The number of an expert that loses channels of its own; its `tensors` have the matrices of all experts."""

    @property
    def mixture(self) -> str | None:
        """The name in the model of the mixture of such an expert; `None` if the part is no expert."""

    def includes(self, name: str) -> bool:
        """Tell whether the tensor `name` belongs to the part: a parameter of the model, or what stands in its place."""

    def shrink(self, name: str, tensor: Tensor, kept: Sequence[int]) -> Tensor:
        """Copy the tensor called `name` in the model with only the groups `kept`; a table names only these."""

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
        prediction_layers: Modules of `not_loaded` whose mixtures have to lose as many experts as those of the model
            (`prediction_layers.with_fewer_experts`); empty if the run removes no experts.
    """

    stored: Mapping[str, StoredTensor] = field(default_factory=dict)
    places: Mapping[str, str] = field(default_factory=dict)
    not_loaded: Mapping[str, str] = field(default_factory=dict)
    not_copied: Mapping[str, str] = field(default_factory=dict)
    layers: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    prediction_layers: Sequence[PredictionLayer] = ()

    @property
    def tensors_to_copy(self) -> dict[str, StoredTensor]:
        """The tensors that the model's class does not load and that the result gets too, by their names in the files.

        `self.not_loaded` has the module of each tensor that is not loaded, by the tensor's name: "mtp" for tensors of
        layers that predict more tokens. `self.not_copied` has, by module, the reasons why such tensors are left out: if
        their shapes would not fit the smaller model, for instance.
        """
        return {
            name: self.stored[name]
            for name, module in self.not_loaded.items()
            if module not in self.not_copied
        }

    def loaded_in_dtypes_of_files(self, dtype: torch.dtype) -> dict[str, StoredTensor]:
        """Return the tensors whose dtypes the result should have again: all that are loaded, or none.

        Some tensors of a model in bfloat16 may be stored in float32. If a model is loaded in the dtype of most of its
        values (`dtype`), the result should store them so again. Otherwise somebody has asked for another dtype when the
        model was loaded. Then the result should have that one everywhere, so the returned dictionary is empty. Only
        plain floats count, and a tie counts as most. The tensors are by their names in the files. `self.places` names
        those that are loaded. Changes nothing.
        """
        # After a run, `places` still names the tensors of removed experts, which `stored` lacks.
        loaded = {name: self.stored[name] for name in self.places if name in self.stored}
        num_values = Counter[str]()  # by dtype; 0 for a dtype that no tensor has
        for tensor in loaded.values():
            if tensor.dtype in PLAIN_FLOATS:
                num_values[tensor.dtype] += math.prod(tensor.shape)
        most_values = max(num_values.values(), default=0)  # of one dtype
        model_has_usual_dtype = num_values[name_of_dtype(dtype)] == most_values
        return loaded if model_has_usual_dtype else {}

    @property
    def num_copied_by_module(self) -> dict[str, int]:
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
        # The entries stand at different depths of `self.settings`, so they are found in its text. A value ends before
        # the quote that begins the next setting.
        values = re.findall(
            r'"(?:weight_block_size|block_structure|group_size)": ([^"]*)',
            json.dumps(self.settings),
        )
        sizes = set[int]()
        for value in values:  # such as "[128, 128], "
            # -1, for no groups, is read as 1, which is never used: sizes are only looked up from 2 on.
            sizes.update(int(number) for number in re.findall(r"\d+", value))
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
            Stored tensors by their names in the result: experts that have tensors of their own get new numbers. Tensors
            of experts that lose channels are left out, because each expert keeps others. A run that removes such
            channels never writes tensors as they are stored.
        """
        # `self.places` has the parameter of each tensor that is loaded.
        tensors: dict[str, StoredTensor] = {}
        for name, place in self.places.items():
            part = part_of(place)
            if part is None:
                tensors[name] = self.stored[name]
                continue
            if part.expert is not None:
                continue
            groups = kept[part.name]
            if place == part.table:
                # It is read and changed when it is written.
                change = partial(part.shrink, place, kept=groups)
                tensors[name] = self.stored[name].changed(change)
                continue
            expert_name = EXPERT.fullmatch(name) if part.is_mixture else None
            # Every expert may have tensors of its own, which stay or go whole.
            if expert_name is not None:
                before, number, after = expert_name.groups()
                # Tensors that are numbered after all experts of the part stay, too.
                are_after_experts = int(number) >= part.groups
                if are_after_experts:
                    new_number = int(number) - part.groups + len(groups)
                    tensors[f"{before}{new_number}{after}"] = self.stored[name]
                elif int(number) in groups:
                    new_number = groups.index(int(number))
                    tensors[f"{before}{new_number}{after}"] = self.stored[name]
                continue
            cut = self._cut(name, place, model, part, groups, strict=strict)
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
        *,
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
        # The axis that is cut, and how often all groups follow there. Scales of inputs of experts are no parameters:
        # they have one value for each expert, on the first axis.
        axis, repeats = part.tensors.get(place, (0, 1))
        # The shape of the parameter. An axis of experts has one entry for each, in a weight as in its scales.
        whole_shape = tensor.shape if part.is_mixture else model.get_parameter(place).shape
        whole_size = whole_shape[axis]
        has_axis = len(tensor.shape) == len(whole_shape)
        size = tensor.shape[axis] if has_axis else 0  # values of this tensor on that axis

        is_shared_by_all_groups = math.prod(tensor.shape) == 1 or size == 1
        if is_shared_by_all_groups:
            return tensor

        # How many rows or columns share one value: the smallest possible number that the quantization settings name.
        block_size = self._block_size(whole_size, size)
        # A mixture may have further entries after those of its experts (`entries`).
        divides_into_groups = part.is_mixture or size % (part.groups * repeats) == 0
        has_equal_blocks = block_size * size == whole_size
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
        group_size = whole_size // (part.groups * repeats)
        raise ValueError(
            f"{name} stores one value for {block_size} rows or columns of {place}, and groups of {group_size} are "
            f"removed, so it can't be cut: pass a pattern that does not cut {place}, such as '2:4', or a dtype "
            "(--dtype bfloat16), in which the result is written without quantization."
        )

    def _block_size(self, whole_size: int, size: int) -> int:
        """Return how many rows or columns of a parameter share one value of a stored tensor, such as a scale.

        The parameter has `whole_size` rows or columns, and the tensor `size` values for them; 0: no axis for them.
        """
        least = math.ceil(whole_size / size) if size else whole_size
        if least == 1:
            return 1
        # The last block may be smaller, so the size of a block is the next one that the settings name.
        possible_sizes = [block for block in self.block_sizes if block >= least]
        return min(possible_sizes, default=least)

    def refuse_numbered_layers(self) -> None:
        """Raise ValueError if a pattern in the quantization settings names decoder layers by number.

        A run that removes decoder layers gives others their numbers. Plain names, such as "model.layers.3.mlp", are
        allowed, because `renamed` renumbers them. Only values in lists and dictionaries of the settings are read.
        Changes nothing.
        """
        prefix = re.escape(self.layers)  # such as "model.layers."
        _, _, list_name = self.layers.removesuffix(".").rpartition(".")  # such as "layers"
        # Matches r"re:.*layers\.(3|5)\..*", but not the plain name "model.layers.3.mlp".
        numbered = re.compile(rf"^(?!{prefix}).*\b{re.escape(list_name)}\\?\.[^.a-zA-Z]*\d")
        # Names of tensors outside of decoder layers, in the files and in the model: those of an image tower, for
        # instance, whose layers keep their numbers.
        names_outside = [name for name in self.stored if not name.startswith(self.layers)]
        places_outside = [self.places[name] for name in names_outside if name in self.places]
        outside = names_outside + places_outside

        for value in _inner_values(self.settings):
            is_other_module = any(name.startswith(f"{value}.") for name in outside)
            if is_other_module:
                continue
            # "[0-9]" is any digit, and names no number.
            pattern = str(value).replace("[0-9]", "")
            if numbered.search(pattern):
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
        new_names = _NewNames(self.layers, stay, total)
        return SourceTensors(
            stored=new_names.of_keys(self.stored),
            places=new_names.of_keys(self.places),
            not_loaded=new_names.of_keys(self.not_loaded),
            not_copied=self.not_copied,
            layers=self.layers,
            settings=new_names.in_lists(self.settings),
            prediction_layers=[
                replace(layer, places=new_names.of_keys(layer.places))
                for layer in self.prediction_layers
            ],
        )


@dataclass(frozen=True)
class _NewNames:
    """Names in a model with fewer decoder layers.

    Attributes:
        layers: How the names of decoder layers begin in the files, such as "model.layers."; empty if that is not known,
            and then all names stay as they are.
        stay: The numbers of the decoder layers that stay, in order.
        total: How many decoder layers there are before. Layers after these predict more tokens.
    """

    layers: str
    stay: Sequence[int]
    total: int

    def of(self, name: str) -> str | None:
        """Return a name, such as "model.layers.3.mlp", with its layer's new number; `None` if the layer goes.

        Names outside of layers are returned as they are.
        """
        # Three groups: what stands before the number ("model.layers."), the number, and what follows (".mlp", or "").
        match = re.match(rf"({re.escape(self.layers)})(\d+)(\..*|)", name)
        if match is None or not self.layers:
            return name
        before, number, after = match.groups()
        old = int(number)
        is_decoder_layer = old < self.total
        if not is_decoder_layer:
            new = len(self.stay) + (old - self.total)
        elif old in self.stay:
            new = self.stay.index(old)
        else:
            return None
        return f"{before}{new}{after}"

    def of_keys(self, values: Mapping[str, T]) -> dict[str, T]:
        """Return `values`, which are by name, under the new names, without those of removed layers."""
        result: dict[str, T] = {}
        for name, value in values.items():
            new_name = self.of(name)
            if new_name is not None:
                result[new_name] = value
        return result

    def in_lists(self, value: Any) -> Any:
        """Copy a value of the quantization settings, with the new names in all lists, such as modules to skip.

        Names of removed layers are left out of the lists.
        """
        if isinstance(value, dict):
            return {key: self.in_lists(inner) for key, inner in value.items()}
        if not isinstance(value, list):
            return value
        entries = []
        for entry in value:
            new_entry = self.of(entry) if isinstance(entry, str) else self.in_lists(entry)
            if new_entry is not None:  # the layer stays
                entries.append(new_entry)
        return entries


def _inner_values(settings: Mapping[str, Any]) -> Iterator[Any]:
    """Yield the values in the dictionaries and lists of quantization settings, at any depth.

    Values at the top, which say how all weights are stored, are left out.
    """
    waiting: list[Any] = []  # what is still to be looked at
    for value in settings.values():
        if isinstance(value, dict | list):
            waiting.append(value)
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value
        else:
            yield value
