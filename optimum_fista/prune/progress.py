"""The progress of a run on stderr: a bar, and a line for each finished decoder layer.

`Progress` is a callback of the run. Costs are in forward passes of a decoder layer (`Plan.costs`).
"""

import sys
from collections.abc import Mapping, Sequence
from statistics import fmean

from optimum_fista.bars import tqdm
from optimum_fista.operator_grid import layer_and_kind
from optimum_fista.prune.callback import PruningCallback
from optimum_fista.records import LayerReport, OperatorReport


class Progress(PruningCallback):
    """Shows a run over the decoder layers, of which an earlier start has finished `num_done`.

    The time left is estimated from their costs.
    """

    def __init__(self, num_done: int = 0) -> None:
        self._num_done = num_done
        self._bar = tqdm(disable=True)

    def close(self) -> None:
        """Take the bar away."""
        self._bar.close()

    def on_layers_begin(self, num_layers: int, costs: Mapping[int, float]) -> None:
        """Begin the bar (`self._bar`), and keep the costs and the number of layers; other processes' don't count.

        `costs` are of the decoder layers that are left, by index, in forward passes. A line on stderr says if an
        earlier start has finished `self._num_done` layers. `num_layers` is that of the whole model, and is not needed.
        Sets `self._costs` and `self._num_layers`, the layers of this process.
        """
        self._costs = costs
        self._num_layers = self._num_done + len(costs)
        if self._num_done:
            self._bar.write(
                f"{self._num_done} of {self._num_layers} decoder layers are done already",
                file=sys.stderr,
            )
        self._bar = tqdm(
            desc=self._layers_done,
            total=sum(costs.values()),
            bar_format="{desc} |{bar}| {elapsed} gone, {remaining} left",
            smoothing=0,  # the rate is that of the whole run, not of the last layer
            leave=False,
        )

    def on_operator_end(self, report: OperatorReport) -> None:
        """Show the newest operator in `self._bar`, with its relative errors on calibration and on held-out tokens.

        `report` is that of the operator, which is pruned.
        """
        _, kind = layer_and_kind(report.name)
        description = f"{self._layers_done}: {kind}, fit error {report.fit_error:.4f}"
        if report.held_out_fit_error is not None:
            description += f", held out {report.held_out_fit_error:.4f}"
        self._bar.set_description_str(description)

    def on_layer_end(
        self, index: int, layer: LayerReport, operators: Sequence[OperatorReport]
    ) -> None:
        """Print a line about the finished decoder layer, above the bar; a log keeps every one of them.

        Counts the layer in `self._num_done`, of `self._num_layers` in all. The bar (`self._bar`) moves by the cost of
        the layer, which `self._costs` has by index; its text `self._layers_done` is made of the two numbers.
        `operators` are the reports of the layer's pruned operators.
        """
        self._num_done += 1
        self._bar.set_description_str(self._layers_done, refresh=False)
        self._bar.update(self._costs[index])
        # The index is from 0, as in the names of operators.
        self._bar.write(
            f"decoder layer {index} ({self._num_done} of {self._num_layers}): {_result(layer, operators)}",
            file=sys.stderr,
        )

    @property
    def _layers_done(self) -> str:
        """How many decoder layers are done, in words."""
        return f"{self._num_done} of {self._num_layers} decoder layers done"


def _result(layer: LayerReport, operators: Sequence[OperatorReport]) -> str:
    """Say in words what became of a decoder layer.

    `layer` is its report, and `operators` are those of its pruned operators. `layer.mixture` is the report of its
    experts, if some of them were removed.
    """
    mixture = layer.mixture
    if operators:
        mean = fmean(operator.fit_error for operator in operators)
        worst = max(operators, key=lambda operator: operator.fit_error)
        _, kind = layer_and_kind(worst.name)
        return f"fit error {mean:.4f} on average, {worst.fit_error:.4f} at most ({kind})"
    if mixture is not None:
        num_kept = len(mixture.groups_kept)
        total = len(mixture.expert_tokens)
        return f"{num_kept} of {total} experts left, fit error {mixture.fit_error:.4f}"
    return "no operator to prune"  # it stays dense, or is removed
