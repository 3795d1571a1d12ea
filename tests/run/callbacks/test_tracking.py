import importlib.util
import logging
import os
import re
import sys
from types import SimpleNamespace

import pytest
from tiny_llama import tiny_llama, tiny_tokens
from tiny_models import tiny_model

from optimum_fista import FistaPruner, FistaPruningConfig, TrackingCallback
from optimum_fista.run.callbacks.tracking import open_tracker, require_tracker

CONFIG = FistaPruningConfig(method="wanda")


def prune_followed(name, folder, run="model-50"):
    with open_tracker(name, folder, run, CONFIG.to_dict()) as callback:
        pruner = FistaPruner(CONFIG, progress=False, callbacks=[callback])
        return pruner.prune(tiny_llama(), tiny_tokens().split(4))


def curves_of(folder):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    read = event_accumulator.EventAccumulator(str(folder))
    read.Reload()
    return {tag: [(e.step, e.value) for e in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


def test_tensorboard_gets_a_curve_a_kind(tmp_path):
    report = prune_followed("tensorboard", tmp_path / "new" / "runs")
    curves = curves_of(tmp_path / "new" / "runs")
    found = [o.fit_error for o in report.operators if o.name.endswith("down_proj.weight")]
    assert [step for step, _ in curves["fit_error/mlp.down_proj"]] == [0, 1]
    assert [value for _, value in curves["fit_error/mlp.down_proj"]] == pytest.approx(found)


class Trackio:
    """What this package uses of trackio."""

    def __init__(self) -> None:
        self.told: list = []

    def init(self, **settings):
        self.told.append(("init", settings, os.environ["TRACKIO_DIR"]))
        return SimpleNamespace(
            log=lambda values, step: self.told.append(("log", step, values)),
            finish=lambda: self.told.append(("finish",)),
        )


@pytest.fixture
def trackio(monkeypatch) -> Trackio:
    standin, find_spec = Trackio(), importlib.util.find_spec
    monkeypatch.setitem(sys.modules, "trackio", standin)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "trackio" or find_spec(name))
    monkeypatch.setenv("TRACKIO_DIR", "elsewhere")
    return standin


def test_trackio_gets_the_folder_the_configuration_and_every_layer(trackio, tmp_path):
    prune_followed("trackio", tmp_path / "runs")
    assert os.environ["TRACKIO_DIR"] == "elsewhere"
    (begun, settings, folder), *layers, end = trackio.told
    assert (begun, folder) == ("init", str(tmp_path / "runs"))
    assert settings["name"] == "model-50"
    assert settings["resume"] == "allow"
    assert settings["config"] == CONFIG.to_dict()
    assert [(kind, step) for kind, step, _ in layers] == [("log", 0), ("log", 1)]
    assert end == ("finish",)


def test_a_tracker_is_closed_when_the_run_fails(trackio, tmp_path):
    with pytest.raises(KeyboardInterrupt), open_tracker("trackio", tmp_path, "run", {}):
        raise KeyboardInterrupt
    assert trackio.told[-1] == ("finish",)


@pytest.mark.parametrize(("name", "advice"), [("tensorboard", "'.[tracking]'"), ("trackio", "trackio")])
def test_what_is_missing_is_named_with_what_to_install(name, advice, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=re.escape(f"{name} is not installed: run `pip install {advice}`")):
        require_tracker(name)


def test_an_unknown_tracker_is_refused(tmp_path):
    with pytest.raises(ValueError, match="report_to='mlflow': pass one of 'tensorboard', 'trackio'"):
        require_tracker("mlflow")


class Tracker:
    def __init__(self, fails: bool = False) -> None:
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.fails = fails

    def log(self, values: dict[str, float], step: int) -> None:
        self.logged.append((step, values))
        if self.fails:
            raise ConnectionError("the server is gone")


def prune(model, tracker, **options):
    pruner = FistaPruner(FistaPruningConfig(**options), progress=False, callbacks=[TrackingCallback(tracker)])
    return pruner.prune(model, tiny_tokens().split(4))


def test_every_layer_is_one_step():
    tracker = Tracker()
    report = prune(tiny_llama(), tracker)
    assert [step for step, _ in tracker.logged] == [0, 1]
    kinds = [operator.name.split(".", 3)[3].removesuffix(".weight") for operator in report.operators[:7]]
    names = [f"{name}/{kind}" for kind in kinds for name in ("fit_error", "output_error", "sparsity", "solve_seconds")]
    for layer, (step, values) in enumerate(tracker.logged):
        assert list(values) == ["layer_seconds", "hidden_state_error", *names]
        assert values["hidden_state_error"] == report.layers[step].hidden_state_error
        assert values["fit_error/mlp.down_proj"] == report.operators[7 * layer + 6].fit_error


def test_held_out_errors_are_curves():
    tracker = Tracker()
    report = prune(tiny_llama(), tracker, method="wanda", held_out=2)
    logged = [values["held_out_fit_error/mlp.up_proj"] for _, values in tracker.logged]
    assert logged == [o.held_out_fit_error for o in report.operators if o.name.endswith("mlp.up_proj.weight")]


def test_experts_are_one_curve_and_what_is_not_known_is_none():
    tracker = Tracker()
    report = prune(tiny_model("mixtral"), tracker, method="wanda")
    values = tracker.logged[0][1]
    errors = [o.fit_error for o in report.operators if ".layers.0." in o.name and o.name.endswith("down_proj.weight")]
    (mean,) = [value for name, value in values.items() if name.startswith("fit_error") and "down_proj" in name]
    assert mean == pytest.approx(sum(errors) / len(errors))
    assert len(errors) > 1
    assert "hidden_state_error" not in values


def test_a_tracker_that_fails_is_warned_of_once(caplog):
    tracker = Tracker(fails=True)
    with caplog.at_level(logging.WARNING):
        report = prune(tiny_llama(), tracker)
    assert len(report.operators) == 14
    assert len(tracker.logged) == 1
    warned = [r.getMessage() for r in caplog.records if "tracker" in r.getMessage()]
    assert warned == ["the tracker failed on decoder layer 0 and is no longer used: the server is gone"]


def test_other_objects_are_refused():
    with pytest.raises(ValueError, match=r"tracker is a list: pass a SummaryWriter"):
        TrackingCallback([])


def test_tensorboard_reads_the_curves(tmp_path):
    pytest.importorskip("tensorboard", reason="needs TensorBoard: pip install 'optimum-fista[tracking]'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(tmp_path) as writer:
        report = prune(tiny_llama(), writer)
    events = EventAccumulator(str(tmp_path)).Reload()
    curve = [(event.step, event.value) for event in events.Scalars("hidden_state_error")]
    assert curve == [(i, pytest.approx(layer.hidden_state_error)) for i, layer in enumerate(report.layers)]
    assert len(events.Tags()["scalars"]) == 2 + 4 * 7
