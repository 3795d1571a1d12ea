"""`optimum-fista doctor` on a machine with accelerators."""

from simulated_device import backend

from optimum_fista.cli.main import main
from optimum_fista.run import diagnosis


def test_every_device_is_tried(monkeypatch, capsys):
    monkeypatch.setattr(diagnosis, "_LONG_ENOUGH", 0.0)
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    for index in range(2):
        assert f"\nsimulated:{index}: Simulated accelerator {index}, 16.0 GiB free of 16.0 GiB\n" in shown
    assert shown.count("of the weights zero or kept as on the CPU") == 2


def test_a_device_without_memory_fails_alone(monkeypatch, capsys):
    monkeypatch.setattr(diagnosis, "_LONG_ENOUGH", 0.0)
    with backend.memory_limit(2**16, "simulated:1"):
        assert main(["doctor"]) == 1
    shown, after = capsys.readouterr().out.split("\nsimulated:1: ")
    assert "FAILED" not in shown
    assert "pruning:        FAILED: OutOfMemoryError: " in after
