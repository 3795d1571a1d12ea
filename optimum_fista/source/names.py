"""Operators under the names that a checkpoint gives their weights, if these differ from the model's.

Transformers renames, splits and merges tensors when it saves, with rules for every family. This code does not read the
rules: it applies them to small stand-in tensors, and sees which names these get.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from optimum_fista.model import UnsupportedArchitectureError
from optimum_fista.model.experts import ExpertOperator, FusedExperts, can_be_split, is_fused_experts
from optimum_fista.model.layers import find_decoder_layers
from optimum_fista.model.operators import LINEAR, LinearOperator

_SHAPE = (2, 3)  # of a stand-in for a weight [out, in]


@dataclass(frozen=True)
class StoredName:
    """The place of a weight in a checkpoint."""

    name: str  # of its tensor; with an index, such as `experts.gate_up_proj[3, :, 0::2]`, if it is a part of that
    transposed: bool  # whether it is stored as [in, out]


def stored_names(
    model: PreTrainedModel,
    operators: Iterable[LinearOperator],
    renamed: Callable[[str], str | None] = str,
    *,
    all_of_them: bool = True,
    layers_name: str | None = None,
) -> dict[str, StoredName]:
    """Names that `save_pretrained` gives the weights of operators, by their names in the model.

    Stand-ins are filled with the number of the operator. `renamed` gives their names in the saved model, if it has
    fewer decoder layers. A weight that is not stored as one matrix is refused, or left out if `all_of_them` is False.
    `layers_name` is the name of the list of decoder layers; `None`: it is looked for.
    """
    asked, prefixes = list(operators), {id(module): name for name, module in model.named_modules()}
    # Those that are not pruned as well: Transformers may store them in one tensor with others, whose place they decide.
    layers = find_decoder_layers(model).name if layers_name is None else layers_name
    by_name: dict[str, LinearOperator] = {}
    for name, module in model.get_submodule(layers).named_modules(prefix=layers):
        if isinstance(module, LINEAR) and module.weight.ndim == 2:
            by_name[name] = LinearOperator(name, module)
        elif is_fused_experts(module) and can_be_split(module):
            by_name |= {o.name: o for o in FusedExperts(name, module).operators}
    found = [*(by_name | {o.name: o for o in asked}).values()]
    stand_ins: dict[str, Tensor] = {}  # by the name of the parameter that holds the weight
    for number, operator in enumerate(found):
        prefix = renamed(prefixes[id(operator.owner)])
        if prefix is None:
            continue
        tensor = f"{prefix}.{operator.tensor}"
        if isinstance(operator, ExpertOperator):  # all experts of a parameter share a stand-in
            halves = (
                2 if operator.experts.gated and operator.kind != "down_proj" else 1
            )  # gate and up projections
            out, inputs = halves * _SHAPE[0], _SHAPE[1]
            matrix = (inputs, out) if operator.experts.transposed else (out, inputs)
            stand_ins.setdefault(
                tensor, torch.zeros((len(operator.experts), *matrix), dtype=torch.int32)
            )
        shape = _SHAPE[::-1] if operator.transposed else _SHAPE
        stand_in = stand_ins.setdefault(tensor, torch.zeros(shape, dtype=torch.int32))
        operator.select(stand_in).fill_(number)
    names: dict[str, StoredName] = {}
    for tensor, numbers in as_saved(model, stand_ins).items():
        for place, operator, transposed in _places(numbers, found):
            stored = StoredName(
                tensor if place == (slice(None),) * 2 else f"{tensor}[{_text(place)}]", transposed
            )
            names.setdefault(f"{renamed(operator.name)}.weight", stored)
    for operator in asked if all_of_them else ():
        if renamed(operator.name) is not None and f"{renamed(operator.name)}.weight" not in names:
            name = operator.name
            if isinstance(operator, ExpertOperator):
                name = f"*.{operator.experts.name.rsplit('.', 1)[-1]}"
            why = (
                "the checkpoint does not keep its weight as one matrix, so its mask can't be saved"
            )
            raise UnsupportedArchitectureError(
                f"{operator.name}: {why}. Pass exclude=['{name}'] to leave it dense."
            )
    return names


def as_saved(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename, split and merge tensors of a model as `save_pretrained` does; they may be smaller than the model's."""
    shown: Any = object.__new__(
        type(model)
    )  # a shallow copy; copy.copy fails for classes of fully_shard
    vars(shown).update(vars(model))
    # Rules that look at the shape of a parameter, to find out if it is transposed, get that of the tensor to save.
    shown.get_parameter = lambda name: (
        tensors[name] if name in tensors else model.get_parameter(name)
    )
    return revert_weight_conversion(shown, dict(tensors))


def _places(
    numbers: Tensor, operators: Sequence[LinearOperator]
) -> Iterator[tuple[tuple[int | slice, ...], LinearOperator, bool]]:
    """Find whole matrices in a stored stand-in: the index of each in the tensor, and whether it is stored as [in, out].

    A matrix may have the rows of several operators, one after the other (q, k and v). In those of experts, rows of
    gate and up projection may alternate.
    """
    for expert, matrix in enumerate(numbers if numbers.ndim == 3 else [numbers]):
        transposed = matrix.ndim == 2 and matrix.shape[1] != _SHAPE[1]
        rows = matrix.T if transposed else matrix
        if rows.ndim != 2 or rows.shape[1] != _SHAPE[1] or bool((rows != rows[:, :1]).any()):
            continue
        order = rows[:, 0].tolist()  # the number of the operator that each row belongs to
        held = [operators[number] for number in dict.fromkeys(order)]
        total, start = sum(operator.shape[0] for operator in held), 0
        alternate = numbers.ndim == 3 and order == [*dict.fromkeys(order)] * _SHAPE[0]
        if not alternate and order != [
            number for number in dict.fromkeys(order) for _ in range(_SHAPE[0])
        ]:
            continue
        for position, operator in enumerate(held):
            end = start + operator.shape[0]
            part = slice(position, total, len(held)) if alternate else slice(start, end)
            part, start = part if len(held) > 1 else slice(None), end
            index = (slice(None), part) if transposed else (part, slice(None))
            yield (expert, *index) if numbers.ndim == 3 else index, operator, transposed


def split_index(name: str) -> tuple[str, tuple[int | slice, ...]]:
    """The tensor of a stored name, and the index of its part; an empty index is all of it."""
    match = re.fullmatch(r"(.+)\[([\d:, ]+)\]", name)
    if match is None:
        return name, ()
    index: list[int | slice] = []
    for part in match[2].split(","):
        numbers = [int(number) if number.strip() else None for number in part.split(":")]
        index.append(slice(*numbers) if len(numbers) > 1 else int(part))
    return match[1], tuple(index)


def _text(index: tuple[int | slice, ...]) -> str:
    """An index as it is written in Python; inverse of `split_index`."""
    parts = []
    for part in index:
        numbers = (part,) if isinstance(part, int) else (part.start, part.stop, part.step)
        parts.append(
            ":".join("" if number is None else str(number) for number in numbers).removesuffix(":")
        )
    return ", ".join(parts)
