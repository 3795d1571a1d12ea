"""The operations `optimum_fista::packed_linear` and `optimum_fista::unpack`, registered with PyTorch and its compiler.

A packed matrix W [rows, columns] is given by `values` [kept], `mask` uint8 [rows, 8 ceil(columns / 64)] with one bit
per weight, and `starts` int64 [rows + 1], where the values of each row start. The kernels multiply few inputs. For many
inputs it is faster to unpack tiles of rows and multiply them as dense matrices.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional

from optimum_fista.packed.kernels import Kernels, kernels
from optimum_fista.packed.masks import as_words, count_bits, place, row_bytes, unpack_bits

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_MAX_BATCH = 32  # inputs up to which the kernels are faster than tiles, also without AVX-512
_TILE_BYTES = (
    30 << 20
)  # below the 32 MB from where the C library asks the system for fresh pages each time

_library = torch.library.Library("optimum_fista", "DEF")
_library.define(
    "packed_linear(Tensor x, Tensor values, Tensor mask, Tensor starts, Tensor? bias) -> Tensor"
)
_library.define("unpack(Tensor values, Tensor mask, Tensor starts, int columns) -> Tensor")


def packed_linear(
    x: Tensor, values: Tensor, mask: Tensor, starts: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Product W x + b with a packed matrix; differentiable in `x` and `bias`, not in the values.

    Under autocast the product uses autocast's dtype, as `nn.functional.linear` does. Under forward-mode differentiation
    and `torch.func` the weight is dense during the product.

    `x` [..., columns], values and `bias` [rows] have one dtype and device; the result is [..., rows].
    """
    if torch._C._is_any_autocast_enabled() and _has_autocast(x.device.type):
        x, values, bias = (
            _as_autocast(x),
            _as_autocast(values),
            None if bias is None else _as_autocast(bias),
        )
    if _is_plain(x, bias):  # the dispatcher takes as long as a small product
        return _multiply_on_cpu(x, values, mask, starts, bias)
    if _is_transformed():  # a custom operation has no rules for these; a dense product has
        return functional.linear(
            x, torch.ops.optimum_fista.unpack(values, mask, starts, x.shape[-1]), bias
        )
    return torch.ops.optimum_fista.packed_linear(x, values, mask, starts, bias)


def row_starts(mask: Tensor) -> Tensor:
    """Number of the first value of each row, int64 [rows + 1], for a mask with one bit a weight."""
    starts = torch.zeros(
        mask.shape[0] + 1, dtype=torch.int64, device=mask.device
    )  # the first row starts at 0
    torch.cumsum(count_bits(mask), 0, out=starts[1:])
    return starts


# Dynamo of PyTorch 2.8 to 2.11 can't trace these two questions, so they are asked while it traces. The answers hold: a
# device has autocast or not, and Dynamo traces again under other transformations of `torch.func`.
@torch.compiler.assume_constant_result
def _has_autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device)


@torch.compiler.assume_constant_result
def _is_in_torch_func() -> bool:
    return torch._C._functorch.get_dynamic_layer_stack_depth() > 0


def _as_autocast(tensor: Tensor) -> Tensor:
    """A tensor in the dtype of its device's autocast, if that is on; float64 stays, as for PyTorch's own operations."""
    device = tensor.device.type
    is_cast = torch.is_autocast_enabled(device) and tensor.dtype != torch.float64
    return tensor.to(torch.get_autocast_dtype(device)) if is_cast else tensor


def _is_plain(x: Tensor, bias: Tensor | None) -> bool:
    """True if nothing traces, wraps or differentiates this product, so that the dispatcher is not needed."""
    return (
        type(x) is Tensor
        and x.is_cpu
        and not (
            torch.is_grad_enabled()
            and (x.requires_grad or (bias is not None and bias.requires_grad))
        )
        and not torch.compiler.is_compiling()
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._is_tracing()
        and not _is_transformed()
        and not x.is_neg()  # a view of memory with the other sign
        and not (bias is not None and bias.is_neg())
    )


def _is_transformed() -> bool:
    """True inside forward-mode differentiation or `torch.func`: the operation has no rules for these."""
    return forward_ad._current_level >= 0 or _is_in_torch_func()


def _check(x: Tensor, values: Tensor, mask: Tensor, starts: Tensor, bias: Tensor | None) -> None:
    rows, columns = mask.shape[0], x.shape[-1]
    device, dtype = x.device, x.dtype
    if (
        not device
        == values.device
        == mask.device
        == starts.device
        == (device if bias is None else bias.device)
    ):
        raise ValueError(
            f"x is on {x.device}, the packed weight on {values.device}: bring them to one device."
        )
    if dtype != values.dtype or (bias is not None and bias.dtype != dtype):
        dtypes = f"{x.dtype}, the weight {values.dtype}{'' if bias is None else f', the bias {bias.dtype}'}"
        raise ValueError(f"x is {dtypes}: pass tensors of one dtype.")
    if mask.dtype != torch.uint8 or starts.dtype != torch.int64:
        raise ValueError(
            f"mask is {mask.dtype}, starts {starts.dtype}: pass torch.uint8 and torch.int64."
        )
    if not (values.is_contiguous() and mask.is_contiguous() and starts.is_contiguous()):
        raise ValueError(
            "values, mask and starts must be contiguous: pass them as PackedLinear.prepare leaves them."
        )
    if mask.shape[1] != row_bytes(columns) or starts.numel() != rows + 1:
        raise ValueError(
            f"x has {columns} columns, which a mask of shape {tuple(mask.shape)} does not fit."
        )
    if bias is not None and tuple(bias.shape) != (rows,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}: pass one of shape {(rows,)}.")


def _multiply(
    x: Tensor, values: Tensor, mask: Tensor, starts: Tensor, bias: Tensor | None
) -> Tensor:
    """Multiply on any device: the whole matrix is unpacked."""
    _check(x, values, mask, starts, bias)
    return functional.linear(x, _unpack(values, mask, starts, x.shape[-1]), bias)


def _multiply_on_cpu(
    x: Tensor, values: Tensor, mask: Tensor, starts: Tensor, bias: Tensor | None
) -> Tensor:
    """Multiply few inputs by the kernels; more inputs, too, if that is fast, otherwise by dense tiles of rows."""
    compiled, dtype = kernels(), x.dtype
    if compiled is None or dtype not in KERNEL_DTYPES or x.numel() == 0:
        return _multiply(x, values, mask, starts, bias)
    inputs, bias = x.contiguous(), None if bias is None else bias.contiguous()
    takes_many = (
        compiled.path == "avx512" and dtype == torch.bfloat16
    )  # VDPBF16PS; other kernels multiply in float32
    if x.numel() <= _MAX_BATCH * x.shape[-1] or takes_many:
        if not (
            dtype == values.dtype
            and (bias is None or (bias.dtype == dtype and bias.is_cpu))
            and (values.is_cpu and mask.is_cpu and starts.is_cpu)
            and (values.is_contiguous() and mask.is_contiguous() and starts.is_contiguous())
        ):  # all that the kernels can't see themselves; the rest of _check would take longer than a small product
            _check(x, values, mask, starts, bias)
        return compiled.linear(inputs, values, mask, starts, bias)
    _check(x, values, mask, starts, bias)
    product = _multiply_by_tiles(compiled, inputs.view(-1, x.shape[-1]), values, mask, starts, bias)
    return product.view(*x.shape[:-1], mask.shape[0])


def _multiply_by_tiles(
    compiled: Kernels,
    inputs: Tensor,
    values: Tensor,
    mask: Tensor,
    starts: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """Dense products with a tile of rows at a time, in float32 if the CPU has no products of 16 bits."""
    rows, columns = mask.shape[0], inputs.shape[1]
    computed = (
        values.dtype if compiled.path == "avx512" else torch.float32
    )  # 16 bits are emulated there, and slow
    y = torch.empty(inputs.shape[0], rows, dtype=computed)
    inputs, bias = inputs.to(computed), None if bias is None else bias.to(computed)
    height = max(
        64, _TILE_BYTES // (columns * computed.itemsize) // 64 * 64
    )  # whole blocks of a matrix product
    scratch = torch.empty(
        min(height, rows), columns, dtype=values.dtype
    )  # overwritten by every tile
    for first in range(0, rows, height):
        last = min(first + height, rows)
        # [rows of the tile, columns] -> [columns, rows of the tile]
        tile = (
            compiled.unpack_rows(values, mask, starts, first, scratch[: last - first])
            .to(computed)
            .t()
        )
        if bias is None:
            torch.mm(inputs, tile, out=y[:, first:last])
        else:
            torch.addmm(bias[first:last], inputs, tile, out=y[:, first:last])
    return y.to(values.dtype)


def _unpack(values: Tensor, mask: Tensor, starts: Tensor, columns: int) -> Tensor:
    dense = torch.zeros(mask.shape[0], columns, dtype=values.dtype, device=values.device)
    compiled = kernels() if values.device.type == "cpu" and values.dtype in KERNEL_DTYPES else None
    if compiled is not None:
        return compiled.unpack_rows(values, mask, starts, 0, dense)
    place(as_words(values), unpack_bits(mask, columns), as_words(dense))
    return dense


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    values, mask, starts = ctx.saved_tensors
    of_x = of_bias = None
    if ctx.needs_input_grad[0]:
        # dL/dx = dL/dy W, [..., rows] -> [..., columns]
        of_x = gradient @ torch.ops.optimum_fista.unpack(values, mask, starts, ctx.columns)
    if ctx.needs_input_grad[4]:
        of_bias = gradient.reshape(-1, gradient.shape[-1]).sum(0)  # [..., rows] -> [rows]
    return of_x, None, None, None, of_bias


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    x, values, mask, starts, _ = inputs
    ctx.save_for_backward(values, mask, starts)
    ctx.columns = x.shape[-1]


_library.impl("packed_linear", _multiply, "CompositeExplicitAutograd")
_library.impl("packed_linear", _multiply_on_cpu, "CPU")
_library.impl("unpack", _unpack, "CompositeExplicitAutograd")
torch.library.register_autograd(
    "optimum_fista::packed_linear", _backward, setup_context=_setup_context, lib=_library
)


@torch.library.register_fake("optimum_fista::packed_linear", lib=_library)
def _multiply_of_shapes(
    x: Tensor, values: Tensor, mask: Tensor, starts: Tensor, bias: Tensor | None
) -> Tensor:
    _check(x, values, mask, starts, bias)
    return x.new_empty(*x.shape[:-1], mask.shape[0])


@torch.library.register_fake("optimum_fista::unpack", lib=_library)
def _unpack_of_shapes(values: Tensor, mask: Tensor, starts: Tensor, columns: int) -> Tensor:  # noqa: ARG001
    return values.new_empty(mask.shape[0], columns)
