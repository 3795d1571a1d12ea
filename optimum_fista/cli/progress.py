"""How far `optimum-fista prune` is: a bar in a terminal, a line a decoder layer in a log."""

from __future__ import annotations

import io
import logging
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr
from statistics import fmean
from typing import Self, TextIO

from rich import progress
from rich.console import Console
from tqdm import tqdm

from optimum_fista.prune.callback import PruningCallback
from optimum_fista.report import LayerReport, OperatorReport, PruningReport, layer_and_kind

_EVERY = 30.0  # seconds between two lines about one piece of work


class Progress(PruningCallback):
    """Shows a run over the decoder layers on the standard error stream; a context.

    The time that is left is in proportion to the costs of the layers. It is known after the second layer: the first
    also meets cold caches and libraries that are not loaded.

    Args:
        stream: Where to; `None`: the standard error stream.
        shares: Whether other processes prune other decoder layers, which are not counted.
    """

    shows_layers = True

    def __init__(self, stream: TextIO | None = None, *, shares: bool = False) -> None:
        self._stream, self._shares, self._opened = stream or sys.stderr, shares, ExitStack()
        self._tokens = self._num_layers = self._num_done = 0
        self._costs: dict[int, float] = {}  # of the layers that are left, by index
        console = Console(file=self._stream, highlight=False)
        self._bar = progress.Progress(
            progress.TextColumn("{task.description}", markup=False),
            progress.BarColumn(),
            progress.TimeElapsedColumn(),
            progress.TimeRemainingColumn(),
            console=console,
            refresh_per_second=2,
            speed_estimate_period=float("inf"),
            transient=True,
            redirect_stdout=False,
            disable=not console.is_terminal or console.is_dumb_terminal,
        )

    def __enter__(self) -> Self:
        if self._bar.disable:
            self._opened.enter_context(bars_as_lines(self._stream))
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    def on_prune_begin(self, report: PruningReport) -> None:
        """Note what the run is calibrated on."""
        self._tokens = report.calibration["num_tokens"]

    def on_layers_begin(self, num_layers: int, costs: Mapping[int, float]) -> None:
        """Begin the bar."""
        self._num_layers, self._costs = len(costs) if self._shares else num_layers, dict(costs)
        self._num_done = self._num_layers - len(costs)
        self._total = sum(costs.values())
        self._task = self._bar.add_task(self._layer(), total=self._total)
        self._opened.enter_context(self._bar)
        if self._bar.disable and self._num_done:
            self._say(f"{self._num_done} of {num_layers} decoder layers are done already")

    def on_operator_end(self, report: OperatorReport) -> None:
        """Show the newest operator."""
        kind = layer_and_kind(report.name)[1]
        self._bar.update(self._task, description=f"{self._layer()}: {kind}, fit error {report.fit_error:.4f}")

    def on_layer_end(self, index: int, layer: LayerReport, operators: Sequence[OperatorReport]) -> None:
        """Say that a decoder layer is finished, in a log."""
        done, found = self._layer(), "no operator to prune"  # it stays dense, or is removed
        self._num_done += 1
        self._costs.pop(index, None)
        self._bar.update(self._task, completed=self._total - sum(self._costs.values()), description=self._layer())
        if layer.mixture is not None:
            mixture = layer.mixture
            left, total = len(mixture.groups_kept), len(mixture.expert_tokens)
            found = f"{left} of {total} experts left, fit error {mixture.fit_error:.4f}"
        if operators:
            worst = max(operators, key=lambda o: o.fit_error)
            mean, kind = fmean(o.fit_error for o in operators), layer_and_kind(worst.name)[1]
            found = f"fit error {mean:.4f} on average, {worst.fit_error:.4f} at most ({kind})"
        task = self._bar.tasks[self._task]
        times = f"{tqdm.format_interval(task.elapsed or 0)} gone"
        if task.time_remaining is not None:
            times += f", {tqdm.format_interval(task.time_remaining)} left"
        if self._bar.disable:
            self._say(f"{done}: {found}; {self._tokens:,} tokens; {times}")

    def on_prune_end(self, report: PruningReport) -> None:  # noqa: ARG002
        """Take the bar away."""
        self._opened.close()

    def _layer(self) -> str:
        return f"decoder layer {min(self._num_done + 1, self._num_layers)} of {self._num_layers}"

    def _say(self, text: str) -> None:
        self._stream.write(f"{text}\n")
        self._stream.flush()


@contextmanager
def log_shown(name: str) -> Iterator[None]:
    """Inside, the messages of the logger called `name` are printed on the standard error stream."""
    handler, logger = logging.StreamHandler(), logging.getLogger(name)
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.setLevel(before)
        logger.removeHandler(handler)


@contextmanager
def bars_as_lines(stream: TextIO) -> Iterator[None]:
    """Inside, bars on the standard error stream become lines of a log, one in half a minute at most."""
    with redirect_stderr(_Lines(stream)):
        yield


class _Lines(io.TextIOBase):
    """Passes text on to a stream; of bars, which begin with a carriage return, a line now and then."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._last, self._in_bar = stream, time.monotonic(), False

    def write(self, text: str) -> int:
        if text.startswith("\r"):
            self._in_bar, line = True, text.strip("\r \n\x1b[A")
            if line and time.monotonic() - self._last > _EVERY:
                self._last = time.monotonic()
                self._stream.write(f"{line}\n")
        elif self._in_bar and not text.strip():
            self._in_bar = False  # the end of a bar
        else:
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        self._stream.flush()
