import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from optimum_fista.model.operator import LinearOperator
from optimum_fista.run.rollback import Rollback


@pytest.fixture(params=[nn.Linear(4, 3), Conv1D(3, 4)], ids=["Linear", "Conv1D"])
def operator(request) -> LinearOperator:
    return LinearOperator("mlp", request.param)


def write_and_fail(operator: LinearOperator, error: type[BaseException]) -> None:
    with Rollback() as rollback:
        rollback.write(operator, torch.zeros(3, 4))
        rollback.write(operator, torch.ones(3, 4))
        raise error


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_any_exception_restores_the_bits_in_place(operator, error):
    parameter = operator.parameter
    before = parameter.detach().clone()
    with pytest.raises(error):
        write_and_fail(operator, error)
    assert operator.parameter is parameter
    assert torch.equal(parameter, before)


def test_success_keeps_what_was_written(operator):
    with Rollback() as rollback:
        rollback.write(operator, torch.ones(3, 4))
    assert torch.equal(operator.parameter, torch.ones_like(operator.parameter))
