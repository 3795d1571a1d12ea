"""Blocks of rows, and the Cholesky factorisation of damped Gram matrices.

The *Gram matrix* `G = X X^T` [in, in] of the inputs of a linear operator, summed over all calibration tokens, is the
largest matrix of a solver. So functions named `in_place` overwrite their argument, and a factorisation that may have
to be repeated makes a new copy each time. torch's own functions would need two or three copies. *Damping* adds a small
positive number to the diagonal, so that a matrix that is singular, or nearly so, can be factorised. If more was needed
than the caller asked for, a message says so; nobody replaces the result by that of another algorithm.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

_ROWS = 192  # of a block, at least; a product with fewer is inefficient
_VALUES = 2**19  # of a block on a CPU, about: 2 MiB of float32
# Times as many values on other devices than the CPU, where a call is expensive: 256 MiB.
SCALE_ON_DEVICES = 128


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

    On other devices than the CPU a block has up to `SCALE_ON_DEVICES` times as many values.
    """
    rows, columns = matrix.shape
    scale = 1 if matrix.device.type == "cpu" else SCALE_ON_DEVICES
    step = max(1, rows_in_block(rows, columns, scale))
    for start in range(0, rows, step):
        yield slice(start, min(rows, start + step))


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
    first_damping = damping
    largest_damping = damping  # of those that were tried
    num_inputs = 0  # for the message of the error, when the matrix is gone
    for attempt in range(5):
        damped = make_gram()
        num_inputs = damped.shape[0]
        if damping:
            amount = mean_damping(damped.diagonal(), damping)
            damped.diagonal().add_(amount * ratios)  # changes `damped`

        # The factor takes the memory of `damped`.
        factor, failed = cholesky_in_place(damped)
        is_first = attempt == 0
        if not failed:
            if is_first:
                return factor, ""
            message = f"the Gram matrix needed damping {damping:g} instead of {first_damping:g}"
            return factor, message

        del damped, factor  # two names of one matrix, which is freed before the next one is made
        largest_damping = damping
        damping = max(10 * damping, 1e-4)  # because zero times ten is zero
        ratios = 1.0  # nearly dead inputs are damped like all others now
    raise torch.linalg.LinAlgError(
        f"the Gram matrix of {num_inputs} inputs is not positive semidefinite: Cholesky failed with damping up to "
        f"{largest_damping:g}"
    )


def mean_damping(diagonal: Tensor, damping: float) -> Tensor:
    """Return `damping * mean(diagonal)`, or `damping` if the mean is zero.

    The result is a scalar on the device of `diagonal` [n], so that the host need not wait for it.
    """
    mean = diagonal.mean().double()  # float64, as precise as the Python number `damping`
    not_zero = torch.where(mean == 0, torch.ones_like(mean), mean)
    return (damping * not_zero).to(diagonal.dtype)


def cholesky_in_place(matrix: Tensor) -> tuple[Tensor, bool]:
    """Compute the lower Cholesky factor of a symmetric contiguous matrix [n, n]; also say whether that failed.

    `matrix` is overwritten: the factor takes its memory. LAPACK keeps matrices by columns. It is given the transpose,
    which is the same matrix, and makes no copy.
    """
    factor = matrix.mT
    info = torch.empty((), dtype=torch.int32, device=matrix.device)
    torch.linalg.cholesky_ex(factor, out=(factor, info))
    return factor, int(info) != 0


def inverse_in_place(factor: Tensor) -> Tensor:
    """Compute the inverse [n, n] of a matrix from its lower Cholesky factor, as `cholesky_in_place` returns it.

    `factor` is overwritten: the inverse takes its memory. The transpose of the symmetric result is contiguous.
    """
    return torch.cholesky_inverse(factor, out=factor).mT


def damped_inverse(gram: Tensor, rho: float) -> Tensor:
    """Compute `(G + rho I)^-1` by Cholesky, for rho > 0.

    `gram` is `G` [in, in], symmetric positive semidefinite and contiguous. It is overwritten: the inverse takes its
    memory. Raises LinAlgError if the factorisation fails.
    """
    gram.diagonal().add_(rho)
    factor, failed = cholesky_in_place(gram)
    if failed:
        raise torch.linalg.LinAlgError(
            f"a Gram matrix of {gram.shape[0]} inputs plus {rho:g} is not positive definite"
        )
    return inverse_in_place(factor)


def diagonal_blocks(matrix: Tensor, width: int) -> Tensor:
    """Copy the blocks [n / width, width, width] along the diagonal of a matrix [n, n]."""
    by_block_rows = matrix.unflatten(0, (-1, width))  # [n / width, width, n]
    blocks = by_block_rows.unflatten(2, (-1, width))  # [n / width, width, n / width, width]
    on_diagonal = blocks.diagonal(dim1=0, dim2=2)  # [width, width, n / width]
    return on_diagonal.permute(2, 0, 1).contiguous()
