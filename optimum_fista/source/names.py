"""Operators under the names that a checkpoint gives their weights, if these differ from the model's.

Transformers renames, splits and merges tensors when it saves, with rules for every family. This code does not read the
rules: it applies them to small stand-in tensors, each filled with the number of its operator. Then it looks under which
names, and in which rows or columns, these numbers come out.

A stored name is that of a tensor in the files; with an index, such as `experts.gate_up_proj[3, :, 0::2]`, if the weight
is a part of that tensor (`split_index` reads it). Operators are found by `model.choice`; the owner of an operator is
the module that has its parameter.
"""

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from optimum_fista.model import UnsupportedArchitectureError
from optimum_fista.model.experts import (
    ExpertOperator,
    FusedExperts,
    can_be_split,
    is_fused_experts,
)
from optimum_fista.model.layers import find_decoder_layers
from optimum_fista.model.operators import LINEAR, LinearOperator

_ROWS, _COLUMNS = 2, 3
"""Shape of a stand-in for a weight [out, in]; different numbers, so that a transposed one is known."""
_ALL = slice(None)


@dataclass(frozen=True)
class StoredName:
    """The place of a weight in a checkpoint.

    Attributes:
        name: The stored name, with an index if the weight is a part of the tensor.
        transposed: Whether it is stored as [in, out].
    """

    name: str
    transposed: bool


@dataclass(frozen=True)
class _Place:
    """A whole weight that was found in a stored stand-in.

    Attributes:
        index: Its index in the stored tensor.
        operator: The operator whose weight it is.
        transposed: Whether it is stored as [in, out].
    """

    index: tuple[int | slice, ...]
    operator: LinearOperator
    transposed: bool


def stored_names(
    model: PreTrainedModel,
    operators: Iterable[LinearOperator],
    renamed: Callable[[str], str | None] = str,
    *,
    all_of_them: bool = True,
    layers_name: str | None = None,
) -> dict[str, StoredName]:
    """Find the names that `save_pretrained` gives the weights of operators.

    Args:
        model: The model; its weights are not read.
        operators: Those whose names are needed.
        renamed: Returns the name that a module has in the saved model, if that has fewer decoder layers; `None` if the
            module is gone.
        all_of_them: Whether to refuse a weight that is not stored as one matrix; otherwise it is left out.
        layers_name: Name of the list of decoder layers, such as "model.layers"; `None`: it is looked for.

    Returns:
        Stored names by the name of the weight in the saved model, such as "model.layers.3.mlp.up_proj.weight"; also of
        operators that were not asked for.
    """
    asked = list(operators)
    # Those that are not pruned as well: Transformers may store them in one tensor with others, whose place they decide.
    by_name = _operators_in(model, layers_name)
    by_name |= {operator.name: operator for operator in asked}
    numbered = list(by_name.values())
    stand_ins = _stand_ins(model, numbered, renamed)

    names: dict[str, StoredName] = {}
    for tensor, numbers in as_saved(model, stand_ins).items():
        for place in _places(numbers, numbered):
            is_whole_tensor = place.index == (_ALL, _ALL)
            name = tensor if is_whole_tensor else f"{tensor}[{_text_of(place.index)}]"
            weight = f"{renamed(place.operator.name)}.weight"
            names.setdefault(weight, StoredName(name, place.transposed))

    if all_of_them:
        for operator in asked:
            new_name = renamed(operator.name)
            if new_name is not None and f"{new_name}.weight" not in names:
                _refuse(operator)
    return names


def _operators_in(model: PreTrainedModel, layers_name: str | None) -> dict[str, LinearOperator]:
    """Return all operators in the decoder layers of a model by name, also those that are never pruned."""
    if layers_name is None:
        layers_name = find_decoder_layers(model).name
    operators: dict[str, LinearOperator] = {}
    for name, module in model.get_submodule(layers_name).named_modules(prefix=layers_name):
        if isinstance(module, LINEAR) and module.weight.ndim == 2:
            operators[name] = LinearOperator(name, module)
        elif is_fused_experts(module) and can_be_split(module):
            for operator in FusedExperts(name, module).operators:
                operators[operator.name] = operator
    return operators


def _stand_ins(
    model: PreTrainedModel,
    operators: Sequence[LinearOperator],
    renamed: Callable[[str], str | None],
) -> dict[str, Tensor]:
    """Make a small int32 tensor for each parameter that holds a weight, filled with the indices of the operators.

    Returns them by the name of the parameter in the saved model (`renamed`), without those of removed modules.
    """
    module_names = {id(module): name for name, module in model.named_modules()}
    stand_ins: dict[str, Tensor] = {}
    for number, operator in enumerate(operators):
        owner = renamed(module_names[id(operator.owner)])
        if owner is None:
            continue
        parameter = f"{owner}.{operator.tensor}"
        if parameter not in stand_ins:
            stand_ins[parameter] = torch.zeros(_stand_in_shape(operator), dtype=torch.int32)
        operator.select(stand_ins[parameter]).fill_(number)
    return stand_ins


def _stand_in_shape(operator: LinearOperator) -> tuple[int, ...]:
    """Return the shape of the stand-in for the parameter that holds an operator; experts of a mixture share one."""
    if not isinstance(operator, ExpertOperator):
        return (_COLUMNS, _ROWS) if operator.transposed else (_ROWS, _COLUMNS)
    has_gate_and_up = operator.experts.gated and operator.kind != "down_proj"
    rows = 2 * _ROWS if has_gate_and_up else _ROWS
    matrix = (_COLUMNS, rows) if operator.experts.transposed else (rows, _COLUMNS)
    return (len(operator.experts), *matrix)


def _refuse(operator: LinearOperator) -> None:
    """Raise UnsupportedArchitectureError for an operator whose weight is not stored as one matrix."""
    to_exclude = operator.name
    if isinstance(operator, ExpertOperator):
        to_exclude = f"*.{operator.experts.name.rpartition('.')[2]}"
    raise UnsupportedArchitectureError(
        f"{operator.name}: the checkpoint does not keep its weight as one matrix, so its mask can't be saved. "
        f"Pass exclude=['{to_exclude}'] to leave it dense."
    )


def as_saved(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename, split and merge tensors of a model as `save_pretrained` does.

    `tensors` have their names in the model, and may be smaller than the model's. `model` stays as it is.
    """

    def get_parameter(name: str) -> Tensor:
        """Return the tensor to save: some rules look at its shape, to find out if it is transposed."""
        return tensors[name] if name in tensors else model.get_parameter(name)

    # A shallow copy; copy.copy fails for classes of fully_shard.
    shown: Any = object.__new__(type(model))
    vars(shown).update(vars(model))
    shown.get_parameter = get_parameter
    return revert_weight_conversion(shown, dict(tensors))


def _places(numbers: Tensor, operators: Sequence[LinearOperator]) -> Iterator[_Place]:
    """Find whole weights in a stored stand-in, `numbers` [out, in] or [experts, out, in], or transposed.

    A matrix may have the rows of several operators, one after the other (q, k and v). In those of experts, rows of
    gate and up projection may alternate. `operators` are those whose indices fill the stand-ins.
    """
    has_experts = numbers.ndim == 3
    for expert, matrix in enumerate(numbers if has_experts else [numbers]):
        transposed = matrix.ndim == 2 and matrix.shape[1] != _COLUMNS
        rows = matrix.T if transposed else matrix
        is_matrix = rows.ndim == 2 and rows.shape[1] == _COLUMNS
        if not is_matrix or bool((rows != rows[:, :1]).any()):
            continue  # a row has columns of several weights

        number_of_row = rows[:, 0].tolist()
        different = list(dict.fromkeys(number_of_row))
        one_after_the_other = [number for number in different for _ in range(_ROWS)]
        alternate = has_experts and number_of_row == different * _ROWS
        if not alternate and number_of_row != one_after_the_other:
            continue  # a weight is cut

        parts = _rows_of_each([operators[number] for number in different], alternate)
        for number, part in zip(different, parts, strict=True):
            index: tuple[int | slice, ...] = (_ALL, part) if transposed else (part, _ALL)
            if has_experts:
                index = (expert, *index)
            yield _Place(index, operators[number], transposed)


def _rows_of_each(operators: Sequence[LinearOperator], alternate: bool) -> list[slice]:
    """Return the rows that each operator has in a matrix of all of them; `alternate`: row by row in turn."""
    if len(operators) == 1:
        return [_ALL]
    sizes = [operator.shape[0] for operator in operators]
    if alternate:
        return [slice(position, sum(sizes), len(sizes)) for position in range(len(sizes))]
    ends = list(itertools.accumulate(sizes))
    return [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]


def split_index(name: str) -> tuple[str, tuple[int | slice, ...]]:
    """Return the tensor of a stored name, and the index of its part; an empty index is all of it."""
    match = re.fullmatch(r"(.+)\[([\d:, ]+)\]", name)
    if match is None:
        return name, ()
    index: list[int | slice] = []
    for part in match[2].split(","):
        if ":" in part:
            bounds = [int(bound) if bound.strip() else None for bound in part.split(":")]
            index.append(slice(*bounds))
        else:
            index.append(int(part))
    return match[1], tuple(index)


def _text_of(index: tuple[int | slice, ...]) -> str:
    """Write an index as in Python, such as "3, :, 0:8:2"; inverse of `split_index`."""
    return ", ".join(str(part) if isinstance(part, int) else _text_of_slice(part) for part in index)


def _text_of_slice(part: slice) -> str:
    """Write a slice as in Python, such as "0:8"."""
    bounds = ["" if bound is None else str(bound) for bound in (part.start, part.stop, part.step)]
    return ":".join(bounds).removesuffix(":")
