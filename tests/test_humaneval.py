"""The script of HumanEval, and the sandbox in which the answers run."""

import json
import sys
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from chat_problem import FUNCTION, PROBLEM, run, save_model_with_chat
from rare_tokens import bpe_tokenizer
from tiny_llama import tiny_llama


@pytest.fixture
def model_with_chat(tmp_path):
    """A tiny model whose tokenizer has a chat template, and a wheel with one problem."""
    return save_model_with_chat(tmp_path)


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
        # The Python of some distributions has words of its own for modules that it packages apart.
        (
            "import dbm.gnu",
            ("ModuleNotFoundError: import of _gdbm", "ImportError: import of _gdbm"),
        ),
        ("import dbm.ndbm", ("ModuleNotFoundError: import of _dbm", "ImportError: import of _dbm")),
        ("import dbm; dbm.open('x', 'c')", "PermissionError: files can't be written here"),
        ("import readline", "ModuleNotFoundError: import of readline halted"),
        ("import tkinter; tkinter.Tcl()", "ModuleNotFoundError: "),
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


MODULE = '''
def _short(x):
    """Too short."""


@cached
def half(x, /):
    """Return half of a number, which need not be even: half of three is 1.5."""
    return x / 2


class Other:
    def half(self):
        """Return half of a number, which need not be even: half of three is 1.5."""
'''


def test_conversations_are_about_functions_with_a_docstring(benchmark):
    script = benchmark("conversations")

    (function,) = script.functions_of(MODULE)

    assert function.name == "half"
    assert function.head.splitlines()[0] == "def half(x, /):"
    assert function.head.endswith('half of three is 1.5."""')
    assert function.head in function.question["content"]


@pytest.mark.parametrize(
    ("answer", "is_kept"),
    [
        ("Here it is:\n```python\ndef half(x):\n    return x / 2\n```\nIt divides.", True),
        ("def half(x):\n    return x / 2", True),
        ("```python\ndef third(x):\n    return x / 3\n```", False),
        ("```python\ndef half(x):\n    return x /\n```", False),
        ("This function returns half of a number.", False),
    ],
)
def test_only_answers_that_define_the_function_are_kept(benchmark, answer, is_kept):
    (function,) = benchmark("conversations").functions_of(MODULE)

    assert function.is_defined_by(answer) is is_kept


def test_a_model_that_answers_with_code_gives_as_many_conversations_as_asked_for(
    benchmark, model_with_chat, tmp_path, monkeypatch
):
    script = benchmark("conversations")
    folder, _ = model_with_chat
    output = tmp_path / "conversations.jsonl"
    words = [folder, "--tokens", 100, "--batch-size", 2, "--output", output]
    tokenizer = script.load_model(str(folder), dtype="float32", device="cpu")[1]
    names = [function.name for function in script.library_functions(script.Path(json.__path__[0]))]
    answers = iter(
        [
            f"def {names[0]}(): pass",
            "I do not know.",
            *[f"def {name}(): pass" for name in names[2:]],
        ]
    )

    def answer(_, prompts, **__):
        return [tokenizer(next(answers), add_special_tokens=False)["input_ids"] for _ in prompts]

    monkeypatch.setattr(script, "decode_greedily", answer)
    monkeypatch.setattr(script.sysconfig, "get_path", lambda _: json.__path__[0])
    run(script, monkeypatch, *words)

    (messages,) = [json.loads(line)["messages"] for line in output.read_text().splitlines()]
    assert [message["role"] for message in messages] == ["user", "assistant"]
    assert messages[1]["content"] == f"def {names[0]}(): pass"
