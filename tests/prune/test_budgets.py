import pytest
import torch
from pruning import plan_of

from optimum_fista import FistaPruner, FistaPruningConfig
from optimum_fista.prune.batches import begin
from optimum_fista.prune.budgets import share_budgets


def budgets_of(model, tokens, **options):
    plan = plan_of(model, FistaPruningConfig(**options))
    calibration, _, report = begin(plan, tokens.split(4), None)
    return plan.all_operators, share_budgets(plan, calibration.batches, report)


@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.9])
def test_sparsities_add_up_to_the_whole(llama, tokens, sparsity):
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
def test_uniform_budgets_run_nothing(llama, tokens, options):
    llama.forward = None  # running it would be an error

    _, budgets = budgets_of(llama, tokens, **options)

    assert (budgets.sparsities, budgets.output_weights, budgets.without_gradient) == ({}, {}, [])


def test_overrides_keep_their_own(llama, tokens):
    operators, budgets = budgets_of(
        llama, tokens, overrides={"*.q_proj": 0.25, "*.down_proj": "2:4"}
    )
    assert set(budgets.sparsities) == {
        n for n in operators if not n.endswith(("q_proj", "down_proj"))
    }


def test_operators_the_loss_does_not_feel_keep_the_average(llama, tokens):
    with torch.no_grad():
        llama.model.layers[1].mlp.down_proj.weight.zero_()
    _, budgets = budgets_of(llama, tokens)

    unseen = [f"model.layers.1.mlp.{name}_proj" for name in ("down", "gate", "up")]

    assert sorted(budgets.without_gradient) == unseen
    assert all(name not in budgets.sparsities for name in unseen)
    report = FistaPruner(FistaPruningConfig(), progress=False).prune(llama, tokens.split(4))
    (warning,) = [w for w in report.warnings if "has no gradient for" in w]
    assert "3 operators" in warning
    assert "model.layers.1.mlp.up_proj" in warning
    assert {o.name: o.sparsity for o in report.operators}[
        "model.layers.1.mlp.up_proj.weight"
    ] == 0.5


def test_rows_keep_their_own_budgets(llama, tokens):
    config = FistaPruningConfig(0.5, scope="row")

    report = FistaPruner(config, progress=False).prune(llama, tokens.split(4))

    for operator in report.operators:
        weight = llama.get_parameter(operator.name)
        assert len(set((weight != 0).sum(1).tolist())) == 1
    assert len({o.sparsity for o in report.operators}) > 5
    assert report.totals["sparsity"] == pytest.approx(0.5, abs=0.02)
