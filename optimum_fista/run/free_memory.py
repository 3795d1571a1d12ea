"""Giving freed memory back to the system."""

from __future__ import annotations

import ctypes
import gc
import sys
from functools import cache
from typing import Any

import torch


def release_free_memory(*, collect: bool = False) -> None:
    """Give the process's free memory back to the system, where the C library is glibc.

    Freed blocks below 32 MiB stay with the process otherwise: the matrices of one operator would lie beside the
    unused remains of the operators before, of other sizes.

    Args:
        collect: Whether to look for unused cycles of Python objects first, and to empty PyTorch's cache on CUDA.
    """
    if collect:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    trim = _trim()
    if trim is not None:
        trim(0)


@cache
def _trim() -> Any:
    if sys.platform != "linux":
        return None
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError):  # another C library
        return None
