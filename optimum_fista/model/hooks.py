"""Callbacks during forward passes of modules, and functions that replace a pass.

All are context managers, which leave the modules as they were: hooks are removed, and forward passes put back.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn


def operator_input(arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> Tensor:
    """The input of a linear operator: the first argument of its call, given by position or else by keyword.

    `arguments` and `keywords` are all arguments of the call, as PyTorch passes them to a hook.
    """
    if arguments:
        return arguments[0]
    first_keyword = next(iter(keywords))  # in the order of the call
    return keywords[first_keyword]


def _call_with_input(
    callback: Callable[[Tensor], None],
    _: nn.Module,
    arguments: tuple[Any, ...],
    keywords: dict[str, Any],
) -> None:
    """Call `callback` with the input of an operator; a forward pre-hook as soon as `callback` is bound by `partial`.

    `arguments` and `keywords` are those of the operator's call; they stay as they are.
    """
    callback(operator_input(arguments, keywords))


@contextmanager
def watching(
    inputs: Mapping[nn.Module, Callable[[Tensor], None]],
    hooks: Mapping[nn.Module, Callable[..., None]] | None = None,
) -> Iterator[None]:
    """Inside, call back with the input of operators before they compute, and have forward hooks on modules.

    `inputs` are callbacks by the operators' modules; each is called with the input tensor. `hooks` are forward hooks of
    PyTorch by modules. All are removed at the end, also after an error.
    """
    with ExitStack() as registered:
        for module, callback in inputs.items():
            before = partial(_call_with_input, callback)
            registered.enter_context(module.register_forward_pre_hook(before, with_kwargs=True))
        for module, hook in (hooks or {}).items():
            registered.enter_context(module.register_forward_hook(hook))
        yield


@contextmanager
def replaced_forwards(
    modules: Sequence[nn.Module], forwards: Iterable[Callable[..., Any]], name: str = "forward"
) -> Iterator[None]:
    """Replace the forward pass `name` of modules by other functions; afterwards each module has its own again.

    There is a function for each module. `name` is "forward", or "_old_forward" for one that Accelerate has wrapped.
    """
    # A module may have a function of its own, such as one of Accelerate; `None` if that of its class is used.
    own = [vars(module).get(name) for module in modules]
    try:
        for module, forward in zip(modules, forwards, strict=True):
            setattr(module, name, forward)
        yield
    finally:
        for module, original in zip(modules, own, strict=True):
            if original is not None:
                setattr(module, name, original)
            else:  # without the attribute, the function of the class is used again
                vars(module).pop(name, None)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put every module in evaluation mode; afterwards each module has its old mode again."""
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        yield
    finally:
        for module in training:
            module.training = True  # not by `train()`, which changes modules inside, too
