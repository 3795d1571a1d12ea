"""Products of float32 matrices in bfloat16, where a device is fast in it: in forward passes and in sums over tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

_DTYPE: ContextVar[torch.dtype] = ContextVar("dtype of quick products", default=torch.float32)


def compute_dtype_of(name: str, device: torch.device) -> torch.dtype:
    """The dtype of products by its name, or `"auto"`; on a CPU, bfloat16 is faster only if it has units for it.

    These are AMX and AVX512-BF16. An older PyTorch may not say whether they are there.
    """
    asked = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    is_fast = device.type != "cpu" or any(getattr(torch.cpu, unit, lambda: False)() for unit in asked)
    return torch.bfloat16 if name == "bfloat16" or (name == "auto" and is_fast) else torch.float32


@contextmanager
def quick_products_in(dtype: torch.dtype) -> Iterator[None]:
    """Inside, `quick_products` are of this dtype."""
    token = _DTYPE.set(dtype)
    try:
        yield
    finally:
        _DTYPE.reset(token)


@contextmanager
def quick_products() -> Iterator[None]:
    """Inside, float32 matrices are rounded to bfloat16 for their products, if the run around says so.

    Sums and results stay float32. An accelerator may have a dtype between the two for this: CUDA takes TensorFloat-32.
    What solves layer problems is never inside: it needs float32.
    """
    if _DTYPE.get() == torch.float32:
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def rounding_of(dtype: torch.dtype) -> float:
    """Largest relative difference between two ways to compute a value in a dtype with quick products."""
    exact = {torch.float32: 1e-3, torch.float64: 1e-6} if _DTYPE.get() == torch.float32 else {}
    return exact.get(dtype, 2e-2)


def as_multiplied(values: Tensor) -> Tensor:
    """Values as `quick_products` take them, in float32.

    Sums of squares and of products must be over the same numbers: an error is a small difference between them.
    """
    dtype = _DTYPE.get()
    return values.float() if dtype in (torch.float32, values.dtype) else values.to(dtype).float()
