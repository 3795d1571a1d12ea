import math

import pytest
import torch
from torch import Tensor, nn
from toy_layer import Group, ToyLayer, toy_layer

from optimum_fista.model.operator import LinearOperator
from optimum_fista.model.replay import LayerCall
from optimum_fista.model.statistics import (
    DenseRecord,
    LayerActivations,
    problems_corrected,
    problems_same_input,
    record_dense,
)

CPU = torch.device("cpu")
MASKS = [None, torch.tensor([[1, 1, 1], [0, 1, 1]]).bool(), torch.tensor([[1, 1, 0]] * 4).bool()]
GROUPS = [0, 1, 2]


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def hidden_states(scale: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [scale * torch.randn(rows, 3, 8, generator=generator) for rows in (1, 2, 4)]


def activations_of(layer: nn.Module, masks=MASKS) -> LayerActivations:
    return LayerActivations(layer, [LayerCall((), {})] * 3, masks, CPU)


def reference(layer: ToyLayer, name: str, states: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Inputs [tokens, in] and outputs without bias [tokens, out] of an operator on the real tokens."""
    inputs: list[Tensor] = []
    handle = layer.get_submodule(name).register_forward_pre_hook(lambda _, args: inputs.append(args[0].clone()))
    for state in states:
        layer(state)
    handle.remove()
    rows = [x.reshape(-1, x.shape[-1]) if mask is None else x[mask] for x, mask in zip(inputs, MASKS, strict=True)]
    X = torch.cat(rows)
    return X, X @ layer.get_submodule(name).weight.T


def short(operator: LinearOperator) -> str:
    return operator.name.rpartition(".")[2]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("in_place", [False, True])
def test_dense_run_records_outputs_grams_and_energies(bias, in_place):
    layer = toy_layer(bias=bias, in_place=in_place)
    groups, states = layer.groups(), hidden_states()
    outputs, records, grams = record_dense(activations_of(layer), groups, states, [True, False, False])
    assert all(torch.equal(ours, layer(state)) for ours, state in zip(outputs, states, strict=True))
    assert [gram is not None for gram in grams] == [True, False, False]
    X, _ = reference(layer, "left", states)
    statistics = grams[0].finish()
    assert torch.allclose(statistics.gram, X.T @ X, rtol=1e-5, atol=1e-5)
    assert statistics.num_tokens == len(X) == 3 + 5 + 8
    assert [record.narrow for record in records] == [False, False, True]
    assert list(records[0].kept) == []
    assert records[0].energies == {}
    X, _ = reference(layer, "up", states)
    assert torch.equal(torch.cat(list(records[1].kept)), X)
    Y = torch.cat([reference(layer, name, states)[1] for name in ("low", "high")], dim=1)
    assert torch.allclose(torch.cat(list(records[2].kept)), Y, rtol=1e-5, atol=1e-6)
    for record in records[1:]:
        for name, energy in record.energies.items():
            Y = reference(layer, name.removeprefix("layer."), states)[1]
            assert torch.allclose(energy.float(), Y.square().sum(0), rtol=1e-5)
    assert [list(record.energies) for record in records[1:]] == [["layer.up"], ["layer.low", "layer.high"]]


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("index", GROUPS)
def test_corrected_problems_are_those_of_the_activations(index, bias, in_place):
    layer = toy_layer(bias=bias, in_place=in_place)
    group: Group = layer.groups()[index]
    dense, changed = hidden_states(), hidden_states(0.7)
    dense_inputs = {short(operator): reference(layer, short(operator), dense) for operator in group}
    _, records, _ = record_dense(activations_of(layer), [group], dense, [False])
    X_star, _ = reference(layer, short(group[0]), changed)
    batches = list(split_like_batches(layer, short(group[0]), changed))
    problems = problems_corrected(activations_of(layer), group, records[0], batches, 1.0)
    assert list(records[0].kept) == [], "used up"
    for operator, problem in zip(group, problems, strict=True):
        X, Y = dense_inputs[short(operator)]
        assert problem.name == operator.name
        assert problem.statistics is problems[0].statistics
        assert problem.statistics.num_tokens == len(X)
        assert torch.allclose(problem.gram, X_star.T @ X_star, rtol=1e-4, atol=1e-4)
        assert torch.allclose(problem.target, Y.T @ X_star, rtol=1e-4, atol=1e-4)
        pruned = problem.weight * (problem.weight.abs() > 0.1)
        expected = float((X_star @ pruned.T - Y).norm() / Y.norm())
        assert problem.relative_error(pruned) == pytest.approx(expected, rel=1e-4)


def split_like_batches(layer: ToyLayer, name: str, states: list[Tensor]):
    """Inputs of an operator [batch, sequence, in], a batch each, padding included."""
    for state in states:
        seen: list[Tensor] = []
        handle = layer.get_submodule(name).register_forward_pre_hook(lambda _, args, s=seen: s.append(args[0].clone()))
        layer(state)
        handle.remove()
        yield seen[0]


@pytest.mark.parametrize("index", GROUPS)
@pytest.mark.parametrize("dense_share", [0.0, 0.25, 0.8, 1.0])
def test_target_between_the_dense_and_the_pruned_outputs(index, dense_share):
    layer = toy_layer()
    group: Group = layer.groups()[index]
    dense, changed = hidden_states(), hidden_states(0.7)
    _, records, _ = record_dense(activations_of(layer), [group], dense, [False])
    X, _ = reference(layer, short(group[0]), dense)
    X_star, _ = reference(layer, short(group[0]), changed)
    batches = list(split_like_batches(layer, short(group[0]), changed))
    for problem in problems_corrected(activations_of(layer), group, records[0], batches, dense_share):
        Y = (dense_share * X + (1 - dense_share) * X_star) @ problem.weight.T
        assert torch.allclose(problem.target, Y.T @ X_star, rtol=1e-4, atol=1e-4)
        assert problem.target_energy == pytest.approx(float(Y.square().sum()), rel=1e-4)
        pruned = problem.weight * (problem.weight.abs() > 0.1)
        expected = float((X_star @ pruned.T - Y).norm() / Y.norm())
        assert problem.relative_error(pruned) == pytest.approx(expected, rel=1e-3)
        assert problem.corrected is (dense_share > 0)


def test_same_input_problems_aim_at_their_own_outputs():
    layer = toy_layer()
    group = layer.groups()[0]
    _, _, grams = record_dense(activations_of(layer), [group], hidden_states(), [True])
    problems = problems_same_input(group, grams[0])
    assert problems[0].statistics is problems[1].statistics
    for operator, problem in zip(group, problems, strict=True):
        X, Y = reference(layer, short(operator), hidden_states())
        assert problem.name == operator.name
        assert torch.allclose(problem.target, Y.T @ X, rtol=1e-4, atol=1e-4)
        assert problem.drift_energy == 0
        problem.weight.zero_()
        assert operator.parameter.abs().max() > 0, "a copy"


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
@pytest.mark.parametrize("corrected", [False, True])
def test_inputs_that_are_not_finite_are_refused_by_name(value, corrected):
    layer = toy_layer()
    group = layer.groups()[2]
    states = hidden_states()
    inputs = [torch.zeros(*state.shape[:2], 16) for state in states]
    inputs[1][0, 1, 4] = value
    if corrected:
        record = DenseRecord(True, [torch.zeros(n, 8) for n in (3, 5, 8)], {"layer.low": 1.0, "layer.high": 1.0})
        with pytest.raises(ValueError, match=r"inputs of layer\.low hold NaN or Inf \(or overflow"):
            problems_corrected(activations_of(layer), group, record, inputs, 1.0)
        return
    layer.up.weight[0, 0] = value
    _, _, grams = record_dense(activations_of(layer), [group], states, [True])
    with pytest.raises(ValueError, match=r"inputs of layer\.low hold NaN or Inf \(or overflow"):
        problems_same_input(group, grams[0])


def test_rows_of_real_tokens():
    layer = toy_layer()
    activations, operator = activations_of(layer), layer.groups()[1][0]
    values = torch.arange(24.0).view(4, 3, 2)
    assert torch.equal(activations.rows(values[:1], 0, operator), values[:1].view(3, 2))
    expected = values[:, :2].reshape(8, 2)
    assert torch.equal(activations.rows(values, 2, operator), expected)
    assert torch.equal(activations.rows(values.view(12, 2), 2, operator), expected)


def test_rows_that_do_not_belong_to_tokens_are_refused_only_where_padding_must_be_told_apart():
    layer = toy_layer()
    activations, operator = activations_of(layer), layer.groups()[1][0]
    assert activations.rows(torch.zeros(5, 2), 0, operator).shape == (5, 2)
    with pytest.raises(ValueError, match=r"layer\.up sees 5 rows for 12 tokens.*exclude=\['layer\.up'\]"):
        activations.rows(torch.zeros(5, 2), 2, operator)


@pytest.mark.parametrize("dense_share", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("index", GROUPS)
def test_held_out_batches_have_sums_of_their_own(index, dense_share):
    layer = toy_layer()
    group: Group = layer.groups()[index]
    dense, changed = hidden_states(), hidden_states(0.7)
    batches = list(split_like_batches(layer, short(group[0]), changed))
    everything = activations_of(layer)

    def made(chosen: list[int], held_out: list[int]):
        order = sorted(chosen + held_out)
        picked = LayerActivations(
            layer,
            [everything.calls[i] for i in order],
            [everything.token_masks[i] for i in order],
            CPU,
            [i in held_out for i in order],
        )
        _, (record,), _ = record_dense(picked, [group], [dense[i] for i in order], [False])
        return problems_corrected(picked, group, record, [batches[i] for i in order], dense_share), record

    problems, record = made([0, 2], [1])
    sums = record.take_held_out()
    assert record.held_out is None
    held_out = list(sums.problems(group, [problem.weight for problem in problems]))
    for found, chosen in ((problems, [0, 2]), (held_out, [1])):
        alone, empty = made(chosen, [])
        assert empty.take_held_out() is None
        for left, right in zip(found, alone, strict=True):
            assert left.name == right.name
            assert left.statistics.num_tokens == right.statistics.num_tokens
            assert torch.equal(left.gram, right.gram)
            assert torch.equal(left.target, right.target)
            assert torch.equal(left.output_energies, right.output_energies)
            assert left.drift_energy == right.drift_energy


def test_held_out_batches_have_a_gram_matrix_of_their_own():
    layer, states = toy_layer(), hidden_states()
    group: Group = layer.groups()[0]
    activations = activations_of(layer)
    activations.held_out = [False, False, True]
    _, (record,), (gram,) = record_dense(activations, [group], states, [True])
    X, _ = reference(layer, "left", states)
    for sums, seen in ((gram, X[: 3 + 5]), (record.take_held_out().gram, X[3 + 5 :])):
        assert sums.num_tokens == len(seen)
        assert torch.allclose(sums.finish().gram, seen.T @ seen, rtol=1e-5, atol=1e-5)
