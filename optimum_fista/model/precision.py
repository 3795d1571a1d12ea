"""How matrices are multiplied in forward passes, gradients and sums over tokens.

A run chooses this once (`choose_products`), and is inside `products_as` from then on, which keeps the choice in a
context variable. Code that multiplies activations is inside `quick_products`, and prepares its matrices by
`as_multiplied` and `in_few_sizes`. All other code, such as the solvers and the proofs, computes in float32. Only the
default method rounds some products of its iterations and its refit to bfloat16 (`products_rounded_to`). It does so if
the run multiplies in bfloat16, or in TensorFloat-32: an accelerator that has units for it has them for bfloat16, too.
This also holds for a model in float32: unlike an activation, a product that is rounded there belongs to a small change
of the weights (`SplitState.round_products`).
"""

import platform
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from optimum_fista import internals
from optimum_fista.solve.linalg import products_rounded_to

Products = Literal["float32", "tf32", "bfloat16", "widened"]
"""How matrices are multiplied; sums are always float32. All but "widened" leave 16-bit matrices as they are.

"float32": float32 ones in full precision. "tf32", "bfloat16": these are rounded to 11 or 8 significant bits first, if
the device has units for that. "widened": 16-bit ones are multiplied in float32, and the product is rounded.
"""


_PRODUCTS: ContextVar[Products] = ContextVar("how quick products are computed", default="float32")


# Weights of one matrix that are copied to float32 at a time: 67 MB. The head of a large vocabulary has more.
WEIGHTS_WIDENED_TOGETHER = 2**24


_MATMUL = {"linear", "matmul", "__matmul__", "mm", "bmm", "addmm", "baddbmm", "einsum", "conv1d"}


_WIDENED = {*_MATMUL, "scaled_dot_product_attention"}
"""Functions of PyTorch that take most of the time of a forward pass."""


def choose_products(name: str, device: torch.device, stored: torch.dtype) -> Products:
    """Choose how matrices are multiplied (`Products`), by the option `compute_dtype` of the user.

    "auto" chooses the fastest way that keeps the perplexity. The kind of the processor decides and no measured time, so
    that all ranks, and a run that resumes, choose alike.

    Args:
        name: The option: "auto", "float32" or "bfloat16".
        device: Where the run computes.
        stored: The dtype of the model's weights.
    """
    if name == "bfloat16":
        return "bfloat16"
    if name != "auto":
        return "float32"

    if device.type != "cpu":
        # TensorFloat-32 keeps 11 significant bits of a number. A number of 16 bits (bfloat16, float16) has no more, so
        # products of such numbers lose nothing. Float32 numbers lose their other bits.
        # The module is torch.cuda or one like it; None if there is none.
        device_module: Any = getattr(torch, device.type, None)
        if not hasattr(device_module, "is_tf32_supported"):
            return "float32"
        return "tf32" if device_module.is_tf32_supported() else "float32"

    is_stored_in_16_bits = stored.itemsize <= 2
    if not is_stored_in_16_bits:
        # Not "bfloat16": its 8 significant bits change the perplexity by up to 2% (docs/results.md).
        return "float32"
    if not is_fast(stored, device):
        return "widened"
    if stored == torch.bfloat16:
        return "bfloat16"
    return "float32"  # which multiplies matrices of float16 as they are


def is_fast(dtype: torch.dtype, device: torch.device) -> bool:
    """Tell whether a device multiplies matrices of this 16-bit dtype at least as fast as float32 ones.

    Accelerators do. On a CPU, oneDNN must have functions for the dtype; nothing is measured.
    """
    if device.type != "cpu":
        return True
    if not internals.onednn_multiplies(dtype):
        return False
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    if dtype != torch.bfloat16 or not is_x86:
        return True
    # On x86, oneDNN says that it multiplies bfloat16 on every processor with AVX-512. Without units for bfloat16, it
    # reaches 0.4 of the rate of float32 there.
    return internals.has_bfloat16_units()


@contextmanager
def products_as(products: Products) -> Iterator[None]:
    """Inside, matrices in a `quick_products` context are multiplied in the way `products`.

    "widened" multiplies copies in float32. It is active at once, for all products of 16-bit matrices on the CPU inside,
    also without `quick_products`. With "bfloat16" and "tf32", methods may round matrices to bfloat16 where their result
    hardly depends on it (`products_rounded_to`). Sets the context variable `_PRODUCTS`, and sets it back at the end.
    """
    token = _PRODUCTS.set(products)
    rounded_dtype = torch.bfloat16 if products in ("bfloat16", "tf32") else None
    try:
        with (
            products_rounded_to(rounded_dtype),
            _Widened() if products == "widened" else nullcontext(),
        ):
            yield
    finally:
        _PRODUCTS.reset(token)


class _Widened(TorchFunctionMode):
    """While it is active, PyTorch multiplies 16-bit matrices of the CPU in float32, and rounds the product to 16 bits.

    Both matrices are copied to float32 for one product; weights and activations keep their dtype. So no parameter is
    replaced, which an interrupt could leave so. Converting a matrix takes a few hundredths of the time of its product
    with 512 tokens.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function of PyTorch, in float32 if it multiplies 16-bit matrices of the CPU.

        PyTorch calls this in place of every function `func`, which would get `args` and `kwargs`. `_WIDENED` are names
        of functions that multiply matrices. They get float32 copies, and their result is rounded to the 16-bit dtype;
        the tensors themselves are not changed. All other functions are called as they are.
        """
        kwargs = kwargs or {}
        # with `out`, the result would have to go into a tensor of 16 bits
        is_product = getattr(func, "__name__", "") in _WIDENED and "out" not in kwargs
        if not is_product:
            return func(*args, **kwargs)
        values = internals.leaves_of((args, kwargs))  # everything inside lists and tuples
        tensors = [value for value in values if isinstance(value, Tensor)]
        half_tensors = [tensor for tensor in tensors if _is_half(tensor)]
        if not half_tensors or half_tensors[0].device.type != "cpu":
            return func(*args, **kwargs)
        if func is nn.functional.linear:
            inputs, weight, bias = _arguments_of_linear(*args, **kwargs)
            if bias is None and _is_widened_in_parts(weight):
                # a head: its float32 copy would take much memory
                return _LinearInParts.apply(inputs, weight)
        wide_args, wide_kwargs = internals.tensors_replaced((args, kwargs), _widened)
        return func(*wide_args, **wide_kwargs).to(half_tensors[0].dtype)


def _arguments_of_linear(
    input: Tensor, weight: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The arguments of `torch.nn.functional.linear`, however they were passed."""
    return input, weight, bias


def _is_widened_in_parts(weight: Tensor) -> bool:
    """Tell whether a matrix is widened a few rows at a time: it is large, has 16 bits, and gets no gradient.

    Large are more than `WEIGHTS_WIDENED_TOGETHER` weights.
    """
    gets_gradient = torch.is_grad_enabled() and weight.requires_grad
    is_large = weight.ndim == 2 and weight.numel() > WEIGHTS_WIDENED_TOGETHER
    return is_large and _is_half(weight) and not gets_gradient


class _LinearInParts(torch.autograd.Function):
    """A product with a large matrix [out, in], widened a few rows at a time; only the inputs get a gradient.

    The graph keeps the matrix as it is, and no copy in float32.
    """

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor) -> Tensor:
        """Multiply `inputs` [..., in] with the transposed `weight` [out, in]; returns [..., out] in the weight's dtype.

        Some rows of the weight at a time are copied to float32. `ctx` is PyTorch's context of the call, which keeps the
        weight for `backward`.
        """
        ctx.save_for_backward(weight)  # not the inputs, because the weight gets no gradient
        wide_inputs = inputs.float()
        outputs = weight.new_empty(*inputs.shape[:-1], len(weight))
        for rows in _parts_of_rows(weight):  # slices
            # the assignment rounds the float32 product to 16 bits
            outputs[..., rows] = nn.functional.linear(wide_inputs, weight[rows].float())
        return outputs

    @staticmethod
    def backward(ctx: Any, *outward: Tensor) -> tuple[Tensor, None]:
        """Compute the gradient of the loss with respect to the inputs [..., in]; the weight gets none.

        It is the product of the gradient with respect to the outputs and the matrix [out, in], summed in float32 over
        parts of the rows, and rounded once. `outward` has the gradient with respect to the outputs [..., out] only.
        `ctx` is PyTorch's context, in which `forward` has kept the matrix.
        """
        (gradient,) = outward  # a function with one output has one gradient
        (weight,) = ctx.saved_tensors
        size = (*gradient.shape[:-1], weight.shape[1])
        total = torch.zeros(size, device=gradient.device, dtype=torch.float32)
        for rows in _parts_of_rows(weight):
            total += gradient[..., rows].float() @ weight[rows].float()
        return total.to(gradient.dtype), None


def _parts_of_rows(weight: Tensor) -> Iterator[slice]:
    """Divide the rows of a matrix [out, in] into slices of at most `WEIGHTS_WIDENED_TOGETHER` weights, or one row."""
    size = max(1, WEIGHTS_WIDENED_TOGETHER // weight.shape[1])
    return (slice(start, start + size) for start in range(0, len(weight), size))


def _widened(tensor: Tensor) -> Tensor:
    """A tensor in float32 if it has 16 bits, otherwise as it is."""
    return tensor.float() if _is_half(tensor) else tensor


def _is_half(tensor: Tensor) -> bool:
    """Whether a tensor has a floating-point dtype of 16 bits."""
    return tensor.dtype in (torch.bfloat16, torch.float16)


@contextmanager
def quick_products() -> Iterator[None]:
    """Inside, matrices are multiplied as the run has chosen (`products_as`); results keep their dtype.

    The choice is in the context variable `_PRODUCTS`, "float32" outside of a run.

    "float32" changes nothing: the process's own setting counts. "widened" activates `_Widened`. "tf32" and "bfloat16"
    set `torch.set_float32_matmul_precision`, which holds for the whole process. All is set back at the end.
    """
    products = _PRODUCTS.get()
    if products == "widened":
        with _Widened():
            yield
        return
    if products == "float32":
        yield
        return

    # PyTorch's words: "high" is TensorFloat-32, "medium" is bfloat16.
    precision = "high" if products == "tf32" else "medium"
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def as_multiplied(values: Tensor) -> Tensor:
    """Round values as `quick_products` does; the result is float32, and is `values` itself if nothing changes.

    Sums of squares and of products must use the same numbers, because an error is a small difference between them. How
    matrices are multiplied is the run's choice (`products_as`).
    """
    products = _PRODUCTS.get()
    if products == "bfloat16" and values.dtype != torch.bfloat16:
        return values.to(torch.bfloat16).float()
    if products == "tf32" and not _is_half(values):
        # Of the 23 bits that are stored after the first one, 10 stay. To round, half of the last of these is added to
        # the number as an integer; then the other 13 bits are set to zero.
        bits = values.float().view(torch.int32)
        half_of_last_bit = 2**12
        all_but_13_bits = -(2**13)
        return ((bits + half_of_last_bit) & all_but_13_bits).view(torch.float32)
    return values.float()


def in_few_sizes(rows: Tensor) -> Tensor:
    """Append rows of zeros to [rows, ...] before a product by oneDNN, so that products have few different shapes.

    oneDNN keeps half a MiB for each shape of a product, and an expert gets any number of tokens. Returns `rows` itself
    if nothing has to be appended: for a multiple of 16 rows or the like, and if oneDNN does not compute the product.
    """
    products = _PRODUCTS.get()
    # Float32 products are those of MKL, which keeps nothing.
    is_float32 = products == "widened" or (products == "float32" and not _is_half(rows))
    if rows.device.type != "cpu" or is_float32:
        return rows
    count = len(rows)
    # The number of rows becomes a multiple of `step`: of 16, and above 128 rows of an eighth of the next power of two.
    exponent = max(4, (count - 1).bit_length() - 3)
    step = 2**exponent
    num_missing = -count % step  # up to the next multiple
    if not num_missing:
        return rows  # not copied
    # `pad` takes a pair for each dimension, beginning with the last one
    padding = (0, 0) * (rows.ndim - 1) + (0, num_missing)
    return nn.functional.pad(rows, padding)
