"""What a run shows while it prunes: in a terminal, and in a log."""

import argparse
import io
import re
import sys

import pytest
from tiny_llama import tiny_llama, tiny_tokens
from tiny_models import tiny_model

from optimum_fista import FistaPruner, FistaPruningConfig
from optimum_fista.cli import main, progress
from optimum_fista.cli.progress import Progress
from optimum_fista.report import LayerReport


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def prune(model, **options) -> None:
    pruner = FistaPruner(FistaPruningConfig(**options), callbacks=[Progress()])
    pruner.prune(model, tiny_tokens().split(4))


def test_a_log_has_a_line_a_decoder_layer_and_no_bar(capsys):
    prune(tiny_llama(num_hidden_layers=3), method="wanda")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    pattern = (
        r"decoder layer 1 \(2 of 3\): fit error 0\.\d{4} on average, 0\.\d{4} at most \((self_attn|mlp)\.\w+_proj\); "
        r"128 tokens; 00:\d\d gone, 00:\d\d left"
    )
    assert re.fullmatch(pattern, lines[1])


@pytest.mark.parametrize("shares", [False, True])
def test_layers_of_other_processes_are_not_called_done(capsys, shares):
    callback = Progress(shares=shares)
    callback._tokens = 0
    callback.on_layers_begin(6, {3: 1.0, 4: 1.0})
    callback.on_layer_end(3, LayerReport("model.layers.3", None, 0.0), [])
    first, last = ([], "1 of 2") if shares else (["4 of 6 decoder layers are done already"], "5 of 6")
    *before, line = capsys.readouterr().err.splitlines()
    assert before == first
    assert line.startswith(f"decoder layer 3 ({last}): no operator to prune")


def test_a_layer_that_loses_experts_is_not_called_dense(capsys):
    prune(tiny_model("mixtral"), pattern="experts:0.25")
    line = capsys.readouterr().err.splitlines()[1]
    assert re.match(r"decoder layer 1 \(2 of 2\): 3 of 4 experts left, fit error 0\.\d{4}; 128 tokens", line)


def test_a_terminal_has_a_bar_that_is_taken_away(monkeypatch):
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    prune(tiny_llama(num_hidden_layers=3), method="wanda")
    assert "\r0 of 3 decoder layers done: mlp.up_proj, fit error 0." in terminal.getvalue()
    assert re.search(r"\r2 of 3 decoder layers done: mlp.down_proj, fit error 0\.\d+:? .*left", terminal.getvalue())
    assert re.search(r"\r *\r$", terminal.getvalue())


def test_the_time_that_is_left_is_in_proportion_to_costs_after_the_first_layer(capsys, monkeypatch):
    callback, now = Progress(), [100.0]
    callback._tokens = 0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    callback.on_layers_begin(4, {0: 2.0, 1: 1.0, 2: 1.0, 3: 4.0})
    for index, now[0] in enumerate((110.0, 113.0, 116.0, 128.0)):
        callback.on_layer_end(index, LayerReport(f"model.layers.{index}", None, 0.0), [])
    times = [line.split("tokens; ")[1] for line in capsys.readouterr().err.splitlines()]
    assert times == ["00:10 gone", "00:13 gone, 00:15 left", "00:16 gone, 00:12 left", "00:28 gone, 00:00 left"]


@pytest.mark.parametrize("terminal", [False, True])
def test_bars_of_any_command_become_lines_now_and_then_unless_a_terminal_shows_them(monkeypatch, terminal):
    stream, now = (Terminal if terminal else io.StringIO)(), [0.0]
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(main.time, "monotonic", lambda: now[0])

    def command(_):
        for second in (1, 31, 32, 62):
            now[0] = second
            sys.stderr.write(f"\rSampling: {second}%")
        sys.stderr.write("\n")
        sys.stderr.write("a warning\n")
        return 0

    assert main.execute(argparse.Namespace(fista_run=command)) == 0
    bars = "\rSampling: 1%\rSampling: 31%\rSampling: 32%\rSampling: 62%\n"
    assert stream.getvalue() == (bars if terminal else "Sampling: 31%\nSampling: 62%\n") + "a warning\n"
