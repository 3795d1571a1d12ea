"""Finding the parts that a model can lose, from outlines alone.

There is no list of families. An *outline* (a model without weights, see `outline`) is built from the configuration,
once as it is and once with fewer parts. The tensors whose shapes differ are those that shrink. If unexpected ones
differ, the model is refused. So a new family needs no code. If a configuration does not state the number of parts, the
model can't lose them.

A run makes one `ModelOutline`, and asks it for the `Parts` of each kind that its pattern names. A `Part` belongs to one
decoder layer, and consists of *groups* that can be removed one by one (`parts`).

A configuration states the number of parts by one of its *words*, such as "num_attention_heads". *Overrides* are its
settings of single decoder layers (`layer_overrides`).
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from optimum_fista.model import UnsupportedArchitectureError
from optimum_fista.model.experts import FusedExperts, can_be_split, is_fused_experts
from optimum_fista.model.layers import DecoderLayers
from optimum_fista.model.operators import LINEAR
from optimum_fista.removal.layer_overrides import (
    overrides_of,
    scaled,
    values_by_layer,
    without_overrides,
)
from optimum_fista.removal.outline import as_text, described_model, shapes_of
from optimum_fista.removal.parts import GroupAxis, Kind, Part, Parts

# What configurations call these numbers. Of several words, the first that changes the right shapes is used.
_WORDS: dict[Kind, tuple[str, ...]] = {
    "channels": (
        "intermediate_size",
        "n_inner",
        "ffn_dim",
        "decoder_ffn_dim",
        "ffn_hidden_size",
        "d_ff",
    ),
    "expert_channels": (
        "moe_intermediate_size",
        "moe_hidden_size",
        "expert_ffn_hidden_size",
        "intermediate_size",
        "ffn_hidden_size",
    ),
    "heads": ("num_attention_heads",),
    "experts": ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"),
}

# What they call the number of experts that a token is sent to.
_WORDS_FOR_TOP_K = ("num_experts_per_tok", "moe_topk", "top_k_experts")
# What they call the number of groups of experts that a router chooses first.
_WORDS_FOR_ROUTER_GROUPS = ("n_group", "num_expert_group")

# What an outline gets for a size that its configuration leaves open: no model would choose it.
_UNUSUAL_SIZE = 8


class ModelOutline:
    """A model, with its outline (`dense`) and the parts that are found in it; each is made once, when it is asked for.

    `layers` are those of the model, which may be on any device, meta included. The model is not changed, and its
    weights are not read.
    """

    def __init__(self, layers: DecoderLayers) -> None:
        self.layers = layers
        self._parts: dict[Kind, Parts] = {}

    @property
    def model(self) -> PreTrainedModel:
        """The model itself."""
        return self.layers.model

    @property
    def text_config(self) -> PreTrainedConfig:
        """The configuration of the model's decoder."""
        return self.model.config.get_text_config(decoder=True)

    @cached_property
    def dense(self) -> PreTrainedModel:
        """The outline of the model as it is, built from its configuration."""
        return described_model(self.model, {})

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all tensors of the outline, by name."""
        return shapes_of(self.dense)

    def parts(self, kind: Kind) -> Parts:
        """Find what the model can lose of one kind.

        - `"channels"` of plain MLPs: columns of the down projection, with the rows that compute their inputs.
        - `"expert_channels"` of mixtures: columns of the down projection of every expert, with the rows that compute
          their inputs, and the same of other MLPs whose size follows from the same number, such as shared experts.
        - `"heads"`: key-value heads with their query heads: columns of the output projection, with rows of q, k and v.
        - `"experts"` of mixtures, with their outputs of the router.

        Shapes do not show the order of rows. The rows of a head are assumed to be together, and a gate and an up
        projection in one matrix to be one after the other. `proof.require_same_outputs` proves this.

        The parts are kept in the outline, and returned again at the next call.

        Raises:
            UnsupportedArchitectureError: If the model can't lose any of this kind, with the reason.
        """
        if kind not in self._parts:
            self._parts[kind] = _find_parts(self, kind)
        return self._parts[kind]


def _find_parts(outline: ModelOutline, kind: Kind) -> Parts:
    """Find the parts of one kind, by the first word of the configuration that states their number.

    `_WORDS` are what configurations may call the number, such as "intermediate_size" for channels. If no word states
    it, an UnsupportedArchitectureError has the reason for each word. `outline` is that of the model; it builds its copy
    without weights if it has none yet.
    """
    model_class = type(outline.model).__name__
    if outline.layers.shared:
        # the first of the operators that share their weight with another one, and the end of a sentence that says so
        name, reason = next(iter(outline.layers.shared.items()))
        raise UnsupportedArchitectureError(f"{model_class} can't lose {kind}: {name} {reason}.")

    reasons = list[str]()
    for word in _WORDS[kind]:
        try:
            stated = _stated_number(outline.text_config, kind, word)
            if stated is not None:
                return _with_parts(outline, stated)
        # also UnsupportedArchitectureError: another word may be the right one
        except ValueError as error:
            reasons.append(str(error))

    if not reasons:
        raise UnsupportedArchitectureError(
            f"{model_class} can't lose {kind}: its configuration states no number of them (looked for "
            f"{', '.join(_WORDS[kind])})."
        )
    raise UnsupportedArchitectureError(
        f"{model_class} can't lose {kind}: {'; or '.join(dict.fromkeys(reasons))}."
    )


def _stated_number(config: PreTrainedConfig, kind: Kind, word: str) -> Parts | None:
    """Read the number of channels, heads or experts that a text configuration calls `word`.

    Returns it as `Parts` without any part in them; `None` if the configuration does not know the word, or does not
    use it. `config` is only read. Raises UnsupportedArchitectureError if decoder layers have different numbers. Only of
    heads they may, if the number is stated for one layer and overridden in others (`_stated_heads`).
    """
    # A setting that some layer overrides can't be read from `config`, but from this copy.
    common = without_overrides(config)
    if not hasattr(common, word):
        return None
    value = getattr(common, word)
    values_of_layers = []
    if isinstance(value, list):
        values_of_layers = value  # one for each decoder layer
        value = value[0] if value else None
    elif kind != "heads" and overrides_of(config) is not None:
        values_of_layers = values_by_layer(config, word)
    different_values = sorted(set(values_of_layers))
    if len(different_values) > 1:
        numbers = ", ".join(map(str, different_values))
        raise UnsupportedArchitectureError(f"{word} differs between decoder layers ({numbers})")
    if kind == "heads":
        return _stated_heads(config, word, value) if value else None

    if kind in ("channels", "expert_channels"):
        return Parts(kind, {word: value})  # with `None`, the model computes the number
    return _stated_experts(common, word, value) if value else None


def _stated_heads(config: PreTrainedConfig, word: str, value: int) -> Parts:
    """Read the numbers of heads from a text configuration, which says that `word` (query heads) is `value`.

    A group is a key-value head with its query heads. Returns `Parts` without any part in them.

    Decoder layers may have different numbers of heads. Then a group of a part is the same share of all its heads in
    every layer: of 8 key-value heads in some layers and 4 in others, there are 4 groups, of 2 heads or of 1.
    """
    # A setting that some layer overrides can't be read from `config`, but from this copy.
    common = without_overrides(config)
    key_value_heads = getattr(common, "num_key_value_heads", None)
    if not key_value_heads:
        key_value_heads = value  # every query head has its own
    groups = key_value_heads
    if overrides_of(config) is not None:
        query_heads = values_by_layer(config, word)
        # key-value heads; empty if every query head has its own
        by_layer = values_by_layer(config, "num_key_value_heads")
        groups = math.gcd(*by_layer) if by_layer else math.gcd(*query_heads)
        for number in query_heads:
            if number % groups:
                raise UnsupportedArchitectureError(
                    f"{word} is {number} in a decoder layer, which {groups} groups of key-value heads do not divide"
                )

    words: dict[str, int | None] = {word: value}
    if hasattr(common, "num_key_value_heads"):
        words["num_key_value_heads"] = key_value_heads
    # stated from now on, because otherwise it would be computed from the number of heads
    head_dim = getattr(common, "head_dim", None)
    if not head_dim:
        head_dim = common.hidden_size // value
    return Parts(kind="heads", words=words, groups=groups, constants={"head_dim": head_dim})


def _stated_experts(config: PreTrainedConfig, word: str, value: int) -> Parts:
    """Read how the router chooses among the experts, of which `word` says that a mixture has `value`.

    `config` is a text configuration without overrides, which is only read. Returns `Parts` without any part in them.
    """
    top_k = _experts_for_a_token(config)
    router_groups = count_router_groups(config)
    if router_groups == 1:
        at_least = top_k
    else:
        # Of how many groups the router chooses experts for a token: of all, if the configuration does not say it. Each
        # of these must have its share of the experts that the token is sent to.
        chosen_groups = getattr(config, "topk_group", None)
        if not chosen_groups:
            chosen_groups = router_groups
        # And at least two: such a router compares groups by the sum of their two best experts (DeepSeek-V3, arXiv
        # 2412.19437).
        at_least = max(math.ceil(top_k / chosen_groups), 2) * router_groups
    return Parts(
        "experts",
        {word: value},
        groups=value,
        num_router_groups=router_groups,
        at_least=at_least,
    )


def _experts_for_a_token(config: PreTrainedConfig) -> int:
    """Read from a text configuration how many experts a token is sent to; the most, if decoder layers differ.

    1 if the configuration does not state it. `config` is only read.
    """
    for word in _WORDS_FOR_TOP_K:
        value = getattr(config, word, None)
        if isinstance(value, list):  # a number for each decoder layer
            value = max(value, default=None)
        if value:  # `None` and 0 state nothing
            return int(value)
    return 1


def count_router_groups(config: PreTrainedConfig) -> int:
    """Count the groups of experts that the router of a mixture chooses first; 1 if it chooses experts at once.

    `config` is a text configuration.
    """
    for word in _WORDS_FOR_ROUTER_GROUPS:
        value = getattr(config, word, None)
        if value:  # `None` and 0 state nothing
            return value
    return 1


def _with_parts(outline: ModelOutline, stated: Parts) -> Parts:
    """Find the parts of one kind in all decoder layers, and return a copy of `stated` that has them.

    A part is made of tensors that become smaller if the numbers in the configuration do. Refuses a model in which other
    tensors become smaller, too, or in which parts differ in their number of groups. The messages continue a sentence
    such as "LlamaForCausalLM can't lose heads: " (`_find_parts`).

    `outline` builds its copy without weights if it has none yet. `stated` has what the configuration says of one kind,
    and no parts yet (`_stated_number`).
    """
    smaller = _smaller_outline(outline, stated)

    parts = list[Part]()
    for layer_name, _ in outline.layers:
        # with a dot: "model.layers.1." is no beginning of "model.layers.10"
        prefix = f"{layer_name}."
        parts += _parts_of_layer(outline, prefix, smaller, stated)

    tensors_of_parts = {name for part in parts for name in part.tensors}
    unexpected = smaller.axes.keys() - tensors_of_parts
    if unexpected:
        raise UnsupportedArchitectureError(
            f"{min(unexpected)} changes as well with {smaller.settings}"
        )
    if not parts:
        raise UnsupportedArchitectureError(
            f"no tensor of a decoder layer changes with {smaller.settings}"
        )
    if stated.kind == "expert_channels" and not any(part.expert is not None for part in parts):
        raise UnsupportedArchitectureError(
            f"no matrix of an expert changes with {smaller.settings}"
        )
    return replace(stated, groups=_common_groups(parts, stated.kind), parts=tuple(parts))


class _SmallerOutline(NamedTuple):
    """How the tensors of a model become smaller if every part has fewer groups."""

    # On which a tensor becomes smaller, by its name; the others keep their size.
    axes: Mapping[str, int]
    shapes: Mapping[str, tuple[int, ...]]  # of all tensors of the smaller outline, by name
    settings: str  # of the smaller outline, as text for messages


def _parts_of_layer(
    outline: ModelOutline, prefix: str, smaller: _SmallerOutline, stated: Parts
) -> list[Part]:
    """Find the parts of one kind (`stated.kind`) in a decoder layer. Changes nothing.

    Args:
        outline: Of the model.
        prefix: The name of the layer with a dot, such as "model.layers.3.".
        smaller: Which tensors become smaller if there are fewer groups of this kind.
        stated: What the configuration states of this kind, without any part yet (`_stated_number`).
    """
    if stated.kind == "experts":
        mixture = _mixture(outline, prefix, smaller, stated)
        return [] if mixture is None else [mixture]
    if stated.kind != "expert_channels":
        return list(_operators(outline, prefix, smaller.axes, stated))

    experts = list(_experts(outline, prefix, smaller.axes))
    of_experts = {name for part in experts for name in part.tensors}
    # MLPs whose size follows from the same number, such as shared experts
    others = {name: axis for name, axis in smaller.axes.items() if name not in of_experts}
    return [*experts, *_operators(outline, prefix, others, stated)]


def _common_groups(parts: Sequence[Part], kind: Kind) -> int:
    """Return the number of groups that all parts of one kind have; refuse parts that differ in it.

    If experts lose channels, it is that of an expert. A shared expert may have a multiple of it, because the
    configuration says how many experts wide it is. Changes nothing.
    """
    first = parts[0]
    if kind == "expert_channels":
        first = next(part for part in parts if part.expert is not None)
    for part in parts:
        may_have_multiple = kind == "expert_channels" and part.expert is None
        has_groups = part.groups == first.groups
        if may_have_multiple:
            has_groups = part.groups % first.groups == 0
        if not has_groups:  # one word of the configuration can't state two sizes
            raise UnsupportedArchitectureError(
                f"{first.name} has {first.groups} {kind}, and {part.name} has {part.groups}"
            )
    return first.groups


def _smaller_outline(outline: ModelOutline, stated: Parts) -> _SmallerOutline:
    """Build an outline with fewer groups in every part, and find the tensors that are smaller in it.

    `outline` is that of the model as it is; it builds its copy without weights if it has none yet. `stated` has the
    numbers of the configuration by their words, such as {"intermediate_size": 64} (`_stated_number`).

    Raises UnsupportedArchitectureError if a tensor differs otherwise, or if there is nothing to remove.
    """
    # The smaller outline has one group of heads, or half of the channels or experts: whatever a model divides by the
    # number (the hidden size, for instance), it can divide by these, too.
    divisor = stated.groups if stated.kind == "heads" else 2
    fewer = dict[str, int]()
    for word, value in stated.words.items():
        fewer[word] = value // divisor if value else _UNUSUAL_SIZE
    if stated.groups == 1 or 0 in fewer.values():
        raise UnsupportedArchitectureError(f"there is a single one ({as_text(stated.words)})")
    overrides = overrides_of(outline.text_config)
    if overrides is not None:
        overrides = scaled(overrides, stated.words, new_groups=1, old_groups=divisor)
    small = described_model(outline.model, {**fewer, **stated.constants}, overrides)

    axes = dict[str, int]()
    stored = outline.dense.state_dict().keys()  # without buffers that the model computes
    small_shapes = shapes_of(small)
    for name, shape in outline.shapes.items():
        small_shape = small_shapes.get(name, ())  # () if the smaller outline lacks the tensor
        if small_shape == shape:
            continue
        axis = _axis_that_shrinks(shape, small_shape)
        if axis is None or name not in stored:
            raise UnsupportedArchitectureError(
                f"{name} of shape {shape} would have shape {small_shape} with {as_text(fewer)}"
            )
        axes[name] = axis
    return _SmallerOutline(axes, small_shapes, settings=as_text(fewer))


def _axis_that_shrinks(shape: tuple[int, ...], small_shape: tuple[int, ...]) -> int | None:
    """Find the axis on which a tensor of `shape` becomes smaller, if it becomes one of `small_shape`.

    `None` if it does not become smaller on one axis and stay as it is on all others.
    """
    if len(small_shape) != len(shape):
        return None
    differing = [axis for axis, size in enumerate(shape) if small_shape[axis] != size]
    if len(differing) != 1:
        return None
    axis = differing[0]
    return axis if small_shape[axis] < shape[axis] else None


def _operators(
    outline: ModelOutline, prefix: str, axes: Mapping[str, int], stated: Parts
) -> Iterator[Part]:
    """Find the parts of a decoder layer that are columns of a linear operator. Changes nothing.

    Args:
        outline: Of the model.
        prefix: The name of the layer with a dot, such as "model.layers.3.".
        axes: The axis on which a tensor becomes smaller, by its name (`_SmallerOutline`).
        stated: The kind ("channels", "expert_channels" or "heads") and the number of groups in a part, as the
            configuration states them. The caller makes a copy of it with the parts that are found here.

    Raises:
        UnsupportedArchitectureError: If other tensors do not have rows of their own for each group of columns.
    """
    shrinking = [  # all tensors of the layer that become smaller
        _ShrinkingTensor(
            name=name,
            shape=shape,
            axis=axes[name],
            module=outline.dense.get_submodule(name.rpartition(".")[0]),
        )
        for name, shape in outline.shapes.items()
        if name in axes and name.startswith(prefix)
    ]
    weights = [tensor for tensor in shrinking if tensor.loses_columns]
    is_only_one = len(weights) == 1
    for weight in weights:
        # The rows that compute the inputs are in the same module, such as "model.layers.3.mlp". If only one operator of
        # the layer loses columns, they may be anywhere in the layer: BERT's MLP has two modules.
        module, _, _ = weight.owner.rpartition(".")
        place_of_rows = prefix if is_only_one else f"{module}."
        rows = [
            tensor
            for tensor in shrinking
            if tensor not in weights and tensor.name.startswith(place_of_rows)
        ]
        yield _part_of_operator(weight, rows, stated)


@dataclass(frozen=True)
class _ShrinkingTensor:
    """A tensor of a decoder layer that is smaller in an outline with fewer parts."""

    name: str  # in the model
    shape: tuple[int, ...]
    axis: int  # that is smaller
    module: nn.Module  # that has it

    @property
    def owner(self) -> str:
        """The name of the module that has it."""
        return self.name.rpartition(".")[0]

    @property
    def entries(self) -> int:
        """How many entries it has on the axis that is smaller."""
        return self.shape[self.axis]

    @property
    def is_linear(self) -> bool:
        """Tell whether it is the weight or bias of a linear operator."""
        return isinstance(self.module, LINEAR)

    @property
    def is_weight_of_operator(self) -> bool:
        """Tell whether it is the weight of a linear operator."""
        return self.is_linear and self.name.endswith(".weight")

    @property
    def loses_columns(self) -> bool:
        """Tell whether it is the weight of a linear operator that has fewer inputs."""
        return self.is_weight_of_operator and self.axis == _axis_of_inputs(self.module)


def _part_of_operator(
    weight: _ShrinkingTensor, rows: Sequence[_ShrinkingTensor], stated: Parts
) -> Part:
    """Make the part of a linear operator that loses columns of its `weight`.

    `rows` are the tensors of the same decoder layer that lose rows or entries with it, and `stated` has the number of
    groups (0: each column is one). Nothing is changed. Raises UnsupportedArchitectureError if tensors have no rows of
    their own for each group.
    """
    operator = weight.owner  # the operator's name
    groups = stated.groups if stated.groups else weight.entries
    # weights whose rows compute the inputs of the operator
    feeders = [tensor.name for tensor in rows if tensor.is_weight_of_operator]
    least_feeders = 2 if stated.kind == "heads" else 1  # queries and keys
    if not feeders:
        raise UnsupportedArchitectureError(f"no projection computes the inputs of {operator}")
    if len(feeders) < least_feeders:
        raise UnsupportedArchitectureError(
            f"only {feeders[0]} computes the inputs of {operator}, but queries and keys need a projection each"
        )

    tensors = dict[str, GroupAxis]()
    for tensor in (weight, *rows):
        # a vector of a module that contains the operator, such as attention sinks: one entry for each head
        is_vector_of_parent = len(tensor.shape) == 1 and operator.startswith(f"{tensor.owner}.")
        is_expected = tensor.is_linear or is_vector_of_parent
        if not is_expected or tensor.entries % groups:
            raise UnsupportedArchitectureError(
                f"{tensor.name} ({type(tensor.module).__name__}) works on all inputs of {operator} together"
            )
        # The rows of a head are together. But if a gate and an up projection are one matrix, all channels of the gate
        # come before those of the up projection: the matrix has all groups twice.
        has_all_groups_again = stated.kind != "heads" and tensor is not weight
        repeats = tensor.entries // groups if has_all_groups_again else 1
        tensors[tensor.name] = GroupAxis(tensor.axis, repeats)
    return Part(name=operator, groups=groups, width=weight.entries // groups, tensors=tensors)


def _axis_of_inputs(module: nn.Module) -> int:
    """The axis of the inputs in the stored weight: the second one of [out, in], the first one of [in, out]."""
    return 0 if isinstance(module, Conv1D) else 1


def _experts(outline: ModelOutline, prefix: str, axes: Mapping[str, int]) -> Iterator[Part]:
    """Find the experts of a decoder layer that lose channels: each is a part. Changes nothing.

    Raises UnsupportedArchitectureError if the matrices of experts are in an unknown form.

    Args:
        outline: Of the model.
        prefix: The name of the layer with a dot, such as "model.layers.3.".
        axes: The axis on which a tensor becomes smaller, by its name (`_SmallerOutline`).
    """
    layer_name = prefix.removesuffix(".")
    for name, module in outline.dense.get_submodule(layer_name).named_modules(prefix=layer_name):
        own_tensors = [f"{name}.{tensor}" for tensor, _ in module.named_parameters(recurse=False)]
        shrinking = [tensor for tensor in own_tensors if tensor in axes]
        if not shrinking or not is_fused_experts(module):
            continue
        down = f"{name}.down_proj"
        if not can_be_split(module) or down not in shrinking:
            raise UnsupportedArchitectureError(
                f"{name} ({type(module).__name__}) keeps the weights of its experts in an unknown form"
            )

        experts = FusedExperts(name, module)
        groups = outline.shapes[down][axes[down]]  # the channels of an expert
        tensors = dict[str, GroupAxis]()
        for tensor in shrinking:
            axis = axes[tensor]
            entries = outline.shapes[tensor][axis]
            if axis == 0 or entries % groups:
                raise UnsupportedArchitectureError(
                    f"{tensor} has no rows of its own for each of {groups} channels of an expert"
                )
            # All channels of the gate come before those of the up projection. If gate and up alternate, both entries
            # of a channel are together.
            repeats = 1 if experts.interleaved else entries // groups
            # The matrix of one expert lacks the first axis.
            tensors[tensor] = GroupAxis(axis - 1, repeats)
        for operator in experts.operators:
            if operator.kind == "down_proj":
                yield Part(
                    name=operator.name,
                    groups=groups,
                    width=1,
                    tensors=tensors,
                    expert=operator.expert,
                )


def _mixture(
    outline: ModelOutline, prefix: str, smaller: _SmallerOutline, stated: Parts
) -> Part | None:
    """Find the mixture of a decoder layer: tensors with an entry for each expert on one axis.

    `None` if the layer has no mixture. Raises UnsupportedArchitectureError if it has one of another form.

    Args:
        outline: Of the model; only read.
        prefix: The name of the layer with a dot, such as "model.layers.3.".
        smaller: Which tensors become smaller with half of the experts.
        stated: The number of experts (`groups`) and of groups of the router, without any part yet (`_stated_number`).
    """
    tensors = {
        name: tensor
        for name, tensor in outline.dense.state_dict().items()
        if name.startswith(prefix)
    }
    shrinking = [name for name in tensors if name in smaller.axes]
    if not shrinking:
        return None

    num_removed = stated.groups - stated.groups // 2  # in the smaller outline
    for name in shrinking:
        axis = smaller.axes[name]
        size = tensors[name].shape[axis]
        # There may be further entries besides those of experts.
        has_entry_for_each_expert = size - smaller.shapes[name][axis] == num_removed
        if not has_entry_for_each_expert or size < stated.groups:
            raise UnsupportedArchitectureError(
                f"{name} is not a mixture with one entry for each expert"
            )
    table = _routing_table(outline.text_config, tensors, shrinking)

    # names of modules that have the matrices of all experts in one tensor of three axes; a router has two
    fused = {name.rpartition(".")[0] for name in shrinking if tensors[name].ndim == 3}
    if not fused:
        raise UnsupportedArchitectureError(
            f"{prefix.rstrip('.')} does not keep its experts in 3-D parameters [experts, rows, columns]"
        )
    if len(fused) > 1:
        names = ", ".join(name.removeprefix(prefix) for name in sorted(fused))
        raise UnsupportedArchitectureError(
            f"{prefix.rstrip('.')} keeps its experts in several modules ({names}), and experts can be removed only if "
            "one module has all their matrices"
        )
    (module_of_experts,) = fused
    return Part(
        name=module_of_experts,
        groups=stated.groups,
        width=1,
        tensors={name: GroupAxis(smaller.axes[name], repeats=1) for name in shrinking},
        num_router_groups=stated.num_router_groups,
        table=table,
    )


def _routing_table(
    config: PreTrainedConfig, tensors: Mapping[str, Tensor], shrinking: Sequence[str]
) -> str | None:
    """Find the table from which the router of a mixture reads the experts of a token; `None` if there is none.

    It has a row of whole numbers for each token, and is in the same module as the router's weight, which has a row for
    each expert. Other whole numbers in a layer with a mixture may be numbers of experts as well, which would be wrong
    for fewer experts: they raise an UnsupportedArchitectureError. Changes nothing.

    Args:
        config: The text configuration, for the number of tokens.
        tensors: All tensors of the decoder layer that are saved, by their names in the model; they may be on the meta
            device.
        shrinking: The names of those with an entry for each expert.
    """
    routers = {name.rpartition(".")[0] for name in shrinking if tensors[name].ndim == 2}
    tables = list[str]()
    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            continue
        has_row_for_each_token = tensor.ndim == 2 and tensor.shape[0] == config.vocab_size
        is_in_router = name.rpartition(".")[0] in routers
        if not has_row_for_each_token or not is_in_router:
            raise UnsupportedArchitectureError(
                f"{name} has whole numbers, which may be numbers of experts, in a form that is not known"
            )
        tables.append(name)
    if len(tables) > 1:
        raise UnsupportedArchitectureError(
            f"{' and '.join(tables)} both have a row for each token: one table of experts is known"
        )
    return tables[0] if tables else None
