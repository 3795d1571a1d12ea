"""Parts of a decoder layer whose operators are all pruned, and which need not run again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from optimum_fista.model.activation_store import ActivationStore
from optimum_fista.model.activations import LayerActivations
from optimum_fista.model.layer_sums import Group
from optimum_fista.model.replay import replaced_forwards


class FinishedParts:
    """Outputs of the finished parts of a decoder layer, such as its attention, kept where activations wait.

    The layer runs from its start for every group of operators. Parts whose operators are all pruned give the same
    outputs each time: they are kept the first time and handed out afterwards. Parts that give out more than one tensor
    run again.

    Args:
        activations: The decoder layer.
        groups: Its groups of operators, in the order in which they are pruned.
    """

    def __init__(self, activations: LayerActivations, groups: Sequence[Group]) -> None:
        self._activations = activations
        self._kept: dict[nn.Module, tuple[ActivationStore, tuple[Any, ...] | None]] = {}
        self._last_group: dict[nn.Module, int] = {}
        operators = {operator.module for group in groups for operator in group}
        for part in activations.layer.children():
            inside = set(part.modules())
            numbers = [i for i, group in enumerate(groups) for operator in group if operator.owner in inside]
            if numbers and part not in operators:
                self._last_group[part] = max(numbers)

    @contextmanager
    def skipped(self, group: int, *, keep: bool) -> Iterator[None]:
        """The layer runs inside on every batch, in their order, without the parts that are finished before a group.

        Args:
            group: Number of the group; that of the first group after the last stands for the layer's end.
            keep: Whether outputs of parts that are finished, and that nothing is known of yet, are kept.
        """
        finished = [part for part, last in self._last_group.items() if last < group]
        new = {part: self._activations.store() for part in finished if keep and part not in self._kept}
        rests: dict[nn.Module, tuple[Any, ...] | None] = {}

        def keeping(part: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
            def run(*arguments: Any, **keywords: Any) -> Any:
                output = forward(*arguments, **keywords)
                first, rest = (output[0], tuple(output[1:])) if isinstance(output, tuple) else (output, None)
                if isinstance(first, Tensor) and not any(isinstance(value, Tensor) for value in tree_leaves(rest)):
                    new[part].append(first, copy=True)  # the layer may overwrite it
                    rests[part] = rest
                return output

            return run

        def handing_out(store: ActivationStore, rest: tuple[Any, ...] | None) -> Callable[..., Any]:
            outputs = iter(store)

            def run(*_: Any, **__: Any) -> Any:
                output = next(outputs)
                output = output if store.gives_copies else output.clone()
                return output if rest is None else (output, *rest)

            return run

        known = [part for part in finished if part in self._kept]
        forwards = [handing_out(*self._kept[part]) for part in known]
        forwards += [keeping(part, part.forward) for part in new]
        with replaced_forwards([*known, *new], forwards):
            yield
        for part, store in new.items():
            if len(store) == len(self._activations.calls):
                self._kept[part] = (store, rests[part])
