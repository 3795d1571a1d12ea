import math
import re

import pytest
import torch
from tiny_llama import tiny_llama, tiny_tokenizer

from optimum_fista_cli.main import main


@pytest.fixture
def evaluate(tiny_folder, text_file):
    def run(*flags: str) -> int:
        arguments = ["evaluate", str(tiny_folder), "--text", str(text_file), "--device", "cpu"]
        return main([*arguments, "--sequence-length", "32", *flags])

    return run


def test_perplexity_is_that_of_the_model(evaluate, text_file, capsys):
    assert evaluate("--max-windows", "5") == 0
    shown = capsys.readouterr().out
    assert re.fullmatch(rf"perplexity [\d.]+ on {text_file}: 5 windows of 32 tokens, 155 predicted, [\d.]+ s\n", shown)
    ids = torch.tensor(tiny_tokenizer()(text_file.read_text()).input_ids[: 5 * 32]).view(5, 32)
    with torch.no_grad():
        expected = math.exp(sum(float(tiny_llama()(row[None], labels=row[None]).loss) for row in ids) / 5)
    assert float(shown.split()[1]) == pytest.approx(expected, abs=2e-3)


def test_whole_text_and_batches(evaluate, capsys):
    perplexities = []
    for batch_size in ("1", "7"):
        assert evaluate("--batch-size", batch_size) == 0
        shown = capsys.readouterr().out
        assert "115 windows of 32 tokens" in shown
        perplexities.append(float(shown.split()[1]))
    assert perplexities[0] == pytest.approx(perplexities[1], abs=2e-3)


def test_a_pruned_folder_can_be_measured(pruned_folder, text_file, capsys):
    flags = ["--text", str(text_file), "--sequence-length", "32", "--max-windows", "3", "--device", "cpu"]
    assert main(["evaluate", str(pruned_folder), *flags]) == 0
    assert capsys.readouterr().out.startswith("perplexity ")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--text", "nothing.txt"], "source='nothing.txt': there is no such file"),
        (["--text", "self"], "source='self' is not known"),
        (["--batch-size", "0"], "batch_size=0; pass 1 or more"),
        (["--max-windows", "0"], "max_windows=0; pass 1 or more"),
        (["--sequence-length", "1"], "sequence_length=1; pass 2 or more"),
        (["--sequence-length", "9999"], "fewer than one window of 9999"),
        (["--device", "tpu9"], "device='tpu9' can't be used"),
    ],
)
def test_errors_are_one_line(evaluate, capsys, flags, message):
    assert evaluate(*flags) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
