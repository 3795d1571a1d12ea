import json
import logging
import sys
from pathlib import Path

import pytest
import torch
from tiny_llama import tiny_llama, tiny_tokenizer

from optimum_fista.evaluate.tasks import TaskSuite

QUESTIONS = [
    {"question": "the sea is", "choices": ["deep", "a ship"], "label": 0},
    {"question": "the ships are", "choices": ["the sky", "small"], "label": 1},
    {"question": "the sailors", "choices": ["count the days", "look"], "label": 1},
    {"question": "look at", "choices": ["the sky", "the days"], "label": 0},
]
TASK = """
task: sea_choice
dataset_path: json
dataset_kwargs:
  data_files:
    test: FILE
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: label
doc_to_choice: "{{choices}}"
metric_list:
  - metric: acc_norm
  - metric: acc
"""


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    """A folder with one task and its documents."""
    pytest.importorskip("lm_eval", reason="needs lm-eval: pip install 'optimum-fista[eval]'")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda storage: None)
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "sea.jsonl").write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    (folder / "sea.yaml").write_text(TASK.replace("FILE", str(folder / "sea.jsonl")))
    return folder


def log_likelihood(model, tokenizer, question, choice):
    start, end = tokenizer(question).input_ids, tokenizer(f" {choice}").input_ids
    with torch.no_grad():
        logits = model(torch.tensor([start + end])).logits[0].log_softmax(-1)
    return sum(float(logits[len(start) + i - 1, token]) for i, token in enumerate(end))


def test_accuracy_is_that_of_the_likelihoods(tasks):
    suite = TaskSuite(["sea_choice"], include_path=tasks, batch_size=2)
    model, tokenizer = tiny_llama().train(), tiny_tokenizer()
    (result,) = suite.measure(model, tokenizer)
    assert not logging.getLogger("lm_eval").level  # as before
    scores = result.scores
    assert model.training
    assert (result.task, result.num_documents, len(result.files_sha256)) == ("sea_choice", 4, 64)
    model.eval()
    right = [
        max((0, 1), key=lambda i: log_likelihood(model, tokenizer, q["question"], q["choices"][i])) == q["label"]
        for q in QUESTIONS
    ]
    assert list(scores) == ["acc", "acc_norm"]
    assert scores["acc"].value == sum(right) / 4
    share = sum(right) / 4
    assert scores["acc"].stderr == pytest.approx((share * (1 - share) / 3) ** 0.5)


def test_task_files_of_the_benchmarks(tasks):
    for path in (Path(__file__).resolve().parents[2] / "benchmarks" / "tasks").iterdir():
        lines = path.read_text()
        for name in ("arc-easy.test.jsonl", "lambada_test.jsonl"):
            lines = lines.replace(name, str(tasks / name))
        (tasks / path.name).write_text(lines)
    (tasks / "arc-easy.test.jsonl").write_text((tasks / "sea.jsonl").read_text())
    (tasks / "lambada_test.jsonl").write_text('{"text": "the sea is a"}\n{"text": "look at b"}\n')
    suite = TaskSuite(["arc_easy_lines", "lambada_lines"], include_path=tasks)
    results = list(suite.measure(tiny_llama(), tiny_tokenizer()))
    assert [(r.task, r.num_documents, next(iter(r.scores))) for r in results] == [
        ("arc_easy_lines", 4, "acc"),
        ("lambada_lines", 2, "acc"),
    ]


def test_unknown_tasks(tasks, monkeypatch, capsys):
    class NoTasks:
        all_tasks, all_groups = ("arc_easy",), ()

        def __init__(self, **options):
            pass

    monkeypatch.setattr("lm_eval.tasks.TaskManager", NoTasks)
    with pytest.raises(ValueError, match="'sea_chioce' not found; pass names of lm-eval"):
        TaskSuite(["sea_chioce", "arc_easy"], include_path=tasks)
    assert "Reading lm-eval's tasks" in capsys.readouterr().err


def test_options_are_checked_before_any_task_is_read():
    with pytest.raises(ValueError, match="include_path='nowhere': no such folder"):
        TaskSuite(["arc_easy"], include_path="nowhere")
    with pytest.raises(ValueError, match="limit=0: pass 1 or more"):
        TaskSuite(["arc_easy"], limit=0)


def test_groups_have_metrics_of_all_their_tasks_and_what_has_none_is_refused_at_once(tasks):
    sky = (tasks / "sea.yaml").read_text().replace("sea_choice", "sky_choice")
    (tasks / "sky.yaml").write_text(f"{sky}tag: ocean\n")
    for name, metrics in (("water", "aggregate_metric_list: [{metric: acc, weight_by_size: true}]"), ("bare", "")):
        (tasks / f"{name}.yaml").write_text(f"group: {name}\ntask: [sea_choice, sky_choice]\n{metrics}\n")
    found = list(
        TaskSuite(["sea_choice", "water"], include_path=tasks, limit=3).measure(tiny_llama(), tiny_tokenizer())
    )
    assert [(result.task, result.num_documents) for result in found] == [("sea_choice", 3), ("water", 6)]
    assert found[1].scores["acc"].value == found[0].scores["acc"].value
    with pytest.raises(ValueError, match="'ocean': a tag or a group without a metric of its own"):
        TaskSuite(["ocean", "water", "bare", "sea_choice"], include_path=tasks)


def test_lm_eval_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install '\.\[eval\]'` in a clone of optimum-fista, or pass no tasks"):
        TaskSuite(["arc_easy"])
