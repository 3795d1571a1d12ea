from optimum_fista.cli.main import main
from optimum_fista.evaluate.evaluation_file import Evaluation, add_evaluation
from optimum_fista.evaluate.perplexity import PerplexityResult


def test_from_measurements_to_a_page(pruned_folder, tmp_path, capsys):
    file, page = tmp_path / "evaluation.json", tmp_path / "new" / "page.html"
    for model, perplexity in (("owner/dense", 10.125), (str(pruned_folder), 12.5)):
        add_evaluation(file, Evaluation.of(model, PerplexityResult(perplexity, 5, 155, 32, 1.5, "sea", "ab")))
    assert main(["report", str(pruned_folder), "-o", str(page), "--evaluations", str(file)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"saved to {page}"
    html = page.read_text()
    assert all(text in html for text in ("<td>10.125</td>", "<td>12.500</td>", "this model"))


def test_an_error_is_one_line(pruned_folder, tmp_path, capsys):
    assert main(["report", str(pruned_folder), "-o", str(tmp_path / "page.html"), "--evaluations", "nothing.json"]) == 1
    assert "error: " in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()
