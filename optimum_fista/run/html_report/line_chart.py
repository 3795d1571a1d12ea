"""Numbers by decoder layer as lines."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

HEIGHT = 200
"""Pixels between the axis and the highest tick."""

_LABELS = 12


@dataclass(frozen=True)
class Point:
    """A place: `x` in percent of the width, `y` in pixels from the top."""

    x: float
    y: float
    label: str
    value: float
    title: str


@dataclass(frozen=True)
class Line:
    """Points by decoder layer; those next to each other are joined."""

    name: str
    points: tuple[Point, ...]


@dataclass(frozen=True)
class LineChart:
    """What is drawn.

    Attributes:
        lines: One a quantity.
        ticks: Places and texts of the horizontal lines.
        labelled: Places and texts below the axis.
        unit: What the texts of the ticks count.
    """

    lines: tuple[Line, ...]
    ticks: tuple[tuple[float, str], ...]
    labelled: tuple[tuple[float, str], ...]
    unit: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the lines, where there are several to tell apart."""
        return tuple(line.name for line in self.lines) if len(self.lines) > 1 else ()


def line_chart(
    labels: Sequence[str],
    series: Mapping[str, Sequence[float | None]],
    text_of: Callable[[float], str],
    unit: tuple[float, str] = (1.0, ""),
) -> LineChart | None:
    """The chart of all finite values, from zero up; `None` where there are none.

    Args:
        labels: Names of the decoder layers.
        series: By name, a value a layer; `None` where it is not known.
        text_of: How a value is written.
        unit: How much one of the axis is, and its name.
    """
    known = {
        name: [(index, value) for index, value in enumerate(values) if value is not None and math.isfinite(value)]
        for name, values in series.items()
    }
    known = {name: found for name, found in known.items() if found}
    if not known:
        return None
    highest = max(value for found in known.values() for _, value in found) / unit[0]
    step = _nice_step(highest)
    top = step * max(1, math.ceil(highest / step - 1e-9))
    digits = max(0, -math.floor(math.log10(step)))
    ticks = [(HEIGHT * (1 - step * i / top), f"{step * i:.{digits}f}") for i in range(round(top / step) + 1)]

    def point(name: str, index: int, value: float) -> Point:
        of = f", {name}" if len(known) > 1 else ""
        y = HEIGHT * (1 - value / unit[0] / top)
        return Point(_place(index, labels), y, labels[index], value, f"layer {labels[index]}{of}: {text_of(value)}")

    lines = tuple(Line(name, tuple(point(name, *at) for at in found)) for name, found in known.items())
    indices = sorted({index for found in known.values() for index, _ in found})
    labelled = tuple((_place(index, labels), labels[index]) for index in indices[:: math.ceil(len(indices) / _LABELS)])
    return LineChart(lines, tuple(ticks), labelled, unit[1])


def _place(index: int, labels: Sequence[str]) -> float:
    return 100 * (index + 0.5) / len(labels)


def _nice_step(highest: float) -> float:
    """1, 2 or 5 times a power of ten, so that the axis gets about five ticks."""
    rough = highest / 4 if highest > 0 else 1.0
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
