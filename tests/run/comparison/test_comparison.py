import csv
import io
from dataclasses import replace

import pytest

from optimum_fista.run.comparison.comparison import Comparison, csv_table, markdown_table
from optimum_fista.run.comparison.plots import plot_lines
from optimum_fista.run.comparison.rows import Row, Score, Spread, averages


def row(method, pattern, perplexity, *, accuracy=None, seed=0, error=None):
    scores = {task: {"acc": Score(value, 0.01), "acc_norm": Score(0.9)} for task, value in (accuracy or {}).items()}
    dense = method == "dense" or error is not None
    totals = {} if dense else {"mean_fit_error": 0.125, "sparsity": 0.5, "solve_seconds": 2.0}
    texts = {} if perplexity is None else {"sea": perplexity}
    return Row(method, pattern, seed, texts, scores, totals, {} if dense else {"total": 5.0}, error=error)


ROWS = [
    row("dense", "-", 10.0, accuracy={"a": 0.75, "b": 0.5}),
    row("wanda", "0.5", 20.0, accuracy={"a": 0.5, "b": 0.25}, seed=0),
    row("wanda", "0.5", 22.0, accuracy={"a": 0.6, "b": 0.25}, seed=1),
    row("fista", "0.5", 15.0, accuracy={"a": 0.4, "b": 0.5}),
    row("wanda", "2:4", 40.0, accuracy={"a": 0.3, "b": 0.25}),
    row("fista", "2:4", None, error="ValueError: no"),
]


def test_markdown_has_means_deviations_and_the_best_of_a_pattern():
    assert markdown_table(ROWS, ["sea"], ["a", "b"]).splitlines() == [
        "| pattern | method | sea | a, % | b, % | mean of tasks, % | fit error | zeros, % | seconds | solving |",
        "|---|---|---|---|---|---|---|---|---|---|",
        "|  | `dense` | 10.00 | 75.0 ± 1.0 | 50.0 ± 1.0 | 62.5 |  |  |  |  |",
        "| 0.5 | `wanda` | 21.00 ± 1.41 | **55.0** ± 7.1 | 25.0 ± 0.0 | 40.0 ± 3.5 | 0.1250 ± 0.0000 | 50.00 ± 0.00 "
        "| 5 ± 0 | 2 ± 0 |",
        "| 0.5 | `fista` | **15.00** | 40.0 ± 1.0 | **50.0** ± 1.0 | **45.0** | 0.1250 | 50.00 | 5 | 2 |",
        "| 2:4 | `wanda` | 40.00 | 30.0 ± 1.0 | 25.0 ± 1.0 | 27.5 | 0.1250 | 50.00 | 5 | 2 |",
        "| 2:4 | `fista` | failed |  |  |  |  |  |  |  |",
    ]


def test_no_perplexities_no_tasks():
    assert markdown_table(ROWS[:1], []).splitlines()[-1] == "|  | `dense` |  |  |  |  |"


def test_averages_leave_out_rows_that_failed_and_texts_that_are_missing():
    (line,) = averages(
        [row("wanda", "0.5", 20.0), row("wanda", "0.5", None, seed=1, error="no"), Row("wanda", "0.5", 2)]
    )
    assert line.perplexity("sea") == Spread(20.0)
    assert line.perplexity("lake") is None
    assert len(line.rows) == 2


def test_csv_has_every_row_and_digit():
    lines = list(csv.DictReader(io.StringIO(csv_table(ROWS, ["sea"], ["a"]))))
    assert len(lines) == len(ROWS)
    assert lines[2] == {
        "pattern": "0.5",
        "method": "wanda",
        "seed": "1",
        "perplexity sea": "22.0",
        "a acc": "0.6",
        "a acc stderr": "0.01",
        "a acc_norm": "0.9",
        "a acc_norm stderr": "",
        "mean fit error": "0.125",
        "sparsity": "0.5",
        "seconds": "5.0",
        "solve seconds": "2.0",
        "error": "",
    }
    assert lines[-1]["error"] == "ValueError: no"


def test_files_can_be_read_again(tmp_path):
    comparison = Comparison({"model": "m"}, ["a recipe"], ROWS)
    comparison.write_tables(tmp_path / "new")
    assert Comparison.read(tmp_path / "new" / "table.json") == comparison
    shown = (tmp_path / "new" / "table.md").read_text()
    assert shown == comparison.to_markdown()
    assert shown.splitlines()[-1] == "- fista, 2:4, seed 0: ValueError: no"
    assert "- a recipe" in shown


@pytest.mark.parametrize("content", ["[]", "{", '{"settings": {}, "recipe": [], "rows": [{"model": 1}]}'])
def test_other_files_are_refused(tmp_path, content):
    (tmp_path / "other.json").write_text(content)
    with pytest.raises(ValueError, match=r"other.json' is no table\.json of a comparison"):
        Comparison.read(tmp_path / "other.json")


def test_plots(tmp_path):
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install 'optimum-fista[plots]'")
    folder = tmp_path / "one"
    folder.mkdir()
    assert Comparison(rows=ROWS).write_plots(folder) == [folder / "perplexity.png"]
    assert Comparison(rows=[*ROWS, row("alps", "0.6", 30.0)]).write_plots(folder) == [folder / "perplexity.png"]
    several = [*ROWS, row("fista", "0.6", 30.0)]
    assert Comparison(rows=several).write_plots(folder) == [folder / "perplexity.png", folder / "sparsity.png"]
    assert all((folder / f"{name}.png").stat().st_size > 5000 for name in ("perplexity", "sparsity"))
    assert Comparison(rows=ROWS[:1]).write_plots(folder) == []


def test_shares_of_parts_are_drawn_kind_by_kind(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install 'optimum-fista[plots]'")
    from matplotlib.axes import Axes

    drawn = []

    def draw(axis, places, means, *_, label, **__):
        drawn.append((axis.get_gridspec().nrows, label, places, means))

    monkeypatch.setattr(Axes, "errorbar", draw)
    rows = [row("flap", f"heads:{share}", 20 + share, seed=seed) for share in (0.5, 0.25) for seed in (0, 1)]
    rows += [row("flap", "0.5", 11.0), row("wanda", "0.5", 12.0), row("wanda", "0.7", 13.0), row("flap", "2:4", 14.0)]
    rows += [row("flap", "channels:0.5+heads:0.5", 50.0), row("flap", "channels:0.5", 60.0), row("dense", "-", 9.0)]
    assert plot_lines(rows, ["sea"], tmp_path) == tmp_path / "sparsity.png"
    assert drawn == [(2, "flap", (0.25, 0.5), (20.25, 20.5)), (2, "wanda", (0.5, 0.7), (12.0, 13.0))]


def test_a_method_has_one_colour_and_a_place_in_the_legend(tmp_path, monkeypatch):
    """Even if it was not measured on every text."""
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install 'optimum-fista[plots]'")
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    colours, legends = {}, []
    errorbar, legend = Axes.errorbar, Figure.legend

    def draw(axis, *values, **style):
        colours.setdefault(style["label"], []).append(style["color"])
        return errorbar(axis, *values, **style)

    def tell(figure, handles, labels, **style):
        legends.append(list(labels))
        return legend(figure, handles, labels, **style)

    def measured(method, pattern, *texts):
        return replace(row(method, pattern, None), perplexity=dict.fromkeys(texts, 12.0))

    monkeypatch.setattr(Axes, "errorbar", draw)
    monkeypatch.setattr(Figure, "legend", tell)
    rows = [measured(method, p, "sea", "lake") for method in ("wanda", "fista") for p in ("0.5", "0.6")]
    rows[:2] = [measured("wanda", p, "sea") for p in ("0.5", "0.6")]
    rows += [measured("alps", p, "lake") for p in ("0.5", "0.6")]
    assert plot_lines(rows, ["sea", "lake"], tmp_path) == tmp_path / "sparsity.png"
    assert colours == {"wanda": ["C0"], "fista": ["C1", "C1"], "alps": ["C2"]}
    assert legends == [["wanda", "fista", "alps"]]


def test_runs_that_prune_no_operator_have_no_fit_error():
    """Experts that go are no operators: their mixtures have errors of their own."""
    removed = {"num_operators": 0, "mean_fit_error": 0.0, "share_removed": 0.2, "solve_seconds": 1.0}
    pruned = removed | {"num_operators": 7, "mean_fit_error": 0.5}
    rows = [Row("reap", "experts:0.25", totals=removed), Row("wanda", "0.5", totals=pruned)]
    lines = [[cell.strip() for cell in line.split("|")] for line in markdown_table(rows, []).splitlines()]
    place = lines[0].index("fit error")
    assert [line[place] for line in lines[2:4]] == ["", "0.5000"]


def test_held_out_errors_have_a_column_where_there_are_any():
    totals = {**ROWS[1].totals, "mean_held_out_fit_error": 0.1875}
    rows = [ROWS[0], replace(ROWS[1], totals=totals), ROWS[2]]
    header, _, dense, wanda = markdown_table(rows, ["sea"]).splitlines()
    assert header == "| pattern | method | sea | fit error | held-out fit error | zeros, % | seconds | solving |"
    assert dense == "|  | `dense` | 10.00 |  |  |  |  |  |"
    assert " | 0.1250 ± 0.0000 | 0.1875 | 50.00 ± 0.00 |" in wanda
    lines = list(csv.DictReader(io.StringIO(csv_table(rows, ["sea"]))))
    assert [line["mean held-out fit error"] for line in lines] == ["", "0.1875", ""]
    assert [line["sparsity"] for line in lines] == ["", "0.5", "0.5"]
