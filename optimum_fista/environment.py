"""The numerical environment of a run, and the processor that it computes on.

These are settings of PyTorch that belong to the process or the thread: autocast, inference mode, the default dtype and
device, and the precision of products of float32 matrices.
"""

import platform
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch


@contextmanager
def numerical_environment() -> Iterator[None]:
    """Compute in the context as in a process that has set nothing; afterwards the caller's settings are as before.

    There is no autocast and no inference mode. The default dtype is float32, and the default device is the CPU.
    Products of float32 matrices have full precision (no TensorFloat-32, no bfloat16). Whether gradients are recorded is
    not changed. Dtype and precision belong to the whole process: let one thread at a time compute.
    """
    device_types = {"cpu"}
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is not None:
        device_types.add(accelerator.type)

    # At the end, the stack undoes what it was given, the latest first.
    with ExitStack() as stack:
        # Tensors of inference mode can't be written to, nor take part in autograd.
        stack.enter_context(torch.inference_mode(False))
        for device_type in device_types:
            if torch.is_autocast_enabled(device_type):
                # Its cache of rounded weights lives until the caller's autocast ends: training would see old ones.
                stack.enter_context(torch.autocast(device_type, enabled=False, cache_enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))

        stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float32)
        _use_full_precision(stack)
        yield


def _use_full_precision(stack: ExitStack) -> None:
    """Have the process multiply float32 matrices in full precision; `stack` puts its settings back when it ends."""
    modules: list[Any] = [
        torch.backends.cuda.matmul,
        getattr(torch.backends.mkldnn, "matmul", None),
    ]
    # PyTorch has had finer settings since 2.9. The one below changes them too, so that they have to be put back.
    for module in modules:
        if hasattr(module, "fp32_precision"):
            stack.callback(setattr, module, "fp32_precision", module.fp32_precision)

    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:  # set by the finer names alone, on which PyTorch refuses to say
        precision = "highest"
    stack.callback(torch.set_float32_matmul_precision, precision)
    torch.set_float32_matmul_precision("highest")


def processor_name() -> str:
    """Return the name of the processor as Linux tells it; on other systems, what Python knows of it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith("model name"):  # of the first core, as in "model name : AMD EPYC"
            _, _, name = line.partition(":")
            return name.strip()
    return platform.processor() or platform.machine()
