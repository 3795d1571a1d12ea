"""The page's charts as numbers, which the macros of charts.html draw: tables with coloured cells, and lines.

Places in a drawing are fractions: x from its left, y from its top.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from optimum_fista.report import OperatorGrid, OperatorReport

STEPS = 9  # colours of a heat map's scale; style.css has them
_LABELS = 12  # below the axis of a line chart: more would touch each other


@dataclass(frozen=True)
class HeatMap:
    """A number of every operator, by decoder layer and kind, as text and as the index of a colour."""

    name: str  # what the number is
    columns: Sequence[str]
    rows: Sequence[tuple[str, list[tuple[str, int | None]]]]  # an empty text if there is no operator
    low: str  # of the first colour
    high: str


def heat_map(
    operators: Iterable[OperatorReport],
    name: str,
    value_of: Callable[[OperatorReport], float],
    text_of: Callable[[float], str],
    *,
    from_zero: bool = False,
) -> HeatMap:
    """The heat map of the number that `value_of` gives for each operator; its scale begins at the smallest or at zero.

    Kinds with several operators in a layer, the experts of a mixture, get two columns: mean and maximum.
    """
    grid = OperatorGrid(operators)
    numbers = {place: [value_of(operator) for operator in found] for place, found in grid.cells.items()}
    several = {kind for (_, kind), found in numbers.items() if len(found) > 1}
    columns = [(kind, how) for kind in grid.kinds for how in (("mean", "max") if kind in several else ("",))]
    values = {
        (layer, kind, how): max(numbers[layer, kind]) if how == "max" else fmean(numbers[layer, kind])
        for layer in grid.layers
        for kind, how in columns
        if (layer, kind) in numbers
    }
    finite = [value for value in values.values() if math.isfinite(value)]
    low, high = 0.0 if from_zero else min(finite, default=0.0), max(finite, default=0.0)

    def cell(layer: str, kind: str, how: str) -> tuple[str, int | None]:
        value = values.get((layer, kind, how))
        if value is None:
            return "", None
        step = min(STEPS - 1, int(STEPS * (value - low) / (high - low or 1.0))) if math.isfinite(value) else None
        return text_of(value), step

    rows = [(layer.rpartition(".")[2], [cell(layer, *column) for column in columns]) for layer in grid.layers]
    return HeatMap(name, [f"{kind} {how}".strip() for kind, how in columns], rows, text_of(low), text_of(high))


@dataclass(frozen=True)
class Point:
    """A place on a line, and what it says."""

    x: float
    y: float
    title: str


@dataclass(frozen=True)
class LineChart:
    """Lines over the decoder layers; a point is joined to the next."""

    lines: Mapping[str, Sequence[Point]]  # by the name of the quantity
    ticks: Sequence[tuple[float, str]]  # places and texts of the horizontal lines
    labels: Sequence[tuple[float, str]]  # places and texts below the axis


def line_chart(
    labels: Sequence[str],
    series: Mapping[str, Sequence[float | None]],
    text_of: Callable[[float], str],
    unit: float = 1.0,
) -> LineChart | None:
    """The chart of all finite values, from zero up; `None` if there are none.

    `labels` are the names of the decoder layers. A series has a value a layer, `None` if it is not known. The texts of
    the axis count units.
    """
    known = {
        name: found
        for name, values in series.items()
        if (found := [(i, value) for i, value in enumerate(values) if value is not None and math.isfinite(value)])
    }
    if not known:
        return None
    highest = max(value for found in known.values() for _, value in found) / unit
    rough = highest / 4 if highest > 0 else 1.0
    power = 10.0 ** math.floor(math.log10(rough))
    # 1, 2 or 5 times a power of ten, so that the axis gets about five ticks.
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    count = max(1, math.ceil(highest / step - 1e-9))
    digits = max(0, -math.floor(math.log10(step)))
    places = [(index + 0.5) / len(labels) for index in range(len(labels))]
    drawn = sorted({index for found in known.values() for index, _ in found})

    def point(name: str, index: int, value: float) -> Point:
        of = f", {name}" if len(known) > 1 else ""
        y = 1 - value / unit / (step * count)
        return Point(places[index], y, f"layer {labels[index]}{of}: {text_of(value)}")

    return LineChart(
        {name: [point(name, *at) for at in found] for name, found in known.items()},
        [(1 - i / count, f"{step * i:.{digits}f}") for i in range(count + 1)],
        [(places[index], labels[index]) for index in drawn[:: math.ceil(len(drawn) / _LABELS)]],
    )
