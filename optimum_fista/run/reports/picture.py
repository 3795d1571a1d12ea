"""A picture of the fit errors for the model card."""

from __future__ import annotations

import io
import math

from optimum_fista.run.reports.operator_grid import OperatorGrid, layer_index
from optimum_fista.run.reports.report import PruningReport

PICTURE_FILE = "fista/relative_error.png"


def error_picture(report: PruningReport) -> bytes | None:
    """Draw the mean fit error by decoder layer and kind of operator as a heat map, PNG.

    Equal reports give equal bytes under one version of Matplotlib.

    Returns:
        The file's bytes; `None` if Matplotlib (extra `plots`) is not installed.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        return None
    grid = OperatorGrid.of(report.operators)
    values = [[_mean(grid, layer, kind) for kind in grid.kinds] for layer in grid.layers]
    size = (2.2 + 0.75 * len(grid.kinds), 2.0 + 0.16 * len(grid.layers))
    with rc_context({"font.family": "DejaVu Sans", "font.size": 8}):  # comes with Matplotlib
        figure = Figure(figsize=size, layout="constrained", facecolor="white")
        axes = figure.subplots()
        image = axes.imshow(values, aspect="auto", cmap="cividis_r", vmin=0)
        axes.set_xticks(range(len(grid.kinds)), grid.kinds, rotation=40, ha="right", rotation_mode="anchor")
        every = math.ceil(len(grid.layers) / 16)
        axes.set_yticks(range(0, len(grid.layers), every), [str(layer_index(la)) for la in grid.layers[::every]])
        axes.set(ylabel="decoder layer", title="fit error")
        axes.spines[:].set_visible(False)
        figure.colorbar(image, ax=axes, shrink=0.8)
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=110, metadata={"Software": None})
    return file.getvalue()


def _mean(grid: OperatorGrid, layer: str, kind: str) -> float:
    errors = [operator.fit_error for operator in grid.cells.get((layer, kind), ())]
    return sum(errors) / len(errors) if errors else math.nan
