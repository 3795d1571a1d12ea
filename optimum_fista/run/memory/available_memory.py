"""Memory that a device has to give, and what it says when there is no more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
import torch

_GROUP = Path("/sys/fs/cgroup")
_EXHAUSTED = (
    "out of memory",  # CUDA, ROCm, XPU, MPS
    "_status_alloc_failed",  # cuBLAS, cuSOLVER, cuDNN, hipBLAS
    "calling `cublascreate",  # a library's own memory, which it asks for at its first use
    "calling `cusolverdncreate",
    "rocblas_status_memory_error",
    "ur_result_error_out_of_",  # XPU: device memory, host memory, resources
    "allocate memory",  # CPU
    "not enough memory",  # CPU on Windows
    "bad_alloc",
)
"""What errors without a type of their own say, in lower case."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device, one of its libraries, or the CPU has no more memory to give."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _EXHAUSTED)


def available_bytes(device: torch.device) -> int | None:
    """Bytes that can be had on a device now, those that PyTorch keeps unused on it included.

    On the CPU it is what the system can give without swapping, or less if the process's control group (Linux,
    version 2; containers) may use less. `None` if the device does not say.
    """
    if device.type == "cpu":
        return int(min(psutil.virtual_memory().available, _left_to_group()))
    counts = device_counts(device)
    if counts is None or not hasattr(counts, "mem_get_info"):
        return None
    return counts.mem_get_info(device)[0] + counts.memory_reserved(device) - counts.memory_allocated(device)


def device_counts(device: torch.device) -> Any:
    """What counts the memory of tensors on a device: `torch.cuda` and its like; `None` if nothing does."""
    module = getattr(torch, device.type, None)  # the meta device has none
    return module if hasattr(module, "max_memory_allocated") else None


def _left_to_group() -> float:
    """What the limit of this process's control group leaves; pages of files can be dropped."""
    try:
        limit = int((_GROUP / "memory.max").read_text())
        used = int((_GROUP / "memory.current").read_text())
        counts = dict(line.split() for line in (_GROUP / "memory.stat").read_text().splitlines())
        return max(0, limit - used + int(counts["inactive_file"]))
    except (OSError, ValueError, KeyError):
        return float("inf")
