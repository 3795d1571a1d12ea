"""What a run shows while it prunes: in a terminal, and in a log."""

import io
import re
import sys

import pytest
import rich.progress
from tiny_llama import tiny_llama, tiny_tokens
from tiny_models import tiny_model

from optimum_fista import FistaPruner, FistaPruningConfig
from optimum_fista.cli import progress
from optimum_fista.cli.progress import Progress, bars_as_lines
from optimum_fista.report import LayerReport


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


def test_a_terminal_has_a_bar_that_is_taken_away(monkeypatch):
    update = rich.progress.Progress.update
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(rich.progress.Progress, "update", lambda bar, *of, **to: update(bar, *of, **to, refresh=True))
    shown = shown_in(Terminal())
    assert "decoder layer 1 of 3: mlp.up_proj, fit error 0." in shown
    assert "decoder layer 3 of 3: mlp.down_proj, fit error 0." in shown
    assert shown.endswith("\x1b[2K") or "\x1b[1A\x1b[2K" in shown[-40:]


def test_the_time_that_is_left_is_in_proportion_to_costs_after_the_first_layer(monkeypatch):
    stream, now = io.StringIO(), [100.0]
    callback = Progress(stream)
    monkeypatch.setattr(callback._bar, "get_time", lambda: now[0])
    callback.on_layers_begin(4, {0: 2.0, 1: 1.0, 2: 1.0, 3: 4.0})
    for index, now[0] in enumerate((110.0, 113.0, 116.0, 128.0)):
        callback.on_layer_end(index, LayerReport(f"model.layers.{index}", None, 0.0), [])
    times = [line.split("tokens; ")[1] for line in stream.getvalue().splitlines()]
    assert times == ["00:10 gone", "00:13 gone, 00:15 left", "00:16 gone, 00:12 left", "00:28 gone, 00:00 left"]


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
