"""Under which names Transformers loads the tensors of a model's files.

Transformers renames tensors when it loads a model, and merges some of them into one parameter, by rules for every
family. `Naming` applies these rules to the name of a stored tensor (`names_of`), such as
"model.layers.3.mlp.up_proj.weight", and says whether the model has a parameter of the new name (`is_loaded`); if it has
none, `module_of` says which module the model lacks. No tensor is read.
"""

from __future__ import annotations

from typing import NamedTuple

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from optimum_fista.source.formats.dequantizer import Dequantizer
from optimum_fista.source.stored_tensor import ACTIVATION_SCALE


class NewNames(NamedTuple):
    """The names that a stored tensor gets when a model is loaded.

    Attributes:
        own: Its name in the model, before it is merged with others, such as "layers.3.mlp.experts.7.up_proj.weight".
        place: The name of the parameter of which it becomes a part, such as "layers.3.mlp.experts.gate_up_proj".
    """

    own: str
    place: str


class Naming:
    """Names of stored tensors as this version of Transformers changes them when it loads a model.

    Attributes:
        state: The parameters and buffers of the model, by name.
    """

    def __init__(self, model: PreTrainedModel, dequantizer: Dequantizer | None) -> None:
        """Read the rules of `model`'s class, and those of its quantized format if there is a `dequantizer`.

        `model` is not changed. The `dequantizer` keeps the rules: Transformers asks its `update_weight_conversions`.
        """
        self.state = model.state_dict()
        self._names_of_modules = {name for name, _ in model.named_modules()}  # full names
        self._prefix = model.base_model_prefix  # such as "model"
        self._is_quantized = dequantizer is not None
        rules = get_model_conversion_mapping(model, hf_quantizer=dequantizer)
        # Renamings only change names. Converters merge or split tensors, too.
        self._renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        self._converters = [rule for rule in rules if isinstance(rule, WeightConverter)]

    def names_of(self, name: str) -> NewNames:
        """Return the names that the stored tensor `name` gets in the model.

        Tensors that Transformers merges into one parameter have the place in common, and each has a name of its own.
        If no parameter or buffer (`self.state`) has the place as its name, the model lacks the tensor. `name` is that
        in the files, such as "model.layers.3.mlp.experts.7.up_proj.weight".
        """
        own = self._renamed(name, renamings=self._renamings, converters=[])
        place = self._renamed(name, renamings=self._renamings, converters=self._converters)
        if place in self.state:
            return NewNames(own, place)

        # Transformers tries the name in the files, too, with or without the prefix of the base model.
        only_prefix_changed = self._renamed(name, renamings=[], converters=[])
        if only_prefix_changed in self.state:
            own = only_prefix_changed
        return NewNames(own, place=only_prefix_changed)

    def _renamed(
        self, name: str, *, renamings: list[WeightRenaming], converters: list[WeightConverter]
    ) -> str:
        """Return what Transformers makes of the name of a stored tensor by these rules.

        Transformers also adds or removes the prefix of the base model (`self._prefix`, such as "model"), if a tensor of
        the model (`self.state`) then has the name. It notes in the rules that they have matched; nothing else changes.
        """
        new_name: str
        new_name, *_ = rename_source_key(  # it also returns the pattern that matches
            name,
            renamings,
            converters,
            base_model_prefix=self._prefix,
            meta_state_dict=self.state,
        )
        return new_name

    def filled_by(self, name: str, place: str) -> set[str]:
        """Return the names of all parameters that get values of the stored tensor `name`; its `place` is one of them.

        There are several if Transformers splits the tensor, such as "query_key_value" into "q_proj", "k_proj" and
        "v_proj". `place` is that of `names_of`, which has the first of them.
        """
        filled = {place}
        for rule in self._converters:
            first, *others = rule.target_patterns
            if first in place and first not in name:
                filled |= {place.replace(first, other, 1) for other in others}
        return filled

    def is_loaded(self, name: str, place: str) -> bool:
        """Tell whether the model loads the stored tensor `name`; `place` is that of `names_of`.

        Scales of the activations of a quantized model count as loaded, because they belong to a weight, although only a
        model that computes with quantized numbers loads them.
        """
        is_parameter = place in self.state
        is_scale = self._is_quantized and ACTIVATION_SCALE.search(name) is not None
        return is_parameter or is_scale

    def module_of(self, own: str) -> str:
        """Find out why a tensor is not loaded: return the name of the outermost module that the model lacks.

        `own` is the name that the tensor would have in the model (`names_of`), such as
        "model.layers.61.eh_proj.weight". If the model has 61 decoder layers, the result is "model.layers.61". If the
        model has all modules in the name, the tensor's own name is returned, with the prefix of the base model
        (`self._prefix`, such as "model"). `self._names_of_modules` are those that the model has.
        """
        # The files may store the tensor without this prefix ("layers.61.eh_proj.weight").
        first_word = own.partition(".")[0]
        lacks_prefix = f"{self._prefix}.{first_word}" in self._names_of_modules
        full_name = f"{self._prefix}.{own}" if lacks_prefix else own

        words = full_name.split(".")  # the last one is the tensor's; those before it are modules
        for num_words in range(1, len(words)):  # from the outermost module inwards
            module = ".".join(words[:num_words])
            if module not in self._names_of_modules:
                return module
        return full_name
