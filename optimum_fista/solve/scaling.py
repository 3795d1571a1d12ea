"""Damped statistics in coordinates where the Gram matrix has unit diagonal."""

from __future__ import annotations

import torch
from torch import Tensor

from optimum_fista.solve.cholesky import mean_damping
from optimum_fista.solve.problem import LayerProblem


def unit_diagonal(problem: LayerProblem, damping: float) -> tuple[Tensor, Tensor, Tensor]:
    """Damp `G` and `C` alike and scale the inputs so that the damped Gram matrix has unit diagonal.

    With `d = damping * mean(diag G)`: `G_d = G + d I`, `C_d = C + d W` (a ridge towards the dense weights), and
    `s_j = 1 / sqrt([G_d]_jj)`; scaled weights are `W_ij / s_j`. For nearly dead inputs `d` is the same fraction of
    their own energy (`InputStatistics.energy_shares`).

    Args:
        problem: The layer problem.
        damping: Fraction of the mean diagonal added.

    Returns:
        `s_i s_j [G_d]_ij` [in, in], `[C_d]_ij s_j` [out, in], and `s` [in].
    """
    diagonal = problem.statistics.diagonal
    amounts = mean_damping(diagonal, damping) * problem.statistics.energy_shares
    scale = (diagonal + amounts).rsqrt()
    gram = problem.gram.clone()
    gram.diagonal().add_(amounts)
    gram.mul_(scale).mul_(scale[:, None])
    target = torch.addcmul(problem.target, problem.weight, amounts).mul_(scale)
    return gram, target, scale
