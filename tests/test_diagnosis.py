"""What `optimum-fista doctor` says of this machine, and of devices that are broken."""

from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from optimum_fista import FistaPruner, diagnosis
from optimum_fista.cli.main import main


@pytest.fixture
def doctor(monkeypatch, capsys):
    """`doctor(*devices)` runs the command on these; exit code and what was printed."""

    def run(*devices: str) -> tuple[int, str]:
        monkeypatch.setattr(diagnosis, "devices", lambda: map(torch.device, devices))
        return main(["doctor"]), capsys.readouterr().out

    return run


def test_a_machine_that_prunes_rightly_passes_all_checks(doctor):
    code, shown = doctor("cpu")

    assert code == 0
    assert shown.endswith("\nall checks passed\n")
    for words in (f"torch {version('torch')}", "GiB free of"):
        assert words in shown
    assert "14 operators in" in shown
    assert str(Path.home()) not in shown


def test_rates_and_the_dtype_of_products_are_shown(doctor, monkeypatch):
    rates = {torch.float32: 97.4, torch.bfloat16: 0.043, torch.float16: 1234.5}
    monkeypatch.setattr(diagnosis, "_rate", lambda _, dtype: rates[dtype])

    def choose_products(name, device, stored):
        return "widened" if stored == torch.bfloat16 else "float32"

    monkeypatch.setattr(diagnosis, "choose_products", choose_products)

    _, shown = doctor("cpu")

    assert "products:       float32 97, bfloat16 0.043, float16 1,234 GFLOP/s" in shown
    assert (
        "bfloat16 model: a run multiplies in float32; bfloat16 would take 2,265 times as long"
        in shown
    )
    assert (
        "float16 model:  a run multiplies in float16; float32 would take 13 times as long" in shown
    )


def test_a_device_that_prunes_wrongly_fails_the_check(doctor, monkeypatch):
    prune = FistaPruner.prune
    pruned_models = []

    def wrong(self, model, *arguments):
        """Prune rightly at the first call, which is the CPU's, and wrongly later."""
        report = prune(self, model, *arguments)
        if pruned_models:
            model.model.layers[0].mlp.up_proj.weight.data.mul_(3)
        pruned_models.append(model)
        return report

    monkeypatch.setattr(FistaPruner, "prune", wrong)

    code, shown = doctor("cpu", "cpu:0")

    assert code == 1
    assert (
        "pruning:        FAILED: ValueError: the pruned weights have a relative distance" in shown
    )
    assert shown.endswith("\nchecks that failed: 1\n")


def test_a_device_that_computes_nothing_fails_the_check(doctor, monkeypatch):
    monkeypatch.setattr(diagnosis, "_describe", lambda device: "no description")

    code, shown = doctor("cpu", "meta")

    assert code == 1
    assert "pruning:        FAILED: " in shown
    assert shown.endswith("\nchecks that failed: 1\n")


def test_home_folders_are_not_named(doctor, monkeypatch):
    def fail(self, *arguments):
        raise OSError(f"can't write to {Path.home()}/models")

    monkeypatch.setattr(FistaPruner, "prune", fail)

    code, shown = doctor("cpu")

    assert code == 1
    assert "FAILED: OSError: can't write to ~/models" in shown
