"""What someone sees who uses the commands for the first time."""

import argparse
import io
import json
import re
import warnings

import pytest

from optimum_fista.cli.main import execute, main

QUICK = ["--num-samples", "8", "--sequence-length", "16", "--device", "cpu", "--method", "wanda"]


def test_a_run_prints_its_plan_its_cost_and_next_commands_that_work(
    tiny_folder, text_file, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    command = ["prune", str(tiny_folder), *QUICK, "--calibration", str(text_file)]
    name = f"{tiny_folder.name}-50pct"

    assert main(command) == 0

    assert [path.name for path in tmp_path.iterdir()] == [name]
    printed = capsys.readouterr()
    begin = dict(line.split(maxsplit=1) for line in printed.err.splitlines() if line[:1].strip())
    assert begin["pruned"] == "14 operators with 15,360 weights; 7,680 become zero (50.0%)"
    assert begin["calibration"] == f"8 x 16 tokens of {text_file}, batches of 1"
    assert begin["output"] == name
    assert {"model", "method", "memory", "disk"} < {*begin}
    report = json.loads((tmp_path / name / "fista" / "report.json").read_text())
    dense = report["perplexity"]["dense"]
    pruned = report["perplexity"]["pruned"]
    assert f"perplexity {dense:.2f} before and {pruned:.2f} after (no verdict on few" in printed.out
    assert re.search(
        r"\nlargest fit error 0\.\d\d \((low|usual|high)\): model\.layers\.", printed.out
    )
    commands = [line.split("#")[0].split() for line in printed.out.split("next:\n")[1].splitlines()]
    assert [" ".join(command[:2]) for command in commands] == [
        "optimum-fista chat",
        "optimum-fista evaluate",
        "optimum-fista recover",
        "optimum-fista report",
        "optimum-fista pack",
        "optimum-fista verify",
        "hf upload",
    ]

    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    more = {
        "evaluate": ["--sequence-length", "16"],
        "recover": [
            "--sequence-length",
            "16",
            "--tokens",
            "64",
            "--held-out",
            "2",
            "--device",
            "cpu",
        ],
    }

    for command in commands[:-1]:
        rest = [str(text_file) if word == "wikitext2" else word for word in command[1:]]
        assert main([*rest, *more.get(command[1], [])]) == 0

    shown = capsys.readouterr()
    assert "are trained (all kept weights" in shown.err  # what `recover` chose
    assert "14 weights: " in shown.out  # packed
    assert (
        ": 14 operators keep their pattern, 7,680 of 15,360 weights zero (50.0000%)\n" in shown.out
    )


def test_a_run_warns_of_an_earlier_pruning_and_reports_a_rounded_sparsity(
    pruned_folder, text_file, tmp_path
):
    flags = ["--sparsity", "0.6", *QUICK, "--calibration", str(text_file)]

    with pytest.warns(
        UserWarning, match=r"the model was pruned before \(wanda, 2:4, 7680 zeros\): errors are"
    ):
        assert main(["prune", str(pruned_folder), "-o", str(tmp_path / "again"), *flags]) == 0

    report = (tmp_path / "again" / "fista" / "report.json").read_text()
    assert (
        "rows have whole numbers of zeros, so 59.58% of the weights are zero instead of 60.00%"
        in report
    )


def test_a_warning_is_printed_as_one_line_without_code():
    before = warnings.formatwarning
    shown = []

    def command(_):
        shown.append(
            warnings.formatwarning(
                "the text\nends here", UserWarning, "prune.py", 174, "FistaPruner("
            )
        )
        return 0

    assert execute(argparse.Namespace(fista_run=command, quiet=False)) == 0

    assert shown == ["warning: the text ends here\n"]
    assert warnings.formatwarning is before


def test_help_shows_only_the_options_for_everyday_use(capsys):
    shown = {}

    for flag in ("--help", "--help-all"):
        with pytest.raises(SystemExit, match="0"):
            main(["prune", flag])
        shown[flag] = capsys.readouterr().out

    every_day = re.findall(r"^  (--[\w-]+)", shown["--help"], re.MULTILINE)
    everything = re.findall(r"^  (--[\w-]+)", shown["--help-all"], re.MULTILINE)
    assert {"--method", "--calibration", "--num-samples", "--dry-run", "--push-to-hub"} < {
        *every_day
    }
    assert {"--storage-device", "--scope", "--warm-start"} <= {*everything} - {*every_day}
    assert everything[: len(every_day)] == every_day
