"""The progress bar and the messages of the processes of `optimum-fista prune`.

The bar is one of tqdm, like all others; without a terminal, `optimum_fista.cli.main` turns it into lines.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import fmean

from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from optimum_fista.prune.callback import PruningCallback
from optimum_fista.report import LayerReport, OperatorReport, PruningReport, layer_and_kind


class Progress(PruningCallback):
    """Show a run over the decoder layers; the estimate of the time left depends on the costs of the layers.

    Args:
        shares: Whether other processes prune other decoder layers; those are not counted.
    """

    shows_layers = True

    def __init__(self, *, shares: bool = False) -> None:
        self._shares, self._bar = shares, tqdm(disable=True)

    def close(self) -> None:
        """Take the bar away."""
        self._bar.close()

    def on_layers_begin(self, num_layers: int, costs: Mapping[int, float]) -> None:
        """Begin the bar."""
        self._costs = costs  # of the layers that are left, by index
        self._num_layers = len(costs) if self._shares else num_layers
        self._num_done = self._num_layers - len(costs)
        if self._num_done:
            print(f"{self._num_done} of {num_layers} decoder layers are done already", file=sys.stderr)
        # smoothing=0: the rate is that of the whole run, not of the last layer
        layout = {"bar_format": "{desc} |{bar}| {elapsed} gone, {remaining} left", "smoothing": 0, "leave": False}
        self._bar = tqdm(desc=self._layer, total=sum(costs.values()), **layout)

    def on_operator_end(self, report: OperatorReport) -> None:
        """Show the newest operator."""
        kind = layer_and_kind(report.name)[1]
        self._bar.set_description_str(f"{self._layer}: {kind}, fit error {report.fit_error:.4f}")

    def on_layer_end(self, index: int, layer: LayerReport, operators: Sequence[OperatorReport]) -> None:
        """Print a line about the finished decoder layer, above the bar; a log keeps every one of them."""
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
        self._bar.set_description_str(self._layer, refresh=False)
        self._bar.update(self._costs.get(index, 0.0))
        self._bar.write(f"{done}: {found}", file=sys.stderr)

    def on_prune_end(self, report: PruningReport) -> None:  # noqa: ARG002
        """Take the bar away before the model is written."""
        self.close()

    @property
    def _layer(self) -> str:
        return f"{self._num_done} of {self._num_layers} decoder layers done"


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
