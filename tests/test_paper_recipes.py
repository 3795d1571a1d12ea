"""The recipes of examples/paper can be imported, and run on a tiny model."""

import importlib
import sys
from pathlib import Path

import pytest
from tiny_llama import TEXT, save_tiny_folder

from optimum_fista.run.comparison.comparison import Comparison
from optimum_fista.run.comparison.rows import Row, Score
from optimum_fista.run.comparison.settings import candidates

PAPER = Path(__file__).resolve().parents[1] / "examples" / "paper"
RECIPES = sorted(path.stem for path in PAPER.glob("*.py") if path.stem != "recipe")


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("paper")
    save_tiny_folder(folder / "model")
    for name in ("wikitext2.txt", "other.txt"):
        (folder / name).write_text(TEXT)
    return folder


@pytest.fixture
def load(monkeypatch):
    monkeypatch.syspath_prepend(str(PAPER))
    for name in ("recipe", *RECIPES):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module


@pytest.fixture
def run(load, places, tmp_path, monkeypatch, capsys):
    """`run(name, "--flag", ...)` gives the cells of the table that a recipe prints for a tiny model."""
    quick = {"model": "model", "texts": "wikitext2.txt,other.txt", "calibration": "other.txt"}
    flags = [word for name, value in quick.items() for word in (f"--{name}", value)]
    flags += ["--calibration-length", "16", "--sequence-length", "32", "--max-windows", "2", "--device", "cpu"]
    monkeypatch.chdir(places)
    monkeypatch.setattr("optimum_fista.run.comparison.compare.release_free_memory", lambda **options: None)
    monkeypatch.setattr("optimum_fista.run.comparison.comparison.Comparison.write_plots", lambda self, folder: [])

    def run_recipe(name, *more):
        monkeypatch.setattr(sys, "argv", [name, *flags, "--output", str(tmp_path / "out"), *more])
        load(name).main()
        shown = capsys.readouterr().out
        return [[c.strip(" `") for c in line.split("|")[1:-1]] for line in shown.splitlines() if line[:1] == "|"]

    return run_recipe


def test_published_values_stand_beside_measured_ones(run):
    table = run("opt_125m_2_4", "--num-samples", "6", "--methods", "sparsegpt,wanda")
    assert table[0] == ["pattern", "method", "wikitext2", "published", "other", "published"]
    assert [(cells[1], cells[3], cells[5]) for cells in table[2:]] == [
        ("dense", "27.66", ""),
        ("sparsegpt", "60.02", ""),
        ("wanda", "80.32", ""),
    ]
    assert all(float(cells[2]) > 1 for cells in table[2:])


def test_numbers_of_samples_share_a_table(run):
    table = run("opt_125m_num_samples", "--methods", "wanda", "--patterns", "0.5")
    assert [cells[1] for cells in table[2:]] == [
        "dense, 2 sequences",
        *(f"wanda, {count} sequences" for count in (2, 8, 32, 128)),
    ]
    assert table[-1][3] == "38.96"


def test_a_share_of_the_dense_accuracy(load, capsys):
    rows = [Row("dense", "-", accuracy={"a": {"acc": Score(0.8)}, "b": {"acc": Score(0.4)}})]
    rows.append(Row("paper", "0.5", accuracy={"a": {"acc": Score(0.6)}, "b": {"acc": Score(0.3)}}))
    load("recipe").show(Comparison(rows=rows), kept={("0.5", "paper"): 0.986})
    assert "| 0.5 | `paper` | 45.0% | 75.0% | 98.6% |" in capsys.readouterr().out


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_asks_for_what_there_is(load, name, monkeypatch):
    module, asked = load(name), {}
    monkeypatch.setattr(module, "measure", lambda *arguments, **settings: asked.update(settings))
    monkeypatch.setattr(module, "show", lambda *arguments, **options: asked.update(shown=arguments[1:], **options))
    module.main()
    found = {(c.pattern, c.method) for c in candidates(asked["methods"], asked["patterns"], [0]) if c.config}
    published = {**getattr(module, "PUBLISHED", {}), **getattr(module, "KEPT", {})}
    measured = {(pattern, method.split(", ")[0]) for pattern, method in published}
    assert measured - {("-", "dense")} <= found
    assert published
    assert f"python examples/paper/{name}.py" in module.__doc__
    assert len((PAPER / f"{name}.py").read_text().splitlines()) < 60
