"""Cholesky factorisation of damped Gram matrices that says when it needed help."""

from __future__ import annotations

import torch
from torch import Tensor


def damped_cholesky(gram: Tensor, damping: float, *, in_place: bool = False) -> tuple[Tensor, str]:
    """Lower Cholesky factor of `G + damping * mean(diag G) I`.

    When the factorisation breaks down numerically the damping is raised tenfold, at most four times, and the
    returned message says so.

    Args:
        gram: [n, n], symmetric positive semidefinite.
        damping: Fraction of the mean diagonal added to the diagonal.
        in_place: Whether the damping may stay in `gram`.

    Returns:
        The factor [n, n], and a message that is empty unless the damping had to be raised.

    Raises:
        torch.linalg.LinAlgError: If it fails even so (the matrix is not positive semidefinite).
    """
    diagonal = gram.diagonal().clone()
    mean = float(diagonal.mean()) or 1.0
    wanted = damping
    damped = gram if in_place else gram.clone()
    for _ in range(5):
        damped.diagonal().copy_(diagonal + damping * mean)
        factor, info = torch.linalg.cholesky_ex(damped)
        if int(info) == 0:
            raised = f"the Gram matrix needed damping {damping:g} instead of {wanted:g}"
            return factor, "" if damping == wanted else raised
        damping = max(10 * damping, 1e-4)
    raise torch.linalg.LinAlgError(
        f"the Gram matrix of {gram.shape[0]} inputs is not positive semidefinite: "
        f"Cholesky failed with damping up to {damping / 10:g}"
    )
