"""How far `optimum-fista prune` is: a bar in a terminal, a line a decoder layer in a log.

`optimum_fista.cli.main` turns the bars of everything else into lines if the standard error stream is no terminal.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import fmean

from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from optimum_fista.prune.callback import PruningCallback
from optimum_fista.report import LayerReport, OperatorReport, PruningReport, layer_and_kind


class Progress(PruningCallback):
    """Show a run over the decoder layers on the standard error stream.

    The time that is left is in proportion to the costs of the layers. It is known after the second layer: the first
    also meets cold caches and libraries that are not loaded.

    Args:
        shares: Whether other processes prune other decoder layers, which are not counted.
    """

    shows_layers = True

    def __init__(self, *, shares: bool = False) -> None:
        self._shares, self._bar = shares, tqdm(disable=True)

    def close(self) -> None:
        """Take the bar away."""
        self._bar.close()

    def on_prune_begin(self, report: PruningReport) -> None:
        """Note what the run is calibrated on."""
        self._tokens = report.calibration["num_tokens"]

    def on_layers_begin(self, num_layers: int, costs: Mapping[int, float]) -> None:
        """Begin the bar."""
        self._costs, self._started = dict(costs), time.monotonic()  # costs of the layers that are left, by index
        self._first_end = 0.0, 0.0  # when the first layer was done, and the cost of the others
        self._num_layers = len(costs) if self._shares else num_layers
        self._num_done = self._num_layers - len(costs)
        self._total = sum(costs.values())
        layout = "{desc} |{bar}|{postfix}"
        # disable=None: no bar unless the stream is a terminal
        self._bar = tqdm(desc=self._layer(), total=self._total, bar_format=layout, leave=False, disable=None)
        if self._bar.disable and self._num_done:
            print(f"{self._num_done} of {num_layers} decoder layers are done already", file=sys.stderr, flush=True)

    def on_operator_end(self, report: OperatorReport) -> None:
        """Show the newest operator."""
        kind = layer_and_kind(report.name)[1]
        self._bar.set_description_str(f"{self._layer()}: {kind}, fit error {report.fit_error:.4f}")

    def on_layer_end(self, index: int, layer: LayerReport, operators: Sequence[OperatorReport]) -> None:
        """Say that a decoder layer is finished, in a log."""
        self._num_done += 1
        done = f"decoder layer {index} ({self._num_done} of {self._num_layers})"  # from 0, as in the names of operators
        found = "no operator to prune"  # it stays dense, or is removed
        if layer.mixture is not None:
            mixture = layer.mixture
            left, total = len(mixture.groups_kept), len(mixture.expert_tokens)
            found = f"{left} of {total} experts left, fit error {mixture.fit_error:.4f}"
        if operators:
            worst = max(operators, key=lambda o: o.fit_error)
            mean, kind = fmean(o.fit_error for o in operators), layer_and_kind(worst.name)[1]
            found = f"fit error {mean:.4f} on average, {worst.fit_error:.4f} at most ({kind})"
        self._costs.pop(index, None)
        times = self._times()
        if self._bar.disable:
            print(f"{done}: {found}; {self._tokens:,} tokens; {times}", file=sys.stderr, flush=True)
        else:
            self._bar.n = self._total - sum(self._costs.values())
            self._bar.set_postfix_str(times)

    def on_prune_end(self, report: PruningReport) -> None:  # noqa: ARG002
        """Take the bar away."""
        self.close()

    def _layer(self) -> str:
        return f"{self._num_done} of {self._num_layers} decoder layers done"

    def _times(self) -> str:
        """Time that is gone and, from the second layer on, left."""
        now, left = time.monotonic(), sum(self._costs.values())
        times = f"{tqdm.format_interval(now - self._started)} gone"
        first_end, others = self._first_end
        if not first_end:
            self._first_end = now, left
            return times
        # seconds for the cost of the layers since the first one, times the cost that is left
        return f"{times}, {tqdm.format_interval((now - first_end) / (others - left) * left)} left"


@contextmanager
def first_process_speaks(index: int, name: str) -> Iterator[None]:
    """Print the messages of the logger called `name` in process 0; the others show no warnings and no bars."""
    if index:
        set_verbosity_error()
        disable_progress_bar()
        yield
        return
    handler, logger = logging.StreamHandler(), logging.getLogger(name)
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.setLevel(before)
        logger.removeHandler(handler)
