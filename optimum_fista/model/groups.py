"""Form of a decoder layer, found by running it: which operators share an input, end a part, or are added to the output.

Operators share an input if they are called on the same memory in one pass. So there is no list of names for each
architecture, as other pruners have it, and an unknown architecture is grouped rightly or its operators stay dense.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers.pytorch_utils import Conv1D

from optimum_fista.model import UnsupportedArchitectureError
from optimum_fista.model.activations import ActivationStore
from optimum_fista.model.hooks import operator_input, replaced_forwards, watching
from optimum_fista.model.inputs import LayerActivations, LayerCall
from optimum_fista.model.operators import LINEAR, Group, LinearOperator

_ROUNDED = 0.5
"""Largest mean error of a rounded sum, in units of its last place; layers of 172 families that add show at most .29."""


def trace_groups(
    layer: nn.Module,
    operators: Mapping[str, LinearOperator],
    call: LayerCall,
    hidden_states: Tensor,
) -> tuple[list[Group], dict[str, str]]:
    """Group operators that are called on the same tensor, by one forward pass of their layer.

    The layer is called with `hidden_states` [batch, sequence, hidden] and the arguments of `call`. Returns the groups
    in the order of their first call, inside a group in the order of the calls; and, with the reason, the operators in
    no group, which are not called exactly once, or whose output is not `W x + b`. Operators that end a part of the
    layer learn of it (`LinearOperator.ends`).
    """
    # It holds the inputs until groups are made: memory that was freed could be that of another input.
    seen: list[tuple[LinearOperator, Tensor]] = []
    left_dense: dict[str, str] = {}
    latest: list[
        tuple[LinearOperator, Tensor, int]
    ] = []  # the output of the latest call, and its version
    by_module = {operator.module: operator for operator in operators.values()}
    parts = [part for part in layer.children() if part not in by_module]
    doubtful = set()
    for module in by_module:
        forward = vars(module).get(
            "_old_forward", module.forward
        )  # what the hooks of Accelerate call
        is_plain = getattr(forward, "__func__", None) in (nn.Linear.forward, Conv1D.forward)
        if isinstance(module, LINEAR) and (
            not is_plain or module._forward_hooks
        ):  # either may change its output
            doubtful.add(module)

    def leave(
        module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: object
    ) -> None:
        operator = by_module.get(module)
        if operator is None:  # a part of the layer
            split = split_output(output)
            for last, own, version in latest:
                if (
                    split is not None and split[0] is own and own._version == version
                ):  # nothing was added in place
                    last.ends = module, split[1]
            return
        seen.append((operator, operator_input(arguments, keywords)))
        if module in doubtful and not _is_product(operator, seen[-1][1], output):
            left_dense[operator.name] = "returns something other than W x + b"
        latest[:] = [(operator, output, output._version)] if isinstance(output, Tensor) else []

    version = hidden_states._version  # PyTorch counts changes in place
    with ExitStack() as hooks:
        for module in (*by_module, *parts):
            hooks.enter_context(module.register_forward_hook(leave, with_kwargs=True))
        call.run(layer, hidden_states)
    if hidden_states._version != version:
        why = f"{type(layer).__name__} overwrites the hidden states that it is called with, and can't run on them again"
        raise UnsupportedArchitectureError(f"{why}: have it work on a copy.")
    calls = Counter(operator.name for operator, _ in seen)
    for name in operators:
        if calls[name] != 1:
            times = f"called {calls[name]} times" if calls[name] else "not called"
            left_dense[name] = f"{times} in a forward pass of its decoder layer"
    groups: dict[object, Group] = {}
    for operator, inputs in seen:
        if operator.name in left_dense:
            continue
        place = (
            inputs.untyped_storage()._cdata,
            inputs.storage_offset(),
        )  # data_ptr() is 0 on the meta device
        # Not the whole shape: one operator may see [batch, sequence, in], the other [tokens, in].
        key = (*place, inputs.numel(), inputs.shape[-1], inputs.stride()[-1], inputs.dtype)
        groups.setdefault(key, []).append(operator)
    return list(groups.values()), left_dense


def _is_product(operator: LinearOperator, inputs: Tensor, output: object) -> bool:
    """Whether an output is `W x + b`, up to rounding."""
    if not isinstance(output, Tensor) or output.shape != (*inputs.shape[:-1], operator.shape[0]):
        return False
    weight = operator.parameter.T if operator.transposed else operator.parameter
    expected = nn.functional.linear(
        inputs, weight.to(inputs.dtype), getattr(operator.module, "bias", None)
    )
    distance = (output.float() - expected.float()).norm()
    return bool(distance <= 10 * torch.finfo(inputs.dtype).eps * expected.float().norm())


def split_output(output: object) -> tuple[Tensor, tuple[Any, ...] | None] | None:
    """The tensor that a module returns, and the rest of its tuple; `None` if that holds anything but `None`."""
    first, rest = (
        (output[0], output[1:]) if isinstance(output, tuple) and output else (output, None)
    )
    if not isinstance(first, Tensor) or any(value is not None for value in tree_leaves(rest)):
        return None
    return first, rest


def is_added_to_output(
    activations: LayerActivations, module: nn.Module, hidden_states: Tensor
) -> bool:
    """Whether the decoder layer's output is something plus the output of one of its modules, tried on one batch.

    Its own output may be smaller than a rounding error of the layer's in half precision, so an output as large as the
    rest takes its place: a wave, because a norm may leave a constant as it is.
    """
    call, hidden_states = activations.calls[0], hidden_states.to(activations.device)
    seen: list[Tensor] = []
    wave: Tensor | None = None

    def replace(_: nn.Module, __: object, output: Tensor) -> Tensor:
        seen.append(output)
        # a clone, because some layers add to it in place
        return torch.zeros_like(output) if wave is None else wave.view(output.shape).clone()

    with module.register_forward_hook(replace):
        rest = call.run(activations.layer, hidden_states).float()  # D
        if len(seen) != 1 or seen[0].numel() != rest.numel():
            return False
        # As large as the rest at every token: beside one of huge activations the answers of others to a wave of its
        # size would be lost in rounding.
        sizes = rest.abs().amax(-1, keepdim=True)
        wave = (
            torch.arange(rest.numel(), device=rest.device)
            .float()
            .sin_()
            .view(rest.shape)
            .mul_(sizes)
        )
        wave = wave.to(seen[0].dtype)
        error = (
            call.run(activations.layer, hidden_states).float() - rest - wave.float()
        )  # D + wave - D - wave
    sizes = torch.linalg.vector_norm(wave.float(), dim=-1) + torch.linalg.vector_norm(rest, dim=-1)
    errors = torch.linalg.vector_norm(error, dim=-1) / sizes.clamp_min(
        torch.finfo(sizes.dtype).tiny
    )
    return bool(errors.mean() <= _ROUNDED * torch.finfo(wave.dtype).eps)


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
        self._inputs: dict[
            nn.Module, ActivationStore
        ] = {}  # of the operators that end parts, until outputs are known
        self._last_group: dict[nn.Module, int] = {}
        self._ends: dict[nn.Module, tuple[LinearOperator, tuple[Any, ...] | None]] = {}
        operators = {operator.module for group in groups for operator in group}
        for part in activations.layer.children():
            inside = set(
                part.modules()
            )  # owners, because an expert's module is none of the layer's
            numbers = [
                i
                for i, group in enumerate(groups)
                for operator in group
                if operator.owner in inside
            ]
            if not numbers or part in operators:
                continue
            self._last_group[part] = max(numbers)
            end = groups[max(numbers)][
                0
            ]  # the one that `arguments_of` stops at, so its inputs come by
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
        known = self._inputs | {part: store for part, (store, _) in self._outputs.items()}
        sources = {part: iter(known[part]) for part in finished if part in known}
        outputs = {
            part: self._activations.store()
            for part in finished
            if keep and part not in self._outputs
        }
        rests: dict[nn.Module, tuple[Any, ...] | None] = {}

        def run(
            part: nn.Module, forward: Callable[..., Any], *arguments: Any, **keywords: Any
        ) -> Any:
            if part in self._outputs:
                store, rest = self._outputs[part]
                found = next(sources[part])
                found = (
                    found if store.staging is not None else found.clone()
                )  # the layer may overwrite it
                return found if rest is None else (found, *rest)
            if part in sources:
                operator, rest = self._ends[part]
                found = operator.module(next(sources[part]))
                output = found if rest is None else (found, *rest)
            else:
                output = forward(*arguments, **keywords)
            if part in outputs and (split := split_output(output)) is not None:
                outputs[part].append(split[0], copy=True)
                rests[part] = split[1]
            return output

        forwards = [partial(run, part, part.forward) for part in finished]
        ending = [
            part
            for part, last in self._last_group.items()
            if keep and last == group and part in self._ends
        ]
        inputs = {part: self._activations.store() for part in ending}
        watched = {self._ends[part][0].module: inputs[part].append for part in ending}
        with replaced_forwards(finished, forwards), watching(watched):
            yield
        # after an error nothing is kept, nor of what ran on some batches only: the layer starts again with others
        for part, kept in outputs.items():
            if len(kept) == len(self._activations.calls):
                self._outputs[part] = (kept, rests[part])
                self._inputs.pop(part, None)
        self._inputs |= {
            part: kept for part, kept in inputs.items() if len(kept) == len(self._activations.calls)
        }
