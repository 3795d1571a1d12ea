"""Forward passes of modules: their precision, callbacks during a pass, and functions that replace a pass.

A run may round float32 matrices to bfloat16 for their products, if that is fast on the device. `quick_products` allows
this in forward passes, gradients and sums over tokens. All other code, such as the solvers and the proofs, computes in
float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

_DTYPE: ContextVar[torch.dtype] = ContextVar("dtype of quick products", default=torch.float32)


def compute_dtype_of(name: str, device: torch.device) -> torch.dtype:
    """The dtype of products by its name; `"auto"` is bfloat16, but on a CPU only if it has units for it."""
    units = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")  # an older PyTorch may not tell
    is_fast = device.type != "cpu" or any(getattr(torch.cpu, unit, lambda: False)() for unit in units)
    return torch.bfloat16 if name == "bfloat16" or (name == "auto" and is_fast) else torch.float32


@contextmanager
def quick_products_in(dtype: torch.dtype) -> Iterator[None]:
    """Inside, `quick_products` are of this dtype."""
    token = _DTYPE.set(dtype)
    try:
        yield
    finally:
        _DTYPE.reset(token)


@contextmanager
def quick_products() -> Iterator[None]:
    """Inside, float32 matrices are rounded to bfloat16 for their products, if `quick_products_in` says so.

    Sums and results stay float32. An accelerator may use a dtype between the two: CUDA uses TensorFloat-32.
    """
    if _DTYPE.get() == torch.float32:
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def as_multiplied(values: Tensor) -> Tensor:
    """Round values as `quick_products` does; the result is float32.

    Sums of squares and of products must use the same numbers, because an error is a small difference between them.
    """
    dtype = _DTYPE.get()
    return values.float() if dtype in (torch.float32, values.dtype) else values.to(dtype).float()


def operator_input(arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> Tensor:
    """Find the input of a linear operator in the arguments of its call."""
    return arguments[0] if arguments else next(iter(keywords.values()))


@contextmanager
def watching(
    inputs: Mapping[nn.Module, Callable[[Tensor], None]], hooks: Mapping[nn.Module, Callable[..., None]] | None = None
) -> Iterator[None]:
    """Inside, call back with the input of operators before they compute, and register forward hooks."""
    with ExitStack() as registered:
        for module, callback in inputs.items():
            # a default argument binds the callback of this turn of the loop
            def before(_: nn.Module, args: Any, kwargs: Any, callback: Callable[[Tensor], None] = callback) -> None:
                callback(operator_input(args, kwargs))

            registered.enter_context(module.register_forward_pre_hook(before, with_kwargs=True))
        for module, hook in (hooks or {}).items():
            registered.enter_context(module.register_forward_hook(hook))
        yield


@contextmanager
def replaced_forwards(
    modules: Sequence[nn.Module], forwards: Iterable[Callable[..., Any]], name: str = "forward"
) -> Iterator[None]:
    """Replace the forward pass `name` of modules by other functions; afterwards each module has its own again."""
    own = [vars(module).get(name) for module in modules]  # of the instance, such as Accelerate's
    try:
        for module, forward in zip(modules, forwards, strict=True):
            setattr(module, name, forward)
        yield
    finally:
        for module, original in zip(modules, own, strict=True):
            if original is not None:
                setattr(module, name, original)
            else:  # the one of its class is used again
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
            module.training = True
