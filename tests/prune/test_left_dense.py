"""Operators that can't be pruned stay as they are, with a reason in the report, and the rest is pruned."""

import json

import pytest
import torch
from families import family_model, family_tokens
from killed import interrupted_after
from untouched import Untouched

from optimum_fista import FistaPruner, FistaPruningConfig
from optimum_fista.evaluate.verification import verify_checkpoint
from optimum_fista.model import UnsupportedArchitectureError

UNCALLED = "not called in a forward pass of its decoder layer"
EXPECTED = {
    "mamba": {f"backbone.layers.{i}.mixer.dt_proj": UNCALLED for i in range(2)},
    "bart": {
        f"model.decoder.layers.{i}.encoder_attn.{proj}_proj": UNCALLED
        for i in range(2)
        for proj in ("k", "v", "q", "out")
    },
    "gemma3n_text": {
        f"model.layers.{i}.altup.modality_router": "called 2 times in a forward pass of its decoder layer"
        for i in range(4)
    },
}


def pruner(**options) -> FistaPruner:
    return FistaPruner(FistaPruningConfig(**options), progress=False)


@pytest.mark.parametrize("family", EXPECTED)
def test_operators_left_dense_are_reported_warned_of_and_untouched(family):
    model = family_model(family)
    dense = {name: model.get_parameter(f"{name}.weight").clone() for name in EXPECTED[family]}

    with pytest.warns(
        UserWarning, match=f"{len(dense)} operators were left dense: .*{next(iter(dense))}"
    ):
        report = pruner(sparsity=0.5, method="magnitude", allocation="fisher").prune(
            model, family_tokens()
        )

    assert report.left_dense == EXPECTED[family]
    assert any("were left dense" in warning for warning in report.warnings)
    assert all(
        torch.equal(model.get_parameter(f"{name}.weight"), weight) for name, weight in dense.items()
    )
    assert report.totals["sparsity"] == pytest.approx(0.5, abs=1e-3)  # of what is pruned


def test_shared_weights_stay_as_they_are():
    model = family_model("zamba2")
    dense = {
        name: tensor.clone()
        for name, tensor in model.state_dict().items()
        if ".shared_transformer." in name
    }

    with pytest.warns(UserWarning, match="20 operators were left dense: .*shares its weight with"):
        report = pruner(pattern="2:4", method="wanda").prune(model, family_tokens())

    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in dense.items())
    assert all(reason.startswith("shares its weight with") for reason in report.left_dense.values())
    assert report.operators


def test_model_of_which_nothing_can_be_pruned_is_refused_and_left_as_it_was():
    model = family_model("mamba")
    message = r"dt_proj, for one: not called in a forward pass"

    with Untouched(model), pytest.raises(UnsupportedArchitectureError, match=message):
        pruner(method="magnitude", include=["*.dt_proj"]).prune(model, family_tokens())


def test_a_resumed_run_reports_the_same_reasons_of_operators_left_dense(tmp_path):
    family_model("mamba").save_pretrained(tmp_path / "source")
    run = pruner(sparsity=0.5, method="wanda")

    def prune(name: str) -> dict:
        run.prune(tmp_path / "source", family_tokens(), output_dir=tmp_path / name)
        verify_checkpoint(tmp_path / name)
        return json.loads((tmp_path / name / "fista" / "report.json").read_text())

    whole = prune("whole")

    with interrupted_after(0), pytest.raises(KeyboardInterrupt):
        prune("resumed")
    resumed = prune("resumed")

    assert resumed["left_dense"] == whole["left_dense"] == EXPECTED["mamba"]
    assert resumed["warnings"] == whole["warnings"]
