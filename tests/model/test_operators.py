"""Linear operators are read, written and called as matrices [out, in]."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from optimum_fista.model.operators import LinearOperator


def make_module(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Five outputs, three inputs, with a bias."""
    torch.manual_seed(0)
    module = nn.Linear(3, 5) if kind == "Linear" else Conv1D(5, 3)
    nn.init.normal_(module.weight)
    nn.init.normal_(module.bias)
    return module.to(dtype)


@pytest.mark.parametrize("kind", ["Linear", "Conv1D"])
def test_weight_is_the_matrix_that_multiplies_the_inputs(kind):
    module = make_module(kind)
    operator = LinearOperator("fc", module)
    inputs = torch.randn(7, 3)

    assert operator.shape == tuple(operator.read().shape) == (5, 3)
    assert operator.transposed is (kind == "Conv1D")
    assert torch.allclose(module(inputs), inputs @ operator.read().T + module.bias, atol=1e-6)


@pytest.mark.parametrize("kind", ["Linear", "Conv1D"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_write_and_read_are_a_round_trip_by_copies(kind, dtype):
    operator = LinearOperator("fc", make_module(kind, dtype))
    parameter = operator.parameter
    weight = torch.randn(5, 3)

    operator.write(weight)
    read = operator.read()

    assert torch.equal(read, weight.to(dtype).float())
    assert read.is_contiguous()
    assert not read.requires_grad
    assert operator.parameter is parameter, "in place"
    assert parameter.dtype == dtype
    read.zero_()
    assert torch.equal(operator.read(), weight.to(dtype).float())


@pytest.mark.parametrize("kind", ["Linear", "Conv1D"])
@pytest.mark.parametrize("bias", [True, False])
def test_outputs_without_bias_are_the_product(kind, bias):
    module = make_module(kind)
    if not bias:
        module.bias = None if kind == "Linear" else nn.Parameter(torch.zeros(5))
    operator = LinearOperator("fc", module)
    inputs = torch.randn(2, 4, 3)

    outputs = operator.outputs_without_bias(module(inputs))

    assert outputs.shape == (8, 5)
    assert not outputs.requires_grad
    assert torch.allclose(outputs, inputs.reshape(8, 3) @ operator.read().T, atol=1e-5)
