"""The layer problem: everything a pruning method may know about one linear operator."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from optimum_fista.solve.linalg import row_blocks
from optimum_fista.solve.statistics import InputStatistics


@dataclass(frozen=True)
class DenseOutputs:
    """What a problem knows of the dense network's outputs `W X`, if its target outputs `Y` are others.

    Attributes:
        energies: Squared norms of the rows of `W X`, [out], float64.
        unpruned_errors: Squared norms of the rows of `W X* - W X`, [out], float64.
        cross: `W X X*^T` [out, in]; `None` if `Y = a W X + (1 - a) W X*`, because `C = Y X*^T` then determines it.
        dense_share: This `a`, above 0.
    """

    energies: Tensor
    unpruned_errors: Tensor
    cross: Tensor | None = None
    dense_share: float = 1.0


class LayerProblem:
    """Reconstruct a linear operator's outputs with sparse weights.

    It minimizes `1/2 || W* X* - Y ||_F^2` over `W*` in a sparsity pattern. `Y` are the target outputs: the dense
    network's `W X` (FISTAPruner, arXiv 2408.03728, eq. 2, without its penalty), or others that the error correction
    chooses. With `G = X* X*^T` and `C = Y X*^T`,

        || W* X* - Y ||_F^2 = <D G, D> - 2 <D, R> + e0,   D = W* - W,  R = C - W G,  e0 = || W X* - Y ||_F^2.

    This form loses no digits if `W*` is close to `W`. If `Y = W X*`, both `R` and `e0` vanish.

    Attributes:
        weight: Dense weights `W` [out, in], float32 or better.
        statistics: Statistics of the inputs `X*`.
        gram: Their Gram matrix `G` [in, in].
        target: `C = Y X*^T` [out, in]; made from `weight` if `Y = W X*`.
        output_energies: Squared norms of the rows of `Y`, [out], float64.
        corrected: Whether `Y` is another matrix than `W X*`.
        aims_at_dense: Whether `Y` is known to be `W X`.
        dense: What is known of `W X` if `Y` is another matrix; `None` if nothing is.
        name: Name of the operator, for messages.
    """

    def __init__(
        self,
        weight: Tensor,
        statistics: InputStatistics,
        target: Tensor | None = None,
        output_energies: Tensor | None = None,
        name: str = "weight",
        *,
        same_energies: Tensor | None = None,
        aims_at_dense: bool = False,
        dense: DenseOutputs | None = None,
    ) -> None:
        """Make the problem.

        `same_energies` are the squared norms of the rows of `W X*`, [out], float64; knowing them spares a product.
        """
        if weight.ndim != 2 or weight.shape[1] != statistics.gram.shape[0]:
            raise ValueError(
                f"{name} has shape {tuple(weight.shape)}, its inputs a Gram matrix of "
                f"{tuple(statistics.gram.shape)}: pass a weight [out, in] whose in matches."
            )
        if (target is None) != (output_energies is None):
            raise ValueError(f"{name}: pass target and output_energies together, or neither.")
        self.weight = weight
        self.statistics = statistics
        self.gram = statistics.gram
        self.name = name
        self.corrected = target is not None
        self.aims_at_dense = aims_at_dense
        self.dense = dense
        self._errors_of: LayerProblem | None = None
        if target is None or output_energies is None:
            self.target = weight @ statistics.gram
            self.output_energies = inner_by_rows(self.target, weight)
            self._unpruned_errors = torch.zeros_like(self.output_energies)
        else:
            if target.shape != weight.shape or output_energies.shape != weight.shape[:1]:
                raise ValueError(
                    f"{name}: target has shape {tuple(target.shape)}, not {tuple(weight.shape)}, or output_energies "
                    f"{tuple(output_energies.shape)}, not {tuple(weight.shape[:1])}."
                )
            self.target, self.output_energies = target, output_energies.double()
            # || W X* - Y ||^2 = || W X* ||^2 - 2 <W X*, Y> + || Y ||^2 by rows, with <W X*, Y> = <W, C>.
            if same_energies is None:
                parts = [weight[rows] for rows in row_blocks(weight)]
                same_energies = torch.cat([inner_by_rows(part @ statistics.gram, part) for part in parts])
            self._unpruned_errors = same_energies - 2 * inner_by_rows(weight, target) + self.output_energies

    @classmethod
    def stack(cls, problems: Sequence[LayerProblem], scales: Tensor) -> LayerProblem:
        """One problem of the outputs of several with the same statistics; row i is multiplied by `scales[i]`, [out, 1].

        Its weights and targets are the only copy: those of the problems become views of them, and so are scaled too,
        until the caller divides by the scales.
        """
        stacked = copy.copy(problems[0])
        for key in ("weight", "target"):
            whole = torch.cat([getattr(problem, key) for problem in problems])
            for problem, part in zip(problems, whole.split([len(p.weight) for p in problems]), strict=True):
                setattr(problem, key, part)
            setattr(stacked, key, whole.mul_(scales))
        squares = scales[:, 0].double().square()
        stacked.output_energies = torch.cat([p.output_energies for p in problems]) * squares
        stacked._unpruned_errors = torch.cat([p._unpruned_errors for p in problems]) * squares
        stacked.dense = None
        stacked.name = " and ".join(p.name for p in problems)
        return stacked

    def decoupled(self) -> LayerProblem:
        """The problem that methods solve: nearly dead inputs stand alone (`InputStatistics`), errors are this one's.

        It is this problem if there are no such inputs. Otherwise it has a Gram matrix and a target of its own.
        """
        statistics = self.statistics.decoupled
        if statistics is None:
            return self
        problem = copy.copy(self)
        problem.statistics, problem.gram, problem._errors_of = statistics, statistics.gram, self
        live = statistics.energy_ratios == 1
        # With C_ij = W_ij G_jj an input that stands alone has the least error at its dense weight.
        problem.target = torch.where(live, self.target, self.weight * statistics.diagonal)
        return problem

    def gradient(self, weight: Tensor) -> Tensor:
        """Gradient of the objective, `W* G - C` [out, in]."""
        return torch.addmm(self.target, weight, self.gram, beta=-1)

    def squared_error(self, weight: Tensor) -> float:
        """`|| W* X* - Y ||_F^2`."""
        return max(float(self._squared_error(weight)), 0.0)  # this order keeps NaN

    def _squared_error(self, weight: Tensor) -> Tensor:
        """The same as a scalar on the device; rounding may have made it negative."""
        if self._errors_of is not None:
            return self._errors_of._squared_error(weight)
        error = self._unpruned_errors.sum().clamp_min(0.0)  # e0, zero when Y = W X*
        for rows in row_blocks(weight):
            new, dense = weight[rows], self.weight[rows]
            if self.corrected:  # <D G, D> - 2 <D, C - W G> = <(W* + W) G - 2 C, D>: one product, two matrices
                difference = new + dense
                residual = torch.addmm(self.target[rows], difference, self.gram, beta=-2)
                torch.sub(new, dense, out=difference)
                error += inner_by_rows(residual, difference).sum()
            else:
                difference = new - dense
                error += inner_by_rows(difference @ self.gram, difference).sum()
        return error

    def fit_error(self, weight: Tensor) -> float:
        """`|| W* X* - Y ||_F / || Y ||_F`, with 0/0 = 0."""
        error, energy = torch.stack([self._squared_error(weight), self.output_energies.sum()]).tolist()  # one transfer
        return relative(max(error, 0.0), energy)

    def output_error(self, weight: Tensor) -> float | None:
        """`|| W* X* - W X ||_F / || W X ||_F` against the dense network's outputs; `None` if they are not known.

        With `D = W* - W`, `K = W X X*^T` and `C = a K + (1 - a) W G`, so that `K - W G = (C - W G) / a`,

            || W* X* - W X ||^2 = <D G, D> - 2 <D, K - W G> + || W X* - W X ||^2
                                = <(D + (2/a) W) G - (2/a) C, D> + || W X* - W X ||^2,

        which takes one product. If `K` itself is known, it takes the place of `C`, with `a = 1`.
        """
        if self.aims_at_dense:
            return self.fit_error(weight)
        if self.dense is None:
            return None
        factor = 2.0 if self.dense.cross is not None else 2 / self.dense.dense_share
        cross = self.target if self.dense.cross is None else self.dense.cross
        error = self.dense.unpruned_errors.sum().clamp_min(0.0)
        for rows in row_blocks(weight):
            difference = weight[rows] - self.weight[rows]
            both = torch.add(difference, self.weight[rows], alpha=factor)
            residual = torch.addmm(cross[rows], both, self.gram, beta=-factor)
            error += inner_by_rows(residual, difference).sum()
        squares, energy = torch.stack([error, self.dense.energies.sum()]).tolist()  # one wait for the device
        return relative(max(squares, 0.0), energy)

    def seminorm(self, difference: Tensor) -> float:
        """`|| D X* ||_F` of a difference of weights [out, in]."""
        return math.sqrt(max(inner(difference @ self.gram, difference), 0.0))


_ROWS = 256
"""Rows multiplied at a time, so that no third matrix of this size is made."""


def inner_by_rows(left: Tensor, right: Tensor) -> Tensor:
    """Inner products of the rows of two matrices, [rows], float64."""
    parts = zip(left.split(_ROWS), right.split(_ROWS), strict=True)
    # A row is summed in its own dtype, rows are added up in float64 by the callers.
    return torch.cat([torch.linalg.vecdot(a, b).double() for a, b in parts])


def inner(left: Tensor, right: Tensor) -> float:
    """Frobenius inner product `<A, B>`, summed by rows in float64."""
    return float(inner_by_rows(left, right).sum())


def relative(squared_error: float, energy: float) -> float:
    """`sqrt(squared_error / energy)`, with 0/0 = 0."""
    if energy <= 0:
        return 0.0 if squared_error <= 0 else math.inf
    return math.sqrt(squared_error / energy)
