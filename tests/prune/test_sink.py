from contextlib import suppress

import pytest
import torch
from accelerate import cpu_offload
from torch import nn
from transformers.pytorch_utils import Conv1D

from optimum_fista.model.offload import offloaded_tensor, onloaded
from optimum_fista.model.operators import LinearOperator
from optimum_fista.prune.sink import ModelSink
from optimum_fista.records import LayerRecord, LayerReport


@pytest.fixture(params=[nn.Linear(4, 3), Conv1D(3, 4)], ids=["Linear", "Conv1D"])
def operator(request) -> LinearOperator:
    return LinearOperator("mlp", request.param)


def write_and_fail(operator: LinearOperator, error: type[BaseException]) -> None:
    sink = ModelSink(operator.module)
    with sink.opened("float32"):
        sink.write(operator, torch.zeros(3, 4))
        sink.write(operator, torch.ones(3, 4))
        raise error


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_any_exception_restores_the_weights_in_the_same_parameter(operator, error):
    parameter = operator.parameter
    before = parameter.detach().clone()

    with pytest.raises(error):
        write_and_fail(operator, error)

    assert operator.parameter is parameter
    assert torch.equal(parameter, before)


def test_undo_puts_back_what_was_written_since_the_last_commit():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(4, 3))
    first, second = (LinearOperator(f"{index}", module) for index, module in enumerate(model))
    before = [module.weight.detach().clone() for module in model]
    sink = ModelSink(model)

    with suppress(ValueError), sink.opened("float32"):
        sink.write(first, torch.zeros(3, 4))
        sink.store(0, model[0], LayerRecord(LayerReport("0", None, 0.0)))
        sink.write(second, torch.zeros(3, 4))
        sink.write(second, torch.ones(3, 4))
        sink.undo()
        assert torch.equal(second.parameter, before[1])
        assert not first.parameter.any()
        raise ValueError

    assert torch.equal(first.parameter, before[0])


def test_offloaded_weights_change_where_they_are_kept_when_their_layer_is_committed():
    model = nn.Sequential(nn.Linear(4, 3))
    before = model[0].weight.detach().clone()
    cpu_offload(model, execution_device=torch.device("cpu"))
    operator = LinearOperator("0", model[0])
    sink = ModelSink(model)

    with suppress(ValueError), sink.opened("float32"):
        with onloaded(model.modules()):
            sink.write(operator, torch.zeros(3, 4))
            sink.undo()
            assert torch.equal(operator.parameter, before)
            sink.write(operator, torch.ones(3, 4))
            assert torch.equal(offloaded_tensor(model[0], "weight"), before)
            sink.store(0, model[0], LayerRecord(LayerReport("0", None, 0.0)))
            assert torch.equal(offloaded_tensor(model[0], "weight"), torch.ones(3, 4))
            sink.undo()
        assert torch.equal(offloaded_tensor(model[0], "weight"), torch.ones(3, 4))
        raise ValueError

    assert torch.equal(offloaded_tensor(model[0], "weight"), before)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_after_an_error_hooks_modes_and_gradients_are_as_before(error):
    model = nn.Linear(4, 3)
    gradient = torch.ones(3, 4)
    model.weight.grad = gradient

    with suppress(error), ModelSink(model).opened("float32"):
        model.register_forward_hook(print)
        model.weight.grad = None
        model.weight.requires_grad_(False)
        model.eval()
        raise error

    assert not model._forward_hooks
    assert model.training
    assert model.weight.grad is gradient
    assert model.weight.requires_grad
    assert torch.is_grad_enabled()
