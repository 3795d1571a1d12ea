"""What the loss of a language model says of gates: factors on groups of columns of linear operators, 1 as they are."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from optimum_fista.model.loss_gradients import DenseLoss, Watcher, watch_gradients
from optimum_fista.model.operator import LinearOperator
from optimum_fista.model.parts import Part


@dataclass
class Gates:
    """Gates of one operator `y = W x`, the gradient of the loss by them, and what else goes with its columns.

    At token t, with the gradient `g_t` of the loss by the outputs, `s_tj = x_tj (W^T g_t)_j` is the derivative of the
    loss by a factor on column j, and the sum of `s_tj` over a group that by the group's gate.

    Attributes:
        changes: `|sum_t s_tj|` [in], nats, float32: how much the loss changes to first order if column j goes,
            `|sum_i w_ij dL/dw_ij|`. If rows of other operators go with the columns, theirs are added, those of a group
            in equal shares on its columns.
        squares: `sum_t (sum_{j in group} s_tj)^2` [groups], nats squared, float32.
        num_tokens: Tokens the loss was summed over.
        is_felt: Whether the loss depends on the operator.
    """

    changes: Tensor
    squares: Tensor
    num_tokens: int = 0
    is_felt: bool = False

    @property
    def costs(self) -> Tensor:
        """Expected increase of the loss in nats a token when a gate alone is closed, [groups].

        `1/2 E[(sum_{j in group} s_tj)^2]`, with the Fisher information of the gate for its second derivative.
        """
        return self.squares * (0.5 / max(1, self.num_tokens))


def measure_gates(
    loss: DenseLoss, operators: Mapping[str, LinearOperator], parts: Mapping[str, Part]
) -> dict[str, Gates]:
    """Take the gradients of a loss by all gates of some operators, by name.

    The parts are, by the same names, the groups of columns of the operators, with the rows that go with them. The
    columns of an operator that is no part are groups of their own.

    Returns:
        Gates by operator, all zero if the loss does not feel it, or it is called more than once.

    Raises:
        ValueError: If a gradient is not finite.
    """
    columns = {n: _Columns(o, parts[n].groups if n in parts else o.shape[1]) for n, o in operators.items()}
    feeders = {tensor.removesuffix(".weight") for n in operators for tensor in (parts[n].tensors if n in parts else ())}
    modules = {name: module for name, module in loss.model.named_modules() if name in feeders - set(columns)}
    rows = {name: _Rows(LinearOperator(name, module)) for name, module in modules.items()}
    watchers = {watcher.operator: watcher for watcher in (*columns.values(), *rows.values())}
    watch_gradients(loss, watchers)
    found = {}
    for name, sums in columns.items():
        changes, size = sums.first.abs(), len(sums.squares)
        for tensor, (_, repeats) in parts[name].tensors.items() if name in parts else ():
            feeder = rows.get(tensor.removesuffix(".weight"))
            if feeder is not None:  # [rows] -> [repeats, groups, rows of a group]
                by_group = feeder.first.abs().view(repeats, size, -1).sum((0, 2)).to(changes.device)
                changes += by_group.repeat_interleave(len(changes) // size) / (len(changes) // size)
        felt, total = torch.stack([sums.squares.sum(), changes.sum()]).tolist()
        if not math.isfinite(felt + total):
            raise ValueError(
                f"the gradients of the loss by the columns of {name} hold NaN or Inf: pass a method that takes none, "
                "such as method='wanda', or a model in float32 or bfloat16."
            )
        found[name] = Gates(changes, sums.squares, sums.num_tokens, felt > 0)
    return found


class _Paired(Watcher):
    """Pairs what is seen of an operator with the gradient, whichever comes first.

    Attributes:
        first: Sums of products with the gradients, one for each row or column, float32.
    """

    def __init__(self, operator: LinearOperator, size: int) -> None:
        self.operator = operator
        self.first = torch.zeros(size, device=operator.device)
        self.num_tokens = 0
        self._seen: Tensor | None = None
        self._gradient: Tensor | None = None

    def see_input(self, inputs: Tensor, num_tokens: int) -> None:  # noqa: ARG002
        self.num_tokens += num_tokens
        self._seen = self._gradient = None  # what was left by a call without a gradient

    def see_gradient(self, gradient: Tensor) -> None:
        self._gradient = gradient.clone()
        self._add_both()

    def take(self, seen: Tensor) -> None:
        """Pair this with the gradient: the inputs of a sequence, or the outputs."""
        self._seen = seen.clone()
        self._add_both()

    def _add_both(self) -> None:
        if self._seen is not None and self._gradient is not None:
            self.add(self._seen, self._gradient)
            self._seen = self._gradient = None

    def add(self, seen: Tensor, gradient: Tensor) -> None:
        """Add one sequence."""
        raise NotImplementedError


class _Columns(_Paired):
    """The derivatives by the gates of columns, and the squares of those by the gates of groups."""

    def __init__(self, operator: LinearOperator, groups: int) -> None:
        super().__init__(operator, operator.shape[1])
        self.squares = torch.zeros(groups, device=operator.device)

    def see_again(self, inputs: Tensor, outputs: Tensor) -> None:  # noqa: ARG002
        self.take(inputs)

    def add(self, seen: Tensor, gradient: Tensor) -> None:
        # read once a sequence and not kept: the weights of all operators together may not fit
        by_column = seen.mul_(gradient @ self.operator.read())
        self.first += by_column.sum(0)
        self.squares += by_column.unflatten(1, (len(self.squares), -1)).sum(-1).square().sum(0)


class _Rows(_Paired):
    """The derivatives by factors on rows, biases included."""

    def __init__(self, operator: LinearOperator) -> None:
        super().__init__(operator, operator.shape[0])

    def see_again(self, inputs: Tensor, outputs: Tensor) -> None:  # noqa: ARG002
        self.take(outputs)

    def add(self, seen: Tensor, gradient: Tensor) -> None:
        self.first += (seen * gradient).sum(0)
