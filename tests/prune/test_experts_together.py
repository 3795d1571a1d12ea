"""Experts of a mixture that are solved together give the model that they give one by one."""

import dataclasses
from unittest import mock

import pytest
import torch
from tiny_models import VOCAB_SIZE, tiny_model

from optimum_fista import FistaPruner, FistaPruningConfig, PruningCallback
from optimum_fista.model import groups
from optimum_fista.prune import loop
from optimum_fista.solve.methods.obs_admm import ObsAdmm


def idle(model, expert):
    """The router of no layer sends a token to an expert: what it would get goes to the first expert."""
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(
            lambda _, __, output: (*output[:2], output[2].masked_fill(output[2] == expert, 0))
        )
    return model


class Watcher(PruningCallback):
    """Names of the operators, in the order in which they are finished."""

    def __init__(self):
        self.names = []

    def on_operator_end(self, report):
        self.names.append(report.name)


def prune(model, groups_in_set, **options):
    """Prune a model with so many groups at once; returns its weights, its report, and the names as they came."""
    tokens = torch.randint(3, VOCAB_SIZE, (8, 24), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens)
    mask[2, 20:] = 0  # padding
    batches = [
        {"input_ids": ids, "attention_mask": real}
        for ids, real in zip(tokens.split(3), mask.split(3), strict=True)
    ]
    watcher = Watcher()
    pruner = FistaPruner(FistaPruningConfig(**options), progress=False, callbacks=[watcher])
    with mock.patch.object(groups, "matrices_in_stack", return_value=groups_in_set):
        report = pruner.prune(model, batches)
    return model.state_dict(), report, watcher.names


@pytest.fixture
def stacks(monkeypatch):
    """Numbers of groups that the default method solves together."""
    sizes = []
    prune_alike = ObsAdmm._prune_alike

    def watched(self, alike):
        sizes.append(len(alike))
        return prune_alike(self, alike)

    monkeypatch.setattr(ObsAdmm, "_prune_alike", watched)
    return sizes


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"pattern": "2:4", "held_out": 2},
        {"allocation": "uniform", "error_correction": 0.5},
        {"method": "wanda"},
    ],
    ids=str,
)
def test_experts_solved_together_give_the_same_model_and_report(options, stacks, monkeypatch):
    # Expert 2 gets no token. Experts with fewer than 30 are pruned by magnitude, and the others by the method.
    monkeypatch.setattr(loop, "UNDER_CALIBRATED_TOKENS", 30)
    alone, report_alone, names_alone = prune(idle(tiny_model("qwen3_moe"), 2), 1, **options)
    assert set(stacks) <= {1}
    stacks.clear()

    together, report, names = prune(idle(tiny_model("qwen3_moe"), 2), 3, **options)

    assert all(torch.equal(together[name], alone[name]) for name in alone)
    for ours, expected in zip(report.operators, report_alone.operators, strict=True):
        assert dataclasses.replace(ours, solve_seconds=0.0) == dataclasses.replace(
            expected, solve_seconds=0.0
        )
    tokens = {o.num_tokens for o in report.operators if ".experts." in o.name}
    assert 0 in tokens
    assert len(tokens) > 3
    if "method" not in options:
        assert max(stacks) > 1
    # Down projections come after the other matrices of all experts, and the report has the order of execution.
    assert names == names_alone
    assert names != [o.name for o in report.operators]
    assert sorted(names) == sorted(o.name for o in report.operators)


@pytest.mark.filterwarnings("ignore")
def test_down_projections_are_pruned_after_the_other_matrices_of_their_experts():
    _, _, names = prune(tiny_model("mixtral"), 2)

    places = {name: place for place, name in enumerate(names)}
    for name, place in places.items():
        if name.endswith("down_proj.weight") and ".experts." in name:
            assert place > places[name.replace("down_proj", "gate_proj")]
            assert place > places[name.replace("down_proj", "up_proj")]
