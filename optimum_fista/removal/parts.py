"""Parts that a model can lose as a whole: channels of MLPs, heads of attention, experts of mixtures.

There is no list of families. A model is built without weights from its configuration, once as it is and once with
fewer parts. The tensors whose shapes differ are those that shrink. If unexpected ones differ, the model is refused. So
a new family needs no code. If a configuration does not state the number of parts, the model can't lose them.
"""

import copy
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from optimum_fista.model import UnsupportedArchitectureError
from optimum_fista.model.layers import find_decoder_layers
from optimum_fista.model.offload import describe_ties
from optimum_fista.model.operators import LINEAR
from optimum_fista.solve.patterns import WholeParts

Kind = Literal["channels", "heads", "experts"]

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
    "heads": ("num_attention_heads",),
    "experts": ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"),
}


@dataclass(frozen=True)
class Part:
    """Groups of columns of a linear operator that can be removed, with the rows that compute their inputs.

    The groups of a mixture are its experts, not columns, and `name` is that of the module that holds them.
    """

    name: str  # of the operator, such as model.layers.0.mlp.down_proj
    groups: int
    width: int  # columns of a group: 1 for channels; for heads, those of the query heads of one key-value head
    # Tensors that shrink, each with the axis of the groups and the number of times that all groups are on it: twice if
    # a gate and an up projection are one matrix.
    tensors: Mapping[str, tuple[int, int]]
    equal_runs: int = 1  # runs of equal length; each keeps equally many (for experts whose router chooses runs first)

    @property
    def is_mixture(self) -> bool:
        """Tell whether the groups are experts, not columns."""
        return f"{self.name}.weight" not in self.tensors

    def kept_by(self, mask: Tensor) -> tuple[int, ...]:
        """The groups that a mask [out, in] of whole groups keeps (True = kept)."""
        by_group = (
            mask.unflatten(1, (self.groups, self.width)).any(2).any(0)
        )  # [out, in] -> [groups]
        return tuple(by_group.nonzero()[:, 0].tolist())

    def shrink(self, name: str, tensor: Tensor, kept: Sequence[int]) -> Tensor:
        """Copy one of `tensors` with only the groups `kept`, in this order."""
        axis, repeats = self.tensors[name]
        return tensor.index_select(
            axis, self.entries(tensor.shape[axis], repeats, kept).to(tensor.device)
        )

    def entries(self, size: int, repeats: int, kept: Sequence[int]) -> Tensor:
        """Numbers of the entries that stay on an axis of `size` entries, with all groups on it `repeats` times."""
        # [repeats, groups, entries of a group] -> [entries that stay]
        return torch.arange(size).view(repeats, self.groups, -1)[:, list(kept)].flatten()

    def without_columns(self, tensor: Tensor, kept: Sequence[int]) -> Tensor:
        """Copy the operator's stored weight, with zeros in the columns of all groups except `kept`."""
        axis, _ = self.tensors[f"{self.name}.weight"]
        gone = torch.tensor(
            sorted({*range(self.groups)}.difference(kept)), dtype=torch.int64, device=tensor.device
        )
        return (
            tensor.unflatten(axis, (self.groups, -1))
            .index_fill(axis, gone, 0)
            .flatten(axis, axis + 1)
        )


@dataclass(frozen=True)
class Parts:
    """All parts of one kind, and how a configuration states their number."""

    kind: Kind
    words: Mapping[
        str, int | None
    ]  # what the number is called, with its values; None: the model chooses it
    groups: int = 0  # channels, key-value heads or experts of each part; 0 while it has to be counted in columns
    constants: Mapping[str, int] = field(
        default_factory=dict
    )  # further settings for the configuration
    equal_runs: int = 1  # as in `Part`
    at_least: int = 1  # a mixture needs as many experts as a token is sent to
    parts: tuple[
        Part, ...
    ] = ()  # in the order of the decoder layers, of which each may have several or none

    def sizes(self, count: int) -> dict[str, int]:
        """Settings of a configuration in which every part has `count` groups."""
        # For instance, with two query heads for each key-value head there are 2 * count query heads.
        stated = {
            word: count * (value or self.groups) // self.groups
            for word, value in self.words.items()
        }
        return stated | dict(self.constants)


def numbers_kept(model: PreTrainedModel, pattern: WholeParts) -> dict[str, int]:
    """Count the channels, heads and experts that a decoder layer keeps, by kind; others are counted elsewhere."""
    counts: dict[str, int] = {}
    for share in pattern.shares:
        if share.kind != "layers" and share.kind != "vocab":
            found = find_parts(model, share.kind)
            counts[share.kind] = share.num_kept(found.groups, found.equal_runs, found.at_least)
    return counts


def find_parts(model: PreTrainedModel, kind: Kind) -> Parts:
    """Find what a model can lose; it may be on any device, meta included, and is not changed.

    - `"channels"` of plain MLPs: columns of the down projection, with the rows that compute their inputs.
    - `"heads"`: key-value heads with their query heads: columns of the output projection, with rows of q, k and v.
    - `"experts"` of mixtures, with their outputs of the router.

    Shapes do not show the order of rows. The rows of a head are assumed to be together, and a gate and an up projection
    in one matrix to be one after the other. `shrinking.require_same_outputs` proves this.
    """
    reasons = [f"{name} {why}" for name, why in find_decoder_layers(model).shared.items()][:1]
    for stated in () if reasons else _stated(model.config.get_text_config(decoder=True), kind):
        try:
            return _parts_by(model, stated)
        except ValueError as error:
            reasons.append(str(error))
    reasons = reasons or [
        f"its configuration states no number of them (looked for {', '.join(_WORDS[kind])})"
    ]
    reason = "; or ".join(dict.fromkeys(reasons))
    raise UnsupportedArchitectureError(f"{type(model).__name__} can't lose {kind}: {reason}.")


def _stated(config: PreTrainedConfig, kind: Kind) -> Iterator[Parts]:
    """Numbers of channels, heads or experts that a configuration states; the parts themselves are not known yet."""
    for word in _WORDS[kind]:
        value = getattr(config, word, None)
        if isinstance(value, list) and len(set(value)) == 1:
            value = value[0]  # the same in every decoder layer
        if not hasattr(config, word) or isinstance(value, list):
            continue
        if kind == "channels":
            yield Parts(kind, {word: value})
        elif kind == "heads" and value:
            groups = getattr(config, "num_key_value_heads", None) or value
            words = {word: value} | (
                {"num_key_value_heads": groups} if hasattr(config, "num_key_value_heads") else {}
            )
            # stated from now on, because otherwise it would be computed from the number of heads
            head_dim = getattr(config, "head_dim", None) or config.hidden_size // value
            yield Parts(kind, words, groups, {"head_dim": head_dim})
        elif kind == "experts" and value:
            runs = runs_of_experts(config)
            chosen = getattr(config, "topk_group", None) or runs
            top_k = (
                getattr(config, "num_experts_per_tok", None)
                or getattr(config, "moe_topk", None)
                or 1
            )
            # A router of runs compares them by the sum of their two best experts (DeepSeek-V3, arXiv 2412.19437).
            least = max(-(-top_k // chosen), 2) * runs if runs > 1 else top_k
            yield Parts(kind, {word: value}, value, equal_runs=runs, at_least=least)


def runs_of_experts(config: PreTrainedConfig) -> int:
    """Count the runs of experts that the router chooses among first; 1 if it does not."""
    return getattr(config, "n_group", None) or getattr(config, "num_expert_group", None) or 1


def _parts_by(model: PreTrainedModel, stated: Parts) -> Parts:
    """Find the parts that become smaller if a stated number does."""
    # One key-value head, otherwise half: both divide whatever the whole number divides. No model would choose 8.
    divisor = stated.groups if stated.kind == "heads" else 2
    fewer = {word: value // divisor if value else 8 for word, value in stated.words.items()}
    if stated.groups == 1 or 0 in fewer.values():
        raise UnsupportedArchitectureError(f"there is a single one ({as_text(stated.words)})")
    dense, small = described_model(model, {}), described_model(model, {**fewer, **stated.constants})
    axes, stored, after = dict[str, int](), dense.state_dict().keys(), shapes_of(small)
    for name, shape in shapes_of(dense).items():
        now = after.get(name, ())
        differing = [
            axis for axis, sizes in enumerate(zip(shape, now, strict=False)) if sizes[0] != sizes[1]
        ]
        if now == shape:
            continue
        if len(now) != len(shape) or len(differing) != 1 or not now < shape or name not in stored:
            raise UnsupportedArchitectureError(
                f"{name} of shape {shape} would have shape {now} with {as_text(fewer)}"
            )
        axes[name] = differing[0]
    find = _mixtures if stated.kind == "experts" else _operators
    parts = [
        part
        for name, _ in find_decoder_layers(dense)
        for part in find(dense, f"{name}.", axes, stated)
    ]
    others = axes.keys() - {name for part in parts for name in part.tensors}
    if not parts or others:
        what = (
            f"{min(others)} changes as well" if others else "no tensor of a decoder layer changes"
        )
        raise UnsupportedArchitectureError(f"{what} with {as_text(fewer)}")
    groups = parts[0].groups
    for part in parts:
        if part.groups != groups:  # one word of the configuration can't state two sizes
            raise UnsupportedArchitectureError(
                f"{parts[0].name} has {groups} of them and {part.name} {part.groups}"
            )
    return replace(stated, groups=groups, parts=tuple(parts))


def _operators(
    dense: PreTrainedModel, prefix: str, axes: Mapping[str, int], stated: Parts
) -> Iterator[Part]:
    """The parts of a decoder layer that are columns of a linear operator."""
    shapes = {
        name: shape
        for name, shape in shapes_of(dense).items()
        if name in axes and name.startswith(prefix)
    }
    owners = {name: name.rpartition(".")[0] for name in shapes}
    modules = {name: dense.get_submodule(owner) for name, owner in owners.items()}
    linear = [name for name, module in modules.items() if isinstance(module, LINEAR)]
    # Weights whose columns shrink: on the second axis if stored as [out, in], on the first if stored as [in, out].
    weights = [
        n
        for n in linear
        if n.endswith(".weight") and axes[n] == (not isinstance(modules[n], Conv1D))
    ]
    for weight in weights:
        operator, columns = owners[weight], shapes[weight][axes[weight]]
        groups = stated.groups or columns
        # The inputs come from the same module, unless there is one operator only: BERT's MLP has two modules.
        siblings = prefix if len(weights) == 1 else operator.rpartition(".")[0] + "."
        rows = [name for name in shapes if name not in weights and name.startswith(siblings)]
        feeders = [name for name in rows if name.endswith(".weight") and name in linear]
        if len(feeders) < (2 if stated.kind == "heads" else 1):
            what = f"{' and '.join(feeders) or 'no projection'}, in which rows of one group can't be told"
            raise UnsupportedArchitectureError(f"beside {operator} there is {what}")
        for name in (weight, *rows):
            own = len(shapes[name]) == 1 and operator.startswith(
                f"{owners[name]}."
            )  # such as attention sinks
            if (name not in linear and not own) or shapes[name][axes[name]] % groups:
                what = f"{name} ({type(modules[name]).__name__})"
                raise UnsupportedArchitectureError(
                    f"{what} works on all inputs of {operator} together"
                )
        repeats = {
            name: shapes[name][axes[name]] // groups if stated.kind == "channels" else 1
            for name in rows
        }
        tensors = {weight: (axes[weight], 1)} | {name: (axes[name], repeats[name]) for name in rows}
        yield Part(operator, groups, columns // groups, tensors)


def _mixtures(
    dense: PreTrainedModel, prefix: str, axes: Mapping[str, int], stated: Parts
) -> Iterator[Part]:
    """The mixture of a decoder layer: tensors with an entry for each expert on one axis."""
    tensors = {
        name: tensor for name, tensor in dense.state_dict().items() if name.startswith(prefix)
    }
    shrinking = [name for name in tensors if name in axes]
    fused = {name.rpartition(".")[0] for name in shrinking if tensors[name].ndim == 3}
    wrong = [name for name in shrinking if tensors[name].shape[axes[name]] != stated.groups]
    wrong += [
        name for name, tensor in tensors.items() if shrinking and not tensor.is_floating_point()
    ]
    if shrinking and (wrong or len(fused) != 1):
        what = wrong[0] if wrong else prefix.rstrip(".")
        raise UnsupportedArchitectureError(
            f"{what} is not a mixture with one entry for each expert"
        )
    for name in fused:
        yield Part(
            name, stated.groups, 1, {each: (axes[each], 1) for each in shrinking}, stated.equal_runs
        )


def described_model(model: PreTrainedModel, settings: Mapping[str, Any]) -> PreTrainedModel:
    """Build, on the meta device, the model that its configuration describes with other settings (of its text model).

    A number replaces a whole list. Settings that the configuration would lose when saved and read again are refused.
    """
    config = copy.deepcopy(model.config)
    text = config.get_text_config(decoder=True)
    try:
        for word, value in settings.items():
            current = getattr(text, word, None)
            by_layer = isinstance(current, list) and not isinstance(value, list)
            setattr(text, word, [value] * len(current) if by_layer and current else value)
        written = config.to_dict()
        read = type(config).from_dict(copy.deepcopy(written)).to_dict()
        for word in written if settings else ():
            if written[word] != read.get(word):
                raise ValueError(
                    f"saved and read again, {word} is {read.get(word)} instead of {written[word]}"
                )
        describe_ties(model, config)
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            return type(model)(config)
    except (
        Exception
    ) as error:  # configurations and models check what they are given with errors of many kinds
        reason = " ".join(str(error).split()).removesuffix(".")
        raise ValueError(
            f"{type(model).__name__} does not take {as_text(settings)}: {reason}"
        ) from error


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors that a model stores, and of tables that it computes when it is built."""
    return {
        name: tuple(tensor.shape)
        for name, tensor in (model.state_dict() | dict(model.named_buffers())).items()
    }


def as_text(settings: Mapping[str, Any]) -> str:
    """Write settings for a message; long lists are shortened."""
    return ", ".join(f"{word}={reprlib.repr(value)}" for word, value in settings.items())
