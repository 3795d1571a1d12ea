import math
import re

import pytest
import torch
from tiny_llama import tiny_llama, tiny_tokenizer

from optimum_fista.cli.main import main


@pytest.fixture
def evaluate(tiny_folder, text_file):
    def run(*flags: str) -> int:
        arguments = ["evaluate", str(tiny_folder), "--text", str(text_file), "--device", "cpu"]
        return main([*arguments, "--sequence-length", "32", *flags])

    return run


def test_perplexity_is_that_of_the_model(evaluate, text_file, capsys):
    assert evaluate("--max-windows", "5") == 0
    shown = capsys.readouterr().out
    assert re.fullmatch(
        rf"perplexity [\d.]+, [\d.]+ bits per byte on {text_file}: 5 windows of 32 tokens, 155 predicted, [\d.]+ s\n",
        shown,
    )
    ids = torch.tensor(tiny_tokenizer()(text_file.read_text()).input_ids[: 5 * 32]).view(5, 32)
    with torch.no_grad():
        expected = math.exp(
            sum(float(tiny_llama()(row[None], labels=row[None]).loss) for row in ids) / 5
        )
    assert float(shown.split()[1].rstrip(",")) == pytest.approx(expected, abs=2e-3)
    assert float(shown.split()[2]) == pytest.approx(
        math.log2(expected), abs=2e-4
    )  # a token is a letter
