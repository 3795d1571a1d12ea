"""Callbacks for pruning runs.

The order of the calls: `on_prune_begin`, `on_layers_begin`, then for each decoder layer `on_operator_end` for each of
its operators and `on_layer_end`, and at last `on_prune_end`.
"""

from collections.abc import Mapping, Sequence

from optimum_fista.records import LayerReport, OperatorReport
from optimum_fista.report import PruningReport


class PruningCallback:
    """Follows a pruning run. The methods do nothing: override those that you need.

    Each of several processes calls its own callbacks, for its share of the decoder layers. Layers that an earlier
    start of the run finished are not reported again. An exception of a callback ends the run like any other error:
    finished layers stay on disk, and a model in memory is put back as it was (but not after `on_prune_end`).
    To let the run go on, the callback must catch its exceptions.
    """

    def on_prune_begin(self, report: PruningReport) -> None:
        """The run is about to prune; the report has the configuration, the model and the calibration."""

    def on_layers_begin(self, num_layers: int, costs: Mapping[int, float]) -> None:
        """Zeros are allocated, and the decoder layers are about to be pruned one after another.

        `costs` estimates the cost of each layer that is left, by index, in forward passes of a layer.
        """

    def on_operator_end(self, report: OperatorReport) -> None:
        """An operator is pruned. If the device then runs out of memory, its decoder layer is pruned once more."""

    def on_layer_end(
        self, index: int, layer: LayerReport, operators: Sequence[OperatorReport]
    ) -> None:
        """A decoder layer is finished, and on disk if the model is pruned from its files.

        `operators` is empty if the layer stays dense, is removed, or loses nothing but experts.
        """

    def on_prune_end(self, report: PruningReport) -> None:
        """The run is done; the report is complete."""


def tell_begin(callbacks: Sequence[PruningCallback], report: PruningReport) -> None:
    """Tell all callbacks that a run begins; its plan is made, and `report` describes it."""
    for callback in callbacks:
        callback.on_prune_begin(report)
