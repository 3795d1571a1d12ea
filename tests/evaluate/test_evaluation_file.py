import errno
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from huggingface_hub import EvalResult, ModelCard
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results
from launched import exit_codes, start_code

from optimum_fista.evaluate.evaluation_file import Evaluation, add_evaluation, read_evaluations
from optimum_fista.evaluate.perplexity import PerplexityResult
from optimum_fista.evaluate.tasks import Score, TaskResult
from optimum_fista.folder import output


def measured(model: str, perplexity: float, text: str = "sea") -> Evaluation:
    return Evaluation(model, PerplexityResult(perplexity, 5, 155, 32, 1.5, text, "ab"))


def test_measurements_are_added_and_those_made_again_replaced(tmp_path):
    file = tmp_path / "new" / "evaluation.json"
    for evaluation in (measured("dense", 10.0), measured("pruned", 12.0), measured("dense", 9.0, "sky")):
        add_evaluation(file, evaluation)
    assert read_evaluations(file) == [measured("dense", 10.0), measured("pruned", 12.0), measured("dense", 9.0, "sky")]
    add_evaluation(file, measured("dense", 11.0))
    assert read_evaluations(file) == [measured("pruned", 12.0), measured("dense", 9.0, "sky"), measured("dense", 11.0)]


def test_a_perplexity_of_the_folder_itself_joins_the_metadata_of_its_card(saved, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(saved.folder, folder)
    other = EvalResult("text-generation", "a/b", "b", "accuracy", 0.5)
    card = ModelCard.load(folder / "README.md")
    card.data.eval_results, card.data.model_name, card.data.license = [other], "mine", "mit"
    card.text += "My own words.\n"
    card.save(folder / "README.md")

    def measure(of: Path, perplexity: float, text: str) -> None:
        result = PerplexityResult(perplexity, 5, 155, 32, 1.5, text, "ab")
        add_evaluation(folder / "fista" / "evaluation.json", Evaluation.of(str(of), result))

    for of, perplexity, text in (
        (folder, 12.5, "c4"),
        (saved.folder, 9.0, "c4"),
        (folder, 7.0, "c4"),
        (folder, 3.0, "sea"),
    ):
        measure(of, perplexity, text)
    found = ModelCard.load(folder / "README.md")
    assert found.text == card.text
    assert (found.data.license, found.data.model_name, found.data.datasets) == ("mit", "mine", ["allenai/c4"])
    values = {(r.dataset_type, r.metric_type): r.metric_value for r in found.data.eval_results}
    assert values == {("a/b", "accuracy"): 0.5, ("allenai/c4", "perplexity"): 7.0, ("sea", "perplexity"): 3.0}
    index = found.data.to_dict()["model-index"]
    assert eval_results_to_model_index(*model_index_to_eval_results(index)) == index


def test_accuracies_are_kept_with_their_errors_beside_perplexities(saved, tmp_path):
    folder = shutil.copytree(saved.folder, tmp_path / "model")
    file = folder / "fista" / "evaluation.json"
    few = {"acc": Score(0.25, 0.1637), "acc_norm": Score(0.5, 0.189), "likelihood": Score(2.0)}
    for result in (
        measured("", 12.0).result,
        TaskResult("arc_easy", few, 8, "0.4.13", "cd"),
        TaskResult("arc_easy", {"acc": Score(0.375, 0.1712)}, 8, "0.4.13", "cd"),  # measured again
        TaskResult("arc_easy", {"acc": Score(0.4, 0.02)}, 400, "0.4.13", "cd"),
    ):
        add_evaluation(file, Evaluation.of(str(folder), result))
    found = [evaluation.result for evaluation in read_evaluations(file)]
    assert found[0] == measured("", 12.0).result
    assert [r.scores["acc"] for r in found[1:]] == [Score(0.375, 0.1712), Score(0.4, 0.02)]
    data = ModelCard.load(folder / "README.md").data
    assert [(r.dataset_name, r.metric_type, r.metric_value, r.metric_name) for r in data.eval_results] == [
        ("sea", "perplexity", 12.0, "perplexity, 5 windows of 32 tokens"),
        ("arc_easy", "acc_norm", 0.5, "acc_norm, 8 documents, lm-eval 0.4.13, standard error 0.1890"),
        ("arc_easy", "likelihood", 2.0, "likelihood, 8 documents, lm-eval 0.4.13"),
        ("arc_easy", "acc", 0.375, "acc, 8 documents, lm-eval 0.4.13, standard error 0.1712"),
        ("arc_easy", "acc", 0.4, "acc, 400 documents, lm-eval 0.4.13, standard error 0.0200"),
    ]
    index = data.to_dict()["model-index"]
    assert eval_results_to_model_index(*model_index_to_eval_results(index)) == index


def test_a_card_that_can_not_be_read_does_not_lose_the_measurement(saved, tmp_path, caplog):
    folder = shutil.copytree(saved.folder, tmp_path / "model")
    (folder / "README.md").write_text("---\na: [\n---\n")
    evaluation = Evaluation.of(str(folder), measured("", 10.0).result)
    add_evaluation(folder / "fista" / "evaluation.json", evaluation)
    assert read_evaluations(folder / "fista" / "evaluation.json") == [evaluation]
    assert "can't be read" in caplog.text
    assert (folder / "README.md").read_text() == "---\na: [\n---\n"


@pytest.mark.parametrize(
    "text",
    [
        "{",
        '[{"task": "a", "scores": 3, "num_documents": 1, "lm_eval": "", "files_sha256": "", "model": ""}]',
        '[{"model": "dense"}]',
        "[1]",
        "[]",
    ],
)
def test_other_files_are_refused_and_left_alone(tmp_path, text):
    file = tmp_path / "other.json"
    file.write_text(text)
    with pytest.raises(
        ValueError, match=r"other\.json' holds no measurements .*: pass a file written by `optimum-fista"
    ):
        read_evaluations(file)
    with pytest.raises(ValueError, match="holds no measurements"):
        add_evaluation(file, measured("dense", 10.0))
    assert file.read_text() == text


_ADD = """
import sys
from pathlib import Path
from optimum_fista.evaluate.evaluation_file import Evaluation, add_evaluation
from optimum_fista.evaluate.perplexity import PerplexityResult
for number in range(5):
    result = PerplexityResult(float(number), 5, 155, 32, 1.5, "sea", "ab")
    add_evaluation(Path(sys.argv[1]), Evaluation(f"{sys.argv[2]}-{number}", result))
"""


def test_measurements_added_at_the_same_time_are_all_kept(tmp_path, tmp_path_factory):
    file, link = tmp_path / "evaluation.json", tmp_path / "link.json"
    link.symlink_to(file.name)
    other = start_code(_ADD, link, "other", streams=tmp_path_factory.mktemp("streams"))
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda name: add_evaluation(file, measured(name, 10.0)), map(str, range(24))))
    assert exit_codes([other]) == [0]
    assert len(read_evaluations(file)) == 24 + 5
    assert {path.name for path in tmp_path.iterdir()} == {"evaluation.json", "link.json"}
    assert link.is_symlink()


def full(path: Path) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def test_a_failure_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    file = tmp_path / "evaluation.json"
    add_evaluation(file, measured("dense", 10.0))
    before = file.read_bytes()
    monkeypatch.setattr(output, "flush", full)
    with pytest.raises(OSError, match="No space left"):
        add_evaluation(file, measured("pruned", 12.0))
    assert file.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["evaluation.json"]


def test_folders_of_one_name_are_told_apart_without_their_paths(tmp_path):
    file, result = tmp_path / "evaluation.json", measured("", 10.0).result
    for folder in ("a", "b", "a"):
        (tmp_path / folder / "tiny").mkdir(parents=True, exist_ok=True)
        add_evaluation(file, Evaluation.of(str(tmp_path / folder / "tiny"), result))
    assert [evaluation.model for evaluation in read_evaluations(file)] == ["tiny", "tiny"]
    assert str(tmp_path) not in file.read_text()
