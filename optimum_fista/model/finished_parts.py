"""Finished parts of a decoder layer: all of their operators are pruned, so they need not run again.

A *part* is a child module of a decoder layer, such as its attention. The layer runs from its start for every group of
operators, and a finished part gives the same outputs each time. `FinishedParts` keeps these outputs the first time, and
hands them out in the passes after it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from optimum_fista import internals
from optimum_fista.model.activations import ActivationStore
from optimum_fista.model.groups import PartEnd, Rest, split_output
from optimum_fista.model.hooks import replaced_forwards, watching
from optimum_fista.model.inputs import LayerActivations
from optimum_fista.model.operators import LINEAR, Group, LinearOperator


@dataclass(eq=False)
class _Part:
    """A part of a decoder layer that has operators, and what is kept of it.

    Attributes:
        module: The part.
        groups: Numbers of the groups that have operators in the part, rising.
        end: The operator whose output the part returns unchanged; `None` if there is no such operator, or if its inputs
            can't be kept.
        rest: What the part returns in a tuple after its output. Known if `end` or `outputs` is.
        inputs: Inputs of `end` by batch, which do not change any more. Kept until `outputs` are.
        outputs: What the finished part returns, by batch.
    """

    module: nn.Module
    groups: list[int]
    end: LinearOperator | None
    rest: Rest
    inputs: ActivationStore | None = None
    outputs: ActivationStore | None = None

    @property
    def last_group(self) -> int:
        """The number of the group after whose pruning the part is finished."""
        return self.groups[-1]


class FinishedParts:
    """Outputs of the finished parts of a decoder layer, such as its attention, kept where activations wait.

    The first time that a finished part runs, its outputs are kept; afterwards they are handed out. If a part returns
    the output of its last operator, as attention does, then even the first time only that operator runs, on the inputs
    that it was pruned on. Parts that return anything else besides one tensor run again.

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

        `activations` is the decoder layer. `groups` are in the order of its `LayerTrace`, and `ends` are those of its
        `LayerTrace`: by the name of an operator, the part that returns its output unchanged.
        """
        self._activations = activations
        self._parts = _parts_with_operators(activations.layer, groups, ends)
        # in the sense above; `None`: the layer has no attention
        self._attention: _Part | None = None
        first = _first_child_with_operators(activations.layer)
        for part in self._parts:
            has_first_groups = part.groups == list(range(len(part.groups)))
            others_follow = len(part.groups) < len(groups)
            if part.module is first and part.end is not None and has_first_groups and others_follow:
                self._attention = part
        self.groups_of_attention = 0 if self._attention is None else len(self._attention.groups)

    @contextmanager
    def keeping_inputs_of_attention(self) -> Iterator[None]:
        """Inside, the dense layer runs whole; keep the inputs of the attention's last operator for later passes.

        Afterwards the attention does not run any more: only this operator runs, on these inputs, with the weights that
        it has then. The caller must run the layer on every batch, in their order. `self.groups_of_attention` must not
        be 0.
        """
        attention = self._attention
        assert attention is not None
        assert attention.end is not None
        inputs = self._activations.store()
        # copies, because the layer may overwrite them
        with watching({attention.end.module: partial(inputs.append, copy=True)}):
            yield
        attention.inputs = inputs

    @contextmanager
    def skipped(self, group: int, *, keep: bool) -> Iterator[None]:
        """Inside, the layer runs without the parts that are finished before a group.

        The caller must run the layer on every batch, in their order. `group` is the number of a group; the number after
        that of the last one stands for the layer's end. With `keep`, the outputs of finished parts are kept if they are
        not kept yet, and so are the inputs of operators that end a part. This pays if the layer runs again afterwards.

        Replaces the forward passes of finished parts and watches operators; both end with the context.
        """
        finished = [part for part in self._parts if part.last_group < group]
        replays = [
            _Replay(part, self._activations.store() if keep and part.outputs is None else None)
            for part in finished
        ]
        # Parts that end with this group: their last operators are not pruned yet, but their inputs are final.
        new_inputs: dict[_Part, ActivationStore] = {}
        callbacks: dict[nn.Module, Callable[[Tensor], None]] = {}
        for part in self._parts:
            if keep and part.last_group == group and part.end is not None:
                new_inputs[part] = self._activations.store()
                callbacks[part.end.module] = new_inputs[part].append

        modules = [part.module for part in finished]
        with replaced_forwards(modules, replays), watching(callbacks):
            yield

        # This line is not reached after an error, so nothing is kept then. Of a part that ran on some batches only,
        # nothing is kept either. In both cases a later pass runs the part.
        num_batches = len(self._activations.calls)
        for part, replay in zip(finished, replays, strict=True):
            if replay.new_outputs is not None and len(replay.new_outputs) == num_batches:
                part.outputs = replay.new_outputs
                part.inputs = None  # not needed any more
        for part, inputs in new_inputs.items():
            if len(inputs) == num_batches:
                part.inputs = inputs


def _parts_with_operators(
    layer: nn.Module, groups: Sequence[Group], ends: Mapping[str, PartEnd]
) -> list[_Part]:
    """Find the child modules of a decoder layer that have operators of `groups`; nothing is kept of them yet.

    Children that are operators themselves are no parts. `groups` are in execution order, and `ends` are those of the
    `LayerTrace`.
    """
    operator_modules = {operator.module for group in groups for operator in group}
    parts: list[_Part] = []
    for child in layer.children():
        if child in operator_modules:
            continue
        inside = set(child.modules())
        # The owner of an operator's weight counts: the module that this package makes for an expert is none of the
        # layer's.
        numbers = [
            number
            for number, group in enumerate(groups)
            if any(operator.owner in inside for operator in group)
        ]
        if not numbers:
            continue
        # The pass that prunes a group stops at its first operator (`arguments_of`), so only the inputs of this one can
        # be watched.
        last_operator = groups[numbers[-1]][0]
        end = ends.get(last_operator.name)
        # A hook that changes inputs has changed the kept ones already, and would change them again.
        has_hooks = internals.has_forward_pre_hooks(last_operator.module)
        if end is not None and end.part is child and not has_hooks:
            parts.append(_Part(child, numbers, last_operator, end.rest))
        else:
            parts.append(_Part(child, numbers, end=None, rest=None))
    return parts


def _first_child_with_operators(layer: nn.Module) -> nn.Module | None:
    """Return the first child of a decoder layer that has linear operators inside; `None` if there is no such child."""
    for child in layer.children():
        if any(isinstance(module, LINEAR) for module in child.modules()):
            return child
    return None


class _Replay:
    """What is called in place of the forward pass of a finished part, batch after batch, in one pass of the layer.

    Attributes:
        new_outputs: Gets the outputs of the part; `None` if they are not to be kept.
    """

    def __init__(self, part: _Part, new_outputs: ActivationStore | None) -> None:
        """Begin before the first batch, while the part has its own forward pass."""
        self.new_outputs = new_outputs
        self._part = part
        self._forward = part.module.forward
        # What is kept of the part, batch after batch: its outputs, or else the inputs of the operator that ends it.
        kept = part.inputs if part.outputs is None else part.outputs
        self._kept: Iterator[Tensor] = iter([] if kept is None else kept)

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        """Return what the part returns for the next batch.

        If outputs of the part are kept, nothing runs. If the inputs of its last operator are kept, only that operator
        runs. If nothing is kept, the part's own forward pass runs with the arguments of the call.
        """
        part = self._part
        if part.outputs is not None:
            output = next(self._kept)
            # A store with buffers makes a copy for each reader. Otherwise this may be the kept tensor itself.
            is_kept_itself = part.outputs.staging is None
            if is_kept_itself:
                output = output.clone()  # the layer may overwrite it
            return _joined(output, part.rest)

        if part.inputs is not None and part.end is not None:
            inputs = next(self._kept)
            returned = _joined(part.end.module(inputs), part.rest)
        else:
            returned = self._forward(*arguments, **keywords)

        split = split_output(returned)
        if self.new_outputs is not None and split is not None:
            output, part.rest = split
            self.new_outputs.append(output, copy=True)
        return returned


def _joined(output: Tensor, rest: Rest) -> Any:
    """Put an output and the rest of its tuple together, as the module returned them: the inverse of `split_output`."""
    return output if rest is None else (output, *rest)
