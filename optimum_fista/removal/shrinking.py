"""Plans of smaller models, proved on shapes.

A `Shrinking` says which tensors of a model become smaller, which decoder layers stay under which new names, and which
configuration describes the result, so that plain Transformers loads it without extra code. A *part* (`parts.Part`)
belongs to one decoder layer, and consists of *groups* that can be removed one by one: channels of its MLP or of one of
its experts, heads of its attention, or experts of its mixture. These are the *kinds*. Every part of one kind keeps the
same share of its groups. The plan leaves open *which* of them stay: a run finds that out later, and passes it as
`kept`, the numbers of the groups that stay, by the name of the part, such as `model.layers.0.mlp.down_proj`.

An *outline* (`model_outline.ModelOutline`) has the model that is to become smaller, and a copy of it without weights
(`outline.dense`). *Overrides* are settings of single decoder layers in a configuration (`layer_overrides`).

`plan_shrinking` makes a plan. `smaller_modules` makes modules in memory smaller by it, and `proof` proves that a
smaller module computes the same, which shapes do not show.
"""

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from optimum_fista.model import UnsupportedArchitectureError
from optimum_fista.removal.layer_overrides import Overrides, overrides_of, renumbered
from optimum_fista.removal.model_outline import ModelOutline
from optimum_fista.removal.outline import described_model, shapes_of
from optimum_fista.removal.parts import Kind, Part

# Settings of configurations: the number of decoder layers,
_NUM_LAYERS = ("num_hidden_layers", "decoder_layers")
# how many layers at the start are of another kind,
_FIRST_LAYERS = ("first_k_dense_replace", "num_dense_layers")
# and lists of numbers of layers.
_LAYER_NUMBERS = ("mlp_only_layers", "attn_layer_indices", "full_attn_idxs", "hybrid_layer_ids")

# Numbers of the groups that stay, by the name of their part; for a mixture with a routing table they are `KeptExperts`.
Kept = Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class Shrinking:
    """A plan of how a model becomes a smaller one, proved on shapes. It leaves open which groups of a part stay."""

    model: PreTrainedModel  # the smaller one, on the meta device, with the configurations to save
    parts: Mapping[str, Part]  # those that shrink, by name, without those of removed decoder layers
    num_kept: Mapping[str, int]  # how many groups each of them keeps, by the name of the part
    layers: tuple[int, ...]  # numbers of the decoder layers that stay, rising
    layers_name: str  # of the list of decoder layers, such as model.layers
    # Sizes and numbers of layers that modules keep as attributes, as they are in the smaller model: by the name of the
    # module in the model, then of the attribute.
    attributes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def new_name(self, name: str) -> str | None:
        """The smaller model's name of a module or tensor of the model; `None` if its decoder layer is removed.

        Without the first decoder layer, "model.layers.3.mlp" becomes "model.layers.2.mlp". `self.layers_name` is
        "model.layers" there, and `self.layers` has the numbers of the layers that stay.
        """
        if not name.startswith(f"{self.layers_name}."):
            return name
        number, dot, rest = name.removeprefix(f"{self.layers_name}.").partition(".")
        new_numbers = {str(old): new for new, old in enumerate(self.layers)}
        if number not in new_numbers:
            return None
        return f"{self.layers_name}.{new_numbers[number]}{dot}{rest}"

    @cached_property
    def _parts_by_tensor(self) -> dict[str, list[Part]]:
        """The parts to which a tensor belongs that becomes another one, by its name in the model.

        It is one part (of `self.parts`), or all experts of a mixture in the order of their numbers, if each of them
        loses channels of its own.
        """
        parts_by_tensor = dict[str, list[Part]]()
        for part in self.parts.values():
            for name in part.changed_tensors:
                parts_by_tensor.setdefault(name, []).append(part)
        return parts_by_tensor

    @cached_property
    def shares_kept(self) -> set[Fraction]:
        """Which shares of their groups the parts keep: `self.num_kept` says how many groups stay in each."""
        # Experts are many, so equal numbers are left out before they become fractions.
        numbers = {(self.num_kept[name], part.groups) for name, part in self.parts.items()}
        return {Fraction(num_kept, groups) for num_kept, groups in numbers}

    def part_of(self, name: str) -> Part | None:
        """The part to which the tensor called `name` in the model belongs; `None` if the tensor stays as it is.

        If it has the matrices of several experts, each of which is a part, this is the first of them.
        """
        parts = self._parts_by_tensor.get(name)
        return parts[0] if parts else None

    def reasons_left_dense(self, names: Iterable[str]) -> dict[str, str]:
        """Say why the linear operators called `names` in the model are not pruned, by their names.

        Those of removed decoder layers are left out. `self.num_kept` says how many groups each part keeps.
        """
        reasons = dict[str, str]()
        for name in names:
            if self.new_name(name) is None:
                continue
            part = self.part_of(f"{name}.weight")
            if part is None:
                part = self.parts.get(name)  # the module of a mixture is called as its part
            if part is None:
                part = self._expert_of(name)
            if part is None:
                reasons[name] = "no part of the pattern"
            elif part.is_mixture:
                reasons[name] = f"keeps {self.num_kept[part.name]} of {part.groups} experts"
            else:
                reasons[name] = f"loses the rows that {self.new_name(part.name)} no longer reads"
        return reasons

    def _expert_of(self, name: str) -> Part | None:
        """The expert that loses channels and has the operator `name`; `None` if the operator is of no such expert.

        Matrices of an expert have no tensor of their own. The expert is called as its down projection in `self.parts`.
        """
        expert_name, _, _ = name.rpartition(".")
        part = self.parts.get(f"{expert_name}.down_proj")
        if part is None or part.expert is None:
            return None
        return part

    def shrink_tensor(self, name: str, tensor: Tensor, kept: Kept) -> Tensor:
        """Copy a tensor for the smaller model, which has the groups `kept` of each part.

        `name` is that of the tensor in the model. If it belongs to no part, the tensor itself is returned.
        """
        part = self.part_of(name)
        if part is None:
            return tensor
        if part.expert is None:
            return part.shrink(name, tensor, kept[part.name])

        # Every expert keeps channels of its own. Its matrix is copied into its place at once, so that no more than one
        # matrix is in memory twice.
        smaller: Tensor | None = None
        for expert_part in self._parts_by_tensor[name]:
            assert expert_part.expert is not None
            matrix = expert_part.shrink(name, tensor[expert_part.expert], kept[expert_part.name])
            if smaller is None:
                # Entries after those of experts with weights are never used, and become zeros (LongCat-Flash).
                smaller = matrix.new_zeros(len(tensor), *matrix.shape)
            smaller[expert_part.expert] = matrix
        assert smaller is not None
        return smaller

    def with_zeros(self, name: str, tensor: Tensor, kept: Kept) -> Tensor | None:
        """Copy the tensor called `name` with zeros in the columns of the groups that go; `None` if it loses no columns.

        `kept` are the groups that stay of each part. A tensor that loses rows only, or that belongs to no part, loses
        no columns, and that of a mixture without some of its experts neither.
        """
        part = self.part_of(name)
        if part is None or name != part.weight:
            return None
        if part.expert is None:
            return part.without_columns(tensor, kept[part.name])
        zeroed = tensor.clone()
        for expert_part in self._parts_by_tensor[name]:
            assert expert_part.expert is not None
            matrix = tensor[expert_part.expert]
            zeroed[expert_part.expert] = expert_part.without_columns(matrix, kept[expert_part.name])
        return zeroed


def plan_shrinking(
    outline: ModelOutline,
    counts: Mapping[Kind, int] | None = None,
    *,
    layers: Sequence[int] | None = None,
) -> Shrinking:
    """Plan a smaller model, and prove on shapes that it can be made of the tensors of the model.

    The smaller model is built, without weights, from the changed configuration. Every tensor must have the shape that
    shrinking gives it. Modules may differ from those of the model in sizes and in the numbers of their decoder layers,
    but not in windows of attention, scales or kinds of layers.

    Args:
        outline: Has the model, whose weights are not read and not changed, and a copy without weights. What it finds
            out (`dense`, `shapes`, `parts`) is kept in it for the next call.
        counts: How many groups every decoder layer keeps, by kind, such as `{"heads": 6}`; kinds that are not named
            keep all. `None`: all kinds do.
        layers: Numbers of the decoder layers that stay, rising; `None`: all.

    Raises:
        UnsupportedArchitectureError: If the model can't lose parts of such a kind.
        ValueError: If no configuration describes the smaller model, or the model is not what its configuration says.
    """
    counts = {} if counts is None else counts
    total = len(outline.layers)
    remaining = tuple(range(total))
    if layers is not None:
        remaining = tuple(layers)
    _require_described_model(outline)

    parts, num_kept = _parts_of_layers(outline, counts, remaining)
    sizes, overrides = _settings_of_parts(outline, counts)
    if overrides is not None:
        overrides = renumbered(overrides, remaining)

    # configurations name the number of layers in different ways: each is tried, and the first that works is returned
    reasons = list[str]()  # why the others do not work
    for layer_settings in _likely_layer_settings(outline.text_config, remaining, total):
        try:
            small = described_model(outline.model, sizes | layer_settings, overrides)
            plan = Shrinking(
                model=small,
                parts=parts,
                num_kept=num_kept,
                layers=remaining,
                layers_name=outline.layers.name,
            )
            # refuses modules that differ in more than sizes
            module_attributes = _changed_attributes(outline.dense, plan, total)
            plan = replace(plan, attributes=module_attributes)
            _require_described_tensors(outline, plan)
        except ValueError as error:
            reasons.append(str(error))
        else:
            small.generation_config = copy.deepcopy(outline.model.generation_config)
            return plan
    numbers = [f"{kind}={count}" for kind, count in counts.items()]
    numbers.append(f"{len(remaining)} decoder layers")
    different_reasons = dict.fromkeys(reasons)
    raise ValueError(
        f"no configuration describes {type(outline.model).__name__} with {', '.join(numbers)}: "
        f"{'; or '.join(different_reasons)}. Pass other numbers, or use a pattern that leaves zeros, such as '2:4'."
    )


def plan_shrinkings(
    outline: ModelOutline, counts: Mapping[Kind, int], layers: Sequence[int] | None = None
) -> tuple[Shrinking, Shrinking]:
    """Plan a smaller model as `plan_shrinking` does, and plan the same model with all experts.

    `counts` says how many groups every decoder layer keeps, by kind, such as `{"experts": 6}`. `layers` are the numbers
    of the decoder layers that stay (`None`: all). `outline` keeps what is found out. Both plans are the same one if no
    experts are removed.
    """
    smaller = plan_shrinking(outline, counts, layers=layers)
    if "experts" not in counts:
        return smaller, smaller
    others: dict[Kind, int] = {kind: count for kind, count in counts.items() if kind != "experts"}
    return smaller, plan_shrinking(outline, others, layers=layers)


def _parts_of_layers(
    outline: ModelOutline, counts: Mapping[Kind, int], remaining: Sequence[int]
) -> tuple[dict[str, Part], dict[str, int]]:
    """List the parts that become smaller, and how many groups each keeps, both by the name of the part.

    `counts` are the numbers of groups that stay, by kind. `remaining` are the numbers of the decoder layers that stay;
    parts of other layers are left out. The outline finds the parts and keeps them, and is else only read.
    """
    beginnings_of_removed_names = tuple(
        f"{layer_name}."
        for index, (layer_name, _) in enumerate(outline.layers)
        if index not in remaining
    )
    parts = dict[str, Part]()
    num_kept = dict[str, int]()
    for kind, count in counts.items():
        of_kind = outline.parts(kind)
        for part in of_kind.parts:
            if not part.name.startswith(beginnings_of_removed_names):
                parts[part.name] = part
                num_kept[part.name] = of_kind.num_kept(part, count)
    return parts, num_kept


def _settings_of_parts(
    outline: ModelOutline, counts: Mapping[Kind, int]
) -> tuple[dict[str, Any], Overrides | None]:
    """Return what a configuration has to say of a smaller model: settings, and overrides of single decoder layers.

    Settings are by what the configuration calls them, such as {"intermediate_size": 24}. The overrides are a copy of
    those of the model's configuration, with the smaller numbers; `None` if it has none. No configuration is changed.

    `counts` are the numbers of groups that stay in every decoder layer, by kind, such as {"channels": 24}.
    `outline.parts` finds all parts of a kind in the model, and keeps them in the outline.
    """
    sizes = dict[str, Any]()
    overrides = overrides_of(outline.text_config)
    for kind, count in counts.items():
        parts = outline.parts(kind)
        sizes |= parts.sizes(count)
        overrides = parts.scaled_overrides(overrides, count)
    return sizes, overrides


def _require_described_model(outline: ModelOutline) -> None:
    """Refuse a model whose decoder layers share weights, or whose tensors are not those of its configuration.

    `outline.model` is the model itself. `outline.shapes` are the shapes that its configuration describes, by the name
    of the tensor. `outline.layers.shared` has operators that share their weight, each with the end of a sentence that
    says so.
    """
    model = outline.model
    if outline.layers.shared:
        name, reason = next(iter(outline.layers.shared.items()))
        raise UnsupportedArchitectureError(
            f"{type(model).__name__} can't be made smaller: {name} {reason}."
        )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        described_shape = outline.shapes.get(name)
        if described_shape is None:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, but {type(model.config).__name__} describes "
                "no such tensor: pass a model as from_pretrained loads it."
            )
        if tuple(tensor.shape) != described_shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, but {type(model.config).__name__} describes "
                f"{described_shape}: pass a model as from_pretrained loads it."
            )


def _likely_layer_settings(
    config: PreTrainedConfig, remaining: Sequence[int], total: int
) -> Iterator[dict[str, Any]]:
    """Propose settings for a model with the decoder layers `remaining` of `total`, the likeliest first.

    They are changes of the text configuration `config`, which is only read: the number of layers (`_NUM_LAYERS` has the
    words for it), lists with numbers of single layers (`_LAYER_NUMBERS`), how many of the first layers are of another
    kind (`_FIRST_LAYERS`), and lists with an entry for each layer.

    `remaining` are the old numbers of the layers that stay, rising.
    """
    if len(remaining) == total:
        yield {}  # all layers stay: nothing has to change
        return

    # Lists of ids of tokens may have as many entries as there are layers.
    values: dict[str, Any] = {
        word: value for word, value in vars(config).items() if "token_id" not in word
    }
    lists = {word: value for word, value in values.items() if isinstance(value, list | tuple)}
    new_numbers = {old: new for new, old in enumerate(remaining)}

    # settings that need new numbers of layers
    numbers = dict[str, Any]()
    for word in _LAYER_NUMBERS:
        if word in lists:
            numbers[word] = [new_numbers[old] for old in lists[word] if old in new_numbers]
    for word in _FIRST_LAYERS:
        if type(values.get(word)) is int:
            first_layers_that_stay = [old for old in remaining if old < values[word]]
            numbers[word] = len(first_layers_that_stay)

    # lists with an entry for each layer, cut to the layers that stay
    entries = dict[str, Any]()
    for word, of_all_layers in lists.items():
        if len(of_all_layers) == total and word not in numbers:
            entries[word] = [of_all_layers[index] for index in remaining]
    # A list of another meaning may have as many entries by chance. So those whose word names layers, such as
    # "layer_types", are tried alone afterwards.
    named_by_layers = {word: cut for word, cut in entries.items() if "layer" in word}

    for cut_lists in (entries, named_by_layers):
        for word in _NUM_LAYERS:
            if hasattr(config, word):
                yield cut_lists | numbers | {word: len(remaining)}


def _require_described_tensors(outline: ModelOutline, plan: Shrinking) -> None:
    """Refuse a plan if its tensors would not have the names and shapes of those of its smaller model.

    `outline.shapes` are the shapes of the model as it is; `plan.model` is the smaller one. Both are only read.
    """
    # any groups have the same shape
    first_groups = {part_name: range(count) for part_name, count in plan.num_kept.items()}
    shrunk = dict[str, tuple[int, ...]]()
    for name, shape in outline.shapes.items():
        new_name = plan.new_name(name)
        if new_name is None:
            continue
        if plan.part_of(name) is not None:
            tensor = torch.empty(shape, device="meta")
            shape = tuple(plan.shrink_tensor(name, tensor, first_groups).shape)
        shrunk[new_name] = shape

    described = shapes_of(plan.model)
    for name in shrunk | described:
        if shrunk.get(name) != described.get(name):
            raise ValueError(
                f"{name} keeps shape {shrunk.get(name)}, but would have to have {described.get(name)}"
            )


def _changed_attributes(
    dense: PreTrainedModel, plan: Shrinking, total: int
) -> dict[str, dict[str, Any]]:
    """Find the attributes of modules that differ in the smaller model, with their values there.

    They are by the name of the module in the model, then of the attribute, such as
    `{"model.layers.0.self_attn": {"num_heads": 6}}`. Only sizes that shrink as parts do, numbers of layers, and lists
    with an entry for each of `total` layers may differ (`_may_become`), and no module may change its class. Otherwise a
    ValueError says which attribute or module does. `dense` is the model as it is, without weights; it and `plan.model`,
    the smaller one, are only read.
    """
    small_modules = dict(plan.model.named_modules())
    attributes = dict[str, dict[str, Any]]()
    for name, module in dense.named_modules():
        new_name = plan.new_name(name)
        if new_name is None:
            continue
        small = small_modules.get(new_name)
        # Such as attention of another kind in every fourth layer. Parametrized modules have a class of their own each.
        if type(small).__qualname__ != type(module).__qualname__:
            raise ValueError(
                f"{name} ({type(module).__name__}) would become {type(small).__name__}"
            )
        for word, old in vars(module).items():
            # tensors and modules are compared elsewhere
            is_plain = isinstance(old, bool | int | float | str | list | tuple | None)
            if word.startswith("_") or not is_plain:
                continue
            new: Any = vars(small).get(word)
            if type(new) is type(old) and new == old:  # True equals 1, but is another setting
                continue
            if not _may_become(word, old, new, plan, total):
                raise ValueError(
                    f"{name or type(module).__name__} would have {word}={new} instead of {old}"
                )
            attributes.setdefault(name, {})[word] = new
    return attributes


def _may_become(word: str, old: Any, new: Any, plan: Shrinking, total: int) -> bool:
    """Tell whether the attribute `word` of a module may be `new` instead of `old` in the smaller model of `plan`.

    It may if both are numbers of decoder layers, the number of one layer, lists with an entry for each layer, sizes
    that shrink as a part does, or numbers of experts that fall by the number of those removed. `total` is the number of
    decoder layers of the model as it is; `plan.layers` are the numbers of those that stay, and `plan.num_kept` says how
    many groups each part keeps.
    """
    names_layers = "layer" in word
    if type(old) is not int or type(new) is not int:
        has_entry_for_each_layer = names_layers and type(old) is list and len(old) == total
        return has_entry_for_each_layer and new == [old[index] for index in plan.layers]

    counts_layers = old == total and new == len(plan.layers)
    if counts_layers:
        return True
    is_number_of_layer = names_layers or "idx" in word
    if is_number_of_layer and old in plan.layers and new == plan.layers.index(old):
        return True
    # a size that shrinks in proportion with one of the parts
    if old == 0:  # no proportion
        return False
    if Fraction(new, old) in plan.shares_kept:
        return True
    # or the number of all experts, together with some that always stay
    for name, part in plan.parts.items():
        counts_more = part.is_mixture and old > part.groups
        if counts_more and old - new == part.groups - plan.num_kept[name]:
            return True
    return False
