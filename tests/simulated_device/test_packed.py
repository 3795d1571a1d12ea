"""Packed layers on another device than the current one compute what they compute on the CPU."""

import copy

import pytest
import torch

from optimum_fista.packed import operation, triton_kernel
from optimum_fista.packed.linear import PackedLinear


def layer():
    torch.manual_seed(0)
    linear = torch.nn.Linear(100, 40)
    linear.weight.data.masked_fill_(torch.rand(40, 100) < 0.5, 0)
    return PackedLinear.from_linear(linear)


@pytest.mark.parametrize("inputs", [1, 5])
def test_products_and_gradients_are_those_of_the_cpu(inputs):
    on_cpu, x = layer(), torch.randn(inputs, 100)
    on_device = copy.deepcopy(on_cpu).to("simulated:0")
    found = []
    for module, given in ((on_cpu, x), (on_device, x.to("simulated:0"))):
        given.requires_grad_()
        y = module(given)
        y.square().sum().backward()
        with torch.autocast(given.device.type, torch.bfloat16):
            assert module(given.detach()).dtype == torch.bfloat16
        found.append([t.cpu() for t in (y.detach(), given.grad, module.bias.grad, module.weight)])
    torch.testing.assert_close(found[0], found[1])


def test_triton_launches_on_the_device_of_the_tensors(monkeypatch):
    launches = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda values, *_: launches.append((values.device.index, torch.accelerator.current_device_index()))

    monkeypatch.setattr(triton_kernel, "_multiply_one", Kernel(), raising=False)
    monkeypatch.setattr(operation, "triton_is_here", lambda: True)
    module = layer().to("simulated:0")
    x = torch.randn(1, 100, device="simulated:0")
    tensors = (module.weight_values, module.weight_mask, module.weight_starts, module.bias)
    operation._multiply_on_cuda(x, *tensors)
    assert launches == [(0, 0)]
    assert torch.accelerator.current_device_index() == 1
