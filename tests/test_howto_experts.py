"""The commands of docs/howto/experts.md run on a tiny mixture, in their order."""

import json
import shlex

import torch
from doc_pages import ROOT, commands
from tiny_llama import TEXT, tiny_tokenizer
from tiny_models import tiny_model

from optimum_fista.cli.main import main

PAGE = ROOT / "docs" / "howto" / "experts.md"
# What makes a command quick, by its name; the page leaves it at the defaults.
QUICK = {
    "prune": "--num-samples 8 --sequence-length 16 --device cpu",
    "evaluate": "--sequence-length 16 --max-windows 2 --device cpu",
    "recover": "--tokens 256 --sequence-length 16 --device cpu",
}


def test_the_commands_of_the_page_run_in_their_order(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    torch.manual_seed(0)
    tiny_model("qwen3_moe", vocab_size=len(tokenizer)).save_pretrained("MODEL")
    tokenizer.save_pretrained("MODEL")
    # Held-out texts must not be copies of the calibration text.
    for name, text in {"chat.jsonl": TEXT, "chat-held-out.jsonl": TEXT[::-1]}.items():
        messages = [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
        (tmp_path / name).write_text(9 * (json.dumps({"messages": messages}) + "\n"))
    for name, text in {
        "code.txt": TEXT,
        "german.txt": TEXT[1:],
        "code-held-out.txt": TEXT[::-1],
    }.items():
        (tmp_path / name).write_text(9 * text)

    programs = []
    for command in commands(PAGE):
        program, *words = shlex.split(command)
        programs.append(" ".join([program, *words[:1]]))
        if program != "optimum-fista":  # uploads, or a server
            continue
        quick = QUICK.get(words[0], "").split()
        assert main([*words, *quick]) == 0, command

    assert programs == [
        "optimum-fista prune",
        "optimum-fista prune",
        "optimum-fista report",
        "optimum-fista verify",
        "optimum-fista evaluate",
        "optimum-fista recover",
        "hf upload",
        "vllm serve",
    ]
    report = json.loads((tmp_path / "smaller" / "fista" / "report.json").read_text())
    assert {text["name"] for text in report["texts"]} == {
        "chat-held-out.jsonl",
        "german.txt",
        "code-held-out.txt",
    }
    assert "Which experts" in (tmp_path / "smaller" / "fista" / "report.html").read_text()
    assert (tmp_path / "smaller-recovered" / "config.json").is_file()
