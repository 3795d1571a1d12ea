import pytest

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


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--evaluations", "nothing.json"], "nothing.json"),
        (["-o", "/dev/null/page.html"], "output can't be written to (Not a directory)"),
    ],
)
def test_errors_are_one_line(pruned_folder, tmp_path, capsys, flags, message):
    assert main(["report", str(pruned_folder), "-o", str(tmp_path / "page.html"), *flags]) == 1
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in error
    assert not (tmp_path / "page.html").exists()
