"""Linear operators of a model as matrices [out, in], however their modules store them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from optimum_fista.model.offload import execution_device, stored_tensor

LINEAR = (nn.Linear, Conv1D)
"""Modules that are plain linear operators; the second is Transformers' own (GPT-2)."""


class LinearOperator:
    """A linear operator with its weight as [out, in]."""

    def __init__(
        self,
        name: str,
        module: nn.Module,
        owner: nn.Module | None = None,
        tensor: str = "weight",
        transposed: bool | None = None,
    ) -> None:
        self.name = name  # of the module in the model
        self.module = module  # computes the operator
        self.owner = (
            module if owner is None else owner
        )  # holds the weight; all experts have the same owner
        self.tensor = tensor  # the owner's parameter
        self.transposed = (
            isinstance(module, Conv1D) if transposed is None else transposed
        )  # stored as [in, out]
        out, columns = self.parameter.shape[::-1] if self.transposed else self.parameter.shape
        self.shape: tuple[int, int] = (out, columns)
        # Tokens of the latest call if it does not get all: int64, indices into the flattened batch, rising.
        self.tokens: Tensor | None = None
        # The part of the decoder layer, such as its attention, that returns this operator's output unchanged, and its
        # other outputs (`split_output`); None if there is no such part, or no forward pass was traced.
        self.ends: tuple[nn.Module, tuple[Any, ...] | None] | None = None

    @property
    def parameter(self) -> Tensor:
        """The weight as stored: the owner's parameter, or a view of the part of it that is this operator's."""
        return self.select(getattr(self.owner, self.tensor))

    def select(self, stored: Tensor) -> Tensor:
        """This operator's part of the stored tensor, a view."""
        return stored

    def read(self) -> Tensor:
        """Read a float32 copy of the weight, [out, in], to the device where it computes."""
        kept = self.select(stored_tensor(self.owner, self.tensor))
        weight = kept.to(
            execution_device(self.owner)
        )  # moved in its own dtype, which may take half the bytes
        return (
            (weight.T if self.transposed else weight)
            .to(torch.float32, copy=weight is kept)
            .contiguous()
        )

    def write(self, weight: Tensor) -> None:
        """Overwrite the weight in place with `weight` [out, in], rounded to the parameter's dtype."""
        # `.data`, because a parameter that requires gradients refuses changes in place.
        self.parameter.data.copy_(weight.T if self.transposed else weight)

    def outputs_without_bias(self, outputs: Tensor) -> Tensor:
        """Compute `W x` from the module's outputs `W x + b`, [tokens, out]; float32 if there is a bias."""
        # [batch, sequence, out] -> [tokens, out].
        flat = outputs.detach().reshape(-1, self.shape[0])
        bias = getattr(self.module, "bias", None)
        return flat if bias is None else flat.float() - bias.detach().float()


Group = list[LinearOperator]
"""Operators that share their inputs."""


def require_finite(operators: Sequence[LinearOperator]) -> None:
    """Refuse damaged weights, with one transfer for all operators."""
    if not operators:
        return
    place = operators[0].parameter.device
    finite = torch.stack(
        [torch.isfinite(operator.parameter).all().to(place) for operator in operators]
    )
    for operator, is_finite in zip(operators, finite.tolist(), strict=True):
        if not is_finite:
            raise ValueError(
                f"the weight of {operator.name} holds NaN or Inf: the model is damaged, load it again."
            )
