"""A rotation of the residual stream, trained so that a sparsity pattern costs little."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from optimum_fista.solve.allocation import LEAST_SCALE
from optimum_fista.solve.pattern import SparsityPattern

_SHARE = 0.25
"""Share of the rows of readers, and of the columns of writers, that a step looks at."""
_GROUPS = 16
"""Groups of operators that a step looks at."""
_WARM_UP = 20


@dataclass(frozen=True)
class Readers:
    """Operators that read the residual stream together: `y = W x`, rotated `y = (W R) (R^T x)`.

    Attributes:
        weights: Their `W` [out, hidden], in any floating dtype.
        output_weights: What a squared error in each of the outputs costs, [out] of each, float32.
        inverse: `(G + r diag(G))^-1` of the Gram matrix `G` of their inputs, [hidden, hidden], float32.
    """

    weights: Sequence[Tensor]
    output_weights: Sequence[Tensor]
    inverse: Tensor

    def error(
        self, rotation: Tensor, pattern: SparsityPattern, share: float = 1.0, generator: torch.Generator | None = None
    ) -> Tensor:
        """The predicted error, a scalar: the sum of `v_i (W R)_ij^2 / (R^T H^-1 R)_jj` over the weights that go.

        That is the error of optimal brain surgery if each weight goes alone. `H = G + r diag(G)`, and `v` are the
        `output_weights` over their mean, none smaller than 0.09. With a `generator` a random `share` of the rows stands
        for all.
        """
        drawn = [_some(len(weight), 1, share, generator).to(weight.device) for weight in self.weights]
        weight = torch.cat([w[rows].float() for w, rows in zip(self.weights, drawn, strict=True)])
        costs = _floored(torch.cat([*self.output_weights])).split([len(w) for w in self.weights])
        chosen = torch.cat([v[rows] for v, rows in zip(costs, drawn, strict=True)])
        rotated, sizes = weight @ rotation, (rotation * (self.inverse @ rotation)).sum(0)
        errors = chosen @ _lost(rotated, chosen[:, None] / sizes, pattern).square() / sizes
        return errors.sum() * (sum(map(len, self.weights)) / len(weight))


@dataclass(frozen=True)
class Writers:
    """Operators that add to the residual stream, one or the experts of a mixture: `y = W x`, rotated `(R^T W) x`.

    Attributes:
        weights: Their `W` [hidden, in], in any floating dtype.
        output_weights: What a squared error in the outputs costs: a matrix `V` [hidden, hidden], float32.
        inputs: Mean squares of their inputs, [in] of each, float32.
    """

    weights: Sequence[Tensor]
    output_weights: Tensor
    inputs: Sequence[Tensor]

    def error(
        self, rotation: Tensor, pattern: SparsityPattern, share: float = 1.0, generator: torch.Generator | None = None
    ) -> Tensor:
        """The predicted error, a scalar: the sum of `v_i (R^T W)_ij^2 E[x_j^2]` over the weights that go.

        `v_i` are the `(R^T V R)_ii` over their mean, none smaller than 0.09. With a `generator` a random `share` of the
        columns, in whole groups of the pattern, stands for all.
        """
        unit = pattern.group_size(1)
        drawn = [_some(w.shape[1], unit, share, generator).to(w.device) for w in self.weights]
        weight = torch.cat([w[:, columns].float() for w, columns in zip(self.weights, drawn, strict=True)], 1)
        inputs = torch.cat([x[columns] for x, columns in zip(self.inputs, drawn, strict=True)])
        costs = _floored((rotation * (self.output_weights @ rotation)).sum(0))
        lost = _lost(rotation.T @ weight, costs[:, None] * inputs, pattern)
        return costs @ lost.square() @ inputs * (sum(map(len, self.inputs)) / len(inputs))


def train_rotation(
    groups: Sequence[Readers | Writers],
    pattern: SparsityPattern,
    *,
    steps: int,
    learning_rate: float,
    seed: int,
    keeps_mean: bool = False,
    progress: Callable[[float], None] | None = None,
) -> tuple[Tensor, float]:
    """Find a rotation `R` after which `pattern` costs little at the operators around a residual stream.

    It minimizes the mean of `error(R) / error(I)` over the groups whose `error(I)` is not zero, by Adam on the
    skew-symmetric matrix `A` of Cayley's transform `R = (I - A) (I + A)^-1`, from the identity. A step draws 16 groups,
    and a quarter of the weights of each. The learning rate falls as a cosine to zero, after a warm-up of 20 steps.

    Args:
        groups: Operators that read together, and those that write, on one device.
        pattern: The pattern, one that fits `hidden` inputs.
        steps: Number of steps.
        learning_rate: The learning rate of Adam, without warm-up and cosine.
        seed: Seed of what is drawn.
        keeps_mean: Whether `R` has to leave the mean of the hidden states as it is, which LayerNorm subtracts:
            `R 1 = 1`.
        progress: Called after every step with the mean over the groups that it looked at.

    Returns:
        `R` [hidden, hidden], float64, orthogonal, and the geometric mean of `error(R) / error(I)` over these groups.
    """
    first = groups[0]
    square = first.inverse if isinstance(first, Readers) else first.output_weights
    generator = torch.Generator().manual_seed(seed)
    identity = torch.eye(len(square), device=square.device)
    with torch.no_grad():
        before = [float(group.error(identity, pattern)) for group in groups]
    felt = [number for number, energy in enumerate(before) if energy > 0]
    if not felt:
        return identity.double(), 1.0
    skew = torch.nn.Parameter(torch.zeros_like(identity))
    optimizer = torch.optim.Adam([skew], betas=(0.9, 0.99))
    waiting: list[int] = []
    with torch.enable_grad():
        for step in range(steps):
            fall = (1 + math.cos(math.pi * step / steps)) / 2
            optimizer.param_groups[0]["lr"] = learning_rate * min(1, (step + 1) / _WARM_UP) * fall
            if len(waiting) < min(_GROUPS, len(felt)):
                waiting = [felt[i] for i in torch.randperm(len(felt), generator=generator).tolist()]
            drawn, waiting = waiting[:_GROUPS], waiting[_GROUPS:]
            rotation = _cayley(skew, keeps_mean)
            # a leaf, so that the solve of the transform is differentiated once a step, and not once a group
            leaf, total = rotation.detach().requires_grad_(True), 0.0
            for number in drawn:
                loss = groups[number].error(leaf, pattern, _SHARE, generator) / (before[number] * len(drawn))
                torch.autograd.backward(loss)
                total += float(loss.detach())
            optimizer.zero_grad()
            rotation.backward(leaf.grad)
            optimizer.step()
            if progress is not None:
                progress(total)
    with torch.no_grad():
        found = _cayley(skew.double(), keeps_mean)  # in float32 it is less orthogonal
        after = torch.tensor([float(groups[n].error(found.float(), pattern)) / before[n] for n in felt])
    return found, float(after.log().mean().exp())


def random_rotation(size: int, seed: int, keeps_mean: bool = False) -> Tensor:
    """Some rotation [size, size], float64; `keeps_mean` as for `train_rotation`."""
    free = torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return _cayley(free / size**0.5, keeps_mean)


def _cayley(free: Tensor, keeps_mean: bool) -> Tensor:
    """`(I + A)^-1 (I - A)` with the skew-symmetric `A` of the upper triangle of a matrix; the factors commute."""
    skew = free.triu(1)
    skew = skew - skew.T
    if keeps_mean:  # P A P, with the projection P that subtracts the mean: then A 1 = 0
        skew = skew - skew.mean(0)
        skew = skew - skew.mean(1, keepdim=True)
    identity = torch.eye(len(skew), dtype=skew.dtype, device=skew.device)
    return torch.linalg.solve(identity + skew, identity - skew)


def _lost(weight: Tensor, costs: Tensor, pattern: SparsityPattern) -> Tensor:
    """The weights that go, zero elsewhere; `costs`, broadcast to them, are what the square of each costs."""
    with torch.no_grad():
        kept = pattern.mask(weight.square().mul_(costs))
    return weight.masked_fill(kept, 0)


def _floored(costs: Tensor) -> Tensor:
    """Costs over their mean; none is smaller than `LEAST_SCALE` allows."""
    mean = costs.detach().mean()
    return torch.where(mean > 0, costs / mean, torch.ones_like(costs)).clamp_min(LEAST_SCALE**2)


def _some(count: int, unit: int, share: float, generator: torch.Generator | None) -> Tensor:
    """Indices below `count`, in whole runs of `unit`: a random share of the runs, rising; all without a generator."""
    groups = count // unit
    if generator is None:
        return torch.arange(groups * unit)
    chosen = torch.randperm(groups, generator=generator)[: max(1, round(share * groups))].sort().values
    return (chosen[:, None] * unit + torch.arange(unit)).flatten()
