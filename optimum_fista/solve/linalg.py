"""Blocks of rows, and the Cholesky factorisation of damped Gram matrices; a message says if it needed more damping.

Gram matrices are the largest matrices of a solver. Functions named `in_place` overwrite their argument, and a
factorisation that may be repeated makes a new copy each time. torch's own functions would need two or three copies.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

_ROWS = 192  # at least, or a product is inefficient
_VALUES = 2**19  # about this many on a CPU: 2 MiB of float32
SCALE_ON_DEVICES = (
    128  # times as many values on other devices than the CPU, where a call is expensive: 256 MiB
)


def rows_in_block(rows: int, columns: int, scale: int = 1) -> int:
    """Rows of a block of a matrix [rows, columns]; `scale`: how many times as large it is as on a CPU."""
    most = max(_ROWS, scale * _VALUES // max(1, columns))
    # Rounded up twice: as few blocks as possible, of about equal size.
    return -(-rows // max(1, -(-rows // most)))


def row_blocks(matrix: Tensor) -> Iterator[slice]:
    """Slices of the rows of a matrix: about half a million values each, but enough rows for a product to be efficient.

    On other devices than the CPU all rows are one block up to `SCALE_ON_DEVICES` times that size.
    """
    rows, columns = matrix.shape
    step = rows_in_block(rows, columns, 1 if matrix.device.type == "cpu" else SCALE_ON_DEVICES)
    for start in range(0, rows, max(1, step)):
        yield slice(start, min(rows, start + max(1, step)))


def damped_cholesky(
    copy: Callable[[], Tensor], damping: float = 0.0, ratios: Tensor | float = 1.0
) -> tuple[Tensor, str]:
    """Lower Cholesky factor [n, n] of `G + damping * mean(diag G) diag(ratios)`.

    If the factorisation fails numerically, the damping is raised tenfold, at most four times, with ratios of 1, and the
    returned message says so; otherwise it is empty. `copy` makes a copy of `G` [n, n], symmetric positive semidefinite,
    which is used up: `gram.clone`. `ratios` are [n] (`InputStatistics.energy_ratios`).
    """
    wanted, size = damping, 0
    for _ in range(5):
        damped = copy()
        size = damped.shape[0]
        if damping:
            damped.diagonal().add_(mean_damping(damped.diagonal(), damping) * ratios)
        factor, failed = cholesky_in_place(damped)
        if not failed:
            raised = f"the Gram matrix needed damping {damping:g} instead of {wanted:g}"
            return factor, "" if damping == wanted else raised
        del damped, factor  # before the next copy is made
        # From 1e-4 because zero times ten is zero. Nearly dead inputs are damped like all others now.
        damping, ratios = max(10 * damping, 1e-4), 1.0
    why = f"Cholesky failed with damping up to {damping / 10:g}"
    raise torch.linalg.LinAlgError(
        f"the Gram matrix of {size} inputs is not positive semidefinite: {why}"
    )


def mean_damping(diagonal: Tensor, damping: float) -> Tensor:
    """`damping * mean(diagonal)`, or `damping` if that vanishes; a scalar on the device."""
    mean = diagonal.mean().double()  # a Python number times the mean, without a transfer
    return (damping * torch.where(mean == 0, torch.ones_like(mean), mean)).to(diagonal.dtype)


def cholesky_in_place(matrix: Tensor) -> tuple[Tensor, bool]:
    """Lower Cholesky factor of a symmetric contiguous matrix [n, n] in its own memory, and whether it failed.

    LAPACK keeps matrices by columns: it is given the transpose, which is the same matrix, and makes no copy.
    """
    factor = matrix.mT
    info = torch.empty((), dtype=torch.int32, device=matrix.device)
    torch.linalg.cholesky_ex(factor, out=(factor, info))
    return factor, int(info) != 0


def inverse_in_place(factor: Tensor) -> Tensor:
    """Inverse [n, n] of a matrix from its lower Cholesky factor as `cholesky_in_place` returns it, in its memory."""
    return torch.cholesky_inverse(factor, out=factor).mT


def damped_inverse(gram: Tensor, rho: float) -> Tensor:
    """`(G + rho I)^-1` of a symmetric positive semidefinite [in, in] matrix, contiguous, rho > 0, by Cholesky.

    The matrix is used up: the inverse takes its memory.
    """
    gram.diagonal().add_(rho)
    factor, failed = cholesky_in_place(gram)
    if failed:
        raise torch.linalg.LinAlgError(
            f"a Gram matrix of {gram.shape[0]} inputs plus {rho:g} is not positive definite"
        )
    return inverse_in_place(factor)


def diagonal_blocks(matrix: Tensor, width: int) -> Tensor:
    """The blocks [n / width, width, width] along the diagonal of a matrix [n, n], in a matrix of their own."""
    blocks = matrix.unflatten(0, (-1, width)).unflatten(
        2, (-1, width)
    )  # [n / width, width, n / width, width]
    return blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()
