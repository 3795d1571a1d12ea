"""Proximal gradient steps for the LASSO on Gram statistics: soft-thresholding, and FISTA with its equation numbers.

The LASSO is a least-squares problem with a penalty of the sum of absolute values, which makes some weights exactly
zero. The method `fista` rounds its solution to a pattern. `G` and `C` (the Gram matrix and the target of a
`LayerProblem`) are sums over all tokens, so that a step takes one product with G for any number of tokens. To avoid
waiting for a device, convergence is tested only every ten steps there, so up to nine steps may be superfluous.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class FistaSolution:
    """Minimizer reached by FISTA, [out, in]."""

    weight: Tensor
    iterations: int
    converged: bool  # whether the iterates stopped moving before the limit


def soft_threshold(values: Tensor, threshold: float) -> Tensor:
    """Proximal step of `threshold * || . ||_1`: `sign(v) max(|v| - threshold, 0)`."""
    return values - values.clamp(-threshold, threshold)


def fista(
    gram: Tensor,
    target: Tensor,
    start: Tensor,
    l1_penalty: float,
    lipschitz: float,
    *,
    max_iterations: int = 20,
    tolerance: float = 1e-6,
) -> FistaSolution:
    """Solve the LASSO of a layer problem by FISTA.

    It minimizes `1/2 <W G, W> - <W, C> + l1_penalty * sum |W_ij|` (FISTAPruner, arXiv 2408.03728, eq. 2) by
    Beck & Teboulle (2009), eqs. 4.1-4.3: `V = Y_k - (Y_k G - C) / L`, `W_{k+1} = soft_threshold(V, l1 / L)`,
    `t_{k+1} = (1 + sqrt(1 + 4 t_k^2)) / 2`, `Y_{k+1} = W_{k+1} + (t_k - 1) / t_{k+1} (W_{k+1} - W_k)`, t_0 = 1.
    Symbols: W iterates, Y extrapolated points, t momentum.

    `gram` is `G` [in, in], symmetric positive semidefinite; `target` is `C` [out, in], as large as `start`, the first
    iterate. `lipschitz` is `L`, at least `lambda_max(G)`. The arguments stay as they are. It stops after
    `max_iterations`, or before if

        || W_{k+1} - W_k ||_F <= tolerance * || W_{k+1} ||_F.
    """
    if lipschitz <= 0:
        return FistaSolution(torch.zeros_like(start), iterations=0, converged=True)

    W = start
    Y = start
    t = 1.0
    # Norms of a step and of the iterate, on the device, that were not read yet: reading makes the host wait for it.
    unread: list[Tensor] = []
    iterations_between_readings = 1 if start.device.type == "cpu" else 10
    converged = False
    iteration = 0
    for iteration in range(1, max_iterations + 1):
        # the gradient step
        V = torch.addmm(Y, Y, gram, alpha=-1 / lipschitz).add_(target, alpha=1 / lipschitz)
        W_next = soft_threshold(V, l1_penalty / lipschitz)  # eq. 4.1
        step = W_next - W
        t_next = (1 + (1 + 4 * t * t) ** 0.5) / 2  # eq. 4.2
        Y = torch.add(W_next, step, alpha=(t - 1) / t_next)  # eq. 4.3
        W = W_next
        t = t_next

        unread.append(torch.stack([step.norm(), W.norm()]))
        if iteration % iterations_between_readings == 0 or iteration == max_iterations:
            norms = torch.stack(unread).tolist()
            unread.clear()
            converged = any(moved <= tolerance * size for moved, size in norms)
            if converged:
                break
    return FistaSolution(W, iteration, converged)
