"""Packed layers on another device than the current one compute what they compute on the CPU."""

import copy

import pytest
import torch

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
