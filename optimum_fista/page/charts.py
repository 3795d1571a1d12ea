"""The page's charts as numbers; the macros of charts.html draw them.

Places are fractions of a drawing: x from its left, y from its top.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from statistics import fmean

from optimum_fista.report import OperatorGrid, OperatorReport

STEPS = 9
"""Colours of a heat map's scale; style.css has them."""

_LETTERS = 7  # that fit a line of the narrowest column
_LABELS = 12  # below the axis of a line chart


@dataclass(frozen=True)
class Cell:
    """A number of a heat map; `step` is the index of its colour, `None` if it is not finite."""

    step: int | None
    text: str
    short: str
    title: str


@dataclass(frozen=True)
class HeatMap:
    """A number of every operator, by decoder layer and kind."""

    name: str  # what the number is
    groups: Sequence[tuple[int, int, list[str]]]  # neighbours in the same module: first column, how many, name in lines
    columns: Sequence[tuple[str, list[str]]]  # names, whole and in lines
    rows: Sequence[tuple[str, list[Cell | None]]]  # names and cells; `None` if there is no operator
    low: str  # of the first colour
    high: str


def heat_map(
    operators: Iterable[OperatorReport],
    name: str,
    value_of: Callable[[OperatorReport], float],
    text_of: Callable[[float], str],
    short_of: Callable[[float], str],
    *,
    from_zero: bool = False,
) -> HeatMap:
    """The heat map of the number that `value_of` gives for each operator; `short_of` writes it in a cell.

    Kinds with several operators in a layer, the experts of a mixture, get two columns: mean and maximum. The scale
    begins at the smallest number unless `from_zero`.
    """
    grid = OperatorGrid(operators)
    numbers = {place: [value_of(operator) for operator in found] for place, found in grid.cells.items()}
    several = {kind for (_, kind), found in numbers.items() if len(found) > 1}
    columns = [(kind, summary) for kind in grid.kinds for summary in (("mean", "max") if kind in several else ("",))]
    values = {
        (layer, kind, summary): max(numbers[layer, kind]) if summary == "max" else fmean(numbers[layer, kind])
        for layer in grid.layers
        for kind, summary in columns
        if (layer, kind) in numbers
    }
    finite = [value for value in values.values() if math.isfinite(value)]
    low, high = 0.0 if from_zero else min(finite, default=0.0), max(finite, default=0.0)

    def cell(layer: str, kind: str, summary: str) -> Cell | None:
        if (layer, kind) not in numbers:
            return None
        value = values[layer, kind, summary]
        of = f", {summary} of {len(numbers[layer, kind])}" if summary else ""
        title = f"{f'{layer}.{kind}'.lstrip('.')}: {name} {text_of(value)}{of}"
        step = min(STEPS - 1, int(STEPS * (value - low) / (high - low or 1.0))) if math.isfinite(value) else None
        return Cell(step, text_of(value), short_of(value), title)

    runs = [(module, len(list(run))) for module, run in groupby(kind.rpartition(".")[0] for kind, _ in columns)]
    starts = accumulate((span for _, span in runs), initial=0)
    groups = [(at, span, _lines(module, _LETTERS * span)) for at, (module, span) in zip(starts, runs, strict=False)]
    names = [(f"{kind} {s}".strip(), _lines(kind.rpartition(".")[2]) + ([s] if s else [])) for kind, s in columns]
    rows = [(la.rpartition(".")[2], [cell(la, *column) for column in columns]) for la in grid.layers]
    return HeatMap(name, groups, names, rows, text_of(low), text_of(high))


def _lines(name: str, letters: int = _LETTERS) -> list[str]:
    """A name in short lines, broken after `_`, `.` and a blank and before `[`; a part that is too long stays whole."""
    lines = [""]
    for part in re.findall(r"\[?[^_. \[]*[_. ]*", name)[:-1]:  # the last match is empty
        if lines[-1] and len(lines[-1]) + len(part) > letters:
            lines.append(part)
        else:
            lines[-1] += part
    return lines


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
    unit: str = ""  # what the texts of the ticks count


def line_chart(
    labels: Sequence[str],
    series: Mapping[str, Sequence[float | None]],
    text_of: Callable[[float], str],
    unit: tuple[float, str] = (1.0, ""),
) -> LineChart | None:
    """The chart of all finite values, from zero up; `None` if there are none.

    `labels` are the names of the decoder layers. A series has a value a layer, `None` if it is not known. The unit is
    how much one of the axis is, and its name.
    """
    known = {
        name: found
        for name, values in series.items()
        if (found := [(i, value) for i, value in enumerate(values) if value is not None and math.isfinite(value)])
    }
    if not known:
        return None
    highest = max(value for found in known.values() for _, value in found) / unit[0]
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
        y = 1 - value / unit[0] / (step * count)
        return Point(places[index], y, f"layer {labels[index]}{of}: {text_of(value)}")

    return LineChart(
        {name: [point(name, *at) for at in found] for name, found in known.items()},
        [(1 - i / count, f"{step * i:.{digits}f}") for i in range(count + 1)],
        [(places[index], labels[index]) for index in drawn[:: math.ceil(len(drawn) / _LABELS)]],
        unit[1],
    )
