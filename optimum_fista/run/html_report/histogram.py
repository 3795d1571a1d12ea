"""The distribution of row sparsities of one kind of operator as bars."""

from __future__ import annotations

from dataclasses import dataclass

from optimum_fista.run.html_report.numbers import share
from optimum_fista.run.html_report.row_sparsity import BINS, RowSparsities

HEIGHT = 56
"""Pixels of the highest bar."""

_BARS = 50


@dataclass(frozen=True)
class Bar:
    """A bar: `x` and `width` in percent of the width, `height` in pixels."""

    x: float
    width: float
    height: float
    title: str


@dataclass(frozen=True)
class Histogram:
    """Bars from 0% to 100% of zeros, and a summary in words."""

    name: str
    bars: tuple[Bar, ...]
    summary: str


def histogram(name: str, rows: RowSparsities) -> Histogram:
    """The histogram of a kind."""
    counts = rows.counts.reshape(_BARS, BINS // _BARS).sum(1)
    highest, width = int(counts.max()), 100 / _BARS
    bars = []
    for index, rows_in in enumerate(counts.tolist()):
        if rows_in:
            title = f"{rows_in:,} rows have {share(index / _BARS, 0)} to {share((index + 1) / _BARS, 0)} zeros"
            bars.append(Bar(index * width, width, max(1.0, HEIGHT * rows_in / highest), title))
    if rows.high - rows.low < 5e-4:
        summary = f"{share(rows.low)} in every row"
    else:
        summary = f"{share(rows.low)} to {share(rows.high)}, median {share(rows.median)}"
    return Histogram(name, tuple(bars), summary)
