import io
import os
import pty
import shutil
import signal
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from launched import exit_codes, start_code
from tiny_llama import tiny_tokenizer
from transformers import AutoModelForCausalLM

from optimum_fista.cli import chat
from optimum_fista.cli.main import main
from optimum_fista.folder.packed_folder import pack_folder

FEW = ["--device", "cpu", "--max-new-tokens", "6"]
TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role[0] }}{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}a{% endif %}"
)


@pytest.fixture
def ask(monkeypatch, capsys):
    """`ask("question\\n...", *arguments)`: what the command answers in a pipe, a line each."""

    def run(text: str, *arguments) -> list[str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        assert main(["chat", *map(str, arguments)]) == 0
        return capsys.readouterr().out.splitlines()

    return run


def continued(folder, prompt: str, count: int = 6, **options) -> str:
    tokenizer, model = tiny_tokenizer(), AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    with torch.no_grad():
        out = model.generate(ids, max_new_tokens=count, do_sample=False, **options)[
            0, ids.shape[1] :
        ]
    return " ".join(tokenizer.decode(out, skip_special_tokens=True).split())


def test_without_a_template_every_line_is_continued_on_its_own(ask, tiny_folder):
    lines = ask("the sea is\n\nthe ships\n", tiny_folder, *FEW)
    assert lines == [continued(tiny_folder, "the sea is"), continued(tiny_folder, "the ships")]
    assert any(lines)


def test_with_a_template_the_conversation_goes_on(ask, tiny_folder, tmp_path):
    AutoModelForCausalLM.from_pretrained(tiny_folder).save_pretrained(tmp_path)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path)
    first, second = ask("sea\nsky\n", tmp_path, *FEW)
    assert first == continued(tmp_path, "<s>useaa")
    settings = SimpleNamespace(device="cpu", dtype="auto", max_new_tokens=6, temperature=0, seed=0)
    raw = chat._Speaker(str(tmp_path), settings)
    said = raw.answer("sea")
    assert second == continued(tmp_path, f"<s>usea<s>a{said}<s>uskya")
    assert [turn["role"] for turn in raw.turns] == ["user", "assistant"]
    # 64 positions: the oldest turns are forgotten, so that a long conversation goes on
    for _ in range(6):
        raw.answer("the days")
    assert raw.turns[0]["content"] != "sea"
    earlier = [*raw.turns]
    assert not raw.answer("x" * 80)
    assert raw.turns == earlier


def test_a_question_that_is_too_long_ends_nothing(tiny_folder, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"the sea\n{'x' * 80}\nthe sea\n"))
    assert main(["chat", str(tiny_folder), *FEW]) == 1
    shown, answer = capsys.readouterr(), continued(tiny_folder, "the sea")
    assert shown.out.splitlines() == [answer, "", answer]
    assert (
        f"error: {tiny_folder} can't answer: the question has 80 tokens: it takes at least 1, and fewer than 64"
        in shown.err
    )


def test_a_template_that_fails_is_one_error_a_question(tiny_folder, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    (folder / "chat_template.jinja").write_text("{{ raise_exception('roles must alternate') }}")
    monkeypatch.setattr(sys, "stdin", io.StringIO("the sea\nthe sky\n"))
    assert main(["chat", str(folder), *FEW]) == 1
    shown = capsys.readouterr()
    assert shown.out.splitlines() == ["", ""]
    assert shown.err.count("roles must alternate") == shown.err.count("error: ") == 2


def test_nan_is_one_error(tiny_folder, tmp_path, monkeypatch, capsys):
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = float("nan")
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO("sea\nsky\n"))
    assert main(["chat", str(tmp_path), *FEW, "--temperature", "1"]) == 1
    out, error = capsys.readouterr()
    assert not out
    assert error.splitlines()[-1].startswith(
        f"error: {tmp_path} gives NaN logits: look for NaN in its weights"
    )


def test_beside_another_model_and_packed_folders(ask, tiny_folder, pruned_folder, tmp_path):
    pack_folder(pruned_folder, tmp_path / "packed")
    lines = ask("the sea\n", tmp_path / "packed", "--beside", tiny_folder, *FEW)
    names = (tmp_path / "packed", pruned_folder), (tiny_folder, tiny_folder)
    assert lines == [
        f"{name}: {continued(folder, 'the sea')}".rstrip() or name for name, folder in names
    ]
    assert lines[0].split(": ")[1:] != lines[1].split(": ")[1:]


IN_TERMINAL = """
import os, sys, time
from optimum_fista.cli import main
from transformers import TextStreamer
terminal = os.open(sys.argv.pop(1), os.O_RDWR)
for number in range(3):
    os.dup2(terminal, number)
sys.stdin, sys.stdout = open(0), open(1, "w", buffering=1)
put = TextStreamer.put
TextStreamer.put = lambda self, value: put(self, value) or time.sleep(0.05)
sys.exit(main.main(sys.argv[1:]))
"""


def test_ctrl_c_stops_an_answer_and_ctrl_d_ends(tiny_folder, tmp_path):
    """In a real terminal, as a user has it."""
    parent, child = pty.openpty()
    command = ["chat", tiny_folder, "--beside", tiny_folder, "--device", "cpu"]
    process = start_code(IN_TERMINAL, os.ttyname(child), *command, streams=tmp_path)
    shown = read_until(parent, "> ")
    assert "Ctrl-C stops an answer, Ctrl-D ends." in shown
    os.write(parent, b"the sea\n")
    read_until(parent, "the sea\r\n", 3)
    os.kill(process.pid, signal.SIGINT)
    read_until(parent, "> ")
    assert process.is_alive()
    os.write(parent, b"\x04")
    assert exit_codes([process]) == [0]
    os.close(child)
    os.close(parent)


def read_until(terminal: int, end: str, more: int = 0) -> str:
    """What a terminal shows up to a text and so many characters after it."""
    shown, deadline = "", time.monotonic() + 120
    while time.monotonic() < deadline:
        shown += os.read(terminal, 1000).decode()
        if end in shown and len(shown.split(end, 1)[1]) >= more:
            return shown
    raise AssertionError(f"the terminal shows {shown!r}")
