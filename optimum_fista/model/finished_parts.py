"""Parts of a decoder layer whose operators are all pruned, and which need not run again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from optimum_fista.model.activation_store import ActivationStore
from optimum_fista.model.activations import LayerActivations
from optimum_fista.model.layer_sums import Group
from optimum_fista.model.operator import LinearOperator
from optimum_fista.model.replay import replaced_forwards, split_output, watching


class FinishedParts:
    """Outputs of the finished parts of a decoder layer, such as its attention, kept where activations wait.

    The layer runs from its start for every group of operators. Parts whose operators are all pruned give the same
    outputs each time: they are kept the first time and handed out afterwards. If a part returns the output of its last
    operator, as attention does, then even the first time only that operator runs, on the inputs that it was pruned on.
    Parts that return anything else besides one tensor run again.

    Args:
        activations: The decoder layer.
        groups: Its groups of operators, in the order in which they are pruned, traced.
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

        def keeping(part: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
            def run(*arguments: Any, **keywords: Any) -> Any:
                output = forward(*arguments, **keywords)
                split = split_output(output)
                if split is not None:
                    outputs[part].append(split[0], copy=True)  # the layer may overwrite it
                    rests[part] = split[1]
                return output

            return run

        forwards = [self._shortcut(part) for part in finished]
        forwards = [keeping(part, f) if part in outputs else f for part, f in zip(finished, forwards, strict=True)]
        ending = [part for part, last in self._last_group.items() if keep and last == group and part in self._ends]
        inputs = {part: self._activations.store() for part in ending}
        watched = {self._ends[part][0].module: inputs[part].append for part in ending}
        with replaced_forwards(finished, forwards), watching(watched):
            yield
        # after an error nothing is kept: the layer starts again with other batches
        for part, store in outputs.items():
            if self._is_whole(store):
                self._outputs[part] = (store, rests[part])
                self._inputs.pop(part, None)
        self._inputs.update({part: store for part, store in inputs.items() if self._is_whole(store)})

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

    def _is_whole(self, store: ActivationStore) -> bool:
        return len(store) == len(self._activations.calls)
