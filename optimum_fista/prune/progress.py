"""What a run shows while it prunes: a bar, and a line for each finished decoder layer."""

import sys
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from optimum_fista.bars import tqdm
from optimum_fista.operator_grid import layer_and_kind
from optimum_fista.prune.callback import PruningCallback
from optimum_fista.report import LayerReport, OperatorReport


class Progress(PruningCallback):
    """Shows a run over the decoder layers, of which an earlier start has finished `num_done`.

    The time left is estimated from their costs.
    """

    def __init__(self, num_done: int = 0) -> None:
        self._num_done, self._bar = num_done, tqdm(disable=True)

    def close(self) -> None:
        """Take the bar away."""
        self._bar.close()

    def on_layers_begin(self, num_layers: int, costs: Mapping[int, float]) -> None:
        """Begin the bar; layers of other processes are not counted."""
        self._costs, self._num_layers = costs, self._num_done + len(costs)
        if self._num_done:
            self._bar.write(
                f"{self._num_done} of {self._num_layers} decoder layers are done already",
                file=sys.stderr,
            )
        # smoothing=0: the rate is that of the whole run, not of the last layer
        layout: dict[str, Any] = {
            "bar_format": "{desc} |{bar}| {elapsed} gone, {remaining} left",
            "smoothing": 0,
            "leave": False,
        }
        self._bar = tqdm(desc=self._layers, total=sum(costs.values()), **layout)

    def on_operator_end(self, report: OperatorReport) -> None:
        """Show the newest operator."""
        kind, error = layer_and_kind(report.name)[1], report.held_out_fit_error
        held_out = "" if error is None else f", held out {error:.4f}"
        self._bar.set_description_str(
            f"{self._layers}: {kind}, fit error {report.fit_error:.4f}{held_out}"
        )

    def on_layer_end(
        self, index: int, layer: LayerReport, operators: Sequence[OperatorReport]
    ) -> None:
        """Print a line about the finished decoder layer, above the bar; a log keeps every one of them."""
        self._num_done += 1
        done = f"decoder layer {index} ({self._num_done} of {self._num_layers})"  # from 0, as in the names of operators
        found = "no operator to prune"  # it stays dense, or is removed
        if (mixture := layer.mixture) is not None:
            left, total = len(mixture.groups_kept), len(mixture.expert_tokens)
            found = f"{left} of {total} experts left, fit error {mixture.fit_error:.4f}"
        if operators:
            worst = max(operators, key=lambda o: o.fit_error)
            mean, kind = fmean(o.fit_error for o in operators), layer_and_kind(worst.name)[1]
            found = f"fit error {mean:.4f} on average, {worst.fit_error:.4f} at most ({kind})"
        self._bar.set_description_str(self._layers, refresh=False)
        self._bar.update(self._costs[index])
        self._bar.write(f"{done}: {found}", file=sys.stderr)

    @property
    def _layers(self) -> str:
        return f"{self._num_done} of {self._num_layers} decoder layers done"
