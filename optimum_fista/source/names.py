"""Operators under the names that a checkpoint gives their weights, if these differ from the model's.

Transformers renames, splits and merges tensors when it saves, with rules for every family. This code does not read the
rules: it applies them to small stand-in tensors, each filled with the number of its operator. Then it looks under which
names, and in which rows or columns, these numbers come out.

A stored name is that of a tensor in the files; with an index, such as `experts.gate_up_proj[3, :, 0::2]`, if the weight
is a part of that tensor (`split_index` reads it). An operator (`LinearOperator`) is a weight [out, in] of a decoder
layer with a name such as "model.layers.3.mlp.up_proj"; its owner is the module that has the parameter. That of experts
(`ExpertOperator`) is a part of a parameter that holds those of all experts of a mixture. The number of an operator is
its index in the list of all.
"""

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
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
class _FoundWeight:
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
    """Return the names that `save_pretrained` gives the weights of operators. Changes nothing.

    Args:
        model: The model; its weights are not read.
        operators: Those whose names are needed.
        renamed: Returns the name that a module has in the saved model, if that has fewer decoder layers; `None` if the
            module is gone. By default (`str`) all names stay.
        all_of_them: Whether to refuse a weight that is not stored as one matrix; otherwise it is left out.
        layers_name: Name of the list of decoder layers, such as "model.layers"; `None`: it is looked for.

    Returns:
        Stored names by the name of the weight in the saved model, such as "model.layers.3.mlp.up_proj.weight"; also of
        operators that were not asked for.

    Raises:
        UnsupportedArchitectureError: A weight is not stored as one matrix (only with `all_of_them`).
    """
    asked = list(operators)
    # Operators that are not pruned are needed, too. Transformers may store the weights of several in one tensor, and
    # then the rows of an operator depend on the others.
    by_name = _operators_in(model, layers_name)
    by_name |= {operator.name: operator for operator in asked}
    numbered = list(by_name.values())
    stand_ins = _stand_ins(model, numbered, renamed)

    names: dict[str, StoredName] = {}
    for tensor, numbers in as_saved(model, stand_ins).items():
        for found_weight in _weights_in(numbers, numbered):
            is_whole_tensor = found_weight.index == (_ALL, _ALL)
            name = tensor if is_whole_tensor else f"{tensor}[{_text_of(found_weight.index)}]"
            # `renamed` gives a name here: operators that are gone have no stand-in.
            weight = f"{renamed(found_weight.operator.name)}.weight"
            # If a weight is stored twice, the first place is returned.
            names.setdefault(weight, StoredName(name, found_weight.transposed))

    if all_of_them:
        for operator in asked:
            new_name = renamed(operator.name)
            is_saved = new_name is not None
            if is_saved and f"{new_name}.weight" not in names:
                _refuse_divided_weight(operator)
    return names


def divided_weights(model: PreTrainedModel, layers_name: str) -> set[str]:
    """Return the names of the linear operators whose weights `save_pretrained` stores as several matrices.

    An example is a gate and an up projection that are one module in the model, and two tensors in the files. The mask
    of such a weight has no place in the files. Matrices of experts are left out. `layers_name` is the name of the list
    of decoder layers, such as "model.layers". Weights are not read, and nothing is changed.
    """
    names = stored_names(model, [], all_of_them=False, layers_name=layers_name)
    return {
        name
        for name, operator in _operators_in(model, layers_name).items()
        if f"{name}.weight" not in names and not isinstance(operator, ExpertOperator)
    }


def _operators_in(model: PreTrainedModel, layers_name: str | None) -> dict[str, LinearOperator]:
    """Return all operators in the decoder layers of a model by name, also those that are never pruned.

    `layers_name` is the name of the list of decoder layers, such as "model.layers"; `None`: it is looked for. Changes
    nothing.
    """
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
    """Make a small int32 tensor for each parameter that holds a weight, filled with the numbers of its operators.

    Args:
        model: The model with the operators; it stays as it is.
        operators: All operators; the number of each is its index.
        renamed: Returns the name that a module has in the saved model; `None` if the module is gone.

    Returns:
        The tensors, by the name of the parameter in the saved model, without those of modules that are gone.
    """
    name_of_module = {id(module): name for name, module in model.named_modules()}
    stand_ins: dict[str, Tensor] = {}
    for number, operator in enumerate(operators):
        owner = renamed(name_of_module[id(operator.owner)])
        if owner is None:  # the module is gone
            continue
        parameter = f"{owner}.{operator.tensor}"  # `operator.tensor` is such as "weight"
        if parameter not in stand_ins:
            stand_ins[parameter] = torch.zeros(_stand_in_shape(operator), dtype=torch.int32)
        # A view of the operator's own weight in the parameter: of one expert, or the whole.
        own_weight = operator.select(stand_ins[parameter])
        own_weight.fill_(number)
    return stand_ins


def _stand_in_shape(operator: LinearOperator) -> tuple[int, ...]:
    """Return the shape of the stand-in for the parameter that holds an operator's weight.

    Experts of a mixture share a parameter [experts, out, in] or, if it is transposed, [experts, in, out]. Gate and up
    projection may share it, too, one after the other.
    """
    if not isinstance(operator, ExpertOperator):
        return (_COLUMNS, _ROWS) if operator.transposed else (_ROWS, _COLUMNS)
    has_gate_and_up = operator.experts.gated and operator.kind != "down_proj"
    rows = 2 * _ROWS if has_gate_and_up else _ROWS
    matrix = (_COLUMNS, rows) if operator.experts.transposed else (rows, _COLUMNS)
    return (len(operator.experts), *matrix)


def _refuse_divided_weight(operator: LinearOperator) -> None:
    """Raise UnsupportedArchitectureError for an operator whose weight is not stored as one matrix.

    The message says what to pass as the option `exclude`, so that the operator stays dense.
    """
    to_exclude = operator.name
    if isinstance(operator, ExpertOperator):
        # All experts at once, in every decoder layer: "*.experts".
        _, _, name_in_layer = operator.experts.name.rpartition(".")
        to_exclude = f"*.{name_in_layer}"
    raise UnsupportedArchitectureError(
        f"{operator.name}: the checkpoint does not keep its weight as one matrix, so its mask can't be saved. "
        f"Pass exclude=['{to_exclude}'] to leave it dense."
    )


def as_saved(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename, split and merge tensors of a model as `save_pretrained` does.

    `model` stays as it is.

    Args:
        model: The model, whose class and configuration have the rules.
        tensors: Some of its tensors or stand-ins for them, by their names in the model; the shapes may be smaller.

    Returns:
        Tensors by their names in the files.
    """

    def get_parameter(name: str) -> Tensor:
        """Return the tensor to save of this name in the model: that of `tensors`, if there is one.

        Some rules read from its shape whether it is transposed.
        """
        return tensors[name] if name in tensors else model.get_parameter(name)

    # A shallow copy, whose `get_parameter` is another; `copy.copy` fails for classes of `fully_shard`.
    model_view: Any = object.__new__(type(model))
    vars(model_view).update(vars(model))
    model_view.get_parameter = get_parameter
    return revert_weight_conversion(model_view, dict(tensors))


def _weights_in(numbers: Tensor, operators: Sequence[LinearOperator]) -> Iterator[_FoundWeight]:
    """Yield the whole weights that are found in a stored stand-in. Weights that are cut there are left out.

    A matrix may have the rows of several operators, one after the other (q, k and v). In those of experts, rows of
    gate and up projection may alternate.

    Args:
        numbers: The stand-in, as `as_saved` returns it: each entry is the number of the operator whose weight it is
            from. [out, in] or [experts, out, in], or transposed.
        operators: All operators; the number of each is its index.
    """
    has_experts = numbers.ndim == 3
    if not has_experts:
        yield from _weights_in_matrix(numbers, operators, may_alternate=False)
        return
    for expert, matrix in enumerate(numbers):
        for weight in _weights_in_matrix(matrix, operators, may_alternate=True):
            yield replace(weight, index=(expert, *weight.index))


def _weights_in_matrix(
    matrix: Tensor, operators: Sequence[LinearOperator], *, may_alternate: bool
) -> Iterator[_FoundWeight]:
    """Yield the whole weights in a matrix, as `_weights_in` does; `may_alternate`: rows of operators may take turns."""
    # A weight has `_COLUMNS` columns, and the rows of several weights are an even number, never `_COLUMNS`.
    transposed = matrix.ndim == 2 and matrix.shape[1] != _COLUMNS
    rows = matrix.T if transposed else matrix
    is_matrix = rows.ndim == 2 and rows.shape[1] == _COLUMNS
    if not is_matrix:
        return
    first_column = rows[:, :1]
    has_columns_of_several = bool((rows != first_column).any())
    if has_columns_of_several:
        return

    number_of_row = rows[:, 0].tolist()  # the operator of each row
    different = list(dict.fromkeys(number_of_row))  # each once, in the order of its first row
    one_after_the_other = [number for number in different for _ in range(_ROWS)]
    in_turn = different * _ROWS  # the list again for each row
    alternate = may_alternate and number_of_row == in_turn
    if not alternate and number_of_row != one_after_the_other:
        return  # a weight is cut

    operators_in_order = [operators[number] for number in different]
    parts = _rows_of_each(operators_in_order, alternate=alternate)
    for operator, part in zip(operators_in_order, parts, strict=True):
        index = (_ALL, part) if transposed else (part, _ALL)
        yield _FoundWeight(index, operator, transposed)


def _rows_of_each(operators: Sequence[LinearOperator], *, alternate: bool) -> list[slice]:
    """Return the rows that each operator has in a matrix which holds the rows of all of them, in their order.

    If `alternate` is set, the operators have equal sizes and every row is of the next one; otherwise all rows of one
    operator come before those of the next.
    """
    if len(operators) == 1:
        return [_ALL]
    sizes = [operator.shape[0] for operator in operators]  # numbers of rows
    if alternate:
        # Of two operators the first has the rows 0, 2, 4, ..., the second 1, 3, 5, ...
        return [slice(position, sum(sizes), len(sizes)) for position in range(len(sizes))]
    ends = list(itertools.accumulate(sizes))
    return [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]


def split_index(name: str) -> tuple[str, tuple[int | slice, ...]]:
    """Return the name of the tensor in a stored name, and the index of the part; an empty index is the whole tensor.

    "experts.gate_up_proj[3, :, 0::2]" gives "experts.gate_up_proj" and `(3, slice(None), slice(0, None, 2))`.
    """
    match = re.fullmatch(r"(.+)\[([\d:, ]+)\]", name)
    if match is None:
        return name, ()
    tensor, parts = match.groups()
    index: list[int | slice] = []
    for part in parts.split(","):
        if ":" in part:
            # One to three bounds (start, stop, step); one that is left out is None.
            bounds = [int(bound) if bound.strip() else None for bound in part.split(":")]
            index.append(slice(*bounds))
        else:
            index.append(int(part))
    return tensor, tuple(index)


def _text_of(index: tuple[int | slice, ...]) -> str:
    """Write an index as in Python, such as "3, :, 0:8:2"; inverse of `split_index`."""
    return ", ".join(str(part) if isinstance(part, int) else _text_of_slice(part) for part in index)


def _text_of_slice(part: slice) -> str:
    """Write a slice as in Python, such as "0:8"."""
    bounds = ["" if bound is None else str(bound) for bound in (part.start, part.stop, part.step)]
    return ":".join(bounds).removesuffix(":")
