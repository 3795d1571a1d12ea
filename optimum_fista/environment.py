"""The numerical environment of a run, and the processor that it computes on."""

import platform
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch


@contextmanager
def numerical_environment() -> Iterator[None]:
    """Compute as in a process that has set nothing; afterwards the caller's environment is as it was.

    Without autocast and inference mode, with float32 as the default dtype, the CPU as the default device, and float32
    products in full precision (no TensorFloat-32, no bfloat16). Gradients are recorded or not as callers inside ask.
    Dtype and precision belong to the whole process: let one thread at a time compute.
    """
    kinds = {"cpu"}
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is not None:
        kinds.add(accelerator.type)

    # At the end, the stack undoes what it was given, the latest first.
    with ExitStack() as stack:
        # Tensors of inference mode can't be written to, nor take part in autograd.
        stack.enter_context(torch.inference_mode(False))
        for kind in kinds:
            if torch.is_autocast_enabled(kind):
                # Its cache of rounded weights lives until the caller's autocast ends: training would see old ones.
                stack.enter_context(torch.autocast(kind, enabled=False, cache_enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))

        stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float32)
        _use_full_precision(stack)
        yield


def _use_full_precision(stack: ExitStack) -> None:
    """Multiply float32 matrices in full precision until the stack ends."""
    modules: list[Any] = [
        torch.backends.cuda.matmul,
        getattr(torch.backends.mkldnn, "matmul", None),
    ]
    for module in modules:
        if hasattr(module, "fp32_precision"):  # from PyTorch 2.9 on
            stack.callback(setattr, module, "fp32_precision", module.fp32_precision)

    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:  # set by the finer names alone, on which PyTorch refuses to say
        precision = "highest"
    stack.callback(torch.set_float32_matmul_precision, precision)
    torch.set_float32_matmul_precision("highest")


def processor_name() -> str:
    """Name of the processor, as Linux tells it; elsewhere what Python knows of it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
