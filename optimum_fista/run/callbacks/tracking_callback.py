"""A pruning run followed in TensorBoard, trackio, or Weights & Biases."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from optimum_fista.run.callbacks.pruning_callback import PruningCallback
from optimum_fista.run.reports.operator_grid import OperatorGrid
from optimum_fista.run.reports.report import LayerReport, OperatorReport

logger = logging.getLogger(__name__)


class TrackingCallback(PruningCallback):
    """Logs curves over the decoder layers: the step is the index of the layer.

    They are `relative_error/KIND`, `sparsity/KIND` and `solve_seconds/KIND` for every kind of operator
    (`self_attn.q_proj`; the mean over the experts of a mixture), `held_out_error/KIND` and `hidden_state_error` where
    they are known, and `layer_seconds`. A tracker that fails is warned of once and no longer used: a run of hours does
    not end for a curve.

    Args:
        tracker: A `torch.utils.tensorboard.SummaryWriter`, or anything with `log(values, step=)`, such as the module
            `trackio` after `trackio.init` or a run of `wandb`. Closing it is left to the caller.

    Raises:
        ValueError: If it is neither.
    """

    def __init__(self, tracker: Any) -> None:
        self._log = _log_of(tracker)

    def on_layer_end(self, index: int, layer: LayerReport, operators: Sequence[OperatorReport]) -> None:
        """Log the numbers of the layer."""
        values = {"layer_seconds": layer.seconds}
        if layer.hidden_state_error is not None:
            values["hidden_state_error"] = layer.hidden_state_error
        for (_, kind), found in OperatorGrid.of(operators).cells.items():
            for name in ("relative_error", "held_out_error", "sparsity", "solve_seconds"):
                known = [value for operator in found if (value := getattr(operator, name)) is not None]
                if known:
                    values[f"{name}/{kind}"] = sum(known) / len(known)
        try:
            self._log(values, index)
        except Exception as error:
            logger.warning("the tracker failed on decoder layer %d and is no longer used: %s", index, error)
            self._log = _log_nothing


def _log_of(tracker: Any) -> Callable[[Mapping[str, float], int], None]:
    if hasattr(tracker, "add_scalar"):

        def add_scalars(values: Mapping[str, float], step: int) -> None:
            for name, value in values.items():
                tracker.add_scalar(name, value, step)

        return add_scalars
    if hasattr(tracker, "log"):
        return lambda values, step: tracker.log(dict(values), step=step)
    raise ValueError(
        f"tracker is a {type(tracker).__name__}: pass a SummaryWriter, or something with log(values, step=)."
    )


def _log_nothing(values: Mapping[str, float], step: int) -> None:
    """For a tracker that has failed."""
