"""What a run shows while it prunes: in a terminal, and in a log."""

import io
import re
import sys

import pytest
from rich.console import Console
from tiny_llama import tiny_llama, tiny_tokens
from tiny_models import tiny_model

from optimum_fista import FistaPruner, FistaPruningConfig
from optimum_fista.cli import progress
from optimum_fista.cli.progress import Progress, TimeLeft, bars_as_lines
from optimum_fista.run.reports.report import LayerReport


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown_in(stream: io.StringIO) -> str:
    callback = Progress(stream)
    with callback:
        pruner = FistaPruner(FistaPruningConfig(method="wanda"), callbacks=[callback])
        pruner.prune(tiny_llama(num_hidden_layers=3), tiny_tokens().split(4))
    return stream.getvalue()


def test_a_log_has_a_line_a_decoder_layer_and_no_bar(capsys):
    lines = shown_in(io.StringIO()).splitlines()
    assert len(lines) == 3
    pattern = (
        r"decoder layer 2 of 3: fit error 0\.\d{4} on average, 0\.\d{4} at most \((self_attn|mlp)\.\w+_proj\); "
        r"128 tokens; 00:\d\d gone, 00:\d\d left"
    )
    assert re.fullmatch(pattern, lines[1])
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("shares", [False, True])
def test_layers_of_other_processes_are_not_called_done(shares):
    callback = Progress(stream := io.StringIO(), shares=shares)
    callback.on_layers_begin(6, {3: 1.0, 4: 1.0})
    callback.on_layer_end(3, LayerReport("model.layers.3", None, 0.0), [])
    first, last = ([], "1 of 2") if shares else (["4 of 6 decoder layers are done already"], "5 of 6")
    *before, line = stream.getvalue().splitlines()
    assert before == first
    assert line.startswith(f"decoder layer {last}: no operator to prune")


def test_a_layer_that_loses_experts_is_not_called_dense():
    with Progress(stream := io.StringIO()) as callback:
        pruner = FistaPruner(FistaPruningConfig(pattern="experts:0.25"), callbacks=[callback])
        pruner.prune(tiny_model("mixtral"), tiny_tokens().split(4))
    line = stream.getvalue().splitlines()[1]
    assert re.match(r"decoder layer 2 of 2: 3 of 4 experts left, fit error 0\.\d{4}; 128 tokens", line)


@pytest.mark.parametrize(("columns", "whole"), [("100", True), ("40", False)])
def test_a_terminal_has_a_table_that_fits(monkeypatch, columns, whole):
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    callback = Progress(Terminal())
    callback._console = Console(file=Terminal(), width=int(columns), force_terminal=True)
    callback.on_layers_begin(3, {0: 1.0, 1: 1.0, 2: 1.0})
    report = FistaPruner(FistaPruningConfig(method="wanda"), progress=False).prune(tiny_llama(), tiny_tokens().split(4))
    for operator in report.operators:
        callback.on_operator_end(operator)
    callback.on_layer_end(0, report.layers[0], report.operators[:7])
    with callback._console.capture() as captured:
        callback._console.print(callback._table())
    callback.on_prune_end(report)
    text = captured.get()
    assert "decoder layer 2 of 3" in text
    assert re.search(r"^(\x1b\[\d*m)*operator", text, re.MULTILINE)  # on a line of its own
    assert "mlp.down_proj" in text
    assert ("on average" in text) == whole
    assert "\x1b[3" not in text  # no colour


def test_the_terminal_is_left_without_the_table(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    shown = shown_in(Terminal())
    assert "decoder layer" in shown
    assert shown.endswith("\x1b[2K") or "\x1b[1A\x1b[2K" in shown[-40:]


def test_the_time_that_is_left_is_in_proportion_to_costs_after_the_first_layer():
    left = TimeLeft({0: 2.0, 1: 1.0, 2: 1.0, 3: 4.0}, 100.0)
    assert left.at(101.0) is None
    left.finish(0, 110.0)
    assert left.at(110.0) == pytest.approx(30.0)
    assert left.at(112.0) == pytest.approx(28.0)
    left.finish(1, 113.0)
    left.finish(2, 116.0)  # from now on without the first layer, which was slower
    assert left.at(116.0) == pytest.approx(12.0)
    assert left.at(200.0) == 0.0


def test_bars_become_lines_now_and_then(monkeypatch):
    log, now = io.StringIO(), [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with bars_as_lines(log):
        for second in (1, 31, 32, 62):
            now[0] = second
            sys.stderr.write(f"\rSampling: {second}%")
        sys.stderr.write("\n")
        sys.stderr.write("a warning\n")
    assert log.getvalue() == "Sampling: 31%\nSampling: 62%\na warning\n"
