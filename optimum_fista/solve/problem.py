"""The layer problem: everything that a pruning method may know about one linear operator.

A linear operator has a weight `W` [out, in], and inputs `X` [in, tokens] in the dense network. While a network is
pruned, the operator gets other inputs `X*`, and the error correction chooses *target outputs* `Y` [out, tokens] that
its pruned weight `W*` shall give for them. A method gets no model and no activations, only matrices of the operator's
own size (`LayerProblem`): the weight, the Gram matrix `G = X* X*^T` of the inputs, and the cross-Gram matrix
`C = Y X*^T` (the *target*). `InputStatistics` are what operators with the same inputs share. So operators are solved
one after the other in the memory of a few matrices, for any number of tokens. The error is a small difference of large
numbers, of which float32 loses digits. So formulas use the change of the weights, `D = W* - W`, where that helps.

The *energy* of an input is its squared norm over all tokens, a diagonal entry of `G`. An input is *nearly dead* if it
has less than 5e-6 of the mean energy, and *live* otherwise.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from optimum_fista.solve.linalg import row_blocks

_NEARLY_DEAD = 5e-6  # of the mean energy: an input of less than a 450th of the usual size
_LEAST_RATIO = 1e-12  # of the mean energy: what a dead input counts with, because energies divide


class InputStatistics:
    """Second-order statistics of the inputs that one or more operators share.

    The *energy* of an input is its squared norm over all tokens, a diagonal entry of the Gram matrix. A dead input is
    zero on all calibration tokens, a nearly dead one has less than 5e-6 of the mean energy. Their weights hardly change
    the outputs, and the outputs hardly determine them. Such an input is handled alone (`decoupled`). Its weights are
    removed first. Those that a pattern must keep have their dense values, because other text may use the input, and
    none grows to compensate for others. Scores and damping use its true energy (`diagonal`, `energy_ratios`). Magnitude
    pruning ignores all inputs, so these, too.

    Attributes:
        gram: `G = X* X*^T` [in, in], float32 or better, symmetric, summed over tokens. It may be overwritten later.
        num_tokens: Calibration tokens that reached the operators.
        diagonal: Energies of the inputs, [in], positive so that one can divide by them; a copy.
        energy_ratios: Energies of nearly dead inputs over the mean, and 1 for all others, [in]. Damping is multiplied
            by them, so that it stays a fraction of what it is added to.
    """

    def __init__(self, gram: Tensor, num_tokens: int, mean: Tensor | None = None) -> None:
        """Keep the Gram matrix `G` [in, in] itself, no copy, and note the energies of the inputs.

        `self.diagonal` are the energies, positive so that one can divide by them. `self.energy_ratios` are 1 for live
        inputs; for nearly dead ones, they are the energy as a share of the mean.

        `gram` is a sum over `num_tokens` tokens; `mean` [in] is the mean of the inputs over them, which only some
        methods need (DSnoT, FLAP).
        """
        self.gram = gram
        self.num_tokens = num_tokens
        self._mean = mean

        mean_energy = gram.diagonal().mean()
        # Not zero, because it divides. Nothing is read back, so the host need not wait for a device.
        mean_energy = torch.where(mean_energy == 0, torch.ones_like(mean_energy), mean_energy)
        # A dead input has no energy, and counts with a tiny one.
        self.diagonal = torch.maximum(gram.diagonal(), _LEAST_RATIO * mean_energy)
        ratios = self.diagonal / mean_energy
        self.energy_ratios = torch.where(ratios < _NEARLY_DEAD, ratios, torch.ones_like(ratios))

    @property
    def mean(self) -> Tensor:
        """Mean of the inputs over the tokens, [in]."""
        if self._mean is None:
            raise ValueError(
                "these statistics hold no mean of the inputs: pass mean to InputStatistics."
            )
        return self._mean

    @property
    def live(self) -> Tensor:
        """Whether an input is live (not nearly dead), booleans [in]."""
        return self.energy_ratios == 1

    @cached_property
    def decoupled(self) -> InputStatistics | None:
        """Statistics in which nearly dead inputs are uncorrelated with all others.

        The result has a Gram matrix of its own: a copy of `self.gram` without the products of nearly dead inputs with
        others. It is made at the first use, and kept. If no input is nearly dead, the result is `None`. `self` in its
        place would be cached in itself, and live on until cycles are collected.
        """
        live = self.live
        if bool(live.all()):
            return None

        gram = self.gram.mul(live)  # a new matrix; columns of nearly dead inputs vanish
        gram.mul_(live[:, None])  # and their rows
        gram.diagonal().copy_(self.diagonal)  # but for the diagonal
        # The mean of the inputs stays the same, or `None`.
        return InputStatistics(gram, self.num_tokens, self._mean)

    @cached_property
    def lipschitz(self) -> float:
        """Lipschitz constant of the gradient, `lambda_max(G)`; computed at the first use, and kept."""
        return largest_eigenvalue(self.gram)


@dataclass(frozen=True)
class DenseOutputs:
    """Sums over the dense network's outputs `W X`, if the target outputs `Y` of a problem are others."""

    energies: Tensor  # squared norms of the rows of `W X`, [out], float64
    unpruned_errors: Tensor  # squared norms of the rows of `W X* - W X`, [out], float64
    # `W X X*^T` [out, in]; None if `Y = a W X + (1 - a) W X*`, because `C = Y X*^T` then determines it
    cross: Tensor | None = None
    dense_share: float = 1.0  # this `a`, above 0


class LayerProblem:
    """Reconstruct a linear operator's outputs with sparse weights.

    It minimizes `1/2 || W* X* - Y ||_F^2` over `W*` in a sparsity pattern. `Y` are the target outputs: the dense
    network's `W X` (FISTAPruner, arXiv 2408.03728, eq. 2, without its penalty), or others that the error correction
    chooses. With `G = X* X*^T` and `C = Y X*^T`,

        || W* X* - Y ||_F^2  =  <W* G - 2 C, W*> + || Y ||_F^2
                             =  <D G, D>    if Y = W X*, with D = W* - W.

    The second form loses no digits if `W*` is close to `W`.

    Attributes:
        weight: `W` [out, in], float32 or better.
        statistics: Of the inputs `X*`.
        gram: `G` [in, in], that of `statistics`.
        target: `C` [out, in].
        output_energies: Squared norms of the rows of `Y`, [out], float64.
        name: Of the operator's weight, such as "model.layers.3.mlp.down_proj.weight", for messages.
        corrected: Whether `Y` is another matrix than `W X*`.
        aims_at_dense: Whether `Y` is known to be `W X`.
        dense: Sums over `W X` if `Y` is another matrix; `None` if they are not known.
    """

    def __init__(
        self,
        weight: Tensor,
        statistics: InputStatistics,
        target: Tensor | None = None,
        output_energies: Tensor | None = None,
        name: str = "weight",
        *,
        aims_at_dense: bool = False,
        dense: DenseOutputs | None = None,
    ) -> None:
        """Keep the matrices (no copies); without a target, compute it and the energies of the target outputs.

        Symbols are those of the module's docstring.

        Args:
            weight: The dense weights `W` [out, in], float32 or better.
            statistics: Of the inputs `X*`.
            target: `C` [out, in], together with `output_energies`; `None`: the target outputs are `Y = W X*`.
            output_energies: Squared norms of the rows of `Y`, [out].
            name: Of the operator's weight, for messages.
            aims_at_dense: Whether `Y` is known to be `W X`.
            dense: Sums over `W X` if `Y` is another matrix; `None` if they are not known.
        """
        if (target is None) != (output_energies is None):
            raise ValueError(
                f"{name}: target and output_energies belong together: pass both, or neither."
            )
        if weight.ndim != 2 or weight.shape[1] != statistics.gram.shape[0]:
            raise ValueError(
                f"{name} has shape {tuple(weight.shape)}, its inputs a Gram matrix of {tuple(statistics.gram.shape)}: "
                "pass a weight [out, in] whose in matches."
            )
        self.weight = weight
        self.statistics = statistics
        self.gram = statistics.gram
        self.name = name
        self.corrected = target is not None
        self.aims_at_dense = aims_at_dense
        self.dense = dense
        # Of a decoupled problem: the one that it was made from, which computes the errors of both.
        self._original: LayerProblem | None = None

        if target is not None and output_energies is not None:
            self.target = target
            self.output_energies = output_energies.double()
        else:
            self.target = weight @ statistics.gram  # C = W X* X*^T
            # || W X* ||^2 = <W G, W>, by rows
            self.output_energies = inner_by_rows(self.target, weight)

    def decoupled(self) -> LayerProblem:
        """Make the problem that methods solve: nearly dead inputs have no products with others, errors are of `self`.

        It is `self` if there are no such inputs. Otherwise it has its own Gram matrix and target, and shares all other
        tensors with `self`. That Gram matrix is computed at the first call, and stays with `self.statistics`, so that
        operators with the same inputs share it. No tensor of `self` changes.
        """
        statistics = self.statistics.decoupled
        if statistics is None:
            return self

        problem = copy.copy(self)
        problem.statistics = statistics
        problem.gram = statistics.gram
        problem._original = self  # whose errors `_squared_error` computes
        # With C_ij = W_ij G_jj an input that stands alone has the least error at its dense weight.
        problem.target = torch.where(
            statistics.live, self.target, self.weight * statistics.diagonal
        )
        return problem

    def with_ridge(self, amounts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Add a ridge towards the dense weights, and scale the inputs so that the Gram matrix has unit diagonal.

        `amounts` are `d` [in], positive: how much is added to each entry of the diagonal. With the Gram matrix
        `G` (`self.gram`), the target `C` (`self.target`), the dense weights `W` (`self.weight`), and

            G_d = G + diag(d)             [in, in]
            C_d = C + W diag(d)           [out, in]
            s_j = 1 / sqrt([G_d]_jj)      [in]

        weights in the scaled coordinates are `W_ij / s_j`. The matrices that are returned are new, so the caller may
        overwrite them. `self` and its tensors stay as they are.

        Returns:
            `s_i [G_d]_ij s_j`, the scaled Gram matrix [in, in].
            `[C_d]_ij s_j`, the scaled target [out, in].
            `s` [in].
        """
        scale = (self.statistics.diagonal + amounts).rsqrt()  # s
        gram = self.gram.clone()
        gram.diagonal().add_(amounts)  # G_d
        gram.mul_(scale).mul_(scale[:, None])
        target = torch.addcmul(self.target, self.weight, amounts).mul_(scale)
        return gram, target, scale

    def squared_error(self, weight: Tensor) -> float:
        """Return the squared error `|| W* X* - Y ||_F^2` of weights `W*` [out, in]; NaN stays NaN."""
        return max(float(self._squared_error(weight)), 0.0)  # this order keeps NaN

    def _squared_error(self, weight: Tensor) -> Tensor:
        """Compute `squared_error` as a scalar on the device; rounding may have made it negative.

        It takes one product. With `D = W* - W` (the docstring of the class has more),

            || W* X* - Y ||_F^2  =  <W* G - 2 C, W*> + || Y ||_F^2
                                 =  <D G, D>                         if Y = W X*, because then C = W G.

        A decoupled problem has the error of `self._original`, from which it was made. `self.target` is `C`, `self.gram`
        is `G`, and the sum of `self.output_energies` is `|| Y ||_F^2`.

        Args:
            weight: The new weights `W*` [out, in]. The dense ones, `W`, are `self.weight`.
        """
        if self._original is not None:  # this problem is decoupled
            return self._original._squared_error(weight)

        if not self.corrected:  # Y = W X*
            error = self.output_energies.new_zeros(())
            for rows in row_blocks(weight):
                difference = weight[rows] - self.weight[rows]  # D
                error += inner_by_rows(difference @ self.gram, difference).sum()
            return error

        error = self.output_energies.sum()  # || Y ||^2
        for rows in row_blocks(weight):
            new = weight[rows]
            outputs = torch.addmm(self.target[rows], new, self.gram, beta=-2)  # W* G - 2 C
            error += inner_by_rows(outputs, new).sum()
        return error

    def change_of_error(self, weight: Tensor) -> float:
        """Return the squared error of the weights `W*` minus that of the dense weights `W`; negative if `W*` is better.

        `weight` is `W*` [out, in]. The change of the weights is `D = W* - W`, and that of the squared error is

            || W* X* - Y ||_F^2 - || W X* - Y ||_F^2  =  <(W* + W) G - 2 C, D>.

        The right side is computed. It is small if `D` is small, and so is its rounding error. Each of the two errors on
        the left is rounded by about as much as `|| Y ||_F^2` is, which may be more than their difference.
        """
        if self._original is not None:  # this problem is decoupled
            return self._original.change_of_error(weight)

        change = self.output_energies.new_zeros(())
        for rows in row_blocks(weight):
            both = weight[rows] + self.weight[rows]
            gradient = torch.addmm(self.target[rows], both, self.gram, beta=-2)  # (W* + W) G - 2 C
            change += inner_by_rows(gradient, weight[rows] - self.weight[rows]).sum()
        return float(change)

    def fit_error(self, weight: Tensor) -> float:
        """Return the error `|| W* X* - Y ||_F / || Y ||_F` of weights `W*` [out, in], with 0/0 = 0."""
        (error,) = fit_errors([self.error_and_energy(weight)])
        return error

    def error_and_energy(self, weight: Tensor) -> Tensor:
        """Return `|| W* X* - Y ||_F^2` and `|| Y ||_F^2`, [2] on the device, for `fit_errors`; the host does not wait.

        `weight` are the weights `W*` [out, in].
        """
        return torch.stack([self._squared_error(weight), self.output_energies.sum()])

    def output_error(self, weight: Tensor) -> float | None:
        """Return the error against the dense network's outputs, `|| W* X* - W X ||_F / || W X ||_F`.

        `None` if these outputs are not known. Changes nothing. Symbols, matrices [out, in] unless something else is
        said:

        - `W*` is `weight`, `W` is `self.weight`, and `D = W* - W`;
        - `G` [in, in] is the Gram matrix of `X*`;
        - `K = W X X*^T` is the cross-Gram matrix with the dense network (`self.dense.cross`), which may not be known;
        - `C = a K + (1 - a) W G` is `self.target`, with a = `self.dense.dense_share`.

        The numerator is the root of

            || W* X* - W X ||^2  =  T + || W X* - W X ||^2,

            T  =  <D G, D> - 2 <D, K - W G>.

        By the equation of `C`,

            K - W G  =  (C - W G) / a.

        So `T` takes one product:

            T  =  <E G - (2/a) C, D>,   E = D + (2/a) W.

        If `K` itself is known, it takes the place of `C`, with a = 1.
        """
        if self._original is not None:  # this problem is decoupled
            return self._original.output_error(weight)
        if self.aims_at_dense:  # Y = W X
            return self.fit_error(weight)
        if self.dense is None:
            return None

        if self.dense.cross is None:
            cross = self.target
            factor = 2 / self.dense.dense_share
        else:
            cross = self.dense.cross
            factor = 2.0

        error = self.dense.unpruned_errors.sum().clamp_min(0.0)  # || W X* - W X ||^2
        for rows in row_blocks(weight):
            difference = weight[rows] - self.weight[rows]  # D
            both = torch.add(difference, self.weight[rows], alpha=factor)  # E
            residual = torch.addmm(cross[rows], both, self.gram, beta=-factor)
            error += inner_by_rows(residual, difference).sum()
        # The other sum is || W X ||^2.
        sums = torch.stack([error, self.dense.energies.sum()])
        squares, energy = sums.tolist()  # one wait for the device
        return relative_norm(max(squares, 0.0), energy)

    def seminorm(self, difference: Tensor) -> float:
        """Return `|| D X* ||_F` of a difference `D` of weights [out, in]."""
        return math.sqrt(max(inner(difference @ self.gram, difference), 0.0))


def fit_errors(sums: Sequence[Tensor]) -> list[float]:
    """Return the `LayerProblem.fit_error` of several results, from the `error_and_energy` of each: one transfer."""
    return [
        relative_norm(max(error, 0.0), energy) for error, energy in torch.stack(list(sums)).tolist()
    ]


def inner_by_rows(left: Tensor, right: Tensor) -> Tensor:
    """Inner products of the rows of two matrices of one shape, [rows], float64.

    A row is summed in its own dtype; callers add up rows in float64.
    """
    # some rows at a time: no third matrix of this size
    parts = zip(left.split(256), right.split(256), strict=True)
    return torch.cat([torch.linalg.vecdot(a, b).double() for a, b in parts])


def inner(left: Tensor, right: Tensor) -> float:
    """Frobenius inner product `<A, B>`, summed by rows in float64."""
    return float(inner_by_rows(left, right).sum())


def relative_norm(squared_error: float, energy: float) -> float:
    """`sqrt(squared_error / energy)`, with 0/0 = 0."""
    if energy <= 0:
        return 0.0 if squared_error <= 0 else math.inf
    return math.sqrt(squared_error / energy)


def largest_eigenvalue(
    gram: Tensor, *, tolerance: float = 1e-4, max_iterations: int = 300
) -> float:
    """Upper estimate of `lambda_max(G)`, by at most `max_iterations` of the power iteration. Changes nothing.

    `gram` is `G` [n, n], symmetric positive semidefinite.

    The Rayleigh quotient `q` of a unit vector `v` never exceeds `lambda_max`, and some eigenvalue lies within
    `r = || G v - q v ||` of it; `q + r` is returned once `r <= tolerance * q`, and never more than the
    largest absolute row sum (Gershgorin), so that a gradient step of its inverse does not diverge.
    """
    bound = float(gram.abs().sum(1).max())  # Gershgorin
    if bound == 0.0:
        return 0.0

    generator = torch.Generator().manual_seed(0)
    vector = torch.randn(len(gram), generator=generator, dtype=torch.float32).to(gram)
    # Strong inputs dominate the leading eigenvector: a start near it. The random part is orthogonal to nothing.
    vector += gram.diagonal() / gram.diagonal().mean()
    vector /= vector.norm()

    # `q` and `r` of the iteration that was read last.
    quotient = 0.0
    residual = bound
    # Pairs (q, r) on the device that were not read yet: reading makes the host wait for a device.
    unread: list[Tensor] = []
    iterations_between_readings = 1 if gram.device.type == "cpu" else 10
    for iteration in range(1, max_iterations + 1):
        product = gram @ vector
        rayleigh = vector @ product  # q
        unread.append(torch.stack([rayleigh, (product - rayleigh * vector).norm()]))
        if iteration % iterations_between_readings == 0 or iteration == max_iterations:
            for quotient, residual in torch.stack(unread).tolist():
                if residual <= tolerance * quotient:
                    return min(bound, quotient + residual)
            unread.clear()
        vector = product / product.norm()
    return min(bound, quotient + residual)
