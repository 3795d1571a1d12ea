"""Smaller models: a plan that is proved on shapes, then single tensors (for files) or whole models (in memory).

A changed configuration describes the smaller model, so that plain Transformers loads it without extra code; every
decoder layer keeps the same number of parts of one kind. Shapes do not prove that the smaller model computes the same;
`require_same_outputs` does.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from optimum_fista.model import UnsupportedArchitectureError
from optimum_fista.model.layers import find_decoder_layers
from optimum_fista.model.offload import alignment_hooks
from optimum_fista.removal.parts import Kind, Part, described_model, find_parts, shapes_of

# Settings of decoder layers in configurations: their number, how many at the start are of another kind, lists.
_NUM_LAYERS = ("num_hidden_layers", "decoder_layers")
_FIRST_LAYERS = ("first_k_dense_replace", "num_dense_layers")
_LAYER_NUMBERS = ("mlp_only_layers", "attn_layer_indices", "full_attn_idxs", "hybrid_layer_ids")


@dataclass(frozen=True)
class Shrinking:
    """A plan of how a model becomes a smaller one, proved on shapes. It leaves open which groups of a part stay."""

    model: PreTrainedModel  # the smaller one, on the meta device, with the configurations to save
    parts: Mapping[str, Part]  # those that shrink, by name, without those of removed decoder layers
    counts: Mapping[str, int]  # how many groups each of them keeps
    layers: tuple[int, ...]  # numbers of the decoder layers that stay, rising
    layers_name: str  # of the list of decoder layers
    # Sizes and numbers of layers that modules keep as attributes, as they are in the smaller model: by the name of the
    # module in the model, then of the attribute.
    attributes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def new_name(self, name: str) -> str | None:
        """The smaller model's name of a module or tensor; `None` if its decoder layer is removed."""
        if not name.startswith(f"{self.layers_name}."):
            return name
        number, dot, rest = name.removeprefix(f"{self.layers_name}.").partition(".")
        new = {str(old): new for new, old in enumerate(self.layers)}.get(number)
        return None if new is None else f"{self.layers_name}.{new}{dot}{rest}"

    def part_of(self, name: str) -> Part | None:
        """The part that a tensor belongs to."""
        return next((part for part in self.parts.values() if name in part.tensors), None)

    def reasons_left_dense(self, names: Iterable[str]) -> dict[str, str]:
        """Reasons why operators are not pruned, without those of removed decoder layers."""
        reasons = dict[str, str]()
        for name in names:
            part = self.part_of(f"{name}.weight") or self.parts.get(name)
            if part is None:
                reasons[name] = "no part of the pattern"
            elif part.is_mixture:
                reasons[name] = f"keeps {self.counts[part.name]} of {part.groups} experts"
            else:
                reasons[name] = f"loses the rows that {self.new_name(part.name)} no longer reads"
        return {name: reason for name, reason in reasons.items() if self.new_name(name) is not None}

    def shrink_tensor(self, name: str, tensor: Tensor, kept: Mapping[str, Sequence[int]]) -> Tensor:
        """Return a tensor in its smaller form, with the groups `kept` of its part; unchanged if it loses nothing."""
        part = self.part_of(name)
        return tensor if part is None else part.shrink(name, tensor, kept[part.name])


def plan_shrinking(
    model: PreTrainedModel, *, layers: Sequence[int] | None = None, **numbers: int
) -> Shrinking:
    """Plan a smaller model from the numbers of parts that each decoder layer keeps, by kind, and the `layers` left.

    The smaller model is built, without weights, from the changed configuration. Every tensor must have the shape that
    shrinking gives it. Modules may differ from those of the model in sizes and in the numbers of their decoder layers,
    but not in windows, scales or kinds. The model may be on any device, meta included, and is not changed.
    """
    decoder_layers = find_decoder_layers(model)
    total, prefix = len(decoder_layers), decoder_layers.name
    stay = tuple(range(total) if layers is None else layers)
    for name, why in decoder_layers.shared.items():
        raise UnsupportedArchitectureError(
            f"{type(model).__name__} can't be made smaller: {name} {why}."
        )
    dense = described_model(model, {})
    described = shapes_of(dense)
    for name, tensor in _tensors(model):
        if tuple(tensor.shape) != described.get(name):
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, but {type(model.config).__name__} describes "
                f"{described.get(name, 'no such tensor')}: pass a model as from_pretrained loads it."
            )
    gone = tuple(f"{prefix}.{number}." for number in range(total) if number not in stay)
    sizes, parts, counts = dict[str, Any](), dict[str, Part](), dict[str, int]()
    for kind, count in numbers.items():
        found = find_parts(model, cast(Kind, kind))
        sizes |= found.sizes(count)
        left = {part.name: part for part in found.parts if not part.name.startswith(gone)}
        parts |= left
        counts |= dict.fromkeys(left, count)
    reasons = []
    for fewer_layers in _layer_settings(model.config.get_text_config(decoder=True), stay, total):
        try:
            small = described_model(model, sizes | fewer_layers)
            plan = Shrinking(small, parts, counts, stay, prefix)
            plan = replace(plan, attributes=_changed_attributes(dense, plan, total))
            _require_described(dense, plan)
            small.generation_config = copy.deepcopy(model.generation_config)
            return plan
        except ValueError as error:
            reasons.append(str(error))
    wanted = ", ".join(
        [*(f"{kind}={count}" for kind, count in numbers.items()), f"{len(stay)} decoder layers"]
    )
    why = f"no configuration describes {type(model).__name__} with {wanted}: {'; or '.join(dict.fromkeys(reasons))}"
    raise ValueError(f"{why}. Pass other numbers, or use another pattern.")


def plan_shrinkings(
    model: PreTrainedModel, counts: Mapping[str, int], layers: Sequence[int] | None = None
) -> tuple[Shrinking, Shrinking]:
    """Plan a model whose decoder layers keep these numbers of parts, and the same model with all experts."""
    smaller = plan_shrinking(model, layers=layers, **counts)
    if "experts" not in counts:
        return smaller, smaller
    others = {kind: count for kind, count in counts.items() if kind != "experts"}
    return smaller, plan_shrinking(model, layers=layers, **others)


def shrink_model(
    model: PreTrainedModel, plan: Shrinking, kept: Mapping[str, Sequence[int]]
) -> None:
    """Make a model in memory smaller, in place, with the groups `kept` of each part.

    Modules and parameters stay the same objects, with their devices, modes and hooks. Tensors that lose nothing keep
    their memory; those that shrink lose their gradients. `model.config` becomes another object.
    """
    for name, tensor in _tensors(model):
        if plan.part_of(name) is not None:
            tensor.data = plan.shrink_tensor(name, tensor.data, kept)
            tensor.grad = None
    _describe(model, "", plan)
    layers: Any = model.get_submodule(plan.layers_name)
    for index in reversed(range(len(layers))):
        if index not in plan.layers:
            del layers[index]
    whole: Any = model
    places = getattr(model, "hf_device_map", None)
    if places is not None:
        whole.hf_device_map = {
            new: place for name, place in places.items() if (new := plan.new_name(name)) is not None
        }


def smaller_copy(
    plan: Shrinking, name: str, module: nn.Module, kept: Mapping[str, Sequence[int]]
) -> nn.Module:
    """Copy a module without the removed groups; unchanged tensors are shared."""
    shrinking = [
        (full, tensor.detach())
        for full, tensor in _tensors(module, name)
        if plan.part_of(full) is not None
    ]
    small = _copied(
        module, name, {full: plan.shrink_tensor(full, tensor, kept) for full, tensor in shrinking}
    )
    _describe(small, name, plan)
    return small


def require_same_outputs(
    plan: Shrinking,
    name: str,
    module: nn.Module,
    kept: Mapping[str, Sequence[int]],
    run: Callable[[nn.Module], Tensor],
) -> None:
    """Prove that a module returns the same without the removed groups as with zeros in their columns.

    Shapes don't show whether rows are in another order, or whether something depends on the number of the decoder layer
    or on all channels or heads together (a norm without weights, slopes computed from the number of heads). This test
    does, for a decoder layer or a whole model (name "") in memory that loses no experts.
    """
    zeroed: dict[str, Tensor] = {}
    for full, tensor in _tensors(module, name):
        part = plan.part_of(full)
        if part is not None and full == f"{part.name}.weight":
            zeroed[full] = part.without_columns(tensor.detach(), kept[part.name])
    small, shown = smaller_copy(plan, name, module, kept), name or type(module).__name__
    with torch.no_grad():
        expected = run(_copied(module, name, zeroed))
        try:
            found = run(small)
        except RuntimeError as error:
            raise UnsupportedArchitectureError(
                f"{shown} does not run without the removed groups: {error}"
            ) from error
    difference = difference_beyond_rounding(found, expected)
    if difference is not None:
        raise UnsupportedArchitectureError(
            f"{shown} does not return the same without the removed groups as with zeros in their columns (relative "
            f"difference {difference:.1e}): something in it depends on all groups together or on the number of "
            "the decoder layer, or its rows are in another order. Use another pattern for this model."
        )


def difference_beyond_rounding(found: Tensor, expected: Tensor) -> float | None:
    """The relative difference of hidden states [batch, tokens, hidden]; `None` if rounding explains it."""
    # token by token: the hidden states of a few are a thousand times as large as those of others
    sizes = expected.float().norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
    difference = float(
        ((found.float() - expected.float()).norm(dim=-1) / sizes).square().mean().sqrt()
    )
    return None if difference <= min(100 * torch.finfo(expected.dtype).eps, 2e-2) else difference


def small_hidden_states(hidden_states: Tensor) -> Tensor:
    """Make hidden states small: in 16 bits, the rounding of large ones hides what attention and MLP add."""
    small = nn.functional.normalize(hidden_states.float(), dim=-1) * (
        0.01 * hidden_states.shape[-1] ** 0.5
    )
    return small.to(hidden_states.dtype)


def _layer_settings(
    config: PreTrainedConfig, stay: Sequence[int], total: int
) -> Iterator[dict[str, Any]]:
    """Try settings for fewer decoder layers: their number, and lists with an entry for each layer."""
    if len(stay) == total:
        yield {}
        return
    values: dict[str, Any] = {
        word: value for word, value in vars(config).items() if "token_id" not in word
    }
    lists = {word: value for word, value in values.items() if isinstance(value, list | tuple)}
    others: dict[str, Any] = {
        w: [stay.index(i) for i in lists[w] if i in stay] for w in _LAYER_NUMBERS if w in lists
    }
    others |= {
        w: sum(i < values[w] for i in stay) for w in _FIRST_LAYERS if type(values.get(w)) is int
    }
    for part_of_name in (
        "",
        "layer",
    ):  # a list of another meaning may have as many entries by chance
        by_layer = [
            word
            for word in lists
            if len(lists[word]) == total and part_of_name in word and word not in others
        ]
        settings = {word: [lists[word][i] for i in stay] for word in by_layer} | others
        for word in _NUM_LAYERS:
            if hasattr(config, word):
                yield settings | {word: len(stay)}


def _require_described(dense: PreTrainedModel, plan: Shrinking) -> None:
    """Compare the shrunk tensors with those of the smaller model."""
    left: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes_of(dense).items():
        new, part = plan.new_name(name), plan.part_of(name)
        if part is not None:
            tensor = torch.empty(shape, device="meta")
            shape = tuple(part.shrink(name, tensor, range(plan.counts[part.name])).shape)
        if new is not None:
            left[new] = shape
    described = shapes_of(plan.model)
    for name in left | described:
        if left.get(name) != described.get(name):
            raise ValueError(
                f"{name} keeps shape {left.get(name)}, but would have to have {described.get(name)}"
            )


def _changed_attributes(
    dense: PreTrainedModel, plan: Shrinking, total: int
) -> dict[str, dict[str, Any]]:
    """`Shrinking.attributes`: sizes that shrink as parts do, numbers of layers, lists with an entry for each."""
    others, stay = dict(plan.model.named_modules()), plan.layers
    ratios = {Fraction(plan.counts[name], part.groups) for name, part in plan.parts.items()}
    found: dict[str, dict[str, Any]] = {}
    for name, module in dense.named_modules():
        new = plan.new_name(name)
        if new is None:
            continue
        other = others.get(new)
        # Such as attention of another kind in every fourth layer. Parametrized modules have a class of their own each.
        if type(other).__qualname__ != type(module).__qualname__:
            raise ValueError(
                f"{name} ({type(module).__name__}) would become {type(other).__name__}"
            )
        for word, value in vars(module).items():
            now: Any = vars(other).get(word)
            plain = isinstance(value, bool | int | float | str | list | tuple | None)
            if word.startswith("_") or not plain or (type(now) is type(value) and now == value):
                continue
            if type(value) is int and type(now) is int:
                number = "layer" in word or "idx" in word
                fits = (number and value in stay and now == stay.index(value)) or (value, now) == (
                    total,
                    len(stay),
                )
                fits = fits or (value != 0 and Fraction(now, value) in ratios)
            else:  # a list with an entry for each layer
                fits = "layer" in word and type(value) is list and len(value) == total
                fits = fits and now == [value[i] for i in stay]
            if not fits:
                raise ValueError(
                    f"{name or type(module).__name__} would have {word}={now} instead of {value}"
                )
            found.setdefault(name, {})[word] = now
    return found


def _describe(module: nn.Module, name: str, plan: Shrinking) -> None:
    """Give a module and those in it the attributes and the configuration of the smaller model."""
    others = dict(plan.model.named_modules())
    for full, child in module.named_modules(prefix=name):
        new = plan.new_name(full)
        if new is not None:
            for word, value in plan.attributes.get(full, {}).items():
                setattr(child, word, copy.copy(value))
            if isinstance(getattr(child, "config", None), PreTrainedConfig):
                child.config = others[new].config


def _copied(module: nn.Module, name: str, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Copy a module; the copy shares its tensors, except for those that are given by their names in the model."""
    # The hooks of Accelerate are shared too: they hold the offloaded weights of the whole model.
    memo: dict[int, Any] = {
        id(hook): hook for child in module.modules() for hook in alignment_hooks(child)
    }
    # So are hooks of the user, except methods of modules inside: they may hold the whole model, or can't be copied.
    inside = [*module.modules()]
    for hooks in (
        found for child in inside for word, found in vars(child).items() if word.endswith("_hooks")
    ):
        memo |= {
            id(hook): hook
            for hook in hooks.values()
            if getattr(hook, "__self__", None) not in inside
        }
    for full, tensor in _tensors(module, name):
        other = tensors.get(full, tensor)
        is_new = isinstance(tensor, nn.Parameter) and other is not tensor
        memo[id(tensor)] = nn.Parameter(other, requires_grad=False) if is_new else other
    return copy.deepcopy(module, memo)


def _tensors(module: nn.Module, name: str = "") -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(name), *module.named_buffers(name)]
