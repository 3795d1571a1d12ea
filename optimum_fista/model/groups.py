"""Groups of operators that share an input, found by running their decoder layer once.

Operators share an input if they are called on the same memory in one pass; together they are a `Group`. So there is no
list of names for each architecture, as other pruners have it, and an unknown architecture is grouped rightly or its
operators stay dense. The same pass shows which operators end a *part* of the layer: a part is a child module of a
decoder layer, such as its attention. A module returns a tensor, or a tuple: its first tensor is the output that counts
here, and the *rest* of the tuple (`Rest`) is kept only to return it again. The *version* of a tensor grows if it is
changed in place.

`trace_groups` is called first, while the layer is dense. `solved_together` says which groups are pruned at once.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from optimum_fista import internals
from optimum_fista.model import UnsupportedArchitectureError
from optimum_fista.model.experts import ExpertOperator, FusedExperts
from optimum_fista.model.hooks import operator_input
from optimum_fista.model.inputs import LayerCall
from optimum_fista.model.operators import LINEAR, Group, LinearOperator
from optimum_fista.solve.linalg import matrices_in_stack

Rest = tuple[Any, ...] | None
"""What a module returns in a tuple after its first tensor, which is only `None`s; `None` if it returns no tuple."""


@dataclass(frozen=True)
class PartEnd:
    """The part of a decoder layer that returns the output of an operator unchanged, and what it returns besides."""

    part: nn.Module
    rest: Rest  # such as (None,) if the part returns (output, None)


@dataclass(frozen=True)
class LayerTrace:
    """What one forward pass of a decoder layer shows of its operators."""

    # in the order of their first call, inside a group in the order of the calls
    groups: list[Group]
    # by name, operators that are in no group, with the reason
    left_dense: dict[str, str]
    # by name, operators whose output a part of the layer returns unchanged
    ends: dict[str, PartEnd]


def trace_groups(
    layer: nn.Module,
    operators: Mapping[str, LinearOperator],
    call: LayerCall,
    hidden_states: Tensor,
) -> LayerTrace:
    """Group operators that are called on the same tensor, by one forward pass of their layer.

    The layer is called with `hidden_states` [batch, sequence, hidden] and the arguments of `call`, which are recorded
    ones (`model.inputs.record_inputs`). `operators` are those of the layer by their full names. Operators are left
    dense if they are not called exactly once, or if their output is not `W x + b`. The trace also says which operators
    end a part of the layer.

    Hooks are on the modules while the layer runs. Nothing else is changed.
    """
    tracer = _Tracer(operators)
    # children of the layer that are no operators themselves
    parts = [part for part in layer.children() if part not in tracer.by_module]
    version_before = internals.version_of(hidden_states)
    with ExitStack() as hooks:
        for module in (*tracer.by_module, *parts):
            hooks.enter_context(module.register_forward_hook(tracer.see, with_kwargs=True))
        call.run(layer, hidden_states)
    if internals.version_of(hidden_states) != version_before:
        raise UnsupportedArchitectureError(
            f"{type(layer).__name__} overwrites the hidden states that it is called with, and can't run on them again: "
            "have it work on a copy."
        )

    left_dense = tracer.left_dense
    num_calls = Counter(operator.name for operator, _ in tracer.calls)
    for name in operators:
        if num_calls[name] != 1:
            times = f"called {num_calls[name]} times" if num_calls[name] else "not called"
            left_dense[name] = f"{times} in a forward pass of its decoder layer"

    groups: dict[object, Group] = {}  # by a key of the memory of their input
    for operator, inputs in tracer.calls:
        if operator.name not in left_dense:
            groups.setdefault(_memory_of(inputs), []).append(operator)
    return LayerTrace(list(groups.values()), left_dense, tracer.ends)


def solved_together(groups: Sequence[Group], device: torch.device) -> list[list[int]]:
    """Divide the groups of a decoder layer into sets, whose groups are solved together; in the order of their pruning.

    Operators of different experts of a mixture do not see each other. So the groups of its experts that have operators
    of the same kinds and shapes are solved together: first gate and up projections, whose outputs the down projections
    then see. A set has no more groups than `matrices_in_stack`. Every group outside of mixtures is alone in its set.

    `groups` are in execution order, and the result has their numbers there. `device` is where they are solved.
    """
    sets: list[list[int]] = []
    for mixture, numbers in groupby(
        range(len(groups)), key=lambda number: _mixture_of(groups[number])
    ):
        if mixture is None:
            sets += [[number] for number in numbers]
        else:
            sets += _sets_of_experts({number: groups[number] for number in numbers}, device)
    return sets


def _sets_of_experts(groups: Mapping[int, Group], device: torch.device) -> list[list[int]]:
    """Divide the groups of one mixture into sets that are solved together (`solved_together`), on a device.

    `groups` are by their numbers among those of the decoder layer, in execution order. The sets are of these numbers.
    """
    # A form has the names of the parameters that the operators of a group are in, such as "down_proj", and the shapes.
    numbers_by_form: dict[tuple[Any, ...], list[int]] = {}
    for number, group in groups.items():
        form = tuple((operator.tensor, operator.shape) for operator in group)
        numbers_by_form.setdefault(form, []).append(number)

    sets: list[list[int]] = []
    # Down projections come last: their inputs are the outputs of the other matrices of their experts.
    for form in sorted(numbers_by_form, key=_has_down_projection):
        shapes = [shape for _, shape in form]  # [out, in] of each operator
        num_inputs = shapes[0][1]  # all operators of a group have the same inputs
        num_outputs = sum(rows for rows, _ in shapes)
        # the Gram matrix is one of the matrices of a group, and all weights together are another
        largest_matrix = max(num_inputs, num_outputs) * num_inputs
        size = matrices_in_stack(largest_matrix, on_cpu=device.type == "cpu")
        numbers = numbers_by_form[form]
        sets += [numbers[start : start + size] for start in range(0, len(numbers), size)]
    return sets


def _has_down_projection(form: Sequence[tuple[str, tuple[int, int]]]) -> bool:
    """Tell whether a down projection is among operators, of which `form` has the names of parameters, and shapes."""
    return any(name == "down_proj" for name, _ in form)


def _mixture_of(group: Group) -> FusedExperts | None:
    """The mixture of whose experts the operators of a group are; `None` if they are of no expert."""
    operator = group[0]
    return operator.experts if isinstance(operator, ExpertOperator) else None


class _Tracer:
    """Sees the calls of operators, and the ends of parts, in one forward pass."""

    def __init__(self, operators: Mapping[str, LinearOperator]) -> None:
        """Begin with empty notes, before any hook of the trace is on the modules of the `operators`.

        These are by their full names, such as "model.layers.3.mlp.down_proj".
        """
        self.by_module = {operator.module: operator for operator in operators.values()}
        # Modules whose output is compared with W x + b. A hook makes a module doubtful, so they are found before the
        # tracer's own hooks are there.
        self._doubtful = {module for module in self.by_module if _is_doubtful(module)}
        # The calls, in their order. They hold the inputs until groups are made: memory that was freed could be that of
        # another input.
        self.calls: list[tuple[LinearOperator, Tensor]] = []
        self.left_dense: dict[str, str] = {}  # by name, operators that stay dense, with the reason
        self.ends: dict[str, PartEnd] = {}  # by name, operators whose output a part returns
        # the operator that was called last, its output, and the version of that output
        self._latest: tuple[LinearOperator, Tensor, int] | None = None

    def see(
        self,
        module: nn.Module,
        arguments: tuple[Any, ...],
        keywords: dict[str, Any],
        output: object,
    ) -> None:
        """Note that a module has run; this is a forward hook of every operator's module and of every part.

        `arguments` and `keywords` are those of the module's forward pass, and `output` is what it has returned.
        `self.by_module` are the operators by their modules; all other modules are parts. Changes the notes of this
        object.
        """
        operator = self.by_module.get(module)
        if operator is None:
            self._see_part(module, output)
        else:
            self._see_operator(operator, operator_input(arguments, keywords), output)

    def _see_part(self, part: nn.Module, output: object) -> None:
        """Note in `self.ends` if a part returns the output of the operator that was called last.

        `part` is a child module of the decoder layer, and `output` is what its forward pass has returned: a tensor, a
        tuple, or anything else. `self._latest` is the operator that was called last, with its output and the version of
        this output, or `None`; `_see_operator` sets it.
        """
        split = split_output(output)
        if split is None or self._latest is None:
            return
        first, rest = split
        operator, operator_output, version_after_call = self._latest
        # nothing was added to the output in place since the operator returned it
        is_unchanged = internals.version_of(operator_output) == version_after_call
        if first is operator_output and is_unchanged:
            # The first part that returns it: a dropout after the attention returns the same tensor.
            self.ends.setdefault(operator.name, PartEnd(part, rest))

    def _see_operator(self, operator: LinearOperator, inputs: Tensor, output: object) -> None:
        """Note a call of an operator in `self.calls`, and in `self.left_dense` if its output is no product.

        The output is kept in `self._latest` until the next call, because a part may return it. `self._doubtful` are the
        modules that may return something other than `W x + b`: only their outputs are checked.
        """
        self.calls.append((operator, inputs))
        if operator.module in self._doubtful and not _is_product(operator, inputs, output):
            self.left_dense[operator.name] = "returns something other than W x + b"
        self._latest = None
        if isinstance(output, Tensor):
            self._latest = (operator, output, internals.version_of(output))


def _is_doubtful(module: nn.Module) -> bool:
    """Tell whether a linear module may return something other than `W x + b`: it has a hook, or a forward of its own.

    The modules that this package makes for matrices of experts are not `LINEAR`, and never doubtful.
    """
    if not isinstance(module, LINEAR):
        return False
    forward = getattr(module, internals.forward_attribute(module))  # what Accelerate's hooks call
    # the function of a method; anything that is no method has none, and is not plain
    is_plain = getattr(forward, "__func__", None) in (nn.Linear.forward, Conv1D.forward)
    has_hooks = internals.has_forward_hooks(module)  # which may change its output
    return has_hooks or not is_plain


def _is_product(operator: LinearOperator, inputs: Tensor, output: object) -> bool:
    """Tell whether the `output` of an operator for `inputs` [..., in] is `W x + b`, up to rounding. Changes nothing."""
    num_outputs, _ = operator.shape
    if not isinstance(output, Tensor) or output.shape != (*inputs.shape[:-1], num_outputs):
        return False
    weight = operator.parameter.T if operator.transposed else operator.parameter
    bias = getattr(operator.module, "bias", None)
    expected = nn.functional.linear(inputs, weight.to(inputs.dtype), bias)
    distance = (output.float() - expected.float()).norm()
    tolerance = 10 * torch.finfo(inputs.dtype).eps  # relative
    return bool(distance <= tolerance * expected.float().norm())


def _memory_of(inputs: Tensor) -> tuple[Any, ...]:
    """A key that is equal for two tensors if they are the same values in the same memory.

    `inputs` are [..., in], those of an operator.
    """
    return (
        internals.memory_of(inputs),  # not data_ptr(), which is 0 on the meta device
        inputs.storage_offset(),
        # Not the whole shape: one operator may see [batch, sequence, in], the other [tokens, in].
        inputs.numel(),
        inputs.shape[-1],
        inputs.stride()[-1],
        inputs.dtype,
    )


def split_output(output: object) -> tuple[Tensor, Rest] | None:
    """Split what a module returns, a tensor or a tuple, into its first tensor and the rest of the tuple.

    The rest is `None` if `output` is no tuple. Instead of both, `None` is returned if the rest holds anything but
    `None`s (at any depth), or if there is no tensor in the first place.
    """
    first: object = output
    rest: Rest = None
    if isinstance(output, tuple) and output:
        first = output[0]
        rest = output[1:]
    # everything inside the rest, at any depth
    returns_more = any(value is not None for value in internals.leaves_of(rest))
    if returns_more or not isinstance(first, Tensor):
        return None
    return first, rest
