"""Giving freed memory back to the system."""

from __future__ import annotations

import ctypes
import gc
import sys
from functools import cache
from typing import Any

import torch
from torch import nn

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


def keep_large_blocks_apart() -> None:
    """Have glibc give blocks from 4 MiB up back to the system as soon as they are freed, as long as the process lives.

    Only for a process that is ours: glibc has no way back. Otherwise that size grows to 32 MiB in time, and matrices
    below it leave holes in the heap that later ones don't fit: the peak of a run is then higher.
    """
    if _glibc() is not None:
        _glibc().mallopt(_MMAP_THRESHOLD, 4 * 2**20)
        _glibc().mallopt(_TRIM_THRESHOLD, 32 * 2**20)


@cache
def _glibc() -> Any:
    """The C library if it is glibc."""
    if sys.platform != "linux":
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "malloc_trim") and hasattr(library, "mallopt") else None


_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Parameters of `mallopt`, from malloc.h."""
