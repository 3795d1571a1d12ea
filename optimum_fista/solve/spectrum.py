"""Largest eigenvalue of a Gram matrix from matrix-vector products."""

from __future__ import annotations

import torch
from torch import Tensor


def largest_eigenvalue(gram: Tensor, *, tolerance: float = 1e-4, max_iterations: int = 300) -> float:
    """Upper estimate of `lambda_max(G)` of a symmetric positive semidefinite matrix by power iteration.

    The Rayleigh quotient `q` of a unit vector `v` never exceeds `lambda_max`, and some eigenvalue lies within
    `r = || G v - q v ||` of it; `q + r` is returned once `r <= tolerance * q`, and never more than the
    largest absolute row sum (Gershgorin), so that a gradient step of its inverse does not diverge.

    Args:
        gram: [n, n], symmetric positive semidefinite.
        tolerance: Relative residual at which to stop; other devices than the CPU are asked every tenth product.
        max_iterations: At most this many products.

    Returns:
        The estimate; zero for a zero matrix.
    """
    n = gram.shape[0]
    bound = float(gram.abs().sum(1).max())
    if bound == 0.0:
        return 0.0
    generator = torch.Generator().manual_seed(0)
    vector = torch.randn(n, generator=generator, dtype=torch.float32).to(gram)
    vector += gram.diagonal() / gram.diagonal().mean()
    vector /= vector.norm()
    quotient, residual = 0.0, bound
    found: list[Tensor] = []
    look = 1 if gram.device.type == "cpu" else 10
    for iteration in range(1, max_iterations + 1):
        product = gram @ vector
        rayleigh = vector @ product
        found.append(torch.stack([rayleigh, (product - rayleigh * vector).norm()]))
        if iteration % look == 0 or iteration == max_iterations:
            for quotient, residual in torch.stack(found).tolist():
                if residual <= tolerance * quotient:
                    return min(bound, quotient + residual)
            found.clear()
        vector = product / product.norm()
    return min(bound, quotient + residual)
