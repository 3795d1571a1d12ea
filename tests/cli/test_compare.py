import json
import threading

import pytest

from optimum_fista.cli.main import main
from optimum_fista.run.checkpoints.output import locked_output
from optimum_fista.run.comparison.comparison import Comparison

QUICK = ["--num-samples", "4", "--sequence-length", "32", "--max-windows", "2", "--device", "cpu"]


@pytest.fixture
def compare(tiny_folder, text_file, tmp_path):
    def run(*flags: str) -> int:
        texts = ["--texts", str(text_file), "--calibration", str(text_file)]
        return main(["compare", str(tiny_folder), "--output", str(tmp_path / "out"), *texts, *QUICK, *flags])

    return run


def test_table_files_and_rendering(compare, tmp_path, capsys):
    assert compare("--methods", "magnitude,wanda:scope=matrix", "--patterns", "0.5,0.25") == 0
    shown = capsys.readouterr().out
    lines = [line for line in shown.splitlines() if line.startswith("|")]
    assert [line.split("|")[2].strip() for line in lines[2:]] == [
        "`dense`",
        *["`magnitude`", "`wanda:scope=matrix`"] * 2,
    ]
    assert "windows of 32 tokens, no overlap" in shown
    table = json.loads((tmp_path / "out" / "table.json").read_text())
    assert len(table["rows"]) == 5
    assert table["settings"]["patterns"] == ["0.5", "0.25"]
    again = ["compare", "--render", str(tmp_path / "out" / "table.json"), "--output", str(tmp_path / "again")]
    assert main(again) == 0
    for name in ("table.md", "table.csv", "table.json"):
        assert (tmp_path / "again" / name).read_text() == (tmp_path / "out" / name).read_text()
    assert (tmp_path / "again" / "sparsity.png").exists()


def test_a_failed_row_is_shown_and_the_exit_code_is_1(compare, tmp_path, capsys):
    assert compare("--methods", "wanda", "--patterns", "3:5,2:4") == 1
    captured = capsys.readouterr()
    assert "| 3:5 | `wanda` | failed |" in captured.out
    assert "failed: wanda, 3:5, seed 0: ValueError:" in captured.err
    assert "| 2:4 | `wanda` | failed |" not in captured.out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--methods", "wnada"], "method 'wnada'"),
        (["--patterns", "24"], "sparsity=24.0 is outside"),
        (["--texts", "nothing.txt"], "there is no such file"),
        (["--texts", ""], "pass something to measure"),
        (["--render", "x.json"], "pass it without MODEL"),
        (["--sequence-length", "9999"], "fewer than one window"),
    ],
)
def test_errors_are_one_line(compare, capsys, flags, message):
    assert compare(*flags) == 1
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in error


def test_neither_model_nor_render(tmp_path, capsys):
    assert main(["compare", "--output", str(tmp_path)]) == 1
    assert "MODEL is missing" in capsys.readouterr().err


@pytest.mark.parametrize("render", [False, True])
def test_tables_of_others_are_not_replaced(compare, tmp_path, capsys, render):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "table.md").write_text("mine")
    Comparison().write_tables(tmp_path / "own")
    if render:
        assert main(["compare", "--render", str(tmp_path / "own" / "table.json"), "-o", str(tmp_path / "out")]) == 1
    else:
        assert compare("--methods", "magnitude") == 1
    assert "holds table.md of something else than a comparison" in capsys.readouterr().err
    assert [path.read_text() for path in (tmp_path / "out").iterdir()] == ["mine"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "own"]


@pytest.mark.parametrize("render", [False, True])
def test_two_comparisons_do_not_share_an_output(compare, tmp_path, capsys, render):
    Comparison().write_tables(tmp_path / "own")
    again = ["compare", "--render", str(tmp_path / "own" / "table.json"), "--output", str(tmp_path / "out")]
    with locked_output(tmp_path / "out"):
        run = (lambda: main(again)) if render else (lambda: compare("--methods", "magnitude"))
        thread = threading.Thread(target=lambda: codes.append(run()))
        codes: list[int] = []
        thread.start()
        thread.join()
    assert not (tmp_path / "out").exists()
    assert codes == [1]
    assert "out' is being written by process" in capsys.readouterr().err
