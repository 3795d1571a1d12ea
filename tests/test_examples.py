"""Every example runs on a tiny model and does what it says."""

import json
import re
import runpy
import sys
from pathlib import Path

import pytest
from tiny_llama import TEXT

from optimum_fista.evaluate.verification import verify_checkpoint

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SMALL = ["--num-samples", "6", "--sequence-length", "32"]


@pytest.fixture
def run(tiny_folder, tmp_path, monkeypatch, capsys):
    """`run("prune_2_4", "--flag", ...)` runs an example in `tmp_path` and returns what it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)

    def run_example(name: str, *flags: str) -> str:
        monkeypatch.setattr(
            sys, "argv", [f"{name}.py", "--model", str(tiny_folder), *SMALL, *flags]
        )
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    return run_example


def test_the_example_prune_2_4_writes_a_folder_of_this_pattern(run, tmp_path):
    (tmp_path / "sea.txt").write_text(TEXT)

    shown = run("prune_2_4", "--output", "out", "--calibration", "sea.txt", "--test", "sea.txt")

    assert re.search(r"perplexity [\d.]+ -> [\d.]+ on sea\.txt", shown)
    assert "14 operators keep their pattern" in shown
    assert (
        json.loads((tmp_path / "out" / "fista" / "report.json").read_text())["config"]["pattern"]
        == "2:4"
    )


@pytest.mark.parametrize("flags", [[], ["--device-map", "disk"]])
def test_the_example_prune_offloaded_works(run, tmp_path, flags):
    shown = run("prune_offloaded", "--output", "out", *flags)

    assert shown.startswith("14 operators pruned by obs_admm")
    verify_checkpoint(tmp_path / "out")


def test_the_example_retrain_masked_lowers_the_perplexity_and_keeps_the_zeros(run, tmp_path):
    (tmp_path / "sea.txt").write_text(TEXT)

    shown = run(
        "retrain_masked", "--output", "out", "--calibration", "sea.txt", "--test", "sea.txt"
    )

    before, after = map(
        float, re.search(r"perplexity ([\d.]+) -> ([\d.]+) on sea\.txt", shown).groups()
    )
    assert after < before
    assert shown.splitlines()[-1] == "7,680 weights are still zero"
    assert json.loads((tmp_path / "out" / "fista" / "report.json").read_text())["retrained"]
    verify_checkpoint(tmp_path / "out")


def test_the_example_prune_one_matrix_compares_the_errors_of_all_methods(run):
    rows = run("prune_one_matrix", "--operator", "model.layers.1.mlp.down_proj").splitlines()

    assert rows[0] == "model.layers.1.mlp.down_proj (32, 48) on 192 tokens, 2:4"
    errors = {row.split()[0]: float(row.split()[3].rstrip(",")) for row in rows[1:]}
    assert list(errors) == ["magnitude", "wanda", "sparsegpt", "fista"]
    assert errors["fista"] < errors["sparsegpt"] < errors["magnitude"]
    assert all("50.0% zeros" in row for row in rows[1:])
