"""Memory: what a device has to give, the most that was held, and giving freed memory back.

A *control group* of Linux limits the memory of a group of processes, such as those of a container. The *resident*
memory of a process is what it has in physical memory.
"""

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

# The control group of the process (Linux, version 2); containers have one of their own.
_GROUP = Path("/sys/fs/cgroup")
# Bytes of weights: in a smaller model, looking for cycles of objects takes longer than pruning.
_WORTH_A_SEARCH = 2**20
_LIBRARY: Any = ctypes.CDLL(None) if sys.platform == "linux" else None  # the C library
_WORDS_OF_ERRORS = (
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
    """Tell whether an error says that a device, one of its libraries, or the CPU has no more memory to give.

    Some errors have a type for this. Others are a RuntimeError, and only their words tell (`_WORDS_OF_ERRORS`).
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if not isinstance(error, RuntimeError):
        return False
    message = str(error).lower()
    return any(words in message for words in _WORDS_OF_ERRORS)


def available_bytes(device: torch.device) -> int | None:
    """Count the bytes that new tensors on a device may take now.

    On an accelerator these are the free bytes, and those that PyTorch holds there without using them. On the CPU it is
    what the system can give without swapping, or less if the process's control group (Linux, version 2; containers) may
    use less. `None` if the device does not say, or is not in this machine. An accelerator may be initialised by the
    question.
    """
    if device.type == "cpu":
        return _available_on_host()
    device_module = module_that_counts(device)  # such as torch.cuda
    if device_module is None or not hasattr(device_module, "mem_get_info"):
        return None
    if not device_module.is_available():
        return None
    free, _ = device_module.mem_get_info(device)
    # what PyTorch has asked the device for, minus what tensors take of it
    unused = device_module.memory_reserved(device) - device_module.memory_allocated(device)
    return free + unused


def _available_on_host() -> int:
    """Return the bytes that the system can give, or those that the control group can give if they are fewer.

    Reads files of Linux. If the process has no control group with a limit, the system counts alone.
    """
    available = psutil.virtual_memory().available
    # Without such a group the files are missing. Without a limit the first one says "max", which is no number.
    with suppress(OSError, ValueError, KeyError):
        limit = int((_GROUP / "memory.max").read_text())
        used = int((_GROUP / "memory.current").read_text())
        lines = (_GROUP / "memory.stat").read_text().splitlines()
        statistics = dict(line.split() for line in lines)
        # What the group uses includes pages of files that were read. The system can drop these.
        pages_of_files = int(statistics["inactive_file"])
        available_in_group = max(0, limit - used + pages_of_files)
        available = min(available, available_in_group)
    return available


def size_text(count: float) -> str:
    """Write a number of bytes for people, such as "3.21GiB"."""
    return tqdm.format_sizeof(count, "iB", 1024)


def total_bytes() -> int:
    """Count the bytes of the machine's memory, or fewer if the process's control group may never use as many."""
    total = psutil.virtual_memory().total
    # without such a group the file is missing; without a limit it says "max", which is no number
    with suppress(OSError, ValueError):
        total = min(total, int((_GROUP / "memory.max").read_text()))
    return total


def module_that_counts(device: torch.device) -> Any:
    """Return the module of PyTorch that counts the memory of tensors on a device, such as `torch.cuda`.

    `None` if there is none, as for the CPU. A module that counts has `max_memory_allocated`, `memory_allocated` and
    `memory_reserved`.
    """
    # `torch.cpu` does not count, and `torch.meta` does not exist
    module = getattr(torch, device.type, None)
    return module if hasattr(module, "max_memory_allocated") else None


@dataclass
class MemoryPeak:
    """Largest memory of a process, in bytes."""

    # all that is in physical memory, with pages of files that are read or mapped
    resident_bytes: int
    # what no file backs, so that the system can't drop it; None if unknown
    anonymous_bytes: int | None = None
    # tensors on the accelerator; None on the CPU, and if PyTorch does not count them
    device_bytes: int | None = None


@contextmanager
def watched_memory(device: torch.device) -> Iterator[MemoryPeak]:
    """Watch the memory of this process inside the context, in a thread of its own, 50 times a second.

    Yields the peak, whose values rise while the thread watches, and are final after the context. For an accelerator as
    `device`, PyTorch counts the largest memory of tensors (`torch.cuda.max_memory_allocated` and its like): this count
    of the whole process is set back at the start, and read at the end.
    """
    peak = MemoryPeak(0)
    device_module = module_that_counts(device)  # such as torch.cuda; None for the CPU
    process = psutil.Process()
    ended = threading.Event()

    def watch() -> None:
        """Raise the values of `peak` to what the process holds, until the event `ended` is set, and once after that.

        Runs in the thread; `process` is this process.
        """
        is_last = False
        while not is_last:
            is_last = ended.is_set()
            memory = process.memory_info()
            peak.resident_bytes = max(peak.resident_bytes, memory.rss)
            if hasattr(memory, "shared"):  # pages of files; only Linux tells
                peak.anonymous_bytes = max(peak.anonymous_bytes or 0, memory.rss - memory.shared)
            ended.wait(0.02)  # seconds

    if device_module is not None:
        device_module.reset_peak_memory_stats(device)
    thread = threading.Thread(target=watch, daemon=True)
    try:
        thread.start()
        yield peak
    finally:
        ended.set()
        if thread.is_alive():  # it is not if an interrupt came before it was started
            thread.join()
        if device_module is not None:
            peak.device_bytes = device_module.max_memory_allocated(device)


@contextmanager
def old_objects_skipped(model: nn.Module) -> Iterator[None]:
    """Inside, Python's garbage collector does not look at the objects that exist now, unless the model is tiny.

    A program that has imported Transformers has about a million objects: modules, classes, functions. Each search for
    unused cycles (`release_memory`) would visit all of them again, which took 0.2 seconds for each decoder layer. They
    are moved to the collector's permanent generation, and moved back at the end. Nothing is moved if the caller has
    objects there, because all of them come back together. Of `model` only the sizes of its parameters are read.
    """
    moves = _is_worth_a_search(model) and gc.get_freeze_count() == 0
    if not moves:
        yield
        return

    gc.collect()  # what is unused now would be skipped, too
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def release_memory(of: nn.Module | None = None, *, collect: bool = False) -> None:
    """Give the process's free memory back to the system, if the C library is glibc.

    Otherwise freed blocks below 32 MiB stay with the process, unused, because the next operators have matrices of other
    sizes. With `collect`, or after work on a module `of` that is not
    tiny, unused cycles of Python objects are freed first, and the accelerator's cache is emptied. No tensor that is
    in use changes; of the module only the sizes of its parameters are read.
    """
    if collect or (of is not None and _is_worth_a_search(of)):
        gc.collect()
        if torch.accelerator.is_available():
            torch.get_device_module().empty_cache()
    if hasattr(_LIBRARY, "malloc_trim"):
        _LIBRARY.malloc_trim(0)


def _is_worth_a_search(module: nn.Module) -> bool:
    """Whether a module is so large that a search for unused cycles of objects takes less time than work on it."""
    num_bytes = sum(parameter.nbytes for parameter in module.parameters())
    return num_bytes >= _WORTH_A_SEARCH
