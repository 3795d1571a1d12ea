import json
import math
import re
import shutil

import pytest
import torch
from tiny_llama import tiny_llama, tiny_tokenizer

from optimum_fista.cli.main import main
from optimum_fista.records import LoopCount
from optimum_fista.text import loops


def test_the_command_prints_the_perplexity_of_the_model(tiny_folder, text_file, capsys):
    arguments = ["evaluate", str(tiny_folder), "--text", str(text_file), "--device", "cpu"]
    arguments += ["--sequence-length", "32", "--max-windows", "5"]

    assert main(arguments) == 0

    shown = capsys.readouterr().out
    assert re.fullmatch(
        rf"perplexity [\d.]+, [\d.]+ bits per byte on {text_file}: 5 windows of 32 tokens, 155 predicted, [\d.]+ s\n",
        shown,
    )
    expected = mean_loss(text_file.read_text(), num_windows=5, length=32)
    words = shown.split()
    assert float(words[1].rstrip(",")) == pytest.approx(math.exp(expected), abs=2e-3)
    # A token is a letter, so bits per byte are bits per token.
    assert float(words[2]) == pytest.approx(expected / math.log(2), abs=2e-4)


def test_windows_are_no_longer_than_the_model_takes(tiny_folder, text_file, capsys):
    arguments = ["evaluate", str(tiny_folder), "--text", str(text_file), "--max-windows", "2"]

    assert main([*arguments, "--device", "cpu"]) == 0

    assert ": 2 windows of 64 tokens, 126 predicted" in capsys.readouterr().out


def test_loops_are_counted_in_conversations_as_the_chat_template_writes_them(
    tiny_folder, tmp_path, monkeypatch
):
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }} {% endfor %}"
    )
    tokenizer.save_pretrained(folder)
    messages = [{"role": "user", "content": "the sea"}, {"role": "assistant", "content": "is deep"}]
    chats = tmp_path / "chats.jsonl"
    chats.write_text(20 * f"{json.dumps({'messages': messages})}\n")
    prompts = []

    def count(model, tokenizer, stretches, **_):
        prompts.extend(stretches)
        return [LoopCount(num_prompts=1, num_new_tokens=1, num_loops=0)]

    monkeypatch.setattr(loops, "count_loops", count)
    arguments = ["evaluate", str(folder), "--text", str(chats), "--max-windows", "2", "--loops"]

    assert main([*arguments, "--device", "cpu"]) == 0

    ((stretch,),) = prompts
    assert stretch.startswith("user: the sea assistant: is deep")


def mean_loss(text: str, num_windows: int, length: int) -> float:
    """Mean negative log-likelihood of the first windows of a text, as Transformers computes it."""
    ids = torch.tensor(tiny_tokenizer()(text).input_ids[: num_windows * length])
    model = tiny_llama()
    with torch.no_grad():
        losses = [
            float(model(row[None], labels=row[None]).loss) for row in ids.view(num_windows, length)
        ]
    return sum(losses) / num_windows
