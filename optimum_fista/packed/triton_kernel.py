"""A product with a packed matrix and one input on CUDA, in Triton."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

_WORDS_AT_ONCE = 8


def triton_is_here() -> bool:
    """Whether Triton can be imported."""
    return triton is not None


if triton is not None:

    @triton.jit
    def _multiply_one(  # type: ignore[no-untyped-def]
        values, mask, starts, x, bias, y, columns, words: tl.constexpr, at_once: tl.constexpr, has_bias: tl.constexpr
    ):
        row = tl.program_id(0)
        kept_of_all = tl.load(starts + tl.num_programs(0))
        start = tl.load(starts + row)
        total = tl.zeros((at_once * 64,), dtype=tl.float32)
        lane = tl.arange(0, at_once * 64)
        for first in range(0, words, at_once):
            column = first * 64 + lane
            inside = column < columns
            byte = tl.load(mask + row.to(tl.int64) * words * 8 + column // 8, mask=inside, other=0).to(tl.int32)
            kept = (byte >> (column % 8)) & 1
            place = start + tl.cumsum(kept, 0) - kept
            weight = tl.load(values + place, mask=(kept == 1) & (place < kept_of_all), other=0.0).to(tl.float32)
            total += weight * tl.load(x + column, mask=inside, other=0.0).to(tl.float32)
            start += tl.sum(kept, 0)
        result = tl.sum(total, 0)
        if has_bias:
            result += tl.load(bias + row).to(tl.float32)
        tl.store(y + row, result.to(y.dtype.element_ty))


def multiply_one(x: Tensor, values: Tensor, mask: Tensor, starts: Tensor, bias: Tensor | None) -> Tensor:
    """Product W x + b of `x` [columns], contiguous, as in `operation.packed_linear`; sums in float32."""
    rows, width = mask.shape
    y = torch.empty(rows, dtype=x.dtype, device=x.device)
    given = x if bias is None else bias.contiguous()
    # Triton launches on the current device, whose memory need not be that of the tensors; on the CPU it interprets.
    on_cpu = x.device.type == "cpu"
    with nullcontext() if on_cpu else torch.get_device_module(x.device).device(x.device):
        _multiply_one[(rows,)](
            values, mask, starts, x, given, y, x.numel(), width // 8, _WORDS_AT_ONCE, bias is not None
        )
    return y
