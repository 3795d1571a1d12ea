"""Least-squares refits of the kept weights: by conjugate gradients, or exactly if whole columns are kept."""

from __future__ import annotations

import torch
from torch import Tensor

from optimum_fista.solve.cholesky import damped_cholesky
from optimum_fista.solve.problem import inner_by_rows


def refit(
    gram: Tensor,
    target: Tensor,
    start: Tensor,
    mask: Tensor,
    *,
    max_iterations: int = 10,
    tolerance: float = 1e-5,
    in_place: bool = False,
    singular: bool = False,
) -> tuple[Tensor, Tensor]:
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
        singular: Whether `gram` may be singular. A row is then at rest once its residual is as small as its rounding
            errors: these point along directions in which no token has an input, where weights would grow without bound.
        in_place: Whether `target` and `start` may be used up; two matrices of their shape are then made, else four.

    Returns:
        Weights [out, in], zero outside the mask, and the number of steps taken, a scalar on the device: other devices
        than the CPU are asked every tenth step only whether to stop, and steps after the last one change nothing.
    """
    diagonal = gram.diagonal()
    # The preconditioner. Inputs without energy have no residual, so that any divisor does for them.
    scale = torch.where(diagonal > 0, diagonal, torch.ones_like(diagonal)).reciprocal()
    weight = start.mul_(mask) if in_place else start * mask
    product = torch.empty_like(weight)
    noise = torch.zeros_like(weight[:, 0])
    if singular:
        # Squared rounding error of the residual C - W G, sums of n terms, in the norm of `energy` below.
        noise += torch.mul(target, mask, out=product).square_() @ scale + torch.square(weight, out=product) @ diagonal
        noise *= gram.shape[0] * torch.finfo(gram.dtype).eps ** 2
    # The negative gradient on the mask; it takes the memory of C if that may be used up.
    residual = torch.addmm(target, weight, gram, alpha=-1, out=target if in_place else None).mul_(mask)
    direction = residual * scale
    energy = inner_by_rows(residual, direction).to(residual.dtype)
    energy.masked_fill_(energy <= noise, 0.0)  # NaN stays
    stop = tolerance**2 * energy.sum().double()
    steps = torch.zeros((), dtype=torch.int64, device=gram.device)
    look = 1 if gram.device.type == "cpu" else 10
    for iteration in range(1, max_iterations + 1):
        at_rest = energy.sum() <= stop
        if iteration % look == 0 and bool(at_rest):
            break
        steps += ~at_rest
        torch.mm(direction, gram, out=product).mul_(mask)
        curvature = inner_by_rows(direction, product).to(residual.dtype)
        # No step along directions that no token has, nor after the end. 1e-38 is about the least normal float32.
        length = torch.where((curvature > 0) & ~at_rest, energy / curvature.clamp_min(1e-38), torch.zeros_like(energy))
        weight.addcmul_(length[:, None], direction)
        residual.addcmul_(length[:, None], product, value=-1)
        preconditioned = torch.mul(residual, scale, out=product)
        energy_next = inner_by_rows(residual, preconditioned).to(residual.dtype)
        energy_next.masked_fill_(energy_next <= noise, 0.0)
        # Fletcher and Reeves: the next direction is conjugate to the last one.
        momentum = torch.where(energy > 0, energy_next / energy.clamp_min(1e-38), torch.zeros_like(energy))
        direction.mul_(momentum[:, None]).add_(preconditioned)
        energy = energy_next
    return weight, steps


def refit_columns(gram: Tensor, target: Tensor, kept: Tensor) -> tuple[Tensor, str]:
    """Minimize `1/2 <W G, W> - <W, C>` over weights whose columns outside `kept` are zero, exactly.

    All rows share one linear system, `W_K G_KK = C_K`, and its Cholesky factor.

    Args:
        gram: `G` [in, in], symmetric positive definite.
        target: `C` [out, in].
        kept: Boolean [in], True = kept.

    Returns:
        Weights [out, in], and the message of a factorisation that needed help (`damped_cholesky`).
    """
    places = kept.nonzero().flatten()
    factor, message = damped_cholesky(lambda: gram.index_select(0, places).index_select(1, places), 0.0)
    solved = torch.cholesky_solve(target.index_select(1, places).mT, factor)
    return torch.zeros_like(target).index_copy_(1, places, solved.mT), message
