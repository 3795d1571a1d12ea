"""Groups of linear operators of a decoder layer that share an input, and parts of it whose groups are all pruned."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from optimum_fista.model import UnsupportedArchitectureError
from optimum_fista.model.activation_store import ActivationStore
from optimum_fista.model.forward import replaced_forwards, split_output, watching
from optimum_fista.model.layer_inputs import LayerActivations, LayerCall
from optimum_fista.model.operator import LINEAR, Group, LinearOperator


def trace_groups(
    layer: nn.Module, operators: Mapping[str, LinearOperator], call: LayerCall, hidden_states: Tensor
) -> tuple[list[Group], dict[str, str]]:
    """Group operators that are called on the same tensor, by one forward pass of their layer.

    Operators that are not called exactly once, or whose output is not `W x + b`, are in no group. Operators that end a
    part of the layer learn of it (`LinearOperator.ends`). The layer is called with `hidden_states` [batch, sequence,
    hidden] and the arguments of `call`.

    Returns:
        Groups in the order of their first call, inside a group in the order of the calls; and the operators that are
        in no group, with the reason.
    """
    # It holds the inputs until groups are made: memory that was freed could be that of another input.
    seen: list[tuple[LinearOperator, Tensor]] = []
    others: list[str] = []
    latest: list[tuple[LinearOperator, Tensor, int]] = []  # the output of the latest call, and its version

    def leave(operator: LinearOperator, output: Tensor) -> None:
        if operator in special and not _is_product(operator, seen[-1][1], output):
            others.append(operator.name)
        latest[:] = [(operator, output, output._version)] if isinstance(output, Tensor) else []

    def end_part(part: nn.Module, output: object) -> None:
        split = split_output(output)
        for operator, own, version in latest:
            if split is not None and split[0] is own and own._version == version:  # nothing was added in place
                operator.ends = part, split[1]

    special = [operator for operator in operators.values() if _may_change_its_product(operator.module)]
    before = {o.module: (lambda inputs, o=o: seen.append((o, inputs))) for o in operators.values()}
    after = {operator.module: partial(leave, operator) for operator in operators.values()}
    after |= {part: partial(end_part, part) for part in layer.children() if part not in after}
    # PyTorch counts changes in place.
    version = hidden_states._version
    with watching(before, after):
        call.run(layer, hidden_states)
    if hidden_states._version != version:
        raise UnsupportedArchitectureError(
            f"{type(layer).__name__} overwrites the hidden states that it is called with, so it can't be run on them "
            "again: have it work on a copy."
        )
    calls = Counter(operator.name for operator, _ in seen)
    where = "in a forward pass of its decoder layer"
    left_dense = {
        name: f"called {calls[name]} times {where}" if calls[name] else f"not called {where}"
        for name in operators
        if calls[name] != 1
    }
    left_dense |= dict.fromkeys(others, "returns something other than W x + b")
    groups: dict[object, Group] = {}
    for operator, inputs in seen:
        if operator.name in left_dense:
            continue
        place = (inputs.untyped_storage()._cdata, inputs.storage_offset())  # data_ptr() is 0 on the meta device
        # Not the whole shape: one operator may see [batch, sequence, in], the other [tokens, in].
        key = (*place, inputs.numel(), inputs.shape[-1], inputs.stride()[-1], inputs.dtype)
        groups.setdefault(key, []).append(operator)
    return list(groups.values()), left_dense


def _may_change_its_product(module: nn.Module) -> bool:
    """Whether a linear module has another forward pass than its type's, or hooks, which may change the output."""
    forward = vars(module).get("_old_forward", module.forward)  # what the hooks of Accelerate call
    is_plain = getattr(forward, "__func__", None) in (nn.Linear.forward, Conv1D.forward)
    return isinstance(module, LINEAR) and (not is_plain or bool(module._forward_hooks))


def _is_product(operator: LinearOperator, inputs: Tensor, output: object) -> bool:
    """Whether an output is `W x + b`, up to rounding."""
    if not isinstance(output, Tensor) or output.shape != (*inputs.shape[:-1], operator.shape[0]):
        return False
    weight = operator.parameter.T if operator.transposed else operator.parameter
    expected = nn.functional.linear(inputs, weight.to(inputs.dtype), getattr(operator.module, "bias", None))
    distance = (output.float() - expected.float()).norm()
    return bool(distance <= 10 * torch.finfo(inputs.dtype).eps * expected.float().norm())


class FinishedParts:
    """Outputs of the finished parts of a decoder layer, such as its attention, kept where activations wait.

    The layer runs from its start for every group of operators. Parts whose operators are all pruned give the same
    outputs each time: they are kept the first time and handed out afterwards. If a part returns the output of its last
    operator, as attention does, then even the first time only that operator runs, on the inputs that it was pruned on.
    Parts that return anything else besides one tensor run again. The groups are in the order in which they are pruned.
    """

    def __init__(self, activations: LayerActivations, groups: Sequence[Group]) -> None:
        self._activations = activations
        self._outputs: dict[nn.Module, tuple[ActivationStore, tuple[Any, ...] | None]] = {}
        self._inputs: dict[nn.Module, ActivationStore] = {}
        self._last_group: dict[nn.Module, int] = {}
        self._ends: dict[nn.Module, tuple[LinearOperator, tuple[Any, ...] | None]] = {}
        operators = {operator.module for group in groups for operator in group}
        for part in activations.layer.children():
            inside = set(part.modules())  # owners, because an expert's module is none of the layer's
            numbers = [i for i, group in enumerate(groups) for operator in group if operator.owner in inside]
            if not numbers or part in operators:
                continue
            self._last_group[part] = max(numbers)
            end = groups[max(numbers)][0]  # the one that `arguments_of` stops at, so its inputs come by
            # a hook that changes inputs would change those that came by a second time
            if end.ends is not None and end.ends[0] is part and not end.module._forward_pre_hooks:
                self._ends[part] = end, end.ends[1]

    @contextmanager
    def skipped(self, group: int, *, keep: bool) -> Iterator[None]:
        """The layer runs inside on every batch, in their order, without the parts that are finished before a group.

        The number after that of the last group stands for the layer's end. If the layer runs again afterwards it pays
        to `keep` what is not known yet.
        """
        finished = [part for part, last in self._last_group.items() if last < group]
        outputs = {part: self._activations.store() for part in finished if keep and part not in self._outputs}
        rests: dict[nn.Module, tuple[Any, ...] | None] = {}

        def run(part: nn.Module, forward: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
            output = forward(*arguments, **keywords)
            split = split_output(output) if part in outputs else None
            if split is not None:
                outputs[part].append(split[0], copy=True)  # the layer may overwrite it
                rests[part] = split[1]
            return output

        forwards = [partial(run, part, self._shortcut(part)) for part in finished]
        ending = [part for part, last in self._last_group.items() if keep and last == group and part in self._ends]
        inputs = {part: self._activations.store() for part in ending}
        watched = {self._ends[part][0].module: inputs[part].append for part in ending}
        with replaced_forwards(finished, forwards), watching(watched):
            yield
        # after an error nothing is kept, nor of what ran on some batches only: the layer starts again with others
        for part, store in outputs.items():
            if len(store) == len(self._activations.calls):
                self._outputs[part] = (store, rests[part])
                self._inputs.pop(part, None)
        self._inputs |= {part: store for part, store in inputs.items() if len(store) == len(self._activations.calls)}

    def _shortcut(self, part: nn.Module) -> Callable[..., Any]:
        """The quickest way to the outputs of a finished part, a batch a call."""
        if part in self._outputs:
            store, rest = self._outputs[part]
        elif part in self._inputs:
            store, rest = self._inputs[part], self._ends[part][1]
        else:
            return part.forward
        operator = None if part in self._outputs else self._ends[part][0].module
        kept = iter(store)

        def run(*_: Any, **__: Any) -> Any:
            found = next(kept)
            output = operator(found) if operator is not None else found if store.gives_copies else found.clone()
            return output if rest is None else (output, *rest)

        return run
