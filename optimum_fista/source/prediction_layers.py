"""Layers that predict more tokens: where the files of a model have them, and how they lose experts.

Many checkpoints hold such *prediction layers* (multi-token prediction, MTP), from which serving programs draft tokens.
The model's class does not load them. A prediction layer is a decoder layer like those of the model, with a projection
in front of it: its input is made of the embedding of the next token and of the hidden states that the decoder layers
return. If its decoder layer has a *mixture* (experts with a router), `config.json` has one number of experts for this
mixture and those of the model. So a run that removes experts of the model has to remove as many here.

`find_prediction_layers` finds them in the files. A run then chooses the experts that stay
(`removal.prediction_experts`), and `with_fewer_experts` leaves out the others.

- A *stored tensor* (`StoredTensor`) is a tensor in the files. A *module* is what a model lacks, such as "mtp" or
  "model.layers.61": all tensors that the model's class does not load belong to one.
- A *place* is the name of the parameter of the model as which a stored tensor is loaded. The tensors of a prediction
  layer have none, but those of its *template* have: that is a decoder layer of the model with the same parameters.
- A *part* (`CutPart`) is here the mixture of the template, such as "model.layers.3.mlp.experts".
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from transformers import PreTrainedModel

from optimum_fista.source.loaded_names import Naming
from optimum_fista.source.source_tensors import EXPERT, CutPart, SourceTensors
from optimum_fista.source.stored_tensor import StoredTensor


class _InputNames(NamedTuple):
    """How a module calls the tensors that make the input of its decoder layer."""

    embedding_norm: str
    hidden_norm: str
    projection: str


_NUMBERED = _InputNames("enorm.weight", "hnorm.weight", "eh_proj.weight")
"""Modules that are numbered as decoder layers after the last one: DeepSeek-V3, GLM-4.5."""
_NAMED = _InputNames("pre_fc_norm_embedding.weight", "pre_fc_norm_hidden.weight", "fc.weight")
"""Modules with the names of `_NAMED_LAYER`: Qwen3-Next, Qwen3.5."""
_NAMED_LAYER = "mtp.layers.0."


@dataclass(frozen=True)
class PredictionLayer:
    """A layer that predicts more tokens, whose mixture has as many experts as those of the model.

    Attributes:
        module: The module that the model lacks, such as "model.layers.61" or "mtp".
        prefix: What the names of the tensors of its decoder layer begin with, such as "model.layers.61.".
        template: The decoder layer of the model with the same parameters, such as "model.layers.60".
        part: The mixture of the template.
        places: For each tensor of its decoder layer, by its name in the files: the parameter of the template in the
            same position.
        embedding_norm, hidden_norm: Weights [hidden] of the norms of the embedding and of the hidden states.
        projection: Weight [hidden, 2 * hidden] of the projection of both, the embedding first.
    """

    module: str
    prefix: str
    template: str
    part: CutPart
    places: Mapping[str, str]
    embedding_norm: StoredTensor
    hidden_norm: StoredTensor
    projection: StoredTensor

    @property
    def mixture(self) -> str:
        """The name of its mixture in the files that the run is given, such as "model.layers.61.mlp.experts"."""
        return self.prefix + self.part.name.removeprefix(f"{self.template}.")

    def part_of(self, place: str) -> CutPart | None:
        """Return the mixture if the parameter `place` of the template belongs to it, otherwise `None`."""
        return self.part if self.part.includes(place) else None


def find_prediction_layers(
    modules: Iterable[str],
    source: SourceTensors,
    *,
    naming: Naming,
    layers_name: str,
    part_of: Callable[[str], CutPart | None],
    in_plain_floats: Callable[[str], StoredTensor | None],
) -> list[PredictionLayer]:
    """Find the prediction layers that can lose experts, in the order in which they predict. Changes nothing.

    A module is left out if its tensors have other names than those of `_NUMBERED` and `_NAMED`, if no decoder layer of
    the model has the same parameters, or if the run cuts anything but experts there.

    Args:
        modules: Modules that the model lacks and that have experts as its decoder layers have.
        source: All stored tensors, with the modules of those that the model does not load.
        naming: Knows the parameter as which a stored tensor is loaded.
        layers_name: The name of the list of decoder layers in the model, such as "model.layers".
        part_of: Returns the part to which a parameter of this name belongs; `None` if the run does not cut it.
        in_plain_floats: Returns the stored tensor of this name, dequantized; `None` if that is not possible.
    """
    layers = []
    for module in sorted(modules, key=_number_at_the_end):
        layer = _prediction_layer(
            module,
            source,
            naming=naming,
            layers_name=layers_name,
            part_of=part_of,
            in_plain_floats=in_plain_floats,
        )
        if layer is not None:
            layers.append(layer)
    return layers


def _prediction_layer(
    module: str,
    source: SourceTensors,
    *,
    naming: Naming,
    layers_name: str,
    part_of: Callable[[str], CutPart | None],
    in_plain_floats: Callable[[str], StoredTensor | None],
) -> PredictionLayer | None:
    """Describe the prediction layer in a module of the files; `None` if it is none that can lose experts.

    The other arguments are those of `find_prediction_layers`.
    """
    layers_prefix = source.layers
    names = [name for name, owner in source.not_loaded.items() if owner == module]
    naming_of_inputs = _prefixes(names, layers_prefix)
    if naming_of_inputs is None:
        return None
    # Inputs (two norms and the projection) are called `outer_prefix` + one of these names. The names of the tensors of
    # its decoder layer begin with `prefix`.
    input_names, outer_prefix, prefix = naming_of_inputs
    embedding_norm, hidden_norm, projection = [
        in_plain_floats(outer_prefix + name) for name in input_names
    ]
    inner_names = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
    template = _template(inner_names, naming, layers_name, layers_prefix)
    if template is None or embedding_norm is None or hidden_norm is None or projection is None:
        return None

    number, inner_places = template
    part = _only_mixture(inner_places.values(), part_of)
    if part is None:
        return None
    layer = PredictionLayer(
        module=module,
        prefix=prefix,
        template=f"{layers_name}.{number}",
        part=part,
        places={prefix + name: place for name, place in inner_places.items()},
        embedding_norm=embedding_norm,
        hidden_norm=hidden_norm,
        projection=projection,
    )
    has_all_experts = _has_all_experts(layer, source.stored, f"{layers_prefix}{number}.")
    return layer if has_all_experts else None


def with_fewer_experts(
    source: SourceTensors, model: PreTrainedModel, kept: Mapping[str, Sequence[int]]
) -> SourceTensors:
    """Return tensors in which the prediction layers have lost experts; `source` does not change, and nothing is read.

    Experts that have tensors of their own get new numbers; all others stay as they are stored. The result has no
    `prediction_layers` any more: their tensors are among those to copy.

    Args:
        source: The tensors in the files of `model`, with its prediction layers.
        model: The dense model, of which only the shapes of parameters are read.
        kept: The numbers of the experts that stay, in order, by the name of the mixture (`PredictionLayer.mixture`).
    """
    if not source.prediction_layers:
        return source
    stored = dict(source.stored)
    not_loaded = dict(source.not_loaded)
    for layer in source.prediction_layers:
        cut = replace(source, places=layer.places).cut_tensors(
            model, layer.part_of, {layer.part.name: kept[layer.mixture]}, strict=True
        )
        for name in layer.places:
            del stored[name]
            del not_loaded[name]
        stored |= cut
        not_loaded |= dict.fromkeys(cut, layer.module)
    return replace(source, stored=stored, not_loaded=not_loaded, prediction_layers=())


def _number_at_the_end(module: str) -> tuple[str, int]:
    """Return the name of a module as a key for sorting: "model.layers.9" comes before "model.layers.10"."""
    match = re.fullmatch(r"(.*?)(\d*)", module)
    assert match is not None
    name, number = match.groups()
    return name, int(number or 0)


def _prefixes(names: Sequence[str], layers_prefix: str) -> tuple[_InputNames, str, str] | None:
    """Find out how a module is named: what its inputs are called, and what its names begin with.

    `names` are those of its tensors in the files, and `layers_prefix` is what those of decoder layers begin with there.
    Returns the names of its inputs, what all names begin with, and what those of its decoder layer begin with. `None`
    if the module has none of the known ways of naming, or several decoder layers in one module.
    """
    match = re.match(rf"{re.escape(layers_prefix)}\d+\.", names[0])
    if match is not None and layers_prefix:
        prefix = match.group()
        if {f"{prefix}{name}" for name in _NUMBERED} <= set(names):
            return _NUMBERED, prefix, prefix
        return None
    outer_prefix = "mtp."
    has_other_layers = any(
        name.startswith("mtp.layers.") and not name.startswith(_NAMED_LAYER) for name in names
    )
    if {f"{outer_prefix}{name}" for name in _NAMED} <= set(names) and not has_other_layers:
        return _NAMED, outer_prefix, _NAMED_LAYER
    return None


def _template(
    inner_names: Sequence[str], naming: Naming, layers_name: str, layers_prefix: str
) -> tuple[int, dict[str, str]] | None:
    """Find the template of a prediction layer: a decoder layer all of whose parameters the prediction layer has, too.

    Of several such decoder layers, it is the one with the most parameters, and of these the last one.

    Args:
        inner_names: Names of the stored tensors of the prediction layer, without what all begin with, such as
            "mlp.gate.weight". Some may belong to its inputs, or to its head.
        naming, layers_name: As in `find_prediction_layers`.
        layers_prefix: What the names of stored tensors of decoder layers begin with, such as "model.layers.".

    Returns:
        The number of the decoder layer, and for each of `inner_names` that belongs to it: the parameter of the decoder
        layer as which it would be loaded there. `None` if there is no such decoder layer.
    """
    # The names of the parameters and buffers of each decoder layer, without that of the layer, by its number.
    tensors_of_layers: dict[int, set[str]] = {}
    for name in naming.state:
        if name.startswith(f"{layers_name}."):
            number, _, inner_name = name.removeprefix(f"{layers_name}.").partition(".")
            tensors_of_layers.setdefault(int(number), set()).add(inner_name)

    template: tuple[int, dict[str, str]] | None = None
    most_places = 0  # number of parameters of the best decoder layer until now
    tried: list[set[str]] = []  # layers of one kind have the same tensors
    for layer_number in sorted(tensors_of_layers, reverse=True):
        tensors = tensors_of_layers[layer_number]
        if tensors in tried:
            continue
        tried.append(tensors)
        places = {}  # parameters of this decoder layer that the prediction layer has, by `inner_names`
        for inner_name in inner_names:
            stored_name = f"{layers_prefix}{layer_number}.{inner_name}"
            place = naming.names_of(stored_name).place
            if naming.is_loaded(stored_name, place):
                places[inner_name] = place
        loaded = {place.removeprefix(f"{layers_name}.{layer_number}.") for place in places.values()}
        has_all_of_layer = tensors <= loaded
        if has_all_of_layer and len(places) > most_places:
            template = layer_number, places
            most_places = len(places)
    return template


def _only_mixture(
    places: Iterable[str], part_of: Callable[[str], CutPart | None]
) -> CutPart | None:
    """Return the mixture to which parameters of a decoder layer belong; `None` if the run cuts anything else of them.

    `places` are the names of the parameters, and `part_of` returns the part of each. Also `None` if the router reads
    experts from a table, whose entries would need others in place of those that are removed.
    """
    parts = {}
    for place in places:
        part = part_of(place)
        if part is not None:
            parts[part.name] = part
    if len(parts) != 1:
        return None
    (part,) = parts.values()
    can_lose_experts = part.is_mixture and part.table is None
    return part if can_lose_experts else None


def _has_all_experts(
    layer: PredictionLayer, stored: Mapping[str, StoredTensor], template_prefix: str
) -> bool:
    """Tell whether a prediction layer has the shapes of its template, and tensors of all of its experts.

    `stored` are all stored tensors, by name; those of the template begin with `template_prefix`, such as
    "model.layers.60.". Tensors that only one of the two has, because only one is quantized, are not compared.
    """
    numbers = set()  # of experts that have tensors of their own
    for name in layer.places:
        in_template = stored.get(template_prefix + name.removeprefix(layer.prefix))
        if in_template is not None and in_template.shape != stored[name].shape:
            return False
        expert_name = EXPERT.fullmatch(name)
        if expert_name is not None:
            numbers.add(int(expert_name.group(2)))
    return not numbers or numbers == set(range(layer.part.groups))
