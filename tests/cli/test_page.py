import shutil

from optimum_fista.cli.main import main
from optimum_fista.evaluate.evaluation_file import EVALUATION_FILE, Evaluation, add_evaluation
from optimum_fista.evaluate.perplexity import PerplexityResult


def test_from_measurements_to_a_page(pruned_folder, tmp_path, capsys):
    folder, page = shutil.copytree(pruned_folder, tmp_path / "pruned"), tmp_path / "new" / "page.html"
    for model, perplexity in (("owner/dense", 10.125), (str(folder), 12.5)):
        result = PerplexityResult(perplexity, 5, 155, 32, 1.5, "sea", "ab")
        add_evaluation(folder / EVALUATION_FILE, Evaluation.of(model, result))
    assert main(["report", str(folder), "-o", str(page)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"saved to {page}"
    html = page.read_text()
    assert all(text in html for text in ("<td>10.125</td>", "<td>12.500</td>", "this model"))
