"""What is said after a second run is about the model that the user began with."""

import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from tiny_llama import QUICK, TEXT

from optimum_fista.cli.main import main
from optimum_fista.folder.checkpoint import read_report


@pytest.fixture(scope="module")
def folders(tiny_folder, tmp_path_factory) -> Path:
    """A folder with the dense model, `half` (without half of its layers), and `zeros` (`half`, 2:4)."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "dense").symlink_to(tiny_folder)
    (folder / "sea.txt").write_text(TEXT)
    prune(folder, "dense", "half", "layers:0.5")
    prune(folder, "half", "zeros", "2:4")
    return folder


def prune(folder: Path, source: str, output: str, pattern: str, text: str = "sea.txt") -> None:
    arguments = ["prune", str(folder / source), "-o", str(folder / output), "--pattern", pattern]
    arguments += ["--method", "wanda", *QUICK, "--calibration", str(folder / text)]
    assert main(arguments) == 0


def test_the_report_keeps_the_first_model(folders):
    first = read_report(folders / "half")
    report = read_report(folders / "zeros")

    assert first.origin is None
    assert report.model["name"] == "half"
    assert report.origin is not None
    assert report.origin.name == "dense"
    assert report.origin.num_parameters == first.model["dense_num_parameters"]
    assert report.origin.sha256 == first.model["sha256"]
    assert report.origin.dtype == "float32"
    assert report.origin.perplexity.perplexity == first.perplexity["dense"]
    (step,) = report.origin.steps
    assert (step.pattern, step.num_parameters) == ("layers:0.5", report.model["num_parameters"])
    assert step.perplexity.perplexity == first.perplexity["pruned"]


def test_the_perplexity_of_the_first_model_stands_beside_that_of_the_result(folders, capsys):
    prune(folders, "half", "again", "2:4")
    printed = capsys.readouterr().out
    report = read_report(folders / "again")
    dense = read_report(folders / "half").perplexity["dense"]
    given, pruned = report.perplexity["dense"], report.perplexity["pruned"]
    assert main(["report", str(folders / "again")]) == 0
    page = (folders / "again/fista/report.html").read_text()
    card = ModelCard.load(folders / "again/README.md").text

    of_dense = f"{dense:.2f} of the dense model"
    of_given = f"{given:.2f} of the model that this run began with"
    assert f"perplexity {of_dense}, {of_given} and {pruned:.2f} after" in printed
    (row,) = [line for line in card.splitlines() if line.startswith("| perplexity |")]
    assert row.startswith(f"| perplexity | {pruned:.2f} ({report.verdict}), {of_dense} ")
    for text in (row, page):
        assert of_dense in text
        assert of_given in text


def test_the_card_and_the_page_are_about_the_first_model_and_have_a_row_for_each_run(folders):
    first = read_report(folders / "half")
    report = read_report(folders / "zeros")
    assert main(["report", str(folders / "zeros")]) == 0
    page = (folders / "zeros/fista/report.html").read_text()
    card = ModelCard.load(folders / "zeros/README.md").text

    size = first.model["dense_num_parameters"]
    left = first.model["num_parameters"]
    assert "\n# dense, layers:0.5, then 2:4\n" in card
    assert "<h1>dense, layers:0.5, then 2:4</h1>" in page
    assert f"Before that, earlier runs removed {size - left:,} of {size:,} parameters" in card
    dense = first.perplexity["dense"]
    given = report.perplexity["dense"]
    assert given == pytest.approx(first.perplexity["pruned"], rel=1e-6)
    zeros = report.totals["num_zeros"]
    after = report.perplexity["pruned"]
    rows = [
        f"| dense |  |  | {size:,} | {dense:.2f} |",
        f"| layers:0.5 | wanda | {size - left:,} parameters | {left:,} | {given:.2f} |",
        f"| 2:4 | wanda | {zeros:,} weights became zero | {left:,} | {after:.2f} |",
    ]
    assert "\n".join(rows) in card
    for row in rows:
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert "</td><td>".join(cells[1:]) in page


def test_a_perplexity_on_another_text_is_not_compared(folders, capsys):
    (folders / "other.txt").write_text(TEXT.replace("sea", "lake"))
    prune(folders, "half", "other", "2:4", text="other.txt")
    printed = capsys.readouterr().out
    report = read_report(folders / "other")

    assert report.first_perplexity is None
    given, pruned = report.perplexity["dense"], report.perplexity["pruned"]
    assert (
        f"perplexity {given:.2f} of the model that this run began with and {pruned:.2f} " in printed
    )
    card = ModelCard.load(folders / "other/README.md").text
    assert "that of the dense model is not known on this text, " in card
    assert card.count("| not known on this text |") == 1


def test_parts_that_two_runs_removed_are_counted_together(folders, capsys):
    prune(folders, "half", "smaller", "channels:0.25/4")
    printed = capsys.readouterr().out
    size = read_report(folders / "half").model["dense_num_parameters"]
    report = read_report(folders / "smaller")

    left = report.model["num_parameters"]
    by_this_run = report.totals["num_removed"]
    gone = (
        f"{size - left:,} of {size:,} parameters removed "
        f"({(size - left) / size:.2%}, {by_this_run:,} of them by this run)"
    )
    assert gone in printed
    assert gone in ModelCard.load(folders / "smaller/README.md").text


def test_next_proposes_the_dense_model_as_teacher_and_to_talk_to(folders, capsys):
    prune(folders, "half", "proposed", "2:4")
    printed = capsys.readouterr().out

    assert f"recover {folders / 'proposed'} --teacher {folders / 'dense'} " in printed
    assert f"chat {folders / 'proposed'} --beside {folders / 'dense'} " in printed


def test_a_result_is_verified_against_the_model_that_its_last_run_began_with(folders, capsys):
    verify = ["verify", str(folders / "zeros"), "--dense"]

    assert main([*verify, str(folders / "half")]) == 0
    assert "tensors that were not pruned equal those of" in capsys.readouterr().out
    assert main([*verify, str(folders / "dense")]) == 1
    error = capsys.readouterr().err
    assert "is the model that was pruned first" in error
    assert "pass the model that the last run began with, 'half'" in error


def test_a_first_model_that_is_not_found_is_not_guessed(folders, tmp_path, capsys):
    (tmp_path / "half").symlink_to(folders / "half")
    (tmp_path / "sea.txt").write_text(TEXT)
    prune(tmp_path, "half", "zeros", "2:4")
    printed = capsys.readouterr().out

    assert "--teacher MODEL " in printed
    assert "# MODEL is the model that was pruned first: its folder or Hub id" in printed


def test_the_history_of_a_folder_of_an_older_version_is_unknown(folders, tmp_path):
    (tmp_path / "half").mkdir()
    for file in (folders / "half").iterdir():
        if file.name != "config.json":
            (tmp_path / "half" / file.name).symlink_to(file)
    config = json.loads((folders / "half/config.json").read_text())
    del config["fista_pruning"]["origin"]
    (tmp_path / "half/config.json").write_text(json.dumps(config))
    (tmp_path / "sea.txt").write_text(TEXT)
    prune(tmp_path, "half", "zeros", "2:4")
    report = read_report(tmp_path / "zeros")

    assert report.origin.num_parameters is None
    assert [step.pattern for step in report.steps] == ["layers:0.5", "2:4"]
    card = ModelCard.load(tmp_path / "zeros/README.md").text
    assert "the size that it had before them is not known" in card
    assert main(["report", str(tmp_path / "zeros")]) == 0
    assert main(["verify", str(tmp_path / "zeros")]) == 0


def test_a_folder_of_others_sends_no_control_characters_to_the_terminal(folders, tmp_path, capsys):
    (tmp_path / "half").mkdir()
    for file in (folders / "half").iterdir():
        if file.name != "config.json":
            (tmp_path / "half" / file.name).symlink_to(file)
    config = json.loads((folders / "half/config.json").read_text())
    config["fista_pruning"]["method"] = "\x1b[2Jwanda"
    config["fista_pruning"]["origin"]["name"] = "dense\x1b[2J"
    config["fista_pruning"]["origin"]["steps"][0]["pattern"] = "layers\x1b[2J:0.5"
    (tmp_path / "half/config.json").write_text(json.dumps(config))
    (tmp_path / "sea.txt").write_text(TEXT)

    with pytest.warns(UserWarning, match=r"was pruned before \(\\x1b\[2Jwanda"):
        prune(tmp_path, "half", "zeros", "2:4")
    assert main(["verify", str(tmp_path / "zeros")]) == 0

    printed = capsys.readouterr()
    assert "\x1b[2J" not in printed.out + printed.err
    assert "\x1b" not in (tmp_path / "zeros/README.md").read_text()
