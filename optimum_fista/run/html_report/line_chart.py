"""A number by decoder layer as a line."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

HEIGHT = 200
"""Pixels between the axis and the highest tick."""

_LABELS = 16


@dataclass(frozen=True)
class Point:
    """A place: `x` in percent of the width, `y` in pixels from the top."""

    x: float
    y: float
    label: str
    value: float


@dataclass(frozen=True)
class LineChart:
    """What is drawn.

    Attributes:
        points: By decoder layer; those next to each other are joined.
        ticks: Places and texts of the horizontal lines.
        labelled: Points whose label is written below the axis.
    """

    points: tuple[Point, ...]
    ticks: tuple[tuple[float, str], ...]
    labelled: tuple[Point, ...]


def line_chart(labels: Sequence[str], values: Sequence[float | None]) -> LineChart | None:
    """The chart of finite values; `None` where there are none."""
    known = [(index, value) for index, value in enumerate(values) if value is not None and math.isfinite(value)]
    if not known:
        return None
    step = _nice_step(max(value for _, value in known))
    top = step * max(1, math.ceil(max(value for _, value in known) / step - 1e-9))
    digits = max(0, -math.floor(math.log10(step)))
    ticks = [(HEIGHT * (1 - step * i / top), f"{step * i:.{digits}f}") for i in range(round(top / step) + 1)]
    points = tuple(
        Point(100 * (index + 0.5) / len(labels), HEIGHT * (1 - value / top), labels[index], value)
        for index, value in known
    )
    return LineChart(points, tuple(ticks), points[:: math.ceil(len(points) / _LABELS)])


def _nice_step(highest: float) -> float:
    """1, 2 or 5 times a power of ten, so that the axis gets about five ticks."""
    rough = highest / 4 if highest > 0 else 1.0
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
