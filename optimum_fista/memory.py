"""Memory: what a device has to give, the most that was held, and giving freed memory back."""

import ctypes
import gc
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn
from tqdm import tqdm

_GROUP = Path("/sys/fs/cgroup")
_WORTH_A_SEARCH = (
    2**20
)  # bytes of weights: looking for cycles takes longer than pruning a toy model
_LIBRARY: Any = ctypes.CDLL(None) if sys.platform == "linux" else None
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
"""Words of errors without a type of their own, in lower case."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device, one of its libraries, or the CPU has no more memory to give."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(
        words in str(error).lower() for words in _EXHAUSTED
    )


def available_bytes(device: torch.device) -> int | None:
    """Bytes that can be had on a device now, those that PyTorch keeps unused on it included.

    On the CPU it is what the system can give without swapping, or less if the process's control group (Linux,
    version 2; containers) may use less. `None` if the device does not say, or is not in this machine.
    """
    if device.type == "cpu":
        left = psutil.virtual_memory().available
        with suppress(
            OSError, ValueError, KeyError
        ):  # there is no such group, or it has no limit ("max")
            limit, used = (
                int((_GROUP / f"memory.{name}").read_text()) for name in ("max", "current")
            )
            pages = dict(line.split() for line in (_GROUP / "memory.stat").read_text().splitlines())
            left = min(
                left, max(0, limit - used + int(pages["inactive_file"]))
            )  # pages of files can be dropped
        return left
    counts = device_counts(device)
    if counts is None or not hasattr(counts, "mem_get_info") or not counts.is_available():
        return None
    return (
        counts.mem_get_info(device)[0]
        + counts.memory_reserved(device)
        - counts.memory_allocated(device)
    )


def size_text(count: float) -> str:
    """Write a number of bytes for people: `3.21GiB`."""
    return tqdm.format_sizeof(count, "iB", 1024)


def total_bytes() -> int:
    """Bytes of the machine's memory, or fewer if the process's control group may never use as many."""
    total = psutil.virtual_memory().total
    with suppress(OSError, ValueError):  # as above
        total = min(total, int((_GROUP / "memory.max").read_text()))
    return total


def device_counts(device: torch.device) -> Any:
    """The module that counts the memory of tensors on a device: `torch.cuda` and its like; `None` if none does."""
    module = getattr(torch, device.type, None)  # the meta device has none
    return module if hasattr(module, "max_memory_allocated") else None


@dataclass
class MemoryPeak:
    """Largest memory of a process, in bytes."""

    resident_bytes: (
        int  # all that is in physical memory, with pages of files that are read or mapped
    )
    anonymous_bytes: int | None = (
        None  # what no file backs, so that the system can't drop it; None if unknown
    )
    device_bytes: int | None = (
        None  # tensors on the accelerator; None on the CPU, and if PyTorch does not count them
    )


@contextmanager
def watched_memory(device: torch.device) -> Iterator[MemoryPeak]:
    """Watch this process; the largest values are known afterwards.

    PyTorch's exact count on an accelerator (`torch.cuda.max_memory_allocated` and its like) starts again with it.
    """
    peak, counts, process, ended = (
        MemoryPeak(0),
        device_counts(device),
        psutil.Process(),
        threading.Event(),
    )

    def watch() -> None:
        is_last = False
        while not is_last:
            is_last = ended.is_set()
            memory = process.memory_info()
            peak.resident_bytes = max(peak.resident_bytes, memory.rss)
            if hasattr(memory, "shared"):
                peak.anonymous_bytes = max(peak.anonymous_bytes or 0, memory.rss - memory.shared)
            ended.wait(0.02)  # seconds

    if counts is not None:
        counts.reset_peak_memory_stats(device)
    thread = threading.Thread(target=watch, daemon=True)
    try:
        thread.start()
        yield peak
    finally:
        ended.set()
        if thread.is_alive():  # not if an interrupt came while it was started
            thread.join()
        if counts is not None:
            peak.device_bytes = counts.max_memory_allocated(device)


def release_memory(of: nn.Module | None = None, *, collect: bool = False) -> None:
    """Give the process's free memory back to the system, if the C library is glibc.

    Freed blocks below 32 MiB stay with the process otherwise: the matrices of one operator would lie beside the
    unused remains of the operators before, of other sizes. With `collect`, or after work on a module that is not tiny,
    unused cycles of Python objects are freed first, and the accelerator's cache is emptied.
    """
    if collect or (of is not None and sum(p.nbytes for p in of.parameters()) >= _WORTH_A_SEARCH):
        gc.collect()
        if torch.accelerator.is_available():
            torch.get_device_module().empty_cache()
    if hasattr(_LIBRARY, "malloc_trim"):
        _LIBRARY.malloc_trim(0)
