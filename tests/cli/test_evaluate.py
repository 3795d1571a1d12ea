import json
import math
import re

import pytest
import torch
from tiny_llama import tiny_llama, tiny_tokenizer

from optimum_fista.cli.main import main
from optimum_fista.evaluate.tasks import TaskSuite


@pytest.fixture
def evaluate(tiny_folder, text_file):
    def run(*flags: str) -> int:
        arguments = ["evaluate", str(tiny_folder), "--text", str(text_file), "--device", "cpu"]
        return main([*arguments, "--sequence-length", "32", *flags])

    return run


def test_perplexity_is_that_of_the_model(evaluate, text_file, capsys):
    assert evaluate("--max-windows", "5") == 0
    shown = capsys.readouterr().out
    assert re.fullmatch(rf"perplexity [\d.]+ on {text_file}: 5 windows of 32 tokens, 155 predicted, [\d.]+ s\n", shown)
    ids = torch.tensor(tiny_tokenizer()(text_file.read_text()).input_ids[: 5 * 32]).view(5, 32)
    with torch.no_grad():
        expected = math.exp(sum(float(tiny_llama()(row[None], labels=row[None]).loss) for row in ids) / 5)
    assert float(shown.split()[1]) == pytest.approx(expected, abs=2e-3)


def test_each_task_is_shown_and_kept_before_the_next(tiny_folder, tmp_path, monkeypatch, capsys):
    pytest.importorskip("lm_eval", reason="needs lm-eval: pip install 'optimum-fista[eval]'")

    def measure(model, *, tasks, **options):
        (name,) = tasks
        scores = {"acc,none": 0.25, "acc_stderr,none": 0.1637}
        results = {"results": {name: scores}, "n-samples": {name: {"effective": 8}}}
        return results if name == "sea" else None

    monkeypatch.setattr("lm_eval.simple_evaluate", measure)
    monkeypatch.setattr(TaskSuite, "_find_tasks", lambda suite: None)
    output = tmp_path / "e.json"
    command = ["evaluate", str(tiny_folder), "--device", "cpu", "--output", str(output), "--tasks", "sea, sky,sea"]
    assert main(command) == 1
    shown = capsys.readouterr()
    assert shown.out == "acc 0.2500 ± 0.1637 on sea: 8 documents\n"
    assert "lm-eval gives no metric for 'sky'" in shown.err
    assert [record["task"] for record in json.loads(output.read_text())] == ["sea"]


def test_something_has_to_be_measured(tiny_folder, capsys):
    assert main(["evaluate", str(tiny_folder), "--tasks", ", "]) == 1
    assert "nothing to measure: pass --text SOURCE" in capsys.readouterr().err


def test_errors_are_one_line(evaluate, text_file, capsys):
    for flags, message in (
        (["--text", "nothing.txt"], "source='nothing.txt': there is no such file"),
        (["--output", str(text_file / "new" / "e.json")], "output can't be written to (Not a directory)"),
    ):
        assert evaluate(*flags) == 1
        (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert message in error
