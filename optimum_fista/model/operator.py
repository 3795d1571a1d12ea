"""A linear operator of a model, seen as a matrix [out, in] whatever way its module stores it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from optimum_fista.model.offload import execution_device, stored_tensor

LINEAR = (nn.Linear, Conv1D)
"""Modules that are plain linear operators; the second is Transformers' own (GPT-2)."""


class LinearOperator:
    """A linear operator with its weight as [out, in].

    Attributes:
        name: Full name of the module in the model.
        module: What computes it: `nn.Linear`, or `Conv1D`, which stores [in, out].
        owner: The module that holds the weight: `module` itself, or one that holds the weights of many.
        tensor: The owner's parameter that holds the weight.
        transposed: Whether the weight is stored as [in, out].
        tokens: Tokens of the latest call if it does not see all: int64, indices into the flattened batch, rising.
        ends: The part of the decoder layer, such as its attention, that returns this operator's output as it is, and
            what it returns besides (`split_output`); `None` if there is none, or no forward pass was traced.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        owner: nn.Module | None = None,
        tensor: str = "weight",
        transposed: bool | None = None,
    ) -> None:
        self.name = name
        self.module = module
        self.owner = module if owner is None else owner
        self.tensor = tensor
        self.transposed = isinstance(module, Conv1D) if transposed is None else transposed
        self.tokens: Tensor | None = None
        self.ends: tuple[nn.Module, tuple[Any, ...] | None] | None = None

    @property
    def parameter(self) -> Tensor:
        """The weight as stored: the owner's parameter, or a view of the part of it that is this operator's."""
        return self.select(getattr(self.owner, self.tensor))

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        rows, columns = self.parameter.shape
        return (columns, rows) if self.transposed else (rows, columns)

    def select(self, stored: Tensor) -> Tensor:
        """This operator's part of the stored tensor, a view."""
        return stored

    def read(self) -> Tensor:
        """A float32 copy of the weight where it computes, [out, in], read from where it is kept."""
        kept = self.select(stored_tensor(self.owner, self.tensor))
        weight = kept.to(execution_device(self.owner))  # in its own dtype, which may be half as many bytes
        return (weight.T if self.transposed else weight).to(torch.float32, copy=weight is kept).contiguous()

    def write(self, weight: Tensor) -> None:
        """Overwrite the weight in place with `weight` [out, in], rounded to the parameter's dtype."""
        # `.data`, because a parameter that requires gradients refuses changes in place.
        self.parameter.data.copy_(weight.T if self.transposed else weight)

    def outputs_without_bias(self, outputs: Tensor) -> Tensor:
        """`W x` from the module's outputs `W x + b`, [tokens, out]: float32, or without a bias in their dtype."""
        # [batch, sequence, out] -> [tokens, out].
        flat = outputs.detach().reshape(-1, self.shape[0])
        bias = getattr(self.module, "bias", None)
        return flat if bias is None else flat.float() - bias.detach().float()


Group = list[LinearOperator]
"""Operators that share their inputs."""
