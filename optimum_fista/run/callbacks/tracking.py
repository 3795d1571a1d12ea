"""A pruning run followed in TensorBoard, trackio, or Weights and Biases."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from accelerate.utils import patch_environment

from optimum_fista.installing import install_command
from optimum_fista.run.callbacks.pruning_callback import PruningCallback
from optimum_fista.run.reports.operator_grid import OperatorGrid
from optimum_fista.run.reports.report import LayerReport, OperatorReport

logger = logging.getLogger(__name__)

_INSTALL = {"tensorboard": install_command("tracking"), "trackio": "`pip install trackio`"}
"""Trackers by the names that Transformers' `report_to` has for them, and what to install."""


_CURVES = ("fit_error", "output_error", "held_out_fit_error", "held_out_output_error", "sparsity", "solve_seconds")


class TrackingCallback(PruningCallback):
    """Logs curves over the decoder layers: the step is the index of the layer.

    They are `fit_error/KIND`, `sparsity/KIND` and `solve_seconds/KIND` for every kind of operator
    (`self_attn.q_proj`; the mean over the experts of a mixture); `output_error/KIND`, `held_out_fit_error/KIND`,
    `held_out_output_error/KIND` and `hidden_state_error` if they are known; and `layer_seconds`. A tracker that fails
    is warned of once and no longer used: a run of hours does not end for a curve.

    Args:
        tracker: A `torch.utils.tensorboard.SummaryWriter`, or anything with `log(values, step=)`, such as the module
            `trackio` after `trackio.init` or a run of `wandb`. Closing it is left to the caller.

    Raises:
        ValueError: If it is neither.
    """

    def __init__(self, tracker: Any) -> None:
        if not hasattr(tracker, "add_scalar") and not hasattr(tracker, "log"):
            raise ValueError(
                f"tracker is a {type(tracker).__name__}: pass a SummaryWriter, or something with log(values, step=)."
            )
        self._tracker: Any = tracker  # `None` once it has failed

    def on_layer_end(self, index: int, layer: LayerReport, operators: Sequence[OperatorReport]) -> None:
        """Log the numbers of the layer."""
        values = {"layer_seconds": layer.seconds}
        if layer.hidden_state_error is not None:
            values["hidden_state_error"] = layer.hidden_state_error
        for (_, kind), found in OperatorGrid.of(operators).cells.items():
            for name in _CURVES:
                known = [value for operator in found if (value := getattr(operator, name)) is not None]
                if known:
                    values[f"{name}/{kind}"] = sum(known) / len(known)
        try:
            if hasattr(self._tracker, "add_scalar"):
                for name, value in values.items():
                    self._tracker.add_scalar(name, value, index)
            elif self._tracker is not None:
                self._tracker.log(values, step=index)
        except Exception as error:
            logger.warning("the tracker failed on decoder layer %d and is no longer used: %s", index, error)
            self._tracker = None


def require_tracker(name: str) -> None:
    """Refuse a tracker that there is not.

    Raises:
        ValueError: If the name is unknown.
        ImportError: If the package of that name is not installed.
    """
    if name not in _INSTALL:
        raise ValueError(f"report_to={name!r}: pass one of {', '.join(map(repr, _INSTALL))}.")
    if importlib.util.find_spec(name) is None:
        raise ImportError(f"report_to={name!r}: {name} is not installed: run {_INSTALL[name]}.")


@contextmanager
def open_tracker(name: str, folder: Path, run: str, config: Mapping[str, Any]) -> Iterator[TrackingCallback]:
    """Follow a pruning run in a tracker, which is closed at the end of the context, also after an error.

    Args:
        name: `"tensorboard"` or `"trackio"`.
        folder: Where it keeps its values. TensorBoard gets files of its own for every start of the run. Trackio
            gets it by the variable `TRACKIO_DIR`, which it reads when it is first imported.
        run: Name of the run; under the same name trackio continues a run that was interrupted.
        config: What trackio shows beside the curves.

    Yields:
        The callback to pass to `FistaPruner`.

    Raises:
        ValueError: If the name is unknown.
        ImportError: If the package of that name is not installed.
    """
    require_tracker(name)
    folder.mkdir(parents=True, exist_ok=True)
    settings: dict[str, Any] = {"run_name": "", "logging_dir": str(folder)}
    if name == "trackio":
        settings = {"run_name": "optimum-fista", "name": run, "config": dict(config), "resume": "allow", "embed": False}
    PartialState()  # the trackers of Accelerate ask it which process writes to the log
    tracker: Any = LOGGER_TYPE_TO_CLASS[name](**settings)
    tracker.main_process_only = False  # among several processes each follows its own decoder layers
    with patch_environment(TRACKIO_DIR=folder.resolve()):
        tracker.start()
        try:
            yield TrackingCallback(tracker)
        finally:
            tracker.finish()
