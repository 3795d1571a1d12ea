"""Blocks of rows, stacks of matrices, and the Cholesky factorisation of damped Gram matrices.

The *Gram matrix* `G = X X^T` [in, in] of the inputs of a linear operator, summed over all calibration tokens, is the
largest matrix of a solver. So functions named `in_place` overwrite their argument, and a factorisation that may have
to be repeated makes a new copy each time. torch's own functions would need two or three copies. *Damping* adds a small
positive number to the diagonal, so that a matrix that is singular, or nearly so, can be factorised. If more was needed
than the caller asked for, a message says so; nobody replaces the result by that of another algorithm.

*Rounded products* are those of a run that multiplies in bfloat16 or TensorFloat-32: a method may round the matrices of
a product to bfloat16 if its result hardly depends on the last bits, as the choice of a mask does, or a step that later
ones correct (`products_rounded_to`).

A *stack* [matrices, rows, columns] has matrices of one shape, for which torch is called once. Many small matrices take
longer one by one, because each call has its cost. On a CPU, every matrix with an even number of columns gets the same
bits in a stack as alone: so it was for all functions that are used here, with MKL and torch 2.13. With an odd number
the last bits may differ.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

_ROWS = 192  # of a block, at least; a product with fewer is inefficient
_VALUES = 2**19  # of a block on a CPU, about: 2 MiB of float32
# Times as many values on other devices than the CPU, where a call is expensive: 256 MiB.
SCALE_ON_DEVICES = 128
_LEAF = 256  # columns up to which a block of a symmetric product is multiplied whole
_ATTEMPTS = 5  # of a factorisation, each with more damping
_VALUES_OF_STACK = 2**20  # of a stack on a CPU: 4 MiB of float32
_STACK_ON_DEVICES = 16  # times as many elsewhere: 64 MiB

# What `products_rounded_to` was given last; `None`: no product is rounded.
_ROUNDED_TO: ContextVar[torch.dtype | None] = ContextVar("dtype of rounded products", default=None)


def rows_in_block(rows: int, columns: int, scale: int = 1) -> int:
    """Count the rows of a block, if a matrix [rows, columns] is cut into blocks of about equal size.

    A block has about half a million values times `scale`, but never fewer rows than a product needs to be efficient.
    """
    values_in_block = scale * _VALUES
    largest_block = max(_ROWS, values_in_block // max(1, columns))  # in rows
    # Rounded up twice: as few blocks as possible, of about equal size.
    num_blocks = max(1, math.ceil(rows / largest_block))
    return math.ceil(rows / num_blocks)


def row_blocks(matrix: Tensor) -> Iterator[slice]:
    """Slices of the rows of a matrix: about half a million values each, but enough rows for a product to be efficient.

    On other devices than the CPU a block has up to `SCALE_ON_DEVICES` times as many values. `matrix` may be a stack
    [matrices, rows, columns]: the slices are those of one matrix.
    """
    rows, columns = matrix.shape[-2:]
    scale = 1 if matrix.device.type == "cpu" else SCALE_ON_DEVICES
    step = max(1, rows_in_block(rows, columns, scale))
    for start in range(0, rows, step):
        yield slice(start, min(rows, start + step))


def matrices_in_stack(values: int, *, on_cpu: bool) -> int:
    """Count the problems that are solved together, if the largest matrix of each has so many `values`: at least one.

    On a CPU the largest matrices of all have about a million values, so that they stay in the cache: 16 Gram matrices
    of 256 inputs. Other devices get `_STACK_ON_DEVICES` times as many. So problems that are solved together take little
    memory beside one large problem.
    """
    values_of_stack = _VALUES_OF_STACK if on_cpu else _STACK_ON_DEVICES * _VALUES_OF_STACK
    return max(1, values_of_stack // max(1, values))


def stacked(matrices: Sequence[Tensor]) -> Tensor:
    """Make a stack of matrices of one shape; that of a single matrix is a view of it, otherwise the stack is a copy."""
    if len(matrices) == 1:
        return matrices[0][None]
    return torch.stack(list(matrices))


@contextmanager
def products_rounded_to(dtype: torch.dtype | None) -> Iterator[None]:
    """Inside, methods may round matrices to a dtype of 16 bits before they multiply them; `None`: they may not.

    It is a permission: a method rounds only where that hardly changes its result. Sets the context variable
    `_ROUNDED_TO`, and sets it back at the end.
    """
    token = _ROUNDED_TO.set(dtype)
    try:
        yield
    finally:
        _ROUNDED_TO.reset(token)


def dtype_of_rounded_products() -> torch.dtype | None:
    """Return the dtype that `products_rounded_to` allows, or `None` if it allows none."""
    return _ROUNDED_TO.get()


def rounded_in_place(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """Round a contiguous matrix, or a stack, to a dtype of fewer bytes, in its own memory.

    `matrix` is overwritten: the result takes the beginning of its memory, so the largest matrix of a solver is not
    held twice.
    """
    values = matrix.view(-1)
    rounded = values.view(dtype)[: values.numel()]
    step = _VALUES if matrix.device.type == "cpu" else SCALE_ON_DEVICES * _VALUES
    for start in range(0, values.numel(), step):
        some = slice(start, start + step)
        # A copy first: its place overlaps that of the values it is made of, never that of later ones.
        rounded[some] = values[some].to(dtype)
    return rounded.view(matrix.shape)


def add_upper_half(out: Tensor, inputs: Tensor) -> None:
    """Add the upper half of `inputs^T inputs` to `out`, in blocks; the blocks below the diagonal stay as they are.

    The matrix is halved into four blocks, and those on the diagonal are halved again in the same way. So about half of
    the multiplications of the whole product are saved. Blocks on the diagonal of at most `_LEAF` columns are added
    whole.

    `out` [in, in] is changed in place. `inputs` [tokens, in] have the same dtype and device.
    """
    size = inputs.shape[1]
    if size <= _LEAF:
        out.addmm_(inputs.T, inputs)
        return
    half = (size // 2 + 31) // 32 * 32  # rounded up to a multiple of 32, so that blocks are aligned
    left = inputs[:, :half]
    right = inputs[:, half:]
    add_upper_half(out[:half, :half], left)
    out[:half, half:].addmm_(left.T, right)
    add_upper_half(out[half:, half:], right)


def fill_lower_half(matrix: Tensor) -> None:
    """Copy the upper half of a matrix [n, n] to its lower one, in place, so that both are equal to the last bit.

    `_LEAF` rows are completed at a time. A block on the diagonal may have values in its lower half: these are replaced,
    too.
    """
    for start in range(0, matrix.shape[0], _LEAF):
        end = start + _LEAF
        corner = matrix[start:end, start:end].triu_()
        corner += corner.triu(1).T  # changes `matrix`, of which it is a view
        matrix[end:, start:end] = matrix[start:end, end:].T


def as_factors(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Make numbers of a boolean mask to multiply with: 1 where it is True, otherwise 0. A new tensor.

    A product with the mask itself has the same result. But on a CPU, PyTorch converts bytes four times as fast as
    booleans, and multiplies tensors of one dtype three times as fast.
    """
    return mask.view(torch.uint8).to(dtype)


def diagonals(matrix: Tensor) -> Tensor:
    """The diagonal of a matrix [n, n], or the diagonals of a stack [matrices, n, n], [matrices, n]: a view."""
    return matrix.diagonal(dim1=-2, dim2=-1)


def damped_cholesky(
    make_gram: Callable[[], Tensor], damping: float = 0.0, ratios: Tensor | float = 1.0
) -> tuple[Tensor, str]:
    """Compute the lower Cholesky factor [n, n] of `G + damping * mean(diag G) diag(ratios)`, and a message.

    If the factorisation fails numerically, it is tried again with more damping, at most four times. Each time the
    damping is ten times as large, but at least 1e-4, and `ratios` are no longer used. Then the message names both
    dampings; otherwise it is empty.

    Args:
        make_gram: Makes a new matrix `G` [n, n], symmetric positive semidefinite, such as `gram.clone`. It is called
            once for each attempt, and what it returns is overwritten.
        damping: As a fraction of the mean of the diagonal, such as 0.01.
        ratios: Factors of the damping by input, [n] (`InputStatistics.energy_ratios`): small for nearly dead inputs.

    Raises:
        torch.linalg.LinAlgError: If it fails with all dampings.
    """
    factors, messages = damped_choleskys(lambda: make_gram()[None], damping, ratios)
    return factors[0], messages[0]


def damped_choleskys(
    make_grams: Callable[[], Tensor], damping: float = 0.0, ratios: Tensor | float = 1.0
) -> tuple[Tensor, list[str]]:
    """Compute the factors [matrices, n, n] of a stack, each as `damped_cholesky` does, with a message for each matrix.

    If some of the factorisations fail, all are repeated: only matrices that failed get more damping, and the others
    have the same factors again. `make_grams` makes a new stack for each attempt, which is overwritten. `damping` is the
    first one of all matrices, and `ratios` are as there. Raises LinAlgError if one matrix fails with all dampings.
    """
    dampings: list[float] = []  # of each matrix; empty before the first attempt
    for _ in range(_ATTEMPTS):
        damped = make_grams()
        num_matrices, num_inputs, _ = damped.shape
        if not dampings:
            dampings = [damping] * num_matrices
        _damp(damped, dampings, first_damping=damping, ratios=ratios)

        # The factors take the memory of `damped`.
        factors, failed = cholesky_in_place(damped)
        if not bool(failed.any()):
            messages = [
                ""
                if last == damping
                else f"the Gram matrix needed damping {last:g} instead of {damping:g}"
                for last in dampings
            ]
            return factors, messages

        del damped, factors  # two names of one stack, which is freed before the next one is made
        largest_damping = max(dampings)
        dampings = [
            # 1e-4 at least, because zero times ten is zero
            max(10 * last, 1e-4) if has_failed else last
            for last, has_failed in zip(dampings, failed.tolist(), strict=True)
        ]
    raise torch.linalg.LinAlgError(
        f"the Gram matrix of {num_inputs} inputs is not positive semidefinite: Cholesky failed with damping up to "
        f"{largest_damping:g}"
    )


def _damp(
    grams: Tensor, dampings: Sequence[float], *, first_damping: float, ratios: Tensor | float
) -> None:
    """Add to the diagonals of a stack of Gram matrices [matrices, n, n] in place, to each the damping of its own.

    `dampings` are as fractions of the mean of the diagonal, one for each matrix. The `ratios` by input count only for
    matrices with the `first_damping`: if that was not enough, nearly dead inputs are damped like all others.
    """
    for gram, damping in zip(grams, dampings, strict=True):
        if not damping:
            continue
        diagonal = gram.diagonal()
        amount = mean_damping(diagonal, damping)
        diagonal.add_(amount * ratios if damping == first_damping else amount)


def mean_damping(diagonal: Tensor, damping: float) -> Tensor:
    """Return `damping * mean(diagonal)`, or `damping` if the mean is zero.

    The result is a scalar on the device of `diagonal` [n], so that the host need not wait for it.
    """
    mean = diagonal.mean().double()  # float64, as precise as the Python number `damping`
    not_zero = torch.where(mean == 0, torch.ones_like(mean), mean)
    return (damping * not_zero).to(diagonal.dtype)


def cholesky_in_place(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the lower Cholesky factor of a symmetric contiguous matrix [n, n], or of each matrix of a stack.

    `matrix` is overwritten: the factor takes its memory. LAPACK keeps matrices by columns. It is given the transpose,
    which is the same matrix, and makes no copy. Also tells whether the factorisation failed: a boolean for each matrix,
    [] or [matrices], on the device.
    """
    factor = matrix.mT
    info = torch.empty(matrix.shape[:-2], dtype=torch.int32, device=matrix.device)
    torch.linalg.cholesky_ex(factor, out=(factor, info))
    return factor, info != 0


def inverse_in_place(factor: Tensor) -> Tensor:
    """Compute the inverse [n, n] of a matrix from its lower Cholesky factor, as `cholesky_in_place` returns it.

    `factor` is overwritten: the inverse takes its memory. The transpose of the symmetric result is contiguous. For the
    factors of a stack, the result is the stack of inverses.
    """
    return torch.cholesky_inverse(factor, out=factor).mT


def damped_inverse(gram: Tensor, rho: float) -> Tensor:
    """Compute `(G + rho I)^-1` by Cholesky, for rho > 0.

    `gram` is `G` [in, in], symmetric positive semidefinite and contiguous, or a stack of such matrices. It is
    overwritten: the inverse takes its memory. If a factorisation fails on a CPU, it raises LinAlgError. On another
    device the host would have to wait to know that: there the inverse is NaN, and so are the weights made with it.
    """
    diagonals(gram).add_(rho)
    factor, failed = cholesky_in_place(gram)
    if gram.device.type != "cpu":
        return inverse_in_place(factor).masked_fill_(failed[..., None, None], math.nan)
    if bool(failed.any()):
        raise torch.linalg.LinAlgError(
            f"a Gram matrix of {gram.shape[-1]} inputs plus {rho:g} is not positive definite"
        )
    return inverse_in_place(factor)


def line_to_other_rho(rho: float, other_rho: float) -> tuple[float, float]:
    """Return `a` and `b`, with which `a X + b X^2` is nearly the inverse for another `rho`.

    `X` is `(G + rho I)^-1`, and the wanted matrix is, with `d = rho' - rho`,

        (G + rho' I)^-1  =  (X^-1 + d I)^-1  =  X (I + d X)^-1.

    For a `d` that is not large, `(I + d X)^-1` is nearly a straight line, `a I + b X`.

    The eigenvalues of `rho X` lie between 0 and 1. The line is chosen so that the error is zero for three of them: 0,
    0.46 and 0.93. These are the roots of the Chebyshev polynomial of degree 3, moved and stretched so that the first
    root is 0 and the polynomial ends at 1. So the largest error is nearly as small as a line can make it.

    Small eigenvalues of `X` are those of strong inputs. Their error is small, too, but it is a larger part of them:

        rho' / rho                                     1.22     1.5      2
        largest error (spectral norm), of 1 / rho      0.14%    0.5%     1.2%
        error of the smallest eigenvalues, of these    1.6%     6%       15%

    `rho` is that of `X`, and `other_rho` is `rho'`; both are positive.
    """
    growth = other_rho / rho - 1  # d / rho
    # The eigenvalues u at which 1 / (1 + growth u) is met exactly. The roots of the Chebyshev polynomial are
    # -sqrt(3)/2, 0 and sqrt(3)/2; the first one moves to 0, and 1 stays where it is.
    first = 2 * math.sqrt(3) - 3
    second = 2 * first
    divisor = (1 + growth * first) * (1 + growth * second)
    a = (1 + growth * (first + second)) / divisor
    b = -growth * rho / divisor
    return a, b


def diagonal_blocks(matrix: Tensor, width: int) -> Tensor:
    """Copy the blocks [n / width, width, width] along the diagonal of a matrix [n, n].

    The blocks of a stack [matrices, n, n] are [matrices, n / width, width, width].
    """
    by_block_rows = matrix.unflatten(-2, (-1, width))  # [..., n / width, width, n]
    blocks = by_block_rows.unflatten(-1, (-1, width))  # [..., n / width, width, n / width, width]
    on_diagonal = blocks.diagonal(dim1=-4, dim2=-2)  # [..., width, width, n / width]
    return on_diagonal.movedim(-1, -3).contiguous()
