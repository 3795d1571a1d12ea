import json
import os

import pytest
from launched import forked_workers

from optimum_fista.cli.main import main
from optimum_fista.run.speed import measure

QUICK = ["--variants", "dense float32,packed float32", "--batch-sizes", "1", "--new-tokens", "2", "--prompt-tokens"]
QUICK += ["2", "--prefill-tokens", "3", "--rounds", "1", "--threads", "1"]


def test_a_table_a_file_and_a_picture(pruned_folder, tmp_path, capsys):
    output, plot = tmp_path / "new" / "bench.json", tmp_path / "bench.png"
    with forked_workers():
        assert main(["bench", str(pruned_folder), *QUICK, "--output", str(output), "--plot", str(plot)]) == 0
    captured = capsys.readouterr()
    assert "| packed float32 | " in captured.out
    assert "warming up, batch 1" in captured.err
    assert set(json.loads(output.read_text())["variants"]) == {"dense float32", "packed float32"}
    assert plot.stat().st_size > 1000


def test_bad_arguments(tiny_folder, pruned_folder, capsys):
    assert main(["bench", str(tiny_folder), *QUICK]) == 1
    assert "holds no fista/masks.safetensors" in capsys.readouterr().err
    assert main(["bench", str(pruned_folder), "--batch-sizes", "1,many"]) == 1
    assert "--batch-sizes 1,many: pass numbers" in capsys.readouterr().err
    assert main(["bench", str(pruned_folder), "--variants", "sparse bfloat16"]) == 1
    assert "variants='sparse bfloat16'" in capsys.readouterr().err


@pytest.mark.parametrize(("flag", "name"), [("--output", "config.json/new"), ("--plot", "fista")])
def test_an_output_that_cant_be_written_is_refused_before_the_work(pruned_folder, monkeypatch, capsys, flag, name):
    monkeypatch.setattr(measure, "measure_speed", None)
    assert main(["bench", str(pruned_folder), flag, str(pruned_folder / name)]) == 1
    assert "output can't be written to (" in capsys.readouterr().err


def test_a_read_only_output_is_refused_before_the_work(pruned_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measure, "measure_speed", None)
    (tmp_path / "bench.json").write_text("mine")
    (tmp_path / "bench.json").chmod(0o444)
    if os.geteuid() == 0:  # whom permission bits don't bind
        monkeypatch.setattr(os, "access", lambda *_, **__: False)
    assert main(["bench", str(pruned_folder), "--output", str(tmp_path / "bench.json")]) == 1
    assert "output can't be written to (Permission denied), nothing was done" in capsys.readouterr().err
