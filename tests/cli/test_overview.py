import shlex
from pathlib import Path

import pytest

from optimum_fista.cli.main import build_parser
from optimum_fista.cli.overview import next_commands, verdicts
from optimum_fista.report import PruningReport


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({}, "usable as it is"),
        ({"pruned": 90.0}, "broken: prune less"),
        ({"num_tokens": 4095}, "no verdict on fewer than 4,096 tokens"),
        # the model wrote this text itself
        ({"text": "self"}, "no verdict on text of its own"),
        # more than half the perplexity of a guess, which is the number of tokens, 64
        ({"dense": 40.0, "pruned": 41.0}, "no verdict: the dense model is no better than chance"),
    ],
)
def test_a_verdict_needs_enough_text_of_others_and_a_dense_model_that_knows_it(changes, word):
    report = PruningReport({}, {"num_parameters": 1_000}, {})
    report.perplexity = {
        "dense": 20.0,
        "pruned": 24.0,
        "num_tokens": 4096,
        "text": None,
        "vocabulary": 64,
    } | changes
    report.perplexity["bits_per_byte"] = {"dense": 1.0, "pruned": 1.25}

    (shown,) = verdicts(report)

    assert f" after ({word}), on {report.perplexity['num_tokens']:,} tokens of text" in shown
    assert shown.endswith("; 1.000 and 1.250 bits per byte")


def test_the_next_commands_can_be_pasted(monkeypatch):
    folder = Path("my model-50pct")

    shown = next_commands("my model", folder, ["self"])

    assert "--text wikitext2 " in shown
    assert "--calibration c4 " in shown

    monkeypatch.setattr("optimum_fista.text.sources.find_spec", lambda name: None)

    plain = next_commands(
        "my model", folder, ["self"]
    )  # without the extra that has the usual texts

    assert "--text pydoc " in plain
    assert "--calibration pydoc " in plain
    assert "hf upload YOUR-NAME/my-model-50pct 'my model-50pct' " in shown

    assert "optimum-fista pack " not in next_commands("my model", folder, ["self"], has_zeros=False)
    assert "optimum-fista pack " not in next_commands("my model", folder, ["self"], is_packed=True)
    shown = next_commands("./-model", Path("-model-50pct"), ["-text.txt", "code.txt"])

    assert "chat ./-model-50pct --beside ./-model " in shown
    assert "--calibration ./-text.txt --calibration code.txt " in shown
    assert "hf upload YOUR-NAME/model-50pct ./-model-50pct " in shown

    many = [f"{number}.txt" for number in range(9)]
    assert "--calibration 8.txt --held-out 9 " in next_commands("model", folder, many)

    for line in shown.splitlines()[1:-1]:
        build_parser().parse_args(shlex.split(line, comments=True)[1:])
