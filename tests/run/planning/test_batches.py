"""Batches cut beforehand where the plan needs more memory than is free."""

import json

import pytest
import torch
from tiny_llama import save_tiny_folder, tiny_llama, tiny_tokens

from optimum_fista import FistaPruner, FistaPruningConfig
from optimum_fista.run.memory import available_memory
from optimum_fista.run.memory.available_memory import available_bytes
from optimum_fista.run.planning import batches as planning_batches
from optimum_fista.run.planning.batches import fit_batches, fitting_sizes
from optimum_fista.run.streamed.journal import Journal

CONFIG = FistaPruningConfig(method="wanda")
CPU = torch.device("cpu")


def have_free(monkeypatch, size):
    monkeypatch.setattr(planning_batches, "available_bytes", lambda device: size)


def peaks(model, storage=CPU):
    """What batches of 1, 2, ... sequences need, by the plan."""
    calibration = [planning_batches.CalibrationBatch(tiny_tokens())]
    return planning_batches._planned_peak(model, CONFIG, calibration, storage, CPU)


def test_sizes_are_halved_until_the_largest_fits():
    assert fitting_sizes([5, 2], lambda size: 10 * size, 29) == [2, 1, 1, 1, 1, 1]
    assert fitting_sizes([5, 2], lambda size: 10 * size, 50) == [5, 2]
    assert fitting_sizes([4], lambda size: 10 * size, 3) == [1, 1, 1, 1]


def test_a_model_in_memory_is_pruned_in_batches_that_fit(monkeypatch):
    model, expected = tiny_llama(), tiny_llama()
    planned = peaks(model)
    assert planned(4) < planned(8)
    have_free(monkeypatch, planned(4))
    with pytest.warns(UserWarning, match="too little for batches of 8 sequences: going on with batches of 4"):
        report = FistaPruner(CONFIG, progress=False).prune(model, tiny_tokens().split(8))
    assert any("batches of 4" in warning for warning in report.warnings)
    expected_report = FistaPruner(CONFIG, progress=False).prune(expected, tiny_tokens().split(4))
    assert expected_report.calibration == report.calibration
    for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_enough_memory_changes_nothing(monkeypatch):
    have_free(monkeypatch, 2**40)
    report = FistaPruner(CONFIG, progress=False).prune(tiny_llama(), tiny_tokens().split(8))
    assert not any("batches" in warning for warning in report.warnings)


def test_a_resumed_run_keeps_its_batches(monkeypatch, tmp_path):
    """More memory on the second day must not change the result."""
    source = save_tiny_folder(tmp_path / "source")
    have_free(monkeypatch, peaks(tiny_llama(), tmp_path)(2))
    calls = []

    def stop_after_one(*arguments, **keywords):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return kept(*arguments, **keywords)

    kept = Journal.keep_layer
    pruner = FistaPruner(CONFIG, progress=False)
    monkeypatch.setattr(Journal, "keep_layer", stop_after_one)
    with pytest.warns(UserWarning, match="batches of 2"), pytest.raises(KeyboardInterrupt):
        pruner.prune(source, tiny_tokens().split(8), output_dir=tmp_path / "pruned")
    file = tmp_path / "pruned.unfinished" / "journal" / "batches.json"
    assert max(json.loads(file.read_text())["values"]["sizes"]) == 2
    monkeypatch.setattr(Journal, "keep_layer", kept)
    have_free(monkeypatch, 2**40)
    with pytest.warns(UserWarning, match="batches of 2"):
        report = pruner.prune(source, tiny_tokens().split(8), output_dir=tmp_path / "pruned")
    assert any("batches of 2" in warning for warning in report.warnings)


def test_a_family_without_a_plan_keeps_its_batches(monkeypatch):
    def fail(*arguments, **keywords):
        raise RuntimeError("no such operation on meta tensors")

    monkeypatch.setattr(planning_batches, "plan_pruning", fail)
    calibration = [planning_batches.CalibrationBatch(tiny_tokens())]
    fitted = fit_batches(tiny_llama(), CONFIG, calibration, torch.device("cpu"))
    assert fitted.sizes == [len(tiny_tokens())]
    assert "could not be foreseen (no such operation" in fitted.message


def test_the_limit_of_a_control_group_counts(monkeypatch, tmp_path):
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 500\ninactive_file 150\n")
    whole = available_bytes(torch.device("cpu"))
    monkeypatch.setattr(available_memory, "_GROUP", tmp_path)
    assert available_bytes(torch.device("cpu")) == 450
    (tmp_path / "memory.max").write_text("max\n")
    assert available_bytes(torch.device("cpu")) > 1000
    assert whole > 1000
    assert available_bytes(torch.device("meta")) is None
