"""Running one decoder layer on recorded inputs, and watching what its operators see."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


class StopForward(Exception):
    """Ends a forward pass whose remainder is not needed."""


@dataclass(frozen=True)
class LayerCall:
    """Arguments of one decoder layer for one batch, besides the hidden states."""

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]

    def run(self, layer: nn.Module, hidden_states: Tensor) -> Tensor | None:
        """Output hidden states of `layer`; `None` when a watcher stopped the forward pass."""
        try:
            output = layer(hidden_states, *self.arguments, **self.keywords)
        except StopForward:
            return None
        return output[0] if isinstance(output, tuple) else output


def operator_input(arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> Tensor:
    """The input of a linear operator from the arguments of its call."""
    return arguments[0] if arguments else next(iter(keywords.values()))


@contextmanager
def watching(
    inputs: Mapping[nn.Module, Callable[[Tensor], None]],
    outputs: Mapping[nn.Module, Callable[[Tensor], None]] | None = None,
) -> Iterator[None]:
    """Call back with the input (before the call) or the output (after it) of modules.

    A callback may raise `StopForward` to end the forward pass there.
    """
    handles = []
    for module, callback in inputs.items():

        def before(_: nn.Module, args: Any, kwargs: Any, callback: Callable[[Tensor], None] = callback) -> None:
            callback(operator_input(args, kwargs))

        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
    for module, callback in (outputs or {}).items():

        def after(_: nn.Module, __: Any, output: Tensor, callback: Callable[[Tensor], None] = callback) -> None:
            callback(output)

        handles.append(module.register_forward_hook(after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
