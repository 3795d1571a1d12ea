"""`optimum-fista prune --dry-run`."""

import re
from types import SimpleNamespace

from tiny_llama import QUICK

from optimum_fista.cli.main import main


def test_a_dry_run_writes_nothing_and_needs_no_weights(tiny_folder, tmp_path, capsys, monkeypatch):
    (tmp_path / "config.json").write_text((tiny_folder / "config.json").read_text())
    monkeypatch.setattr("optimum_fista.text.calibration_tokens.load_model", None)
    monkeypatch.setattr("optimum_fista.source.loading.load_model", None)
    monkeypatch.chdir(tmp_path)
    flags = ["--dry-run", "--method", "wanda", "--pattern", "2:4", "--exclude", "*.0.*", *QUICK]
    shown = []

    for model in ("config.json", ".", str(tiny_folder)):
        inside = model == "."  # where a run would be refused
        assert main(["prune", model, *flags, "--calibration", "c4"]) == int(inside)
        said = capsys.readouterr()
        assert (
            "lies in the folder that is read, '.': pass a folder outside of it" in said.err
        ) == inside
        shown.append(said.out.split("\ntime ")[0])

    assert shown[0] == shown[1] == shown[2]
    assert "7 operators with 7,680 weights; 3,840 become zero (50.0%)" in shown[0]
    assert "left dense (exclude): model.layers.0.self_attn.q_proj" in shown[0]
    assert "wanda, error correction 0.0" in shown[0]
    assert "8 x 16 tokens of c4, batches of 1\n" in shown[0]
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_dry_run_takes_the_flags_of_a_run(tiny_folder, capsys, monkeypatch):
    flags = [
        "--dry-run",
        "--num-samples",
        "4",
        "--sequence-length",
        "32",
        "--batch-size",
        "2",
        "--dtype",
        "bfloat16",
    ]

    assert (
        main(["prune", str(tiny_folder), *flags, "--device", "cpu", "--storage-device", "cpu"]) == 0
    )

    shown = capsys.readouterr().out
    assert "in bfloat16" in shown
    assert "4 x 32 tokens that the model writes itself, batches of 2" in shown
    assert "note: --calibration self loads the whole model" in shown
    assert "forward passes" in shown

    assert main(["prune", str(tiny_folder), *flags, "--device", "cpu", "--held-out", "2"]) == 0

    assert (
        "6 x 32 tokens (2 held out) that the model writes itself, batches of 2"
        in capsys.readouterr().out
    )


def test_a_run_that_may_be_killed_is_announced(tiny_folder, tmp_path, capsys, monkeypatch):
    (tmp_path / "text.txt").write_text("one two three four five " * 200)
    flags = ["--calibration", str(tmp_path / "text.txt"), "--method", "magnitude", *QUICK]
    free = [2**40, 2**10]
    monkeypatch.setattr("optimum_fista.memory.available_bytes", lambda device: free.pop(0))

    for output, words in (("enough", 0), ("little", 1)):
        assert main(["prune", str(tiny_folder), "--output", str(tmp_path / output), *flags]) == 0
        assert capsys.readouterr().err.count("warning: this run is estimated to need") == words


def test_a_model_that_can_not_be_estimated_is_pruned_nevertheless(
    tiny_folder, tmp_path, capsys, monkeypatch
):
    def fail(*arguments, **options):
        raise RuntimeError("no such operation on meta tensors")

    (tmp_path / "text.txt").write_text("one two three four five " * 200)
    monkeypatch.setattr("optimum_fista.estimate.run_sizes.plan_run", fail)
    flags = [
        "--output",
        str(tmp_path / "out"),
        "--calibration",
        str(tmp_path / "text.txt"),
        "--method",
        "magnitude",
    ]

    assert main(["prune", str(tiny_folder), *flags, *QUICK]) == 0

    assert (
        "note: memory could not be estimated: no such operation on meta tensors"
        in capsys.readouterr().err
    )


def test_a_model_that_is_too_large_to_write_text_is_given_text(tiny_folder, capsys, monkeypatch):
    small = SimpleNamespace(total=2**10, available=2**40)
    monkeypatch.setattr("optimum_fista.memory.psutil.virtual_memory", lambda: small)
    monkeypatch.setattr("optimum_fista.estimate.estimate.Estimate.seconds", {})

    for flags, words in (
        ([], "tokens of c4 (to write its own text, the whole model would"),
        (["--calibration", "self"], "tokens that the model writes itself, batches"),
    ):
        assert main(["prune", str(tiny_folder), "--dry-run", *QUICK, *flags]) == 0
        assert words in capsys.readouterr().out


def test_a_dry_run_of_heads_speaks_only_of_options_that_were_passed(tiny_folder, capsys):
    flags = ["--dry-run", "--pattern", "heads:0.5", "--calibration", "c4", *QUICK]

    assert main(["prune", str(tiny_folder), *flags]) == 0

    shown = capsys.readouterr().out
    assert "overrides" not in shown
    # One operator in each of the two decoder layers loses columns; the last one of each may be refitted.
    assert re.search(
        r"^pruned +2 operators with .*; others are refitted .* \(2 at most\)$", shown, re.M
    )
