from concurrent.futures import ThreadPoolExecutor

import pytest

from optimum_fista.evaluate.evaluation_file import Evaluation, add_evaluation, read_evaluations
from optimum_fista.evaluate.perplexity import PerplexityResult


def measured(model: str, perplexity: float, text: str = "sea") -> Evaluation:
    return Evaluation(model, PerplexityResult(perplexity, 5, 155, 32, 1.5, text, "ab"))


def test_measurements_are_added_and_those_made_again_replaced(tmp_path):
    file = tmp_path / "new" / "evaluation.json"
    for evaluation in (measured("dense", 10.0), measured("pruned", 12.0), measured("dense", 9.0, "sky")):
        add_evaluation(file, evaluation)
    assert read_evaluations(file) == [measured("dense", 10.0), measured("pruned", 12.0), measured("dense", 9.0, "sky")]
    add_evaluation(file, measured("dense", 11.0))
    assert read_evaluations(file) == [measured("pruned", 12.0), measured("dense", 9.0, "sky"), measured("dense", 11.0)]


@pytest.mark.parametrize(
    "text",
    [
        "{",
        '[{"model": "dense", "place": "", "result": {"perplexity": "low"}}]',
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


def test_measurements_added_at_the_same_time_are_all_kept(tmp_path):
    file, link = tmp_path / "evaluation.json", tmp_path / "link.json"
    link.symlink_to(file.name)
    with ThreadPoolExecutor() as pool:  # a lock of its own each, as processes have
        list(pool.map(lambda n: add_evaluation((file, link)[n % 2], measured(str(n), 10.0)), range(24)))
    assert len(read_evaluations(file)) == 24
    assert {path.name for path in tmp_path.iterdir()} == {"evaluation.json", "link.json"}
    assert link.is_symlink()


def test_folders_of_one_name_are_told_apart_without_their_paths(tmp_path):
    file, result = tmp_path / "evaluation.json", measured("", 10.0).result
    for folder in ("a", "b", "a"):
        (tmp_path / folder / "tiny").mkdir(parents=True, exist_ok=True)
        add_evaluation(file, Evaluation.of(str(tmp_path / folder / "tiny"), result))
    assert [evaluation.model for evaluation in read_evaluations(file)] == ["tiny", "tiny"]
    assert str(tmp_path) not in file.read_text()
