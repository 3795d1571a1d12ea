"""A linear operator of a model, seen as a matrix [out, in] whatever way its module stores it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from optimum_fista.model.offload import stored_tensor


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a plain linear operator: `nn.Linear` or Transformers' `Conv1D` (GPT-2)."""
    return isinstance(module, nn.Linear | Conv1D)


class LinearOperator:
    """A linear operator with its weight as [out, in].

    Attributes:
        name: Full name of the module in the model.
        module: `nn.Linear`, or `Conv1D`, which stores [in, out].
        transposed: Whether the module stores the weight as [in, out].
    """

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name = name
        self.module = module
        self.transposed = isinstance(module, Conv1D)

    @property
    def parameter(self) -> nn.Parameter:
        """The weight as stored."""
        return self.module.weight  # type: ignore[return-value]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        rows, columns = self.parameter.shape
        return (columns, rows) if self.transposed else (rows, columns)

    def read(self) -> Tensor:
        """A float32 copy of the weight, [out, in], read from where it is kept."""
        weight = stored_tensor(self.module, "weight")
        return (weight.T if self.transposed else weight).to(torch.float32, copy=True).contiguous()

    def write(self, weight: Tensor) -> None:
        """Overwrite the weight in place with `weight` [out, in], rounded to the parameter's dtype."""
        self.parameter.data.copy_(weight.T if self.transposed else weight)

    def outputs_without_bias(self, outputs: Tensor) -> Tensor:
        """`W x` from the module's outputs `W x + b`, [tokens, out], float32."""
        flat = outputs.detach().reshape(-1, self.shape[0]).float()
        bias = getattr(self.module, "bias", None)
        return flat if bias is None else flat - bias.detach().float()
