"""Sums over tokens, from which the layer problems of operators that share their inputs are made."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from optimum_fista.model.gram import GramAccumulator
from optimum_fista.model.operator import LinearOperator
from optimum_fista.model.products import as_multiplied, quick_products
from optimum_fista.solve.linalg import row_blocks
from optimum_fista.solve.problem import DenseOutputs, LayerProblem, inner_by_rows
from optimum_fista.solve.statistics import InputStatistics

Group = list[LinearOperator]
"""Operators that share their inputs."""


class LayerSums:
    """Sums over the tokens of a group of operators with the inputs `X*`, and in the dense network `X`.

    They are in float32, whatever dtype the activations are in: sums in half precision would lose digits.

    At most one of the two sums with the dense network is kept, the smaller one: the outputs of all operators, one below
    the other, or the inputs. Neither is kept if the dense network is not known, or if `X* = X`.

    Attributes:
        same_inputs: Whether `X* = X`.
        gram: `X* X*^T`.
        output_cross: `W X X*^T` of all operators, one below the other, [out, in].
        input_cross: `X X*^T` [in, in].
        energies: Squared norms of the rows of `W X`, [out], float64, by operator.
        target_cross: `Y X*^T` [out, in] of a single operator whose targets `Y` were summed themselves.
        target_energies: Squared norms of the rows of `Y`, [out], float64.
    """

    def __init__(self, size: int, device: torch.device, *, same_inputs: bool = False) -> None:
        self.same_inputs = same_inputs
        self.gram = GramAccumulator(size, device)
        self.output_cross: Tensor | None = None
        self.input_cross: Tensor | None = None
        self.energies: dict[str, Tensor] = {}
        self.target_cross: Tensor | None = None
        self.target_energies: Tensor | float = 0.0

    def add_dense_inputs(self, inputs: Tensor, dense: Tensor) -> None:
        """Add `X*` and `X`, both [tokens, in]."""
        self.input_cross = _add_product(self.input_cross, as_multiplied(dense), self.gram.add(inputs))

    def add_dense_outputs(self, inputs: Tensor, outputs: Tensor) -> None:
        """Add `X*` [tokens, in], and `W X` of all operators side by side, [tokens, out]."""
        self.output_cross = _add_product(self.output_cross, as_multiplied(outputs), self.gram.add(inputs))

    def add_targets(self, inputs: Tensor, targets: Tensor) -> None:
        """Add `X*` [tokens, in] and `Y` [tokens, out]."""
        targets = as_multiplied(targets)
        self.target_cross = _add_product(self.target_cross, targets, self.gram.add(inputs))
        self.target_energies = self.target_energies + _energies(targets)

    def add_energies(self, name: str, outputs: Tensor) -> None:
        """Add outputs `W X` [tokens, out] of an operator to its energies."""
        found = _energies(as_multiplied(outputs))
        self.energies[name] = self.energies[name] + found if name in self.energies else found

    def problems(self, group: Group, weights: Sequence[Tensor], dense_share: float) -> Iterator[LayerProblem]:
        """The problems of the operators with their dense weights `W` [out, in], one by one; the sums are used up.

        `dense_share` is `a` in the targets `W (a X + (1 - a) X*)`; it is not used if `X* = X` or targets were summed.
        """
        statistics, row = self.gram.finish(), 0
        if not bool(torch.isfinite(torch.stack(statistics.gram.aminmax())).all()):
            raise ValueError(
                f"the inputs of {group[0].name} hold NaN or Inf (or overflow when squared in float32): the model is "
                "damaged there, or its activations overflow its dtype; try dtype=torch.float32 or torch.bfloat16."
            )
        for operator, weight in zip(group, weights, strict=True):
            name = operator.name
            if self.target_cross is not None:
                assert isinstance(self.target_energies, Tensor)
                yield LayerProblem(weight, statistics, self.target_cross, self.target_energies, name)
            elif self.output_cross is None and self.input_cross is None:
                yield LayerProblem(weight, statistics, name=name, aims_at_dense=self.same_inputs)
            else:
                # either way `_problem` may overwrite it: these rows, or this product, are read only once
                if self.output_cross is not None:
                    cross = self.output_cross[row : row + weight.shape[0]]
                else:
                    cross = weight @ self.input_cross  # type: ignore[operator]
                row += weight.shape[0]
                yield _problem(weight, statistics, cross, self.energies[name], dense_share, name)


@quick_products()
def _add_product(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    if total is None:
        total = torch.zeros(left.shape[1], right.shape[1], device=right.device)
    return total.addmm_(left.T, right)  # in place: no second matrix of this size


def _energies(outputs: Tensor) -> Tensor:
    """Squared norms of the columns of [tokens, out], float64."""
    # a batch in float32, the sum of batches in float64: only that has many terms
    return outputs.square().sum(0).double()


def _problem(
    weight: Tensor, statistics: InputStatistics, cross: Tensor, energies: Tensor, dense_share: float, name: str
) -> LayerProblem:
    """The problem of target outputs `Y = W (a X + (1 - a) X*)`, a = `dense_share`, with the statistics of `X*`.

    `cross`, `W X X*^T` [out, in], is overwritten by `Y X*^T = a W X X*^T + (1 - a) W G`; `energies` are the squared
    norms of the rows of `W X`, [out], float64.
    """
    if dense_share == 1:
        return LayerProblem(weight, statistics, cross, energies, name, aims_at_dense=True)
    mixed, remade = inner_by_rows(weight, cross), torch.empty_like(energies)
    for rows in row_blocks(weight):
        same = weight[rows] @ statistics.gram
        remade[rows] = inner_by_rows(weight[rows], same)
        if dense_share:
            cross[rows].mul_(dense_share).add_(same, alpha=1 - dense_share)
    # || W X* - W X ||^2 by rows, not through Y: a small share would magnify the rounding of the difference
    unpruned_errors = energies - 2 * mixed + remade
    if dense_share == 0:  # Y = W X*: nothing is mixed into the cross-Gram
        return LayerProblem(weight, statistics, name=name, dense=DenseOutputs(energies, unpruned_errors, cross))
    dense = DenseOutputs(energies, unpruned_errors, dense_share=dense_share)
    # || a W X + (1 - a) W X* ||^2 by rows, expanded
    energies = dense_share**2 * energies + 2 * dense_share * (1 - dense_share) * mixed + (1 - dense_share) ** 2 * remade
    return LayerProblem(weight, statistics, cross, energies, name, same_energies=remade, dense=dense)
