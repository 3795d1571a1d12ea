"""Form of a decoder layer, found by running it: which operators share an input, end a part, or are added to the output.

Operators share an input if they are called on the same memory in one pass; together they are a `Group`. So there is no
list of names for each architecture, as other pruners have it, and an unknown architecture is grouped rightly or its
operators stay dense. A *part* is a child module of a decoder layer, such as its attention. A module returns a tensor,
or a tuple: its first tensor is the output that counts here, and the *rest* of the tuple (`Rest`) is kept only to return
it again. The *version* of a tensor grows if it is changed in place.

`trace_groups` is called first, while the layer is dense. `solved_together` says which groups are pruned at once, and
`FinishedParts` then serves the passes of the layer between which groups are pruned.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from optimum_fista import internals
from optimum_fista.model import UnsupportedArchitectureError
from optimum_fista.model.activations import ActivationStore
from optimum_fista.model.experts import ExpertOperator, FusedExperts
from optimum_fista.model.hooks import operator_input, replaced_forwards, watching
from optimum_fista.model.inputs import LayerActivations, LayerCall
from optimum_fista.model.operators import LINEAR, Group, LinearOperator
from optimum_fista.solve.linalg import matrices_in_stack

_ROUNDED = 0.5
"""Largest mean error of a rounded sum, in units of its last place; layers of 172 families that add show at most .29."""

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


def _joined(first: Tensor, rest: Rest) -> Any:
    """Put a tensor and the rest of its tuple together, as the module returned them: the inverse of `split_output`."""
    return first if rest is None else (first, *rest)


def is_added_to_output(
    activations: LayerActivations, module: nn.Module, hidden_states: Tensor
) -> bool:
    """Tell whether the decoder layer's output is something plus the output of one of its modules, on one batch.

    `activations` is the layer with its recorded arguments. `module` is the last operator of the layer, or its mixture
    of experts. `hidden_states` [batch, sequence, hidden] are those of the first batch.

    The layer runs twice. First zeros take the place of the module's output: what the layer returns then is the rest D.
    Then a wave takes its place, and the layer must return D plus the wave. The module's own output would not do: it may
    be smaller than a rounding error of D in half precision. The wave is as large as D. A constant would not do either,
    because a norm may leave it as it is.

    A hook is on the module while the layer runs; nothing else is changed.
    """
    call = activations.calls[0]
    hidden_states = hidden_states.to(activations.device)
    outputs: list[Tensor] = []  # of the module
    with module.register_forward_hook(partial(_replace_by_zeros, outputs)):
        rest = call.run(activations.layer, hidden_states).float()  # D
    is_called_once = len(outputs) == 1
    if not is_called_once or outputs[0].numel() != rest.numel():
        return False

    # At every token the wave is as large as the rest is there. Some tokens have huge activations: a wave of one size
    # for all tokens would be lost in their rounding, or drown the others.
    sizes = rest.abs().amax(-1, keepdim=True)
    wave = torch.arange(rest.numel(), device=rest.device).float().sin_()
    wave = wave.view(rest.shape).mul_(sizes).to(outputs[0].dtype)
    with module.register_forward_hook(partial(_replace_by_wave, wave)):
        # (D + wave) - D - wave
        error = call.run(activations.layer, hidden_states).float() - rest - wave.float()

    # relative errors of the tokens; a token of zeros has the error 0, not NaN
    norms = torch.linalg.vector_norm(wave.float(), dim=-1) + torch.linalg.vector_norm(rest, dim=-1)
    least_norm = torch.finfo(norms.dtype).tiny
    errors = torch.linalg.vector_norm(error, dim=-1) / norms.clamp_min(least_norm)
    rounding = torch.finfo(wave.dtype).eps
    return bool(errors.mean() <= _ROUNDED * rounding)


def _replace_by_zeros(outputs: list[Tensor], _: nn.Module, __: object, output: Tensor) -> Tensor:
    """Append the output of a module to `outputs`, and replace it by zeros; a forward hook."""
    outputs.append(output)
    return torch.zeros_like(output)


def _replace_by_wave(wave: Tensor, _: nn.Module, __: object, output: Tensor) -> Tensor:
    """Replace the output of a module by a wave with as many numbers; a forward hook."""
    # a clone, because some layers add to it in place
    return wave.view(output.shape).clone()


@dataclass(frozen=True)
class _PartOutputs:
    """The outputs of a finished part: the first tensor of every batch, and the rest, which is the same for all."""

    store: ActivationStore
    rest: Rest


class FinishedParts:
    """Outputs of the finished parts of a decoder layer, such as its attention, kept where activations wait.

    The layer runs from its start for every group of operators. Parts whose operators are all pruned give the same
    outputs each time: they are kept the first time and handed out afterwards. If a part returns the output of its last
    operator, as attention does, then even the first time only that operator runs, on the inputs that it was pruned on.
    Parts that return anything else besides one tensor run again.

    `groups` and `ends` are those of `LayerTrace`, groups in its order.

    The *attention* is the first part of the layer with a linear operator, whatever its name (it may be a Mamba mixer).
    It counts only if its groups are the first ones, if other groups come after them, and if it returns the output of
    its last operator unchanged. Otherwise the layer has no attention in this sense.

    Attributes:
        groups_of_attention: How many of the groups are in the attention; 0 without an attention.
    """

    def __init__(
        self,
        activations: LayerActivations,
        groups: Sequence[Group],
        ends: Mapping[str, PartEnd],
    ) -> None:
        """Find after which group each part is finished; nothing runs, and nothing is kept yet.

        `activations` is the decoder layer. `groups` are in the order of its `LayerTrace`, and `ends` are those
        of its `LayerTrace`: by the name of an operator, the part that returns its output unchanged.
        """
        self._activations = activations
        # what finished parts return, by part, as soon as it is kept
        self._outputs: dict[nn.Module, _PartOutputs] = {}
        # by part, the inputs of the operator that ends it, until the outputs of the part are kept
        self._inputs: dict[nn.Module, ActivationStore] = {}
        # by part, the number of the last group that has operators in it
        self._last_group: dict[nn.Module, int] = {}
        # by part, the operator that ends it
        self._ends: dict[nn.Module, tuple[LinearOperator, Rest]] = {}
        self.groups_of_attention = 0
        self._attention = _first_part_with_operators(activations.layer)

        operator_modules = {operator.module for group in groups for operator in group}
        for part in activations.layer.children():
            if part in operator_modules:
                continue
            inside = set(part.modules())
            # Groups with an operator in this part. The owner of its weight counts: the module that this package makes
            # for an expert is none of the layer's.
            numbers = [
                number
                for number, group in enumerate(groups)
                if any(operator.owner in inside for operator in group)
            ]
            if not numbers:
                continue
            self._last_group[part] = max(numbers)
            # The pass that prunes a group stops at its first operator (`arguments_of`), so only the inputs of this one
            # can be watched.
            last_operator = groups[max(numbers)][0]
            end = ends.get(last_operator.name)
            # A hook that changes inputs has changed the kept ones already, and would change them again.
            has_hooks = internals.has_forward_pre_hooks(last_operator.module)
            if end is not None and end.part is part and not has_hooks:
                self._ends[part] = (last_operator, end.rest)
            are_first = numbers == list(range(len(numbers)))
            others_follow = len(numbers) < len(groups)
            if part is self._attention and part in self._ends and are_first and others_follow:
                self.groups_of_attention = len(numbers)

    @contextmanager
    def keeping_inputs_of_attention(self) -> Iterator[None]:
        """Inside, the dense layer runs whole; keep the inputs of the attention's last operator for later passes.

        Afterwards the attention does not run any more: only this operator runs, on these inputs, with the weights that
        it has then. The caller must run the layer on every batch, in their order. `self.groups_of_attention` must not
        be 0. `self._ends` has the operator; its inputs are kept in `self._inputs`, as copies, because the layer may
        overwrite them.
        """
        assert self._attention is not None
        operator, _ = self._ends[self._attention]
        inputs = self._activations.store()
        with watching({operator.module: partial(inputs.append, copy=True)}):
            yield
        self._inputs[self._attention] = inputs

    @contextmanager
    def skipped(self, group: int, *, keep: bool) -> Iterator[None]:
        """Inside, the layer runs without the parts that are finished before a group.

        The caller must run the layer on every batch, in their order. `group` is the number of a group; the number after
        that of the last one stands for the layer's end. With `keep`, outputs of finished parts (`self._outputs`), and
        the inputs of operators that end a part (`self._inputs`), are kept if they are not kept yet. This pays if the
        layer runs again afterwards.

        `self._last_group` has for each part the number of the last group in the part, and `self._ends` the operator
        that ends the part. Replaces the forward passes of finished parts and watches operators; both end with the
        context.
        """
        finished = [part for part, last in self._last_group.items() if last < group]
        layer_pass = _Pass(self._outputs, self._ends)
        for part in finished:
            # in the pass, each part takes one tensor for each batch
            if part in self._outputs:
                layer_pass.waiting[part] = iter(self._outputs[part].store)
            elif part in self._inputs:
                layer_pass.waiting[part] = iter(self._inputs[part])
            if keep and part not in self._outputs:
                layer_pass.new_outputs[part] = self._activations.store()

        # Parts that end with this group: their last operators are not pruned yet, but their inputs are final.
        new_inputs: dict[nn.Module, ActivationStore] = {}
        callbacks: dict[nn.Module, Callable[[Tensor], None]] = {}
        for part, last in self._last_group.items():
            if keep and last == group and part in self._ends:
                operator, _ = self._ends[part]
                new_inputs[part] = self._activations.store()
                callbacks[operator.module] = new_inputs[part].append

        forwards = [partial(layer_pass.run, part, part.forward) for part in finished]
        with replaced_forwards(finished, forwards), watching(callbacks):
            yield

        # This line is not reached after an error, so nothing is kept then. Of a part that ran on some batches only,
        # nothing is kept either. In both cases a later pass runs the part.
        num_batches = len(self._activations.calls)
        for part, store in layer_pass.new_outputs.items():
            if len(store) == num_batches:
                self._outputs[part] = _PartOutputs(store, layer_pass.rests[part])
                self._inputs.pop(part, None)  # not needed any more
        for part, store in new_inputs.items():
            if len(store) == num_batches:
                self._inputs[part] = store


def _first_part_with_operators(layer: nn.Module) -> nn.Module | None:
    """Return the first child of a decoder layer that has linear operators inside; `None` if there is no such child."""
    for part in layer.children():
        if any(isinstance(module, LINEAR) for module in part.modules()):
            return part
    return None


class _Pass:
    """One pass of a decoder layer over all batches, in which finished parts do not run."""

    def __init__(
        self,
        outputs: Mapping[nn.Module, _PartOutputs],
        ends: Mapping[nn.Module, tuple[LinearOperator, Rest]],
    ) -> None:
        """Keep the two arguments, which are by part and are only read; all other maps begin empty.

        `outputs` has the first tensor of every batch, and the rest. `ends` has the operator whose output the part
        returns, and the rest beside it. The caller then fills `waiting` and `new_outputs`, before the layer runs; `run`
        fills `rests`.
        """
        self._outputs = outputs
        self._ends = ends
        # what is kept of a finished part, batch after batch: its outputs, or the inputs of the operator that ends it
        self.waiting: dict[nn.Module, Iterator[Tensor]] = {}
        # outputs that are to be kept in this pass, by part
        self.new_outputs: dict[nn.Module, ActivationStore] = {}
        # what the parts with new outputs returned besides, in the latest batch
        self.rests: dict[nn.Module, Rest] = {}

    def run(
        self, part: nn.Module, forward: Callable[..., Any], *arguments: Any, **keywords: Any
    ) -> Any:
        """Return what a finished part returns for the next batch, in place of its own forward pass `forward`.

        `self.waiting` yields batch after batch what is kept of a part. If these are its outputs (the part is in
        `self._outputs`), nothing runs. If they are the inputs of its last operator, only that operator (`self._ends`)
        runs. If nothing is kept, `forward` runs with the other arguments. The output is appended to the part's store in
        `self.new_outputs`, if it has one, and its rest is noted in `self.rests`.
        """
        if part in self._outputs:
            stored = self._outputs[part]
            first = next(self.waiting[part])
            # A store with buffers makes a copy for each reader. Otherwise this may be the kept tensor itself.
            is_kept_itself = stored.store.staging is None
            if is_kept_itself:
                first = first.clone()  # the layer may overwrite it
            return _joined(first, stored.rest)

        if part in self.waiting:
            operator, rest = self._ends[part]
            first = operator.module(next(self.waiting[part]))  # on its inputs of this batch
            output = _joined(first, rest)
        else:
            output = forward(*arguments, **keywords)

        split = split_output(output)
        if part in self.new_outputs and split is not None:
            first, rest = split
            self.new_outputs[part].append(first, copy=True)
            self.rests[part] = rest
        return output
