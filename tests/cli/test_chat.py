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

SIX_TOKENS = ["--device", "cpu", "--max-new-tokens", "6"]
TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role[0] }}{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}a{% endif %}"
)


@pytest.fixture
def chatted(monkeypatch, capsys):
    """`chatted("question\\n...", *arguments)`: the exit code of the command in a pipe, and what it prints."""

    def run(text: str, *arguments):
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        code = main(["chat", *map(str, arguments)])
        return code, capsys.readouterr()

    return run


@pytest.fixture
def ask(chatted):
    """`ask("question\\n...", *arguments)`: the lines that the command answers in a pipe."""

    def run(text: str, *arguments) -> list[str]:
        code, printed = chatted(text, *arguments)
        assert code == 0
        return printed.out.splitlines()

    return run


def continued(folder, prompt: str, count: int = 6) -> str:
    """How Transformers continues a prompt with the most probable tokens, in one line."""
    tokenizer = tiny_tokenizer()
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    with torch.no_grad():
        output = model.generate(ids, max_new_tokens=count, do_sample=False)
    text = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    return " ".join(text.split())


@pytest.fixture
def folder_with_template(tiny_folder, tmp_path):
    AutoModelForCausalLM.from_pretrained(tiny_folder).save_pretrained(tmp_path)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


def speaker_of(folder):
    settings = SimpleNamespace(device="cpu", dtype="auto", max_new_tokens=6, temperature=0, seed=0)
    return chat._Speaker(str(folder), settings)


def test_without_a_template_every_line_is_continued_on_its_own(ask, tiny_folder):
    lines = ask("the sea is\n\nthe ships\n", tiny_folder, *SIX_TOKENS)

    assert lines == [continued(tiny_folder, "the sea is"), continued(tiny_folder, "the ships")]
    assert any(lines)


def test_with_a_template_a_question_is_answered_after_all_earlier_turns(ask, folder_with_template):
    first, second = ask("sea\nsky\n", folder_with_template, *SIX_TOKENS)

    speaker = speaker_of(folder_with_template)
    raw_answer = speaker.answer("sea")
    assert first == continued(folder_with_template, "<s>useaa")
    assert second == continued(folder_with_template, f"<s>usea<s>a{raw_answer}<s>uskya")
    assert [turn["role"] for turn in speaker.turns] == ["user", "assistant"]


def test_a_conversation_longer_than_the_context_drops_its_oldest_turns(folder_with_template):
    speaker = speaker_of(folder_with_template)

    speaker.answer("sea")
    for _ in range(6):  # together longer than the 64 positions of the model
        speaker.answer("the days")

    assert speaker.turns[0]["content"] != "sea"


def test_a_question_that_is_too_long_is_not_added_to_the_conversation(folder_with_template):
    speaker = speaker_of(folder_with_template)
    speaker.answer("sea")
    turns = [*speaker.turns]

    answer = speaker.answer("x" * 80)  # a token each, but the model has 64 positions

    assert answer == ""
    assert speaker.turns == turns


def test_questions_after_one_that_is_too_long_are_still_answered(chatted, tiny_folder):
    code, printed = chatted(f"the sea\n{'x' * 80}\nthe sea\n", tiny_folder, *SIX_TOKENS)

    answer = continued(tiny_folder, "the sea")
    assert code == 1
    assert printed.out.splitlines() == [answer, "", answer]
    assert (
        f"error: {tiny_folder} can't answer: the question has 80 tokens: ask one of 1 to 63 tokens"
        in printed.err
    )


def test_a_template_that_fails_gives_one_error_for_each_question(chatted, tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    (folder / "chat_template.jinja").write_text("{{ raise_exception('roles must alternate') }}")

    code, printed = chatted("the sea\nthe sky\n", folder, *SIX_TOKENS)

    assert code == 1
    assert printed.out.splitlines() == ["", ""]
    assert printed.err.count("roles must alternate") == printed.err.count("error: ") == 2


def test_nan_weights_end_the_chat_with_one_error(chatted, tiny_folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = float("nan")
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)

    code, printed = chatted("sea\nsky\n", tmp_path, *SIX_TOKENS, "--temperature", "1")

    assert code == 1
    assert not printed.out
    assert printed.err.count("error: ") == 1  # though there are two questions
    assert printed.err.splitlines()[-1].startswith(
        f"error: {tmp_path} gives NaN logits: look for NaN in its weights"
    )


def test_a_packed_folder_and_the_model_beside_it_both_answer_a_question(
    ask, tiny_folder, pruned_folder, tmp_path
):
    packed = tmp_path / "packed"
    pack_folder(pruned_folder, packed)

    lines = ask("the sea\n", packed, "--beside", tiny_folder, *SIX_TOKENS)

    answers = [continued(pruned_folder, "the sea"), continued(tiny_folder, "the sea")]
    assert answers[0] != answers[1]
    assert lines == [f"{packed}: {answers[0]}".rstrip(), f"{tiny_folder}: {answers[1]}".rstrip()]


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


def test_ctrl_c_stops_an_answer_and_ctrl_d_ends_the_chat(tiny_folder, tmp_path):
    """In a real terminal, as a user has it."""
    parent, child = pty.openpty()
    command = ["chat", tiny_folder, "--beside", tiny_folder, "--device", "cpu"]
    process = start_code(IN_TERMINAL, os.ttyname(child), *command, streams=tmp_path)

    shown = read_until(parent, "> ")
    os.write(parent, b"the sea\n")
    read_until(parent, "the sea\r\n", 3)
    os.kill(process.pid, signal.SIGINT)
    read_until(parent, "> ")
    is_alive = process.is_alive()
    os.write(parent, b"\x04")
    codes = exit_codes([process])
    os.close(child)
    os.close(parent)

    assert "Ctrl-C stops an answer, Ctrl-D ends." in shown
    assert is_alive
    assert codes == [0]


def read_until(terminal: int, end: str, more: int = 0) -> str:
    """What a terminal shows up to a text and so many characters after it."""
    shown = ""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        shown += os.read(terminal, 1000).decode()
        if end in shown and len(shown.split(end, 1)[1]) >= more:
            return shown
    raise AssertionError(f"the terminal shows {shown!r}")
