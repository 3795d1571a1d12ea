"""How far `optimum-fista prune` is: a live table in a terminal, a line a decoder layer in a log."""

from __future__ import annotations

import io
import logging
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr
from statistics import fmean
from typing import Self, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text
from tqdm import tqdm

from optimum_fista.run.callbacks.pruning_callback import PruningCallback
from optimum_fista.run.reports.operator_grid import layer_and_kind
from optimum_fista.run.reports.report import LayerReport, OperatorReport, PruningReport

_SHOWN = 10  # kinds of operators
_NARROW = 64  # columns of a terminal without room for the whole table
_EVERY = 30.0  # seconds between two lines about one piece of work


class TimeLeft:
    """Seconds that the decoder layers still take, from how long those before took.

    Layers cost unequal amounts of work: `left = cost left * seconds a unit of cost`. The first layer also meets cold
    caches and libraries that are not loaded, so it counts only until there are two others.

    Args:
        costs: What each layer costs, by index, in any unit.
        now: The time at which the first one begins.
    """

    def __init__(self, costs: Mapping[int, float], now: float) -> None:
        self._costs = dict(costs)
        self._left = dict(costs)
        self._done: list[tuple[float, float]] = []  # cost and seconds
        self._last = now

    @property
    def cost(self) -> float:
        """Cost of the layers that are left."""
        return sum(self._left.values())

    def finish(self, index: int, now: float) -> None:
        """A layer is finished."""
        self._left.pop(index, None)
        self._done.append((self._costs.get(index, 0.0), now - self._last))
        self._last = now

    def at(self, now: float) -> float | None:
        """What is left; `None` before the first layer is finished."""
        counted = self._done[1:] if len(self._done) > 2 else self._done
        cost = sum(cost for cost, _ in counted)
        if not cost:
            return None
        left = self.cost * sum(seconds for _, seconds in counted) / cost
        return max(0.0, left - (now - self._last))


class Progress(PruningCallback):
    """Shows a run over the decoder layers on the standard error stream; a context.

    Args:
        stream: Where to; `None`: the standard error stream.
        shares: Whether other processes prune other decoder layers, which are not counted.
    """

    shows_layers = True

    def __init__(self, stream: TextIO | None = None, *, shares: bool = False) -> None:
        self._tokens = 0
        self._stream, self._shares = stream or sys.stderr, shares
        self._console = Console(file=self._stream, highlight=False)
        self._is_live = self._console.is_terminal and not self._console.is_dumb_terminal
        self._live: Live | None = None
        self._opened = ExitStack()
        self._num_layers, self._costs, self._num_done = 0, dict[int, float](), 0
        self._left = TimeLeft({}, 0.0)
        self._started = 0.0
        self._reports: dict[str, list[OperatorReport]] = {}  # by kind, in the order in which they are pruned

    def __enter__(self) -> Self:
        if not self._is_live:
            self._opened.enter_context(bars_as_lines(self._stream))
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    def on_prune_begin(self, report: PruningReport) -> None:
        """Note what the run is calibrated on."""
        self._tokens = report.calibration["num_tokens"]

    def on_layers_begin(self, num_layers: int, costs: Mapping[int, float]) -> None:
        """Begin the table."""
        self._started = time.perf_counter()
        self._num_layers, self._costs = len(costs) if self._shares else num_layers, dict(costs)
        self._num_done = self._num_layers - len(costs)
        self._left = TimeLeft(costs, self._started)
        if self._is_live:
            self._live = Live(
                console=self._console,
                get_renderable=self._table,
                refresh_per_second=2,
                transient=True,
                redirect_stdout=False,
            )
            self._opened.enter_context(self._live)
        elif self._num_done:
            self._say(f"{self._num_done} of {num_layers} decoder layers are done already")

    def on_operator_end(self, report: OperatorReport) -> None:
        """Add an operator to the table."""
        self._reports.setdefault(layer_and_kind(report.name)[1], []).append(report)

    def on_layer_end(self, index: int, layer: LayerReport, operators: Sequence[OperatorReport]) -> None:
        """Say that a decoder layer is finished, in a log."""
        now = time.perf_counter()
        self._left.finish(index, now)
        self._num_done += 1
        if self._is_live:
            return
        found = "no operator to prune"  # it stays dense, or is removed
        if layer.mixture is not None:
            mixture = layer.mixture
            left, total = len(mixture.groups_kept), len(mixture.expert_tokens)
            found = f"{left} of {total} experts left, fit error {mixture.fit_error:.4f}"
        if operators:
            worst = max(operators, key=lambda o: o.fit_error)
            mean, kind = fmean(o.fit_error for o in operators), layer_and_kind(worst.name)[1]
            found = f"fit error {mean:.4f} on average, {worst.fit_error:.4f} at most ({kind})"
        done = f"decoder layer {self._num_done} of {self._num_layers}"
        self._say(f"{done}: {found}; {self._tokens:,} tokens; {self._time(now)}")

    def on_prune_end(self, report: PruningReport) -> None:  # noqa: ARG002
        """Take the table away."""
        self._opened.close()

    def _time(self, now: float) -> str:
        left = self._left.at(now)
        done = f"{tqdm.format_interval(now - self._started)} gone"
        return done if left is None else f"{done}, {tqdm.format_interval(left)} left"

    def _say(self, text: str) -> None:
        self._stream.write(f"{text}\n")
        self._stream.flush()

    def _table(self) -> Group:
        """The newest operator of every kind below a line about the whole."""
        now, narrow = time.perf_counter(), self._console.width < _NARROW
        layer = min(self._num_done + 1, self._num_layers)
        head = Text(f"decoder layer {layer} of {self._num_layers}, {self._tokens:,} tokens: {self._time(now)}")
        total = sum(self._costs.values()) or 1.0
        done = total - self._left.cost
        bar = ProgressBar(total=total, completed=done, width=min(60, self._console.width))
        line = Table.grid()  # a bar alone does not end its line
        line.add_row(bar)
        table = Table(box=None, padding=(0, 2, 0, 0))
        table.add_column("operator", no_wrap=True, overflow="ellipsis")
        for name in ("fit error", *(() if narrow else ("on average", "at most", "zeros", "seconds"))):
            table.add_column(name, justify="right", no_wrap=True)
        for kind, found in list(self._reports.items())[:_SHOWN]:
            last, errors = found[-1], [o.fit_error for o in found]
            more = f"{fmean(errors):.4f}", f"{max(errors):.4f}", f"{last.sparsity:.1%}", f"{last.solve_seconds:.1f}"
            table.add_row(kind, f"{last.fit_error:.4f}", *(() if narrow else more))
        return Group(head, line, *([table] if self._reports else []))


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
        self._stream = stream
        self._last = time.monotonic()
        self._in_bar = False

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

    def isatty(self) -> bool:
        return False
