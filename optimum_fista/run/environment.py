"""The numerical environment of a run, and what it computes on."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from optimum_fista.model.offload import execution_device
from optimum_fista.model.products import compute_dtype_of


@contextmanager
def numerical_environment() -> Iterator[None]:
    """Compute as in a process that has set nothing; afterwards the caller's environment is as it was.

    The default dtype and the precision of products belong to the whole process: let one thread at a time compute.

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
                # Its cache of rounded weights lives until the caller's autocast ends: training would see old ones.
                stack.enter_context(torch.autocast(kind, enabled=False, cache_enabled=False))
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


def arithmetic_of(model: PreTrainedModel, compute_dtype: str) -> dict[str, str | None]:
    """What a model computes with, besides its weights and its configuration; the dtype of products by its name."""
    device = execution_device(model.get_input_embeddings())
    return {
        "dtype": str(model.dtype),
        "products": str(compute_dtype_of(compute_dtype, device)),
        "device": device.type,
        "attention": model.config._attn_implementation,
        "experts": getattr(model.config, "_experts_implementation", None),
    }


def processor() -> dict[str, str | int]:
    """The processor, the instructions that PyTorch uses of it, and in how many threads."""
    instructions = torch.backends.cpu.get_cpu_capability()
    return {"name": processor_name(), "instructions": instructions, "threads": torch.get_num_threads()}


def processor_name() -> str:
    """Name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
