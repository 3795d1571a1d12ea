import pytest
import torch
from tiny_models import VOCAB_SIZE, tiny_model
from torch import nn

from optimum_fista.model.architecture import find_decoder_layers, find_operators
from optimum_fista.model.calibration import read_batches
from optimum_fista.model.experts import split_experts
from optimum_fista.model.gates import measure_gates
from optimum_fista.model.loss_gradients import DenseLoss
from optimum_fista.model.parts import find_parts

TOKENS = torch.randint(3, VOCAB_SIZE, (5, 12), generator=torch.Generator().manual_seed(1))
USED = 3  # sequences


def parts_of(model, kinds):
    return {part.name: part for kind in kinds for part in find_parts(model, kind).parts}


def measure(model, parts, storage=None):
    layers = find_decoder_layers(model)
    operators = {k: v for name, layer in layers for k, v in find_operators(name, layer).items()}
    chosen = {name: operator for name, operator in operators.items() if name in parts or not parts}
    batches = read_batches(TOKENS.split((2, 3)), VOCAB_SIZE)
    with torch.no_grad(), split_experts(operators.values()):
        loss = DenseLoss(model, layers, batches, USED * 12, storage=storage)
        return operators, measure_gates(loss, chosen, parts)


def loss_of(model, ids):
    logits = model(input_ids=ids[None], use_cache=False).logits[0]
    return nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="sum")


def first_order(model, name):
    """`sum_ij w_ij dL/dw_ij` of every entry of a parameter's gradient."""
    parameter = model.get_parameter(name)
    return parameter.detach() * parameter.grad


@pytest.mark.parametrize(
    ("family", "kinds"),
    [("llama", ("channels", "heads")), ("gpt2", ("channels",)), ("phi3", ("channels",)), ("qwen2", ("heads",))],
)
def test_changes_are_weights_times_their_gradients(family, kinds):
    model = tiny_model(family)
    parts = parts_of(model, kinds)
    _, found = measure(tiny_model(family), parts)
    sum(loss_of(model, ids) for ids in TOKENS[:USED]).backward()
    assert set(found) == set(parts)
    assert all(gates.is_felt for gates in found.values())
    for name, part in parts.items():
        scores = torch.zeros(part.groups)
        for tensor, (axis, repeats) in part.tensors.items():
            owner, _, kind = tensor.rpartition(".")
            if kind == "weight":
                by_entry = first_order(model, tensor).sum(1 - axis)
                if owner != name and f"{owner}.bias" in part.tensors:  # goes with the row
                    by_entry += first_order(model, f"{owner}.bias")
                scores += by_entry.abs().view(repeats, part.groups, -1).sum((0, 2))
        by_group = found[name].changes.view(part.groups, -1).sum(1)
        assert torch.allclose(by_group, scores, rtol=2e-3, atol=1e-4 * float(scores.max()))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_squares_are_those_of_the_derivatives_by_gates_token_by_token(family):
    model = tiny_model(family)
    parts = parts_of(model, ("channels", "heads") if family == "llama" else ("channels",))
    _, found = measure(tiny_model(family), parts)
    for name, part in parts.items():
        gate = torch.ones(1, TOKENS.shape[1], part.groups, requires_grad=True)  # one of each token

        def close(_, arguments, gate=gate, part=part):
            return arguments[0] * gate.repeat_interleave(part.width, -1)

        handle = model.get_submodule(name).register_forward_pre_hook(close)
        squares = torch.zeros(part.groups)
        for ids in TOKENS[:USED]:
            (gradient,) = torch.autograd.grad(loss_of(model, ids), gate)
            squares += gradient[0].square().sum(0)
        handle.remove()
        assert torch.allclose(found[name].squares, squares, rtol=1e-3, atol=1e-5 * float(squares.max()))
        assert torch.allclose(found[name].costs, squares / (2 * USED * 12), rtol=1e-3)


def test_columns_that_are_no_part_stand_alone():
    model = tiny_model("mixtral")
    operators, found = measure(model, {})
    assert set(found) == set(operators)
    assert all(found[name].changes.shape == (operators[name].shape[1],) for name in found)
    attention = "model.layers.0.self_attn.v_proj"
    again = tiny_model("mixtral")
    sum(loss_of(again, ids) for ids in TOKENS[:USED]).backward()
    expected = first_order(again, f"{attention}.weight").sum(0).abs()
    assert torch.allclose(found[attention].changes, expected, rtol=2e-3, atol=1e-4 * float(expected.max()))
    stacked = again.model.layers[1].mlp.experts.down_proj
    for expert in range(4):
        expected = (stacked[expert] * stacked.grad[expert]).detach().sum(0).abs()
        changes = found[f"model.layers.1.mlp.experts.{expert}.down_proj"].changes
        assert torch.allclose(changes, expected, rtol=2e-3, atol=1e-4 * float(expected.max()))


def test_where_hidden_states_wait_does_not_matter(tmp_path):
    model = tiny_model("llama")
    parts = parts_of(model, ("channels", "heads"))
    _, on_device = measure(model, parts)
    _, in_files = measure(model, parts, storage=tmp_path)
    for name in parts:
        assert torch.equal(on_device[name].changes, in_files[name].changes)
        assert torch.equal(on_device[name].squares, in_files[name].squares)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_gradients_that_are_not_finite_are_an_error():
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight[5] = float("nan")
    with pytest.raises(ValueError, match=r"by the columns of model\.layers\.0\..* hold NaN or Inf: pass a method"):
        measure(model, parts_of(model, ("channels",)))
