"""Forward passes of modules: run on recorded inputs, watched, replaced for a while, in evaluation mode."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


class StopForward(Exception):
    """Ends a forward pass whose remainder is not needed."""


@dataclass(frozen=True)
class LayerCall:
    """Arguments of one decoder layer for one batch, besides the hidden states."""

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]

    def run(self, layer: nn.Module, hidden_states: Tensor) -> Tensor:
        """Output hidden states of `layer`."""
        output = layer(hidden_states, *self.arguments, **self.keywords)
        return output[0] if isinstance(output, tuple) else output


def operator_input(arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> Tensor:
    """The input of a linear operator from the arguments of its call."""
    return arguments[0] if arguments else next(iter(keywords.values()))


def split_output(output: object) -> tuple[Tensor, tuple[Any, ...] | None] | None:
    """The tensor that a module returns, and the rest of its tuple; `None` if that holds anything but `None`."""
    first, rest = (output[0], output[1:]) if isinstance(output, tuple) and output else (output, None)
    if not isinstance(first, Tensor) or any(value is not None for value in tree_leaves(rest)):
        return None
    return first, rest


@contextmanager
def replaced_forwards(
    modules: Sequence[nn.Module], forwards: Iterable[Callable[..., Any]], name: str = "forward"
) -> Iterator[None]:
    """Have modules run other functions for their forward pass, `name`; afterwards each has its own back."""
    own = [vars(module).get(name) for module in modules]  # of the instance, such as Accelerate's
    try:
        for module, forward in zip(modules, forwards, strict=True):
            setattr(module, name, forward)
        yield
    finally:
        for module, original in zip(modules, own, strict=True):
            if original is not None:
                setattr(module, name, original)
            else:
                vars(module).pop(name, None)


@contextmanager
def watching(
    inputs: Mapping[nn.Module, Callable[[Tensor], None]],
    outputs: Mapping[nn.Module, Callable[[Tensor], None]] | None = None,
) -> Iterator[None]:
    """Call back with the input (before the call) or the output (after it) of modules."""
    with ExitStack() as handles:
        for module, callback in inputs.items():
            # A default argument binds the callback of this turn of the loop.
            def before(_: nn.Module, args: Any, kwargs: Any, callback: Callable[[Tensor], None] = callback) -> None:
                callback(operator_input(args, kwargs))

            handles.enter_context(module.register_forward_pre_hook(before, with_kwargs=True))
        for module, callback in (outputs or {}).items():

            def after(_: nn.Module, __: Any, output: Tensor, callback: Callable[[Tensor], None] = callback) -> None:
                callback(output)

            handles.enter_context(module.register_forward_hook(after))
        yield


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put every module in evaluation mode; afterwards each module has its own mode back."""
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        yield
    finally:
        for module in training:
            module.training = True
