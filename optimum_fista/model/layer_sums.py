"""Sums over tokens, from which the layer problems of operators that share their inputs are made."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from optimum_fista.model.gram import GramAccumulator
from optimum_fista.model.operator import LinearOperator
from optimum_fista.solve.blocks import row_blocks
from optimum_fista.solve.problem import InputStatistics, LayerProblem, inner_by_rows

Group = list[LinearOperator]


class LayerSums:
    """Sums over the tokens of a group of operators with the inputs `X*`, in the dense network `X`.

    The problems made from them have the target outputs `W (a X + (1 - a) X*)`, a = `dense_share`.

    Attributes:
        gram: `X* X*^T`.
        cross: `W X X*^T` of all operators, one below the other, [out, in], or `X X*^T` [in, in]; `None` where the
            target outputs are `W X*`.
        energies: Squared norms of the rows of `W X`, [out], float64, by operator.
    """

    def __init__(
        self,
        size: int,
        device: torch.device,
        *,
        narrow: bool = False,
        dense_share: float = 0.0,
        energies: dict[str, Tensor] | None = None,
    ) -> None:
        """Begin with no token; `narrow` says which of its two forms `cross` has."""
        self.gram = GramAccumulator(size, device)
        self.cross: Tensor | None = None
        self.energies = {} if energies is None else energies
        self._narrow = narrow
        self._dense_share = dense_share

    def add(self, inputs: Tensor, dense: Tensor | None = None) -> None:
        """Add `X*` [tokens, in] and what the dense network has: outputs [tokens, out] or inputs [tokens, in]."""
        self.gram.add(inputs)
        if dense is not None:
            if self.cross is None:
                self.cross = torch.zeros(dense.shape[1], inputs.shape[1], device=inputs.device)
            self.cross.addmm_(dense.T, inputs)

    def problems(self, group: Group, weights: Sequence[Tensor]) -> Iterator[LayerProblem]:
        """The problems of the operators, one after the other; the sums are used up.

        Raises:
            ValueError: If the sums hold NaN or Inf.
        """
        statistics, row = checked_statistics(group, self.gram), 0
        for operator, weight in zip(group, weights, strict=True):
            if self.cross is None:
                yield LayerProblem(weight, statistics, name=operator.name)
                continue
            target = self.cross[row : row + weight.shape[0]] if self._narrow else weight @ self.cross
            row += weight.shape[0]
            yield _mixed(weight, statistics, target, self.energies[operator.name], self._dense_share, operator.name)


def add_energies(energies: dict[str, Tensor], name: str, outputs: Tensor) -> None:
    """Add the squared norms of outputs [tokens, out], float32, over the tokens to those of an operator."""
    squares = outputs.square().sum(0).double()
    energies[name] = energies[name] + squares if name in energies else squares


def checked_statistics(group: Group, gram: GramAccumulator) -> InputStatistics:
    """The finished statistics of a group's inputs.

    Raises:
        ValueError: If they hold NaN or Inf.
    """
    statistics = gram.finish()
    if not bool(torch.isfinite(torch.stack(statistics.gram.aminmax())).all()):
        raise ValueError(
            f"the inputs of {group[0].name} hold NaN or Inf (or overflow when squared in float32): the model is "
            "damaged there, or its activations overflow its dtype; try dtype=torch.float32 or torch.bfloat16."
        )
    return statistics


def _mixed(
    weight: Tensor, statistics: InputStatistics, target: Tensor, energies: Tensor, share: float, name: str
) -> LayerProblem:
    """The problem of target outputs `W (a X + (1 - a) X*)` from `W X X*^T` and the squared norms of the rows of W X."""
    if share == 1:
        return LayerProblem(weight, statistics, target, energies, name)
    mixed, remade = inner_by_rows(weight, target), torch.empty_like(energies)
    for rows in row_blocks(weight):
        same = weight[rows] @ statistics.gram
        remade[rows] = inner_by_rows(weight[rows], same)
        target[rows].mul_(share).add_(same, alpha=1 - share)
    energies = share**2 * energies + 2 * share * (1 - share) * mixed + (1 - share) ** 2 * remade
    return LayerProblem(weight, statistics, target, energies, name, same_energies=remade)
