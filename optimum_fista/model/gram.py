"""Sums over tokens, from which layer problems are made: of operators that share their inputs, or of a single matrix."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from optimum_fista.model.forward import as_multiplied, quick_products
from optimum_fista.model.operator import Group
from optimum_fista.solve.linalg import row_blocks
from optimum_fista.solve.problem import DenseOutputs, LayerProblem, inner_by_rows
from optimum_fista.solve.statistics import InputStatistics

_LEAF = 256  # inputs up to which a block is multiplied whole


class GramAccumulator:
    """Sum of `x x^T` over tokens, in float32; only half of each product is formed, in memory taken when tokens come.

    Attributes:
        num_tokens: Tokens summed so far.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self._shape, self._device = (size, size), device
        self._upper: Tensor | None = None
        self._sum = torch.zeros(size, device=device)
        self.num_tokens = 0

    @quick_products()
    def add(self, inputs: Tensor) -> Tensor:
        """Add inputs [tokens, in]; returns them as they were multiplied, float32."""
        if self._upper is None:
            self._upper = torch.zeros(self._shape, device=self._device)
        inputs = as_multiplied(inputs)
        _add_upper(self._upper, inputs)
        self._sum += inputs.sum(0)
        self.num_tokens += inputs.shape[0]
        return inputs

    def finish(self) -> InputStatistics:
        """Statistics with the symmetric Gram matrix; the accumulator is used up."""
        gram = torch.zeros(self._shape, device=self._device) if self._upper is None else self._upper
        for start in range(0, gram.shape[0], _LEAF):
            end = start + _LEAF
            # Only upper blocks were summed. Copied, both halves are equal to the last bit.
            corner = gram[start:end, start:end].triu_()
            corner += corner.triu(1).T
            gram[end:, start:end] = gram[start:end, end:].T
        return InputStatistics(gram, self.num_tokens, self._sum / max(1, self.num_tokens))


def _add_upper(out: Tensor, inputs: Tensor) -> None:
    """Add the upper block triangle of `inputs^T inputs` to `out`, halving recursively."""
    size = inputs.shape[1]
    if size <= _LEAF:
        out.addmm_(inputs.T, inputs)
        return
    # A multiple of 32, so that blocks are aligned.
    half = (size // 2 + 31) // 32 * 32
    left, right = inputs[:, :half], inputs[:, half:]
    _add_upper(out[:half, :half], left)
    out[:half, half:].addmm_(left.T, right)
    _add_upper(out[half:, half:], right)


class LayerSums:
    """Sums over the tokens of a group of operators with the inputs `X*`, and in the dense network `X`.

    They are in float32, whatever dtype the activations are in: sums in half precision would lose digits.

    Attributes:
        same_inputs: Whether `X* = X`.
        gram: `X* X*^T`.
        cross: With the dense network, by what was added: `"inputs"` for `X X*^T` [in, in], `"outputs"` for `W X X*^T`
            of all operators, one below the other, [out, in], whichever is smaller; `"targets"` for the `Y X*^T` [out,
            in] of a single operator. Empty if the dense network is not known, or if `X* = X`.
        energies: Squared norms of the rows of `W X`, [out], float64, by operator, and of `Y` as `"targets"`.
    """

    def __init__(self, size: int, device: torch.device, *, same_inputs: bool = False) -> None:
        self.same_inputs = same_inputs
        self.gram = GramAccumulator(size, device)
        self.cross: dict[str, Tensor] = {}
        self.energies: dict[str, Tensor] = {}

    @quick_products()
    def add(self, inputs: Tensor, kind: str, others: Tensor) -> None:
        """Add `X*` [tokens, in], and dense inputs, outputs of all operators side by side, or targets, [tokens, n]."""
        inputs, others = self.gram.add(inputs), as_multiplied(others)
        if kind not in self.cross:
            self.cross[kind] = torch.zeros(others.shape[1], inputs.shape[1], device=inputs.device)
        self.cross[kind].addmm_(others.T, inputs)  # in place: no second matrix of this size
        if kind == "targets":
            self.add_energies(kind, others)

    def add_energies(self, name: str, outputs: Tensor) -> None:
        """Add outputs `W X` [tokens, out] of an operator to its energies."""
        # a batch in float32, the sum of batches in float64: only that has many terms
        found = as_multiplied(outputs).square().sum(0).double()
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
            if not self.cross:
                yield LayerProblem(weight, statistics, name=name, aims_at_dense=self.same_inputs)
            elif "targets" in self.cross:
                yield LayerProblem(weight, statistics, self.cross["targets"], self.energies["targets"], name)
            else:
                # either way `_problem` may overwrite it: these rows, or this product, are read only once
                if "outputs" in self.cross:
                    cross = self.cross["outputs"][row : row + weight.shape[0]]
                else:
                    cross = weight @ self.cross["inputs"]
                row += weight.shape[0]
                yield _problem(weight, statistics, cross, self.energies[name], dense_share, name)


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


def single_problem(weight: Tensor, inputs: Tensor, dense_inputs: Tensor | None = None) -> LayerProblem:
    """Form the layer problem of `weight` [out, in] on `inputs` X* [tokens, in], dense inputs X [tokens, in]."""
    named = {"weight": weight, "inputs": inputs, "dense_inputs": dense_inputs}
    for name, tensor in named.items():
        if tensor is None:
            continue
        if tensor.ndim != 2 or tensor.shape[1] != weight.shape[-1] or tensor.numel() == 0:
            wanted = "[out, in]" if name == "weight" else f"[tokens, in] with in = {weight.shape[-1]} as in weight"
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}: pass a non-empty {wanted}.")
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name} holds NaN or Inf: pass finite values.")
    if dense_inputs is not None and dense_inputs.shape != inputs.shape:
        raise ValueError(
            f"dense_inputs has shape {tuple(dense_inputs.shape)}, inputs {tuple(inputs.shape)}: pass the same tokens."
        )
    weight, inputs = weight.detach().float(), inputs.detach().float()
    accumulator = GramAccumulator(weight.shape[1], weight.device)
    accumulator.add(inputs)
    statistics = accumulator.finish()
    if not bool(torch.isfinite(statistics.gram).all()):
        raise ValueError("inputs overflow when squared in float32: pass them scaled down; the error is relative.")
    if dense_inputs is None:
        return LayerProblem(weight, statistics)
    # Y = W X, C = Y X*^T.
    outputs = dense_inputs.detach().float() @ weight.T
    return LayerProblem(weight, statistics, outputs.T @ inputs, outputs.square().sum(0))
