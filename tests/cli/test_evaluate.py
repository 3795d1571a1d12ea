import math
import re

import pytest
import torch
from tiny_llama import tiny_llama, tiny_tokenizer

from optimum_fista.cli.main import main


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


def mean_loss(text: str, num_windows: int, length: int) -> float:
    """Mean negative log-likelihood of the first windows of a text, as Transformers computes it."""
    ids = torch.tensor(tiny_tokenizer()(text).input_ids[: num_windows * length])
    model = tiny_llama()
    with torch.no_grad():
        losses = [
            float(model(row[None], labels=row[None]).loss) for row in ids.view(num_windows, length)
        ]
    return sum(losses) / num_windows
