from dataclasses import FrozenInstanceError

import pytest
import torch
from pruning import plan_of, prune, weights
from tiny_llama import tiny_llama

from optimum_fista import FistaPruningConfig
from optimum_fista.prune.plan import Budgets


def test_with_budgets_returns_a_new_plan_and_changes_no_other():
    plan = plan_of(tiny_llama(), FistaPruningConfig(pattern="channels:0.25/4+layers:0.5"))

    chosen = plan.with_budgets(Budgets(removed_layers=[(1, 2.5)]))

    assert (plan.pruned_layers, chosen.pruned_layers) == ([0, 1], [0])
    assert (plan.removal.removed_layers, chosen.removal.removed_layers) == ({}, {1: 2.5})
    with pytest.raises(FrozenInstanceError):
        chosen.removal = plan.removal


def test_overrides_set_the_sparsity_or_pattern_of_the_operators_they_name(llama, tokens):
    overrides = {"*.down_proj": "1:4", "*.0.*.q_proj": 0, "*.v_proj": 0.25}
    dense = weights(llama)

    report = prune(llama, tokens.split(4), sparsity=0.75, method="wanda", overrides=overrides)

    sparsity = {
        name: float((p == 0).double().mean()) for name, p in llama.named_parameters() if p.ndim == 2
    }
    assert sparsity.pop("model.layers.0.self_attn.q_proj.weight") == 0
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        sparsity.pop(name)
    for name, value in sparsity.items():
        assert value == (0.25 if "v_proj" in name else 0.75)
    down = llama.model.layers[1].mlp.down_proj.weight
    assert bool(((down != 0).view(32, -1, 4).sum(-1) == 1).all())
    assert report.left_dense == {"model.layers.0.self_attn.q_proj": "sparsity 0"}
    assert torch.equal(
        llama.model.layers[0].self_attn.q_proj.weight,
        dense["model.layers.0.self_attn.q_proj.weight"],
    )


def test_a_warning_names_the_patterns_of_exclude_that_match_nothing(llama, tokens):
    with pytest.warns(
        UserWarning, match=r"exclude: 'lm_head', '\*\.weight' matches no linear operator"
    ):
        report = prune(
            llama, tokens.split(4), method="wanda", exclude=("*.q_proj", "lm_head", "*.weight")
        )

    assert len(report.operators) == 12  # of 14, two of which are q_proj
    assert [message.split(" ")[0] for message in report.warnings] == ["exclude:"]
