import json
import shutil

import pytest

from optimum_fista.cli.main import main


def test_from_measurements_to_a_page(pruned_folder, tiny_folder, text_file, tmp_path, capsys):
    file, page = tmp_path / "evaluation.json", tmp_path / "new" / "page.html"
    flags = ["--text", str(text_file), "--sequence-length", "32", "--max-windows", "3", "--device", "cpu"]
    for model in (tiny_folder, pruned_folder):
        assert main(["evaluate", str(model), *flags, "--output", str(file)]) == 0
    records = json.loads(file.read_text())
    assert [record["model"] for record in records] == [tiny_folder.name, pruned_folder.name]
    assert records[0]["text_name"] == "sea.txt"
    prompts = ["--dense", str(tiny_folder), "--prompt", "the sea", "--prompt", "days", "--max-new-tokens", "4"]
    arguments = ["report", str(pruned_folder), "-o", str(page), "--evaluations", str(file), "--device", "cpu"]
    assert main([*arguments, *prompts]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"saved to {page}"
    html = page.read_text()
    for text in ("<blockquote>the sea</blockquote>", "<blockquote>days</blockquote>", "<b>dense</b>", "this model"):
        assert text in html
    for record in records:
        assert f"<td>{record['perplexity']:.3f}</td>" in html


def test_the_usual_places(pruned_folder, text_file, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(pruned_folder, folder)
    flags = ["--text", str(text_file), "--sequence-length", "32", "--max-windows", "1", "--device", "cpu"]
    assert main(["evaluate", str(folder), *flags, "--output", str(folder / "fista" / "evaluation.json")]) == 0
    assert main(["report", str(folder)]) == 0
    assert "this model" in (folder / "fista" / "report.html").read_text()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prompt", "the sea"], "--dense MODEL and --prompt TEXT belong together"),
        (["--dense", "model"], "--dense MODEL and --prompt TEXT belong together"),
        (["--evaluations", "nothing.json"], "nothing.json"),
        (
            ["--dense", "x", "--prompt", "y", "-o", "/dev/null/page.html"],
            "output can't be written to (Not a directory)",
        ),
    ],
)
def test_errors_are_one_line(pruned_folder, tmp_path, capsys, flags, message):
    assert main(["report", str(pruned_folder), "-o", str(tmp_path / "page.html"), *flags]) == 1
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in error
    assert not (tmp_path / "page.html").exists()


def test_a_dense_folder_is_refused(tiny_folder, capsys):
    assert main(["report", str(tiny_folder)]) == 1
    assert "holds no fista/report.json: pass a folder saved by optimum-fista" in capsys.readouterr().err


def test_a_file_that_holds_something_else_is_refused_before_measuring(tiny_folder, text_file, tmp_path, capsys):
    other = tmp_path / "notes.json"
    other.write_text("{}{")
    assert main(["evaluate", str(tiny_folder), "--text", str(text_file), "--output", str(other)]) == 1
    assert "holds no measurements" in capsys.readouterr().err
    assert other.read_text() == "{}{"
