"""The numerical environment of a run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch


@contextmanager
def numerical_environment() -> Iterator[None]:
    """Compute as in a process that has set nothing; afterwards the caller's environment is as it was.

    Without autocast and inference mode, with float32 as the default dtype, the CPU as the default device, and float32
    products in full precision (no TensorFloat-32, no bfloat16). Gradients are recorded or not as callers inside ask.
    """
    accelerator = torch.accelerator.current_accelerator()
    kinds = {"cpu", accelerator.type} if accelerator is not None else {"cpu"}
    dtype = torch.get_default_dtype()
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        for kind in kinds:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        stack.callback(torch.set_default_dtype, dtype)
        torch.set_default_dtype(torch.float32)
        stack.enter_context(_full_precision())
        yield


@contextmanager
def _full_precision() -> Iterator[None]:
    """Products of float32 matrices in float32."""
    modules: list[Any] = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]
    modules = [module for module in modules if hasattr(module, "fp32_precision")]  # from PyTorch 2.9 on
    finer = [module.fp32_precision for module in modules]
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:  # set by the finer names alone, on which PyTorch refuses to say
        precision = "highest"
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        for module, value in zip(modules, finer, strict=True):
            module.fp32_precision = value
