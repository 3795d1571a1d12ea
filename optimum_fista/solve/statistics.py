"""Statistics of the inputs that operators share: their Gram matrix, which inputs are dead, and its spectrum."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

_NEARLY_DEAD = 5e-6
"""Fraction of the mean energy below which an input is nearly dead: the root of it is a 450th."""
_DEAD = 1e-12
"""Fraction of the mean energy that an input counts with at least."""


class InputStatistics:
    """Second-order statistics of the inputs that one or more operators share.

    A dead input is zero on all calibration tokens, a nearly dead one has less than 5e-6 of the mean energy. Their
    weights hardly change the outputs, and the outputs hardly determine them. Such an input stands alone
    (`decoupled`): its weights are the first to be removed, those that a pattern must keep have their dense
    values, in case other text brings the input to life, and none grows to stand for others. Scores and damping know its
    true energy (`diagonal`, `energy_ratios`). Magnitude pruning looks at no input, and not at these either.

    Attributes:
        gram: Gram matrix `G = X* X*^T` [in, in], float32 or better, symmetric, summed over tokens.
        num_tokens: Number of tokens summed.
    """

    def __init__(self, gram: Tensor, num_tokens: int, mean: Tensor | None = None) -> None:
        if gram.ndim != 2 or gram.shape[0] != gram.shape[1]:
            raise ValueError(f"gram has shape {tuple(gram.shape)}: pass a square [in, in] matrix.")
        self.gram = gram
        self.num_tokens = num_tokens
        self._mean = mean
        energy = gram.diagonal().mean()
        self._mean_energy = torch.where(energy == 0, torch.ones_like(energy), energy)  # 1 if all inputs are dead

    @property
    def mean(self) -> Tensor:
        """Mean of the inputs over the tokens, [in]."""
        if self._mean is None:
            raise ValueError("these statistics hold no mean of the inputs: pass mean to InputStatistics.")
        return self._mean

    @cached_property
    def diagonal(self) -> Tensor:
        """Squared norms of the inputs over the tokens, [in]; of dead ones 1e-12 of the mean, to divide by."""
        diagonal = self.gram.diagonal()
        return torch.maximum(diagonal, _DEAD * self._mean_energy)

    @cached_property
    def energy_ratios(self) -> Tensor:
        """Squared norms of nearly dead inputs over the mean, and 1 for all others, [in].

        Damping is multiplied by it, so that it stays a fraction of what it is added to.
        """
        ratios = self.diagonal / self._mean_energy
        return torch.where(ratios < _NEARLY_DEAD, ratios, torch.ones_like(ratios))

    @cached_property
    def decoupled(self) -> InputStatistics | None:
        """Statistics in which nearly dead inputs are uncorrelated with all others; `None` if there are none.

        They are not itself then: kept in itself, an object would live on until cycles are collected.
        """
        live = self.energy_ratios == 1
        if bool(live.all()):
            return None
        # Rows and columns of nearly dead inputs vanish but for the diagonal.
        gram = self.gram.mul(live).mul_(live[:, None])
        gram.diagonal().copy_(self.diagonal)
        return InputStatistics(gram, self.num_tokens, self._mean)

    @cached_property
    def lipschitz(self) -> float:
        """Lipschitz constant of the gradient, `lambda_max(G)`."""
        return largest_eigenvalue(self.gram)


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
    # Gershgorin.
    bound = float(gram.abs().sum(1).max())
    if bound == 0.0:
        return 0.0
    generator = torch.Generator().manual_seed(0)
    vector = torch.randn(n, generator=generator, dtype=torch.float32).to(gram)
    # Strong inputs dominate the leading eigenvector: a start near it. The random part is orthogonal to nothing.
    vector += gram.diagonal() / gram.diagonal().mean()
    vector /= vector.norm()
    quotient, residual = 0.0, bound
    found: list[Tensor] = []
    # Reading a residual makes the host wait for a device.
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
