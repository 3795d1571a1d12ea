"""What a model can lose as a whole: channels of its MLPs, heads of its attention, experts of its mixtures.

No family is known by name. A model is built without weights from its configuration, as it is and with a smaller
number. The tensors whose shapes differ are those that shrink. If others differ as well, the model is refused.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from optimum_fista.model import UnsupportedArchitectureError
from optimum_fista.model.architecture import find_decoder_layers
from optimum_fista.model.offload import describe_ties
from optimum_fista.model.operator import LINEAR, LinearOperator
from optimum_fista.solve.patterns import WholeParts

Kind = Literal["channels", "heads", "experts"]

# What configurations call these numbers. Of several words, the first that changes the right shapes is used.
_WORDS: dict[Kind, tuple[str, ...]] = {
    "channels": ("intermediate_size", "n_inner", "ffn_dim", "decoder_ffn_dim", "ffn_hidden_size", "d_ff"),
    "heads": ("num_attention_heads",),
    "experts": ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"),
}


@dataclass(frozen=True)
class Part:
    """Groups of columns of a linear operator that can go, together with the rows that compute their inputs.

    Attributes:
        name: Name of the operator, such as `model.layers.0.mlp.down_proj`. The groups of a mixture are its experts;
            they are not columns, and the name is that of the module that holds their matrices.
        groups: Number of groups.
        width: Columns of a group: 1 for channels; for heads, the columns of the query heads of one key-value head.
        tensors: Names of the tensors that shrink, each with the axis of the groups, and how often all groups follow one
            another on it: twice if a gate and an up projection are one matrix, else once.
        equal_runs: The groups form this many runs of equal length, of which each must keep the same number of groups
            (experts whose router chooses runs first).
    """

    name: str
    groups: int
    width: int
    tensors: Mapping[str, tuple[int, int]]
    equal_runs: int = 1

    @property
    def is_mixture(self) -> bool:
        """Whether the groups are experts, and no columns."""
        return f"{self.name}.weight" not in self.tensors

    def kept_by(self, mask: Tensor) -> tuple[int, ...]:
        """The groups that a mask [out, in] of the operator keeps (True = kept)."""
        by_group = mask.unflatten(1, (self.groups, self.width)).movedim(1, 0).flatten(1)
        kept, partly = by_group.all(1), by_group.any(1)
        if not torch.equal(kept, partly):
            first = int((kept != partly).nonzero()[0]) * self.width
            raise ValueError(
                f"the mask of {self.name} keeps a part of columns {first} to {first + self.width - 1}: they are one "
                "group, so keep all of their weights or none."
            )
        return tuple(kept.nonzero()[:, 0].tolist())

    def require_kept(self, kept: Sequence[int], count: int) -> None:
        """Refuse groups to keep that are not `count` different groups in rising order, equally many of every run."""
        groups = [int(group) for group in kept]
        rising = groups == sorted(set(groups)) and all(0 <= group < self.groups for group in groups)
        length = self.groups // self.equal_runs
        by_run = {sum(group // length == run for group in groups) for run in range(self.equal_runs)}
        if not rising or len(groups) != count or len(by_run) > 1:
            runs = f", equally many of every {length} in a row" if self.equal_runs > 1 else ""
            raise ValueError(
                f"kept[{self.name!r}] is {as_text(groups)} ({len(groups)} of {self.groups}): pass {count} different "
                f"numbers from 0 to {self.groups - 1} in rising order{runs}."
            )

    def shrink(self, name: str, tensor: Tensor, kept: Sequence[int]) -> Tensor:
        """A copy of one of `tensors` that holds only the groups `kept`."""
        axis, repeats = self.tensors[name]
        entries = torch.arange(tensor.shape[axis]).view(repeats, self.groups, -1)[:, list(kept)].flatten()
        return tensor.index_select(axis, entries.to(tensor.device))

    def shrunk_shape(self, name: str, shape: tuple[int, ...], count: int) -> tuple[int, ...]:
        """The shape of one of `tensors` that holds `count` groups."""
        axis, _ = self.tensors[name]
        return (*shape[:axis], shape[axis] // self.groups * count, *shape[axis + 1 :])

    def without_columns(self, tensor: Tensor, kept: Sequence[int]) -> Tensor:
        """A copy of the operator's weight, as stored, with zeros in the columns of all groups but `kept`."""
        axis, _ = self.tensors[f"{self.name}.weight"]
        gone = sorted(set(range(self.groups)).difference(int(group) for group in kept))
        index = torch.tensor(gone, dtype=torch.int64, device=tensor.device)
        return tensor.unflatten(axis, (self.groups, -1)).index_fill(axis, index, 0).flatten(axis, axis + 1)


@dataclass(frozen=True)
class Parts:
    """All parts of one kind.

    Attributes:
        groups: Groups of each part: channels, key-value heads or experts.
        parts: In the order of the decoder layers. A layer may have several parts or none.
        settings: The configuration's words for the number of groups, and what each says for one group.
        constants: What the configuration has to say besides.
        at_least: The smallest number of groups that works. A mixture needs as many experts as a token is sent to.
    """

    kind: Kind
    groups: int
    parts: tuple[Part, ...]
    settings: Mapping[str, Fraction]
    constants: Mapping[str, int]
    at_least: int = 1

    def sizes(self, count: int) -> dict[str, int]:
        """What a configuration says if every part keeps `count` groups."""
        divisors = [self.parts[0].equal_runs, *(one.denominator for one in self.settings.values())]
        if not self.at_least <= count <= self.groups or any(count % divisor for divisor in divisors):
            divisible = f" that is divisible by {max(divisors)}" if max(divisors) > 1 else ""
            raise ValueError(
                f"{self.kind}={count}: {self.parts[0].name} has {self.groups}; pass a number from {self.at_least} to "
                f"{self.groups}{divisible}."
            )
        return {word: int(one * count) for word, one in self.settings.items()} | dict(self.constants)


def numbers_kept(model: PreTrainedModel, pattern: WholeParts) -> dict[str, int]:
    """How many channels, heads and experts a decoder layer keeps, by kind; whole layers have no part in it."""
    counts: dict[str, int] = {}
    for share in pattern.shares:
        if share.kind == "layers":
            continue
        found = find_parts(model, share.kind)
        try:
            counts[share.kind] = share.num_kept(found.groups, found.parts[0].equal_runs, found.at_least)
        except ValueError as error:
            raise ValueError(f"{found.parts[0].name}: {error}") from None
    return counts


def find_parts(model: PreTrainedModel, kind: Kind) -> Parts:
    """Find what a model can lose.

    - `"channels"`: intermediate channels of plain MLPs. Columns of the down projection go, with the rows of the
      projections that compute their inputs.
    - `"heads"`: key-value heads with their query heads. Columns of the attention's output projection go, with rows of
      q, k and v.
    - `"experts"`: experts of mixtures, with their outputs of the router.

    Shapes do not tell in which order a matrix keeps its rows. Those of a head are taken to be together, and a gate and
    an up projection in one matrix to follow one another. `shrinking.require_same_outputs` proves it. The model may be
    on any device, meta included, and is not changed.
    """
    reasons = [f"{name} {why}" for name, why in find_decoder_layers(model).shared.items()][:1]
    for number in () if reasons else _numbers(model.config.get_text_config(decoder=True), kind):
        try:
            return _parts_by(model, number)
        except ValueError as error:
            reasons.append(str(error))
    reasons = reasons or [f"its configuration states no number of them (looked for {', '.join(_WORDS[kind])})"]
    reason = "; or ".join(dict.fromkeys(reasons))
    raise UnsupportedArchitectureError(f"{type(model).__name__} can't lose {kind}: {reason}.")


@dataclass(frozen=True)
class _Number:
    """A number of channels, heads or experts that a configuration states; the rest is as in `Part` and `Parts`.

    Attributes:
        words: What it is called, and its values. Without a value the model chooses it.
        groups: The number of groups. Without it there are as many as an operator has columns.
    """

    kind: Kind
    words: Mapping[str, int | None]
    groups: int | None = None
    constants: Mapping[str, int] = field(default_factory=dict)
    equal_runs: int = 1
    at_least: int = 1

    def fewer(self) -> dict[str, int]:
        """Other values to try: one key-value head, else half, which divide whatever the whole number divides.

        A word without a value gets one that no model would choose.
        """
        divisor = self.groups if self.kind == "heads" and self.groups else 2
        values = {word: value // divisor if value else 8 for word, value in self.words.items()}
        if self.groups == 1 or 0 in values.values():
            raise UnsupportedArchitectureError(f"there is a single one ({as_text(self.words)})")
        return values


def _numbers(config: PreTrainedConfig, kind: Kind) -> Iterator[_Number]:
    for word in _WORDS[kind]:
        value = getattr(config, word, None)
        if isinstance(value, list) and len(set(value)) == 1:
            value = value[0]  # the same in every decoder layer
        if not hasattr(config, word) or isinstance(value, list):
            continue
        if kind == "channels":
            yield _Number(kind, {word: value})
        elif kind == "heads" and value:
            groups = getattr(config, "num_key_value_heads", None) or value
            words = {word: value} | ({"num_key_value_heads": groups} if hasattr(config, "num_key_value_heads") else {})
            # stated from now on, because else it would be computed from the number of heads
            head_dim = getattr(config, "head_dim", None) or config.hidden_size // value
            yield _Number(kind, words, groups, {"head_dim": head_dim})
        elif kind == "experts" and value:
            runs = runs_of_experts(config)
            chosen = getattr(config, "topk_group", None) or runs
            top_k = getattr(config, "num_experts_per_tok", None) or getattr(config, "moe_topk", None) or 1
            # A router of runs compares them by the sum of their two best experts (DeepSeek-V3, arXiv 2412.19437).
            least = max(-(-top_k // chosen), 2) * runs if runs > 1 else top_k
            yield _Number(kind, {word: value}, value, equal_runs=runs, at_least=least)


def runs_of_experts(config: PreTrainedConfig) -> int:
    """How many runs of experts the router chooses among first; 1 if it does not."""
    return getattr(config, "n_group", None) or getattr(config, "num_expert_group", None) or 1


def _parts_by(model: PreTrainedModel, number: _Number) -> Parts:
    """The parts that become smaller if a number does."""
    fewer = number.fewer()
    dense, small = described_model(model, {}), described_model(model, {**fewer, **number.constants})
    axes = _smaller_axes(dense, small, as_text(fewer))
    find = _mixtures if number.kind == "experts" else _operators
    parts = [part for name, _ in find_decoder_layers(dense) for part in find(dense, f"{name}.", axes, number)]
    others = axes.keys() - {name for part in parts for name in part.tensors}
    if not parts or others:
        what = f"{min(others)} changes as well" if others else "no tensor of a decoder layer changes"
        raise UnsupportedArchitectureError(f"{what} with {as_text(fewer)}")
    groups = parts[0].groups
    for part in parts:
        if part.groups != groups:
            raise UnsupportedArchitectureError(f"{parts[0].name} has {groups} of them and {part.name} {part.groups}")
    settings = {word: Fraction(value or groups, groups) for word, value in number.words.items()}
    return Parts(number.kind, groups, tuple(parts), settings, number.constants, number.at_least)


def _smaller_axes(dense: PreTrainedModel, small: PreTrainedModel, stated: str) -> dict[str, int]:
    """The axis on which a tensor of the smaller model is smaller, for each that is."""
    axes, stored, after = {}, dense.state_dict().keys(), shapes_of(small)
    for name, shape in shapes_of(dense).items():
        now = after.get(name, ())
        differing = [axis for axis, sizes in enumerate(zip(shape, now, strict=False)) if sizes[0] != sizes[1]]
        if now == shape:
            continue
        if len(now) != len(shape) or len(differing) != 1 or not now < shape or name not in stored:
            raise UnsupportedArchitectureError(f"{name} of shape {shape} would have shape {now} with {stated}")
        axes[name] = differing[0]
    return axes


def _operators(dense: PreTrainedModel, prefix: str, axes: Mapping[str, int], number: _Number) -> Iterator[Part]:
    """The parts of a decoder layer that are columns of a linear operator."""
    shapes = {name: shape for name, shape in shapes_of(dense).items() if name in axes and name.startswith(prefix)}
    owners = {name: name.rpartition(".")[0] for name in shapes}
    modules = {name: dense.get_submodule(owner) for name, owner in owners.items()}
    linear = {
        name: LinearOperator(owners[name], module) for name, module in modules.items() if isinstance(module, LINEAR)
    }
    weights = [n for n, o in linear.items() if n.endswith(".weight") and axes[n] == (0 if o.transposed else 1)]
    for weight in weights:
        operator, columns = owners[weight], shapes[weight][axes[weight]]
        groups = number.groups or columns
        # The inputs come from the same module, unless there is one operator only: BERT's MLP has two modules.
        siblings = prefix if len(weights) == 1 else operator.rpartition(".")[0] + "."
        rows = [name for name in shapes if name not in weights and name.startswith(siblings)]
        feeders = [name for name in rows if name.endswith(".weight") and name in linear]
        if len(feeders) < (2 if number.kind == "heads" else 1):
            raise UnsupportedArchitectureError(
                f"beside {operator} there is {' and '.join(feeders) or 'no projection'}, in which rows of one group "
                "can't be told"
            )
        for name in (weight, *rows):
            own = len(shapes[name]) == 1 and operator.startswith(f"{owners[name]}.")  # such as attention sinks
            if (name not in linear and not own) or shapes[name][axes[name]] % groups:
                raise UnsupportedArchitectureError(
                    f"{name} ({type(modules[name]).__name__}) works on all inputs of {operator} together"
                )
        repeats = {name: shapes[name][axes[name]] // groups if number.kind == "channels" else 1 for name in rows}
        tensors = {weight: (axes[weight], 1)} | {name: (axes[name], repeats[name]) for name in rows}
        yield Part(operator, groups, columns // groups, tensors)


def _mixtures(dense: PreTrainedModel, prefix: str, axes: Mapping[str, int], number: _Number) -> Iterator[Part]:
    """The mixture of a decoder layer: tensors with an entry for each expert on one axis."""
    tensors = {name: tensor for name, tensor in dense.state_dict().items() if name.startswith(prefix)}
    shrinking = [name for name in tensors if name in axes]
    fused = {name.rpartition(".")[0] for name in shrinking if tensors[name].ndim == 3}
    wrong = [name for name in shrinking if tensors[name].shape[axes[name]] != number.groups]
    wrong += [name for name, tensor in tensors.items() if shrinking and not tensor.is_floating_point()]
    if shrinking and (wrong or len(fused) != 1):
        raise UnsupportedArchitectureError(
            f"{wrong[0] if wrong else prefix.rstrip('.')} is not a mixture with one entry for each expert"
        )
    for name in fused:
        assert number.groups is not None
        yield Part(name, number.groups, 1, {each: (axes[each], 1) for each in shrinking}, number.equal_runs)


def changed_config(config: PreTrainedConfig, settings: Mapping[str, Any]) -> PreTrainedConfig:
    """A copy of a configuration with other settings of its text model. A number replaces all of a list."""
    changed = copy.deepcopy(config)
    text = changed.get_text_config(decoder=True)
    try:
        for word, value in settings.items():
            current = getattr(text, word, None)
            by_layer = isinstance(current, list) and not isinstance(value, list)
            setattr(text, word, [value] * len(current) if by_layer and current else value)
        written = changed.to_dict()
        read = type(config).from_dict(copy.deepcopy(written)).to_dict()
    except Exception as error:  # configurations check what they are given with errors of many kinds
        raise ValueError(f"{type(config).__name__} does not take {as_text(settings)}: {_one_line(error)}") from error
    for word in written if settings else ():
        if written[word] != read.get(word):
            raise ValueError(
                f"{type(config).__name__} does not take {as_text(settings)}: saved and read again, {word} is "
                f"{read.get(word)} instead of {written[word]}"
            )
    return changed


def described_model(model: PreTrainedModel, settings: Mapping[str, Any]) -> PreTrainedModel:
    """The model without weights, on the meta device, that its configuration describes with other settings."""
    config = changed_config(model.config, settings)
    describe_ties(model, config)
    try:
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            return type(model)(config)
    except Exception as error:  # models check their configurations with errors of many kinds
        raise ValueError(f"{type(model).__name__} does not take {as_text(settings)}: {_one_line(error)}") from error


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors that a model stores, and of the tables that it computes when it is built."""
    return {name: tuple(tensor.shape) for name, tensor in (model.state_dict() | dict(model.named_buffers())).items()}


def as_text(values: Sequence[int] | Mapping[str, Any]) -> str:
    """Numbers or settings for a message, the first six of them."""
    found = (
        [f"{word}={value}" for word, value in values.items()] if isinstance(values, Mapping) else [*map(str, values)]
    )
    shown = ", ".join([*found[:6], *(["..."] if len(found) > 6 else [])])
    return shown if isinstance(values, Mapping) else f"[{shown}]"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).removesuffix(".")
