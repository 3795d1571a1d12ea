import pytest
import torch
from pruning import plan_of

from optimum_fista import FistaPruner, FistaPruningConfig
from optimum_fista.model.sensitivity import measure_sensitivities
from optimum_fista.prune import budgets
from optimum_fista.prune.batches import read_calibration
from optimum_fista.prune.budgets import share_budgets


def budgets_of(model, tokens, **options):
    plan = plan_of(model, FistaPruningConfig(**options))
    calibration, _, report = read_calibration(plan, tokens.split(4), None)
    return plan.operators, share_budgets(plan, calibration.batches, report)


@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.9])
def test_budgets_of_operators_add_up_to_the_sparsity_asked_for(llama, tokens, sparsity):
    operators, budgets = budgets_of(llama, tokens, sparsity=sparsity)

    assert set(budgets.sparsities) == set(budgets.output_weights) == set(operators)
    assert len(set(budgets.sparsities.values())) > 5
    total = sum(o.parameter.numel() for o in operators.values())
    zeros = sum(budgets.sparsities[name] * o.parameter.numel() for name, o in operators.items())
    assert zeros == pytest.approx(round(sparsity * total), abs=1e-6)
    for name, operator in operators.items():
        assert budgets.output_weights[name].shape == (operator.shape[0],)


@pytest.mark.parametrize(
    "options",
    [
        {"allocation": "uniform"},
        {"pattern": "2:4"},
        {"method": "alps"},
        {"sparsity": 0.0, "overrides": {"*.q_proj": 0.5}},
    ],
)
def test_where_every_operator_has_one_sparsity_budgets_take_no_forward_pass(llama, tokens, options):
    llama.forward = None  # running it would be an error

    _, budgets = budgets_of(llama, tokens, **options)

    assert (budgets.sparsities, budgets.output_weights, budgets.without_gradient) == ({}, {}, [])


@pytest.mark.parametrize(
    ("num_tokens", "lengths"),
    [
        (64, [8] * 8),  # eight sequences of `_LONGEST` tokens
        (20, [8] * 3),
        (72, [9] * 8),  # more tokens of each, since there are eight sequences only
        (73, [10] * 8),
    ],
)
def test_zeros_are_shared_by_the_beginnings_of_sequences(
    llama, tokens, num_tokens, lengths, monkeypatch
):
    assert budgets._LONGEST == 128
    monkeypatch.setattr(budgets, "_LONGEST", 8)
    losses = []

    def watched(loss, operators, batches):
        losses.append(loss)
        return measure_sensitivities(loss, operators, batches)

    monkeypatch.setattr(budgets, "measure_sensitivities", watched)
    budgets_of(llama, tokens, allocation_tokens=num_tokens)

    (loss,) = losses
    assert [sequence.num_tokens for sequence in loss.sequences()] == lengths


def test_decoder_layers_are_chosen_by_the_loss_of_whole_sequences():
    assert budgets.longest_of_loss(FistaPruningConfig(pattern="layers:0.25"), 8) is None


def test_operators_with_an_override_take_no_part_in_the_sharing_of_zeros(llama, tokens):
    overrides = {"*.q_proj": 0.25, "*.down_proj": "2:4"}

    operators, budgets = budgets_of(llama, tokens, overrides=overrides)

    assert set(budgets.sparsities) == {
        n for n in operators if not n.endswith(("q_proj", "down_proj"))
    }


def test_operators_without_a_gradient_have_the_sparsity_asked_for_and_are_warned_of(llama, tokens):
    with torch.no_grad():  # so that no gradient reaches the MLP
        llama.model.layers[1].mlp.down_proj.weight.zero_()
    unseen = [f"model.layers.1.mlp.{name}_proj" for name in ("down", "gate", "up")]

    _, budgets = budgets_of(llama, tokens)
    report = FistaPruner(FistaPruningConfig(), progress=False).prune(llama, tokens.split(4))

    assert sorted(budgets.without_gradient) == unseen
    assert all(name not in budgets.sparsities for name in unseen)
    (warning,) = [w for w in report.warnings if "has no gradient for" in w]
    assert "3 operators" in warning
    assert "model.layers.1.mlp.up_proj" in warning
    assert {o.name: o.sparsity for o in report.operators}[
        "model.layers.1.mlp.up_proj.weight"
    ] == 0.5


def test_with_scope_row_all_rows_of_an_operator_keep_equally_many_weights(llama, tokens):
    config = FistaPruningConfig(0.5, scope="row")

    report = FistaPruner(config, progress=False).prune(llama, tokens.split(4))

    for operator in report.operators:
        weight = llama.get_parameter(operator.name)
        assert len(set((weight != 0).sum(1).tolist())) == 1
    assert len({o.sparsity for o in report.operators}) > 5
    assert report.totals["sparsity"] == pytest.approx(0.5, abs=0.02)
