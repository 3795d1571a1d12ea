"""Training the kept weights of one decoder layer on what it should return."""

import math

import pytest
import torch
from torch import Tensor, nn
from toy_layer import toy_layer

from optimum_fista.model.activations import LayerActivations
from optimum_fista.model.operator import LinearOperator
from optimum_fista.model.reconstruction import reconstruct
from optimum_fista.model.replay import LayerCall

CPU = torch.device("cpu")


def hidden(batches: int = 4, size: int = 8, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 6, size, generator=generator) for _ in range(batches)]


def activations_of(layer: nn.Module, batches: int = 4, masks: list[Tensor | None] | None = None) -> LayerActivations:
    return LayerActivations(layer, [LayerCall((), {})] * batches, masks or [None] * batches, CPU)


def halve(operators: list[LinearOperator]) -> dict[str, Tensor]:
    """Set the smaller half of every weight to zero; returns the masks."""
    masks = {}
    for operator in operators:
        weight = operator.read()
        masks[operator.name] = weight.abs() > weight.abs().median()
        operator.write(weight * masks[operator.name])
    return masks


def halved_layer(last: float = 1.0, **options):
    """A decoder layer, what enters it, what it should return, its operators, halved, and their masks."""
    layer, entering = toy_layer(**options), hidden()
    entering[-1] = entering[-1] * last
    wanted = [layer(h) for h in entering]
    operators = [operator for group in layer.groups() for operator in group]
    return layer, entering, wanted, operators, halve(operators)


def relative_error(outputs: list[Tensor], wanted: list[Tensor]) -> float:
    """The error in float64, token by token."""
    squares = [
        float((o.double() - w.double()).square().sum() / w.double().square().sum())
        for output, target in zip(outputs, wanted, strict=True)
        for o, w in zip(output.flatten(0, 1), target.flatten(0, 1), strict=True)
    ]
    return math.sqrt(sum(squares) / len(squares))


@torch.no_grad()
def test_the_error_falls_and_is_that_of_the_outputs():
    layer, entering, wanted, operators, masks = halved_layer(bias=True)
    pruned = [layer(h) for h in entering]
    biases = [module.bias.clone() for module in layer.children()]
    made = reconstruct(activations_of(layer), operators, masks, entering, wanted, steps=80, learning_rate=1e-2, seed=0)
    assert made.error_before == pytest.approx(relative_error(pruned, wanted), rel=1e-5)
    assert made.error == pytest.approx(relative_error([layer(h) for h in entering], wanted), rel=1e-5)
    assert made.error < 0.7 * made.error_before
    for output, hidden_states in zip(made.outputs, entering, strict=True):
        assert torch.equal(output, layer(hidden_states))
    for operator in operators:
        weight = operator.read()
        assert not weight[~masks[operator.name]].any()
        assert weight[masks[operator.name]].all()
    assert all(torch.equal(module.bias, bias) for module, bias in zip(layer.children(), biases, strict=True))
    assert all(p.requires_grad and p.grad is None for p in layer.parameters())


class Linear(nn.Module):
    """A decoder layer of one operator: its best weights are known."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(6, 5, bias=False, dtype=dtype)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor]:
        return (self.linear(hidden_states),)


@torch.no_grad()
def test_it_reaches_the_least_squares_weights_of_each_row_with_tokens_weighted_by_their_size():
    layer, entering = Linear(), hidden(1, 6)
    entering[0] = entering[0] * torch.rand(2, 6, 1)
    operator = LinearOperator("linear", layer.linear)
    wanted = [layer(h)[0] for h in entering]
    masks = halve([operator])
    made = reconstruct(
        activations_of(layer, 1), [operator], masks, entering, wanted, steps=4000, learning_rate=0.02, seed=0
    )
    inputs, targets = (h[0].flatten(0, 1).double() for h in (entering, wanted))
    scale = targets.norm(dim=1, keepdim=True)
    expected = torch.zeros(5, 6, dtype=torch.float64)
    for row, mask in enumerate(masks["linear"]):
        found = torch.linalg.lstsq((inputs / scale)[:, mask], (targets / scale)[:, row : row + 1])
        expected[row, mask] = found.solution[:, 0]
    assert torch.allclose(operator.read().double(), expected, atol=1e-3)
    assert made.error == pytest.approx(relative_error([(inputs @ expected.T)[None]], [targets[None]]), rel=1e-3)


@torch.no_grad()
def test_a_weight_that_is_part_of_a_larger_tensor():
    entering, found = hidden(size=6), []
    for columns in (6, 9):
        layer, tensor = Linear(), torch.ones(5, columns)
        tensor[:, :6] = layer.linear.weight
        layer.linear.weight = nn.Parameter(tensor[:, :6])
        operator, wanted = LinearOperator("linear", layer.linear), [layer(h)[0] for h in entering]
        masks = halve([operator])
        reconstruct(activations_of(layer), [operator], masks, entering, wanted, steps=5, learning_rate=0.02, seed=0)
        found.append(tensor)
    assert torch.allclose(found[1][:, :6], found[0])
    assert (found[1][:, 6:] == 1).all()


@torch.no_grad()
@pytest.mark.parametrize("rate", [1e6, math.inf])
def test_weights_that_got_worse_or_are_not_finite_are_put_back(rate):
    layer, entering, wanted, operators, masks = halved_layer()
    before = [operator.read() for operator in operators]
    made = reconstruct(activations_of(layer), operators, masks, entering, wanted, steps=5, learning_rate=rate, seed=0)
    assert made.outputs is None
    assert made.error == made.error_before > 0
    assert all(torch.equal(operator.read(), old) for operator, old in zip(operators, before, strict=True))


@torch.no_grad()
def test_the_seed_decides_the_result():
    results = []
    for seed in (0, 0, 1):
        layer, entering, wanted, operators, masks = halved_layer()
        reconstruct(activations_of(layer), operators, masks, entering, wanted, steps=6, learning_rate=1e-2, seed=seed)
        results.append(layer.up.weight.clone())
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


@torch.no_grad()
def test_what_is_not_named_stays_dense_and_padding_counts_nowhere():
    tuned = []
    for padding in (0.0, 100.0):
        layer, entering = toy_layer(), hidden()
        wanted = [layer(h) for h in entering]
        real = torch.ones(2, 6, dtype=torch.bool)
        real[1, 4:] = False
        for h in entering:
            h[1, 4:] += padding
        operators = [operator for operator in layer.groups()[0] if operator.name == "layer.left"]
        masks = halve(operators)
        others = layer.up.weight.clone()
        activations = activations_of(layer, masks=[real] * 4)
        made = reconstruct(activations, operators, masks, entering, wanted, steps=20, learning_rate=1e-2, seed=0)
        assert made.error < made.error_before
        assert torch.equal(layer.up.weight, others)
        tuned.append(layer.left.weight.clone())
    assert torch.equal(*tuned)


@torch.no_grad()
def test_steps_below_the_resolution_of_bfloat16_add_up():
    layer, entering = Linear(torch.bfloat16), [h.bfloat16() for h in hidden(2, 6)]
    operator = LinearOperator("linear", layer.linear)
    wanted = [layer(h)[0] for h in entering]
    masks = halve([operator])
    operator.write(operator.read() * 1.5)
    before = operator.read()
    made = reconstruct(
        activations_of(layer, 2), [operator], masks, entering, wanted, steps=400, learning_rate=2e-4, seed=0
    )
    assert made.error < 0.95 * made.error_before
    moved = (operator.read() - before).abs()[masks["linear"]]
    assert 5e-3 < float(moved.max()) < 400 * 2e-4
    assert layer.linear.weight.dtype == torch.bfloat16


@torch.no_grad()
def test_held_out_batches_are_measured_and_not_fitted_to():
    tuned = []
    for held_out in (1.0, 3.0):
        layer, entering, wanted, operators, masks = halved_layer(last=held_out)
        before = relative_error([layer(entering[3])], wanted[3:])
        activations = activations_of(layer)
        activations.held_out = [False, False, False, True]
        made = reconstruct(activations, operators, masks, entering, wanted, steps=30, learning_rate=1e-2, seed=0)
        assert made.held_out_error_before == pytest.approx(before, rel=1e-5)
        assert made.held_out_error == pytest.approx(relative_error([layer(entering[3])], wanted[3:]), rel=1e-5)
        assert made.error == pytest.approx(relative_error([layer(h) for h in entering[:3]], wanted[:3]), rel=1e-5)
        assert len(made.outputs) == 4
        tuned.append(layer.up.weight.clone())
    assert torch.equal(*tuned)
