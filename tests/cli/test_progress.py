"""What a run shows while it prunes: in a terminal, and in a log."""

import argparse
import io
import re
import sys
import time
from contextlib import closing, suppress

import pytest
from tiny_llama import tiny_llama, tiny_tokens
from tiny_models import tiny_model

from optimum_fista import FistaPruner, FistaPruningConfig, PruningCallback
from optimum_fista.cli import main
from optimum_fista.prune.progress import Progress
from optimum_fista.records import LayerReport


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown_of(capsys, model, **options) -> str:
    pruner = FistaPruner(FistaPruningConfig(**options))
    pruner.prune(model, tiny_tokens().split(4))
    return capsys.readouterr().err


def test_a_bar_shows_operators_and_layers_and_disappears_at_the_end(capsys):
    shown = shown_of(capsys, tiny_llama(num_hidden_layers=3), method="wanda")

    assert "\r0 of 3 decoder layers done: mlp.up_proj, fit error 0." in shown

    errors = r"fit error 0\.\d{4} on average, 0\.\d{4} at most"
    layer = rf"\rdecoder layer 1 \(2 of 3\): {errors} \((self_attn|mlp)\.\w+_proj\)"

    assert re.search(
        layer + r"\n\r2 of 3 decoder layers done \|.*\| 00:\d\d gone, 00:\d\d left", shown
    )
    assert re.search(r"\r *\r$", shown)


def test_every_stage_of_a_run_from_files_has_a_bar(capsys, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "dense")

    class Stop(PruningCallback):
        def on_layer_end(self, index, layer, operators):
            raise KeyboardInterrupt

    for callbacks in ((Stop(),), ()):
        pruner = FistaPruner(FistaPruningConfig(), callbacks=callbacks)
        with suppress(KeyboardInterrupt):
            pruner.prune(
                tmp_path / "dense",
                tiny_tokens().split(4),
                output_dir=tmp_path / "pruned",
                device="cpu",
            )

    shown = capsys.readouterr().err
    names = [
        "Hashing weights",
        "Gradients of the loss",
        "Sharing zeros",
        "Recording inputs",
        "Reading finished layers",
    ]
    places = [shown.index(f"\r{name}:   0%") for name in names]
    assert places == sorted(places)
    passes = 2 * 2  # of 2 decoder layers, forwards and backwards; all sequences are in one batch
    assert re.search(rf"\rGradients of the loss: 100%.* {passes}/{passes} \[", shown)


def test_a_layer_that_loses_experts_is_not_called_dense(capsys):
    shown = shown_of(capsys, tiny_model("mixtral"), pattern="experts:0.25")

    assert re.search(
        r"decoder layer 1 \(2 of 2\): 3 of 4 experts left, fit error 0\.\d{4}\n", shown
    )


@pytest.mark.parametrize("num_done", [0, 4])  # 0: other processes prune the other layers
def test_layers_of_an_earlier_start_are_called_done_already(capsys, num_done):
    with closing(Progress(num_done)) as progress:
        progress.on_layers_begin(6, {3: 1.0, 4: 1.0})
        progress.on_layer_end(3, LayerReport("model.layers.3", None, 0.0), [])

    shown = capsys.readouterr().err
    assert shown.startswith("4 of 6 decoder layers are done already") == bool(num_done)
    assert (
        f"decoder layer 3 ({'5 of 6' if num_done else '1 of 2'}): no operator to prune\n" in shown
    )


@pytest.mark.parametrize("terminal", [False, True])
def test_bars_of_any_command_become_lines_now_and_then_unless_a_terminal_shows_them(
    monkeypatch, terminal
):
    stream = Terminal() if terminal else io.StringIO()
    now = [0.0]  # seconds
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def command(_):
        for second in (1, 31, 32, 62):
            now[0] = second
            sys.stderr.write(f"\rSampling: {second}%")
        sys.stderr.write("\n")
        for text in ("\n", "\rSaving", "\x1b[A", "\r\n"):  # a second bar, below the first
            sys.stderr.write(text)
        sys.stderr.write("a warning\n")
        sys.stderr.write("\rtwo\nlines\n")
        sys.stderr.write("\rinterrupted")
        for text in ("an error", "\n"):  # as print does
            sys.stderr.write(text)
        return 0

    assert main.execute(argparse.Namespace(fista_run=command, quiet=False)) == 0

    bars = "\rSampling: 1%\rSampling: 31%\rSampling: 32%\rSampling: 62%\n\n\rSaving\x1b[A\r\n"
    bars += "a warning\n\rtwo\nlines\n\rinterruptedan error\n"
    lines = "Sampling: 1%\nSampling: 32%\nSaving\na warning\n\rtwo\nlines\ninterrupted\nan error\n"
    assert stream.getvalue() == (bars if terminal else lines)
