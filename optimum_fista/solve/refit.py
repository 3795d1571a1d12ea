"""Least-squares refit of the kept weights by preconditioned conjugate gradients."""

from __future__ import annotations

import torch
from torch import Tensor


def refit(
    gram: Tensor,
    target: Tensor,
    start: Tensor,
    mask: Tensor,
    *,
    max_iterations: int = 10,
    tolerance: float = 1e-5,
) -> tuple[Tensor, int]:
    """Minimize `1/2 <W G, W> - <W, C>` over weights that vanish outside a fixed mask.

    Every row is a least-squares problem of its own; all rows take a conjugate-gradient step together, each
    with its own step length, preconditioned by the diagonal of G. The objective falls in every step.

    Args:
        gram: `G` [in, in], symmetric positive semidefinite.
        target: `C` [out, in].
        start: Starting weights [out, in]; values outside the mask are ignored.
        mask: Boolean [out, in], True = kept.
        max_iterations: Products with `G`, besides the one for the first gradient.
        tolerance: Stop when the preconditioned residual of all rows together has fallen by this factor.

    Returns:
        Weights [out, in], zero outside the mask, and the number of steps taken.
    """
    diagonal = gram.diagonal()
    scale = torch.where(diagonal > 0, diagonal, torch.ones_like(diagonal)).reciprocal()
    weight = start * mask
    residual = torch.addmm(target, weight, gram, alpha=-1).mul_(mask)
    preconditioned = residual * scale
    direction = preconditioned.clone()
    energy = torch.linalg.vecdot(residual, preconditioned)
    stop = tolerance**2 * float(energy.sum())
    for iteration in range(max_iterations):
        if float(energy.sum()) <= stop:
            return weight, iteration
        product = (direction @ gram).mul_(mask)
        curvature = torch.linalg.vecdot(direction, product)
        length = torch.where(curvature > 0, energy / curvature.clamp_min(1e-38), torch.zeros_like(energy))
        weight.addcmul_(length[:, None], direction)
        residual.addcmul_(length[:, None], product, value=-1)
        preconditioned = residual * scale
        energy_next = torch.linalg.vecdot(residual, preconditioned)
        momentum = torch.where(energy > 0, energy_next / energy.clamp_min(1e-38), torch.zeros_like(energy))
        direction.mul_(momentum[:, None]).add_(preconditioned)
        energy = energy_next
    return weight, max_iterations
