"""Linear operators of a model as matrices [out, in], however their modules store them.

A `LinearOperator` is one matrix of a decoder layer that multiplies its inputs: the weight of an `nn.Linear`, of a
`Conv1D` (stored as [in, out]), or a part of a larger parameter (`model.experts`). `model.choice` finds the operators of
a decoder layer. They are made once for a run, and hold no results of forward passes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from optimum_fista.model.offload import execution_device, stored_tensor

LINEAR = (nn.Linear, Conv1D)
"""Modules that are plain linear operators; the second is Transformers' own (GPT-2)."""


class LinearOperator:
    """A linear operator with its weight as [out, in].

    Attributes:
        name: Of the module in the model, such as "model.layers.3.mlp.down_proj".
        module: Computes the operator; hooks on it see the inputs and outputs.
        owner: Holds the weight: the same module, except for experts, which have one owner together.
        tensor: Name of the owner's parameter, such as "weight".
        transposed: Whether the weight is stored as [in, out].
        shape: Numbers of outputs and inputs.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        owner: nn.Module | None = None,
        tensor: str = "weight",
        transposed: bool | None = None,
    ) -> None:
        """Name the weight `tensor` of `owner`, by default of `module`; nothing is copied.

        `name` is the operator's in the model, such as "model.layers.3.mlp.down_proj". `transposed` says that the weight
        is stored as [in, out]; `None`: only if the module is a `Conv1D`.
        """
        self.name = name
        self.module = module
        self.owner = module if owner is None else owner
        self.tensor = tensor
        self.transposed = isinstance(module, Conv1D) if transposed is None else transposed
        rows, columns = self.parameter.shape
        self.shape: tuple[int, int] = (columns, rows) if self.transposed else (rows, columns)

    @property
    def parameter(self) -> Tensor:
        """The weight as stored: the owner's parameter, or a view of the part of it that is this operator's."""
        return self.select(getattr(self.owner, self.tensor))

    def select(self, stored: Tensor) -> Tensor:
        """This operator's part of the stored tensor, a view."""
        return stored

    def read(self) -> Tensor:
        """Read a float32 copy of the weight, [out, in], to the device where it computes.

        The weight is the tensor `self.tensor` of `self.owner`, or a part of it; it may be offloaded. Changes nothing.
        """
        stored = self.select(stored_tensor(self.owner, self.tensor))
        # Moved in its own dtype, which may take half the bytes of float32.
        weight = stored.to(execution_device(self.owner))
        is_same_tensor = weight is stored  # then float32 weights must be copied
        if self.transposed:
            weight = weight.T
        return weight.to(torch.float32, copy=is_same_tensor).contiguous()

    def write(self, weight: Tensor) -> None:
        """Overwrite the weight in place with `weight` [out, in], rounded to the parameter's dtype.

        The parameter must be in memory: an offloaded one is onloaded by the caller.
        """
        # `.data`, because a parameter that requires gradients refuses changes in place.
        self.parameter.data.copy_(weight.T if self.transposed else weight)

    def outputs_without_bias(self, outputs: Tensor) -> Tensor:
        """Compute `W x` [tokens, out] from the module's `outputs` `W x + b` [..., out].

        The result is float32 if there is a bias. Otherwise it may share memory with `outputs`.
        """
        num_outputs, _ = self.shape
        flat = outputs.detach().reshape(-1, num_outputs)  # [batch, sequence, out] -> [tokens, out]
        bias = getattr(self.module, "bias", None)
        if bias is None:
            return flat
        return flat.float() - bias.detach().float()


Group = list[LinearOperator]
"""Operators that share their inputs."""


def require_finite(operators: Sequence[LinearOperator]) -> None:
    """Refuse weights that hold NaN or Inf. Changes nothing; the host waits once for all operators.

    All weights must be in memory, on any devices.
    """
    if not operators:
        return
    device = operators[0].parameter.device
    # one boolean for each operator
    finite = torch.stack(
        [torch.isfinite(operator.parameter).all().to(device) for operator in operators]
    )
    for operator, is_finite in zip(operators, finite.tolist(), strict=True):
        if not is_finite:
            raise ValueError(
                f"the weight of {operator.name} holds NaN or Inf: the model is damaged, load it again."
            )
