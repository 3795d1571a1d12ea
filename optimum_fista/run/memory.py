"""Memory: what a device has to give, the most that was held, and giving freed memory back."""

from __future__ import annotations

import ctypes
import gc
import sys
import threading
import weakref
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

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
    version 2; containers) may use less. `None` if the device does not say, or is not in this machine.
    """
    if device.type == "cpu":
        return int(min(psutil.virtual_memory().available, _left_to_group()))
    counts = device_counts(device)
    if counts is None or not hasattr(counts, "mem_get_info") or not counts.is_available():
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


_INTERVAL = 0.02
"""Seconds between two looks."""


@dataclass(frozen=True)
class MemoryPeak:
    """Largest memory of a process, in bytes.

    Attributes:
        resident_bytes: All that is in physical memory, pages of files that are read or mapped included.
        anonymous_bytes: The part that no file backs, so that the system can't drop it; `None` if it is unknown.
        device_bytes: Tensors on the accelerator; `None` on the CPU, and if PyTorch does not count them.
    """

    resident_bytes: int
    anonymous_bytes: int | None = None
    device_bytes: int | None = None


class PeakMemory:
    """As a context: watches this process, 50 times a second, and takes PyTorch's exact count on an accelerator.

    That count (`torch.cuda.max_memory_allocated` and its like) starts again with it.

    Attributes:
        peak: The largest values, known when the context ends.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._counts = device_counts(device)
        self._process = psutil.Process()
        self._done = threading.Event()
        # The thread must not keep this object, so that it ends with it if an interrupt hits the context itself.
        self._thread = threading.Thread(target=_watch, args=(weakref.ref(self), self._done), daemon=True)
        self.peak = MemoryPeak(0)

    def __enter__(self) -> PeakMemory:
        if self._counts is not None:
            self._counts.reset_peak_memory_stats(self._device)
        self._look()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self._look()
        if self._counts is not None:
            self.peak = replace(self.peak, device_bytes=self._counts.max_memory_allocated(self._device))

    def _look(self) -> None:
        memory = self._process.memory_info()
        anonymous = memory.rss - memory.shared if hasattr(memory, "shared") else None
        seen = self.peak
        self.peak = MemoryPeak(
            max(seen.resident_bytes, memory.rss),
            None if anonymous is None else max(seen.anonymous_bytes or 0, anonymous),
        )


def _watch(peak: weakref.ref[PeakMemory], done: threading.Event) -> None:
    while not done.wait(_INTERVAL):
        watched = peak()
        if watched is None:
            return
        watched._look()
        del watched


_WORTH_A_SEARCH = 2**20


def release_memory_of(module: nn.Module) -> None:
    """Give back what the work on a module has left, in cycles of Python objects too if the module is not tiny."""
    size = sum(p.numel() * p.element_size() for p in module.parameters())
    release_free_memory(collect=size >= _WORTH_A_SEARCH)


def release_free_memory(*, collect: bool = False) -> None:
    """Give the process's free memory back to the system, if the C library is glibc.

    Freed blocks below 32 MiB stay with the process otherwise: the matrices of one operator would lie beside the
    unused remains of the operators before, of other sizes.

    Args:
        collect: Whether to look for unused cycles of Python objects first, and to empty the accelerator's cache.
    """
    if collect:
        gc.collect()
        if torch.accelerator.is_available():
            torch.get_device_module().empty_cache()
    if _glibc() is not None:
        _glibc().malloc_trim(0)


@cache
def _glibc() -> Any:
    """The C library if it is glibc."""
    if sys.platform != "linux":
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "malloc_trim") else None
