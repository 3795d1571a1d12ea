"""Trackers by the names that Transformers' `report_to` has for them."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from optimum_fista.run.callbacks.tracking_callback import TrackingCallback

_INSTALL = {"tensorboard": "'optimum-fista[tracking]'", "trackio": "trackio"}

TRACKERS = tuple(_INSTALL)
"""The names."""

_PROJECT = "optimum-fista"


def require_tracker(name: str) -> None:
    """Refuse a tracker that there is not.

    Raises:
        ValueError: If the name is unknown.
        ImportError: If the package of that name is not installed.
    """
    if name not in _INSTALL:
        raise ValueError(f"report_to={name!r}: pass one of {', '.join(map(repr, TRACKERS))}.")
    if importlib.util.find_spec(name) is None:
        raise ImportError(f"report_to={name!r}: {name} is not installed, run: pip install {_INSTALL[name]}")


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
    if name == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(str(folder)) as writer:
            yield TrackingCallback(writer)
        return
    before = os.environ.get("TRACKIO_DIR")
    os.environ["TRACKIO_DIR"] = str(folder.resolve())
    try:
        trackio = importlib.import_module("trackio")
        tracked = trackio.init(project=_PROJECT, name=run, config=dict(config), resume="allow", embed=False)
        try:
            yield TrackingCallback(tracked)
        finally:
            trackio.finish()
    finally:
        del os.environ["TRACKIO_DIR"]
        if before is not None:
            os.environ["TRACKIO_DIR"] = before
