import importlib.util
import os
import sys
from types import SimpleNamespace

import pytest
from tiny_llama import tiny_llama, tiny_tokens

from optimum_fista import FistaPruner, FistaPruningConfig
from optimum_fista.run.callbacks.trackers import open_tracker, require_tracker

CONFIG = FistaPruningConfig(method="wanda")


def prune(name, folder, run="model-50"):
    with open_tracker(name, folder, run, CONFIG.to_dict()) as callback:
        pruner = FistaPruner(CONFIG, progress=False, callbacks=[callback])
        return pruner.prune(tiny_llama(), tiny_tokens().split(4))


def curves_of(folder):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    read = event_accumulator.EventAccumulator(str(folder))
    read.Reload()
    return {tag: [(e.step, e.value) for e in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


def test_tensorboard_gets_a_curve_a_kind(tmp_path):
    report = prune("tensorboard", tmp_path / "new" / "runs")
    curves = curves_of(tmp_path / "new" / "runs")
    found = [o.relative_error for o in report.operators if o.name.endswith("down_proj.weight")]
    assert [step for step, _ in curves["relative_error/mlp.down_proj"]] == [0, 1]
    assert [value for _, value in curves["relative_error/mlp.down_proj"]] == pytest.approx(found)


class Trackio:
    """What this package uses of trackio."""

    def __init__(self) -> None:
        self.told: list = []

    def init(self, **settings):
        self.told.append(("init", settings, os.environ["TRACKIO_DIR"]))
        return SimpleNamespace(log=lambda values, step: self.told.append(("log", step, values)))

    def finish(self):
        self.told.append(("finish",))


@pytest.fixture
def trackio(monkeypatch) -> Trackio:
    standin, find_spec = Trackio(), importlib.util.find_spec
    monkeypatch.setitem(sys.modules, "trackio", standin)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "trackio" or find_spec(name))
    monkeypatch.setenv("TRACKIO_DIR", "elsewhere")
    return standin


def test_trackio_gets_the_folder_the_configuration_and_every_layer(trackio, tmp_path):
    prune("trackio", tmp_path / "runs")
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


@pytest.mark.parametrize(("name", "advice"), [("tensorboard", "'optimum-fista[tracking]'"), ("trackio", "trackio")])
def test_what_is_missing_is_named_with_what_to_install(name, advice, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=f"{name} is not installed, run: pip install ") as caught:
        require_tracker(name)
    assert str(caught.value).endswith(advice)


def test_an_unknown_tracker_is_refused(tmp_path):
    with pytest.raises(ValueError, match="report_to='mlflow': pass one of 'tensorboard', 'trackio'"):
        require_tracker("mlflow")
