"""Parts that a model can lose as a whole: channels of MLPs and experts, heads of attention, experts of mixtures.

There is no list of families. An *outline* (a model without weights, see `outline`) is built from the configuration,
once as it is and once with fewer parts. The tensors whose shapes differ are those that shrink. If unexpected ones
differ, the model is refused. So a new family needs no code. If a configuration does not state the number of parts, the
model can't lose them.

A `Part` belongs to one decoder layer, and consists of *groups* that can be removed one by one: single channels, a
key-value head with its query heads, or single experts. The part of a linear operator has columns of its weight, and
the rows of other operators that compute their inputs. The part of a mixture has an entry of each tensor for an expert.
Every expert may lose channels of its own ("expert_channels"): then it is a part itself, although it has its matrices in
the tensors of its mixture. `Parts` are all parts of one kind in a model. A run makes one `ModelOutline`, and
asks it for the `Parts` of each kind that its pattern names.

A configuration states the number of parts by one of its *words*, such as "num_attention_heads". *Overrides* are its
settings of single decoder layers (`layer_overrides`).
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from optimum_fista.model import UnsupportedArchitectureError
from optimum_fista.model.experts import FusedExperts, can_be_split, is_fused_experts
from optimum_fista.model.layers import DecoderLayers
from optimum_fista.model.operators import LINEAR
from optimum_fista.removal.layer_overrides import (
    Overrides,
    overrides_of,
    scaled,
    values_by_layer,
    without_overrides,
)
from optimum_fista.removal.outline import as_text, described_model, shapes_of
from optimum_fista.removal.routing_table import repointed
from optimum_fista.solve.patterns import PartShare, WholeParts

Kind = Literal["channels", "expert_channels", "heads", "experts"]

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

# What an outline gets for a size that its configuration leaves open: no model would choose it.
_UNUSUAL_SIZE = 8


class GroupAxis(NamedTuple):
    """Where a tensor has the groups of a part, or if the part is an expert, its own matrix in the tensor."""

    axis: int
    repeats: int  # how often all groups are on the axis: twice if a gate and an up projection are one matrix


@dataclass(frozen=True)
class Part:
    """Groups of columns of a linear operator that can be removed, with the rows that compute their inputs.

    The groups of a mixture are its experts, not columns, and `name` is that of the module that holds them. If `expert`
    is set, the operator is the down projection of this expert, and the groups are its channels. Then each of `tensors`
    has the matrices of all experts, which are parts of their own, one after the other on its first axis.
    """

    name: str  # of the operator, such as model.layers.0.mlp.down_proj
    groups: int
    width: int  # columns of a group: 1 for channels; for heads, those of the query heads of one key-value head
    tensors: Mapping[str, GroupAxis]  # that shrink, by their names in the model
    # Some routers first choose groups of experts, and then experts in these (`n_group` of DeepSeek-V3). Experts of a
    # router's group follow each other, and each of its groups keeps equally many. 1: the router chooses experts only.
    num_router_groups: int = 1
    # The name in the model of the table from which the router of a mixture reads the experts of a token
    # (`routing_table`). It keeps its shape, and names only experts that stay. None: the router has no table.
    table: str | None = None
    # The number of the expert in its mixture. None: the part is no expert, and has its tensors for itself.
    expert: int | None = None

    @property
    def changed_tensors(self) -> list[str]:
        """The names in the model of the tensors that become others if groups are removed.

        `self.tensors` become smaller, and entries of `self.table` change.
        """
        names = list(self.tensors)
        if self.table is not None:
            names.append(self.table)
        return names

    @property
    def mixture(self) -> str | None:
        """The name of the mixture of an expert, such as "model.layers.3.mlp.experts"; `None` if the part is no expert.

        The name of the expert's operator (`self.name`) is that of the mixture with a number and "down_proj".
        """
        if self.expert is None:
            return None
        return self.name.rsplit(".", 2)[0]

    @property
    def weight(self) -> str:
        """The name in the model of the tensor that loses columns; of a mixture, no tensor has this name.

        `self.name` is that of the operator. The matrix of an expert is in a tensor of its mixture (`self.mixture`):
        that of "model.layers.3.mlp.experts.5.down_proj" is in "model.layers.3.mlp.experts.down_proj".
        """
        if self.mixture is None:
            return f"{self.name}.weight"
        tensor = self.name.rpartition(".")[2]
        return f"{self.mixture}.{tensor}"

    @property
    def is_mixture(self) -> bool:
        """Tell whether the groups are experts, not columns."""
        return self.weight not in self.tensors

    def includes(self, name: str) -> bool:
        """Tell whether the tensor `name` belongs to the part.

        `name` is that of a parameter of the model, or of a tensor in its files that stands in the place of one: scales
        of the inputs of experts are no parameters, but are removed with the experts (`self.name` is their module).
        """
        if name in self.tensors or name == self.table:
            return True
        return name.startswith(f"{self.name}.") and self.is_mixture

    def kept_by(self, mask: Tensor) -> tuple[int, ...]:
        """Find the numbers of the groups of columns that a mask [out, in] keeps (True = kept), rising.

        The mask of the operator keeps or removes whole groups, each of `self.width` columns side by side.
        """
        by_group = mask.unflatten(1, (self.groups, self.width))  # [out, in] -> [out, groups, width]
        is_kept = by_group.any(2).any(0)
        return tuple(is_kept.nonzero()[:, 0].tolist())

    def shrink(self, name: str, tensor: Tensor, kept: Sequence[int]) -> Tensor:
        """Copy the tensor called `name`, one of this part, with only the groups `kept`, in this order.

        Of an expert, `tensor` is its own matrix in the tensor called `name`. `self.tensors` says, by the name of a
        tensor in the model, on which axis its groups are, and how often. The tensor called `self.table` keeps its
        shape: it names experts, and `kept` may say which ones replace the removed ones (`KeptExperts`). `self.groups`
        is the number of experts then.
        """
        if name == self.table:
            return repointed(tensor, self.groups, kept)
        axis, repeats = self.tensors[name]
        entries = self.entries(tensor.shape[axis], repeats, kept)
        return tensor.index_select(axis, entries.to(tensor.device))

    def entries(self, size: int, repeats: int, kept: Sequence[int]) -> Tensor:
        """Return the numbers of the entries that stay on an axis of `size` entries, int64, on the CPU.

        The axis has all groups of the part `repeats` times; `kept` are the numbers of the groups that stay, in the
        order that they get. After the experts of a mixture, which have one entry each, there may be further entries,
        all of which stay: a router may have rows for shared experts, for experts without weights, or for none.
        """
        if self.is_mixture:
            others = torch.arange(self.groups, size)
            return torch.cat([torch.tensor(kept, dtype=torch.int64), others])
        by_group = torch.arange(size).view(repeats, self.groups, -1)  # [repeats, groups, entries]
        return by_group[:, list(kept)].flatten()

    def without_columns(self, tensor: Tensor, kept: Sequence[int]) -> Tensor:
        """Copy the weight of the part's operator, as it is stored, with zeros in the columns of all groups but `kept`.

        `tensor` is [out, in] or [in, out]; `self.tensors` says which axis has the columns. The columns of a group are
        side by side, so the axis is divided into groups.
        """
        axis = self.tensors[self.weight].axis
        removed = sorted(set(range(self.groups)).difference(kept))
        indices = torch.tensor(removed, dtype=torch.int64, device=tensor.device)
        by_group = tensor.unflatten(axis, (self.groups, -1))
        return by_group.index_fill(axis, indices, 0).flatten(axis, axis + 1)


@dataclass(frozen=True)
class Parts:
    """All parts of one kind, and how a configuration states their number."""

    kind: Kind
    # What the configuration calls the number, with its value. None: the configuration leaves it to the model.
    words: Mapping[str, int | None]
    # Of each part; 0 as long as they have to be counted in columns. Of expert_channels, those of an expert: a shared
    # expert has a multiple of them if the configuration states how many experts wide it is.
    groups: int = 0
    constants: Mapping[str, int] = field(default_factory=dict)  # further settings to state
    num_router_groups: int = 1  # as in `Part`
    at_least: int = 1  # groups: a mixture needs as many experts as a token is sent to
    # In the order of the decoder layers, of which each may have several or none.
    parts: tuple[Part, ...] = ()

    def sizes(self, count: int) -> dict[str, int]:
        """Return the settings of a configuration in which every part has `count` groups, by their words.

        `self.words` has the present numbers, for parts of `self.groups` groups, such as {"num_attention_heads": 8}.
        `self.constants` are settings that are stated besides, whatever `count` is.
        """
        numbers = dict[str, int]()
        for word, value in self.words.items():
            # `None` and 0 leave the number to the model, which then has one for each group
            present = value if value else self.groups
            # With two query heads for each key-value head, for instance, there are 2 * count query heads.
            numbers[word] = count * present // self.groups
        return numbers | dict(self.constants)

    def num_kept(self, part: Part, count: int) -> int:
        """How many groups a part keeps if `count` of `self.groups` stay."""
        return count * part.groups // self.groups

    def scaled_overrides(self, overrides: Overrides | None, count: int) -> Overrides | None:
        """Copy the overrides of single decoder layers, with the numbers for `count` groups in every part.

        Overrides are settings by the number of the layer, such as {5: {"num_attention_heads": 4}}. `self.words` names
        the settings that change. `None` (there are no overrides) stays `None`.
        """
        if overrides is None:
            return None
        return scaled(overrides, self.words, new_groups=count, old_groups=self.groups)


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


@dataclass(frozen=True)
class RemovedParts:
    """How many parts of one kind a run removes: of every decoder layer, or how many decoder layers."""

    share: PartShare  # that was asked for
    number: int  # of all
    kept: int

    def __str__(self) -> str:
        """Write it for people, such as `1 of 3 heads of every decoder layer (33.33%; asked for: 34%)`.

        There `self.number` is 3, `self.kept` is 2, and `self.share` is what was asked for: 0.34 of the heads. If the
        user asked for a divisor of the number of experts that stay, that number is named, too.
        """
        if self.share.kind == "layers":
            kind = "decoder layers"
            place = ""  # they are no parts of a decoder layer
        elif self.share.kind == "expert_channels":
            kind = "channels"
            place = " of every expert"
        else:
            kind = self.share.kind
            place = " of every decoder layer"
        asked = f"; asked for: {100 * self.share.share:g}%" if self.is_rounded else ""
        if self.share.divisible_by is not None:
            asked += f"; {self.kept} stay, a multiple of {self.share.divisible_by}"
        removed = self.number - self.kept
        return f"{removed} of {self.number} {kind}{place} ({removed / self.number:.2%}{asked})"

    @property
    def is_rounded(self) -> bool:
        """Tell whether not exactly the share that was asked for is removed."""
        return not math.isclose(1 - self.kept / self.number, self.share.share, rel_tol=1e-9)

    @property
    def pattern(self) -> str:
        """The pattern with the share that is really removed, such as `heads:0.33`; `self.share` was asked for."""
        if not self.is_rounded:
            return str(self.share)
        asked = self.share
        return str(PartShare.keeping(asked.kind, self.kept, self.number, asked.multiple_of))


def removed_parts(outline: ModelOutline, pattern: WholeParts) -> list[RemovedParts]:
    """Count the parts that a pattern removes from the model of `outline`, in the order of the pattern.

    `pattern` has a share for each kind, such as a quarter of the heads. The outline keeps the parts that it finds.
    Nothing is removed yet.

    Raises:
        ValueError: If the model can't lose such parts, or no whole number of them is near enough to a share.
    """
    removed = list[RemovedParts]()
    for share in pattern.shares:
        if share.kind == "layers":
            number = len(outline.layers)
            kept = share.num_kept(number)
        else:
            parts = outline.parts(share.kind)
            number = parts.groups
            # Raises ValueError. Equally many experts stay in each group of a router, and at least as many as a token is
            # sent to.
            kept = share.num_kept(number, parts.num_router_groups, parts.at_least)
        removed.append(RemovedParts(share, number, kept))
    return removed


def kept_by_kind(removed: Iterable[RemovedParts]) -> dict[Kind, int]:
    """How many channels, heads and experts every decoder layer keeps, and how many channels every expert, by kind.

    `removed` has an entry for each kind that loses some. That of decoder layers is left out.
    """
    counts = dict[Kind, int]()
    for parts in removed:
        kind = parts.share.kind
        if kind != "layers":
            counts[kind] = parts.kept
    return counts


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
    use it. `config` is only read. Raises UnsupportedArchitectureError if decoder layers have different numbers of
    channels or experts.
    """
    # A setting that some layer overrides can't be read from `config`, but from this copy.
    common = without_overrides(config)
    if not hasattr(common, word):
        return None
    value = getattr(common, word)
    if isinstance(value, list):
        if len(set(value)) != 1:
            return None
        value = value[0]  # the same in every decoder layer
    if kind == "heads":
        return _stated_heads(config, word, value) if value else None

    if overrides_of(config) is not None:
        different_values = sorted(set(values_by_layer(config, word)))
        if len(different_values) > 1:
            numbers = ", ".join(map(str, different_values))
            raise UnsupportedArchitectureError(f"{word} differs between decoder layers ({numbers})")
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
        # Of how many groups the router chooses experts for a token. Each of these must have its share of the experts
        # that the token is sent to.
        chosen_groups = getattr(config, "topk_group", None) or router_groups
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
    return getattr(config, "n_group", None) or getattr(config, "num_expert_group", None) or 1


def _with_parts(outline: ModelOutline, stated: Parts) -> Parts:
    """Find the parts of one kind in all decoder layers, and return a copy of `stated` that has them.

    A part is made of tensors that become smaller if the numbers in the configuration do. Refuses a model in which other
    tensors become smaller, too, or in which parts differ in their number of groups. The messages continue a sentence
    such as "LlamaForCausalLM can't lose heads: " (`_find_parts`).

    `outline` builds its copy without weights if it has none yet. `stated` has what the configuration says of one kind,
    and no parts yet (`_stated_number`).
    """
    # The axis on which a tensor becomes smaller, by its name; and the smaller settings, as text for messages.
    axes, small_shapes, smaller_settings = _shrinking_axes(outline, stated)

    parts = list[Part]()
    for layer_name, _ in outline.layers:
        # with a dot: "model.layers.1." is no beginning of "model.layers.10"
        prefix = f"{layer_name}."
        if stated.kind == "experts":
            parts += _mixtures(outline, prefix, axes, small_shapes, stated)
        elif stated.kind == "expert_channels":
            experts = list(_experts(outline, prefix, axes))
            of_experts = {name for part in experts for name in part.tensors}
            # MLPs whose size follows from the same number, such as shared experts
            others = {name: axis for name, axis in axes.items() if name not in of_experts}
            parts += [*experts, *_operators(outline, prefix, others, stated)]
        else:
            parts += _operators(outline, prefix, axes, stated)

    tensors_of_parts = {name for part in parts for name in part.tensors}
    unexpected = axes.keys() - tensors_of_parts
    if unexpected:
        raise UnsupportedArchitectureError(
            f"{min(unexpected)} changes as well with {smaller_settings}"
        )
    if not parts:
        raise UnsupportedArchitectureError(
            f"no tensor of a decoder layer changes with {smaller_settings}"
        )
    first = parts[0]
    if stated.kind == "expert_channels":
        experts = [part for part in parts if part.expert is not None]
        if not experts:
            raise UnsupportedArchitectureError(
                f"no matrix of an expert changes with {smaller_settings}"
            )
        first = experts[0]
    for part in parts:
        is_several_experts_wide = stated.kind == "expert_channels" and part.expert is None
        size = first.groups
        if is_several_experts_wide and part.groups % first.groups == 0:
            size = part.groups
        if part.groups != size:  # one word of the configuration can't state two sizes
            raise UnsupportedArchitectureError(
                f"{first.name} has {first.groups} {stated.kind}, and {part.name} has {part.groups}"
            )
    return replace(stated, groups=first.groups, parts=tuple(parts))


def _shrinking_axes(
    outline: ModelOutline, stated: Parts
) -> tuple[dict[str, int], dict[str, tuple[int, ...]], str]:
    """Build an outline with fewer groups in every part, and find the tensors that are smaller in it.

    `outline` is that of the model as it is; it builds its copy without weights if it has none yet. `stated` has the
    numbers of the configuration by their words, such as {"intermediate_size": 64} (`_stated_number`). Returns the axis
    that is smaller, by the name of the tensor; the shapes of all tensors of the smaller outline; and its settings, as
    text for messages.

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
        differing = [
            axis
            for axis, (size, small_size) in enumerate(zip(shape, small_shape, strict=False))
            if size != small_size
        ]
        has_as_many_axes = len(small_shape) == len(shape)
        # if one size differs, the comparison of tuples is that of this size
        one_axis_shrinks = has_as_many_axes and len(differing) == 1 and small_shape < shape
        if not one_axis_shrinks or name not in stored:
            raise UnsupportedArchitectureError(
                f"{name} of shape {shape} would have shape {small_shape} with {as_text(fewer)}"
            )
        axes[name] = differing[0]
    return axes, small_shapes, as_text(fewer)


def _operators(
    outline: ModelOutline, prefix: str, axes: Mapping[str, int], stated: Parts
) -> Iterator[Part]:
    """Find the parts of a decoder layer that are columns of a linear operator. Changes nothing.

    Args:
        outline: Of the model.
        prefix: The name of the layer with a dot, such as "model.layers.3.".
        axes: The axis on which a tensor becomes smaller, by its name (`_shrinking_axes`).
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
    if len(feeders) < least_feeders:
        raise UnsupportedArchitectureError(
            f"beside {operator} there is {' and '.join(feeders) or 'no projection'}, in which rows of one group can't "
            "be told"
        )

    tensors = dict[str, GroupAxis]()
    for tensor in (weight, *rows):
        # a vector of a module that contains the operator, such as attention sinks: one entry for each head
        is_vector_of_operator = len(tensor.shape) == 1 and operator.startswith(f"{tensor.owner}.")
        is_expected = tensor.is_linear or is_vector_of_operator
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
        axes: The axis on which a tensor becomes smaller, by its name (`_shrinking_axes`).
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


def _mixtures(
    outline: ModelOutline,
    prefix: str,
    axes: Mapping[str, int],
    small_shapes: Mapping[str, tuple[int, ...]],
    stated: Parts,
) -> Iterator[Part]:
    """Find the mixture of a decoder layer: tensors with an entry for each expert on one axis.

    Yields one part, or none if the layer has no mixture. Raises UnsupportedArchitectureError if the layer has a mixture
    of another form.

    Args:
        outline: Of the model; only read.
        prefix: The name of the layer with a dot, such as "model.layers.3.".
        axes: The axis on which a tensor becomes smaller, by its name (`_shrinking_axes`).
        small_shapes: Shapes of all tensors in the outline with half of the experts, by name.
        stated: The number of experts (`groups`) and of groups of the router, without any part yet (`_stated_number`).
    """
    tensors = {
        name: tensor
        for name, tensor in outline.dense.state_dict().items()
        if name.startswith(prefix)
    }
    shrinking = [name for name in tensors if name in axes]
    if not shrinking:
        return

    num_removed = stated.groups - stated.groups // 2  # in the smaller outline
    for name in shrinking:
        axis = axes[name]
        size = tensors[name].shape[axis]
        # There may be further entries besides those of experts.
        has_entry_for_each_expert = size - small_shapes[name][axis] == num_removed
        if not has_entry_for_each_expert or size < stated.groups:
            raise UnsupportedArchitectureError(
                f"{name} is not a mixture with one entry for each expert"
            )
    table = _routing_table(outline.text_config, tensors, shrinking)
    # names of modules that have the matrices of all experts in one tensor of three axes; a router has two
    fused = {name.rpartition(".")[0] for name in shrinking if tensors[name].ndim == 3}
    if not fused:
        raise UnsupportedArchitectureError(
            f"{prefix.rstrip('.')} keeps its experts in another form than one 3-D parameter for a matrix of all of them"
        )
    if len(fused) > 1:
        names = ", ".join(name.removeprefix(prefix) for name in sorted(fused))
        raise UnsupportedArchitectureError(
            f"{prefix.rstrip('.')} keeps its experts in several modules ({names}), and experts can be removed only if "
            "one module has all their matrices"
        )
    (module_of_experts,) = fused
    yield Part(
        name=module_of_experts,
        groups=stated.groups,
        width=1,
        tensors={name: GroupAxis(axes[name], repeats=1) for name in shrinking},
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
