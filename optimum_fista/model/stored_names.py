"""Operators under the names that a checkpoint gives their weights, if these differ from the model's.

Transformers renames, splits and merges tensors when it saves, with rules for every family. This code does not read the
rules: it applies them to small stand-in tensors, and sees which names these get.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from optimum_fista.model import UnsupportedArchitectureError
from optimum_fista.model.operator import ExpertOperator, LinearOperator

_SHAPE = (2, 3)  # of a stand-in for a weight [out, in]
_NO_OPERATOR = -1  # what a stand-in holds where no operator's weight is


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
) -> dict[str, StoredName]:
    """Names that `save_pretrained` gives the weights of operators, by their names in the model.

    Stand-ins are filled with the number of the operator. `renamed` gives their names in the saved model, if it has
    fewer decoder layers. A weight that is not stored as one matrix is refused, or left out if `all_of_them` is False.
    """
    found, prefixes = list(operators), {id(module): name for name, module in model.named_modules()}
    stand_ins: dict[str, Tensor] = {}  # by the name of the parameter that holds the weight
    origins: list[str] = []  # that parameter's name, by operator
    for number, operator in enumerate(found):
        tensor = f"{renamed(prefixes[id(operator.owner)])}.{operator.tensor}"
        origins.append(tensor)
        if isinstance(operator, ExpertOperator):  # all experts of a parameter share a stand-in
            halves = 2 if operator.experts.gated and operator.kind != "down_proj" else 1  # gate and up projections
            out, inputs = halves * _SHAPE[0], _SHAPE[1]
            matrix = (inputs, out) if operator.experts.transposed else (out, inputs)
            empty = torch.full((len(operator.experts), *matrix), _NO_OPERATOR, dtype=torch.int32)
            stand_ins.setdefault(tensor, empty)
        shape = _SHAPE[::-1] if operator.transposed else _SHAPE
        stand_in = stand_ins.setdefault(tensor, torch.full(shape, _NO_OPERATOR, dtype=torch.int32))
        operator.select(stand_in).fill_(number)
    names: dict[str, StoredName] = {}
    for tensor, numbers in revert_weight_conversion(model, dict(stand_ins)).items():
        held = [int(number) for number in numbers.unique() if number != _NO_OPERATOR]
        if not held:
            continue
        if len(numbers.unique()) == 1 and tuple(numbers.shape) in (_SHAPE, _SHAPE[::-1]):
            operator = found[held[0]]  # the whole tensor is its weight, perhaps transposed
            names.setdefault(f"{renamed(operator.name)}.weight", StoredName(tensor, tuple(numbers.shape) != _SHAPE))
        elif torch.equal(numbers, stand_ins[origins[held[0]]]):  # all experts are where they were
            for operator in (found[number] for number in held):
                if isinstance(operator, ExpertOperator):
                    place = operator.module.place(getattr(operator.owner, operator.tensor))
                    names[f"{renamed(operator.name)}.weight"] = StoredName(
                        f"{tensor}[{_text(place)}]", operator.transposed
                    )
    for operator in found if all_of_them else ():
        if f"{renamed(operator.name)}.weight" not in names:
            name = operator.name
            if isinstance(operator, ExpertOperator):
                name = f"*.{operator.experts.name.rsplit('.', 1)[-1]}"
            raise UnsupportedArchitectureError(
                f"{operator.name}: the checkpoint does not keep its weight as one matrix, so its mask can't be saved. "
                f"Pass exclude=['{name}'] to leave it dense."
            )
    return names


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
        parts.append(":".join("" if number is None else str(number) for number in numbers).removesuffix(":"))
    return ", ".join(parts)
