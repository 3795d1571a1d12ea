"""Callbacks for pruning runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from optimum_fista.report import LayerReport, OperatorReport, PruningReport


class PruningCallback:
    """Follows a pruning run; override what is needed, every method does nothing by itself.

    Methods are called in the process that prunes, between two pieces of work. With several processes each calls its own
    callbacks for the decoder layers of its share. Layers that an earlier start of the run finished are not reported
    again.

    An exception of a callback ends the run like any other error, so that raising one is the way to stop a run that goes
    wrong, and no failure hides in the log of a run of hours. From files to files nothing finished is lost by it: the
    decoder layers before are kept, that of `on_layer_end` included, and the same call resumes after them. A model in
    memory is put back as it was, as after an interrupt; after `on_prune_end` it is pruned, and can be saved. If a
    failure should not matter, the callback catches it itself.

    Attributes:
        shows_layers: Whether it shows the progress over the decoder layers, so that no bar is needed.
    """

    shows_layers: bool = False

    def on_prune_begin(self, report: PruningReport) -> None:
        """The run is about to prune; the report has the configuration, the model and the calibration."""

    def on_layers_begin(self, num_layers: int, costs: Mapping[int, float]) -> None:
        """Zeros are allocated, and the decoder layers are about to be pruned one after another.

        Args:
            num_layers: How many the model has.
            costs: By index, what each that is left takes, in forward passes of a layer: an estimate.
        """

    def on_operator_end(self, report: OperatorReport) -> None:
        """An operator is pruned. If the device then runs out of memory, its decoder layer is pruned once more."""

    def on_layer_end(self, index: int, layer: LayerReport, operators: Sequence[OperatorReport]) -> None:
        """A decoder layer is finished, and on disk if the model is pruned from its files.

        Args:
            index: Its index.
            layer: Its report.
            operators: Those of its operators; none if it stays dense, is removed, or loses nothing but experts.
        """

    def on_prune_end(self, report: PruningReport) -> None:
        """The run is done; the report is complete."""
