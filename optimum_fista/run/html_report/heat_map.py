"""A number of every operator by decoder layer and kind, as the cells of a heat map and of a table."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from optimum_fista.run.reports.operator_grid import OperatorGrid, layer_index
from optimum_fista.run.reports.report import OperatorReport

STEPS = 9
"""Colours of the scale."""

_ROW = 19
_LINE = 13
_LETTERS = 7
_LETTER_WIDTH = 5.8
_LEAST_WIDTH = 44


@dataclass(frozen=True)
class Cell:
    """One cell; `step` is the index of its colour, `None` where its number is not finite."""

    column: int
    row: int
    step: int | None
    text: str
    title: str


@dataclass(frozen=True)
class Group:
    """Neighbouring columns whose operators are in the same module; `lines` is its name."""

    start: int
    span: int
    lines: tuple[str, ...]


@dataclass(frozen=True)
class HeatMap:
    """What is drawn; lengths are in pixels, columns share the width.

    Attributes:
        name: What the number is.
        groups: Names above those of the columns.
        columns: Names of the columns, in lines.
        headings: Names of the columns, whole.
        rows: Names of the rows.
        cells: All cells.
        table: By row, the text of every column, empty where there is no operator.
        low: Number of the first colour.
        high: Number of the last colour.
        group_height: Height of the names of the groups.
        head_height: Height of all names above the first row.
        least_width: Width that a column needs.
        row_height: Height of a row.
    """

    name: str
    groups: tuple[Group, ...]
    columns: tuple[tuple[str, ...], ...]
    headings: tuple[str, ...]
    rows: tuple[str, ...]
    cells: tuple[Cell, ...]
    table: tuple[tuple[str, ...], ...]
    low: str
    high: str
    group_height: int
    head_height: int
    least_width: int
    row_height: int = _ROW

    @property
    def height(self) -> int:
        """Height of all of it."""
        return self.head_height + self.row_height * len(self.rows)


def heat_map(
    grid: OperatorGrid,
    name: str,
    value_of: Callable[[OperatorReport], float],
    text_of: Callable[[float], str],
    short_of: Callable[[float], str],
    *,
    from_zero: bool,
) -> HeatMap:
    """The heat map of a number.

    Kinds with several operators in a layer, the experts of a mixture, get two columns: their mean and their maximum.

    Args:
        grid: The operators.
        name: What the number is.
        value_of: The number of an operator.
        text_of: How it is written.
        short_of: How it is written in a cell.
        from_zero: Whether the scale begins at 0, or at the smallest number.
    """
    columns = [(kind, summary) for kind in grid.kinds for summary in _summaries(grid, kind)]
    values: dict[tuple[int, int], float] = {}
    titles: dict[tuple[int, int], str] = {}
    for row, layer in enumerate(grid.layers):
        for column, (kind, summary) in enumerate(columns):
            numbers = [value_of(operator) for operator in grid.cells.get((layer, kind), ())]
            if numbers:
                value = max(numbers) if summary == "max" else sum(numbers) / len(numbers)
                values[row, column] = value
                of = f", {summary} of {len(numbers)}" if summary else ""
                titles[row, column] = f"{f'{layer}.{kind}'.lstrip('.')}: {name} {text_of(value)}{of}"
    finite = [value for value in values.values() if math.isfinite(value)]
    low, high = 0.0 if from_zero else min(finite, default=0.0), max(finite, default=0.0)
    cells = [
        Cell(column, row, _step(value, low, high), short_of(value), titles[row, column])
        for (row, column), value in values.items()
    ]
    texts = {place: text_of(value) for place, value in values.items()}
    names = [_lines(kind.rpartition(".")[2], summary) for kind, summary in columns]
    groups = _groups([kind.rpartition(".")[0] for kind, _ in columns])
    group_height = _LINE * max(len(group.lines) for group in groups) + 8
    return HeatMap(
        name=name,
        groups=tuple(groups),
        columns=tuple(names),
        headings=tuple(f"{kind} {summary}".strip() for kind, summary in columns),
        rows=tuple(str(layer_index(layer)) if layer else "" for layer in grid.layers),
        cells=tuple(cells),
        table=tuple(
            tuple(texts.get((row, column), "") for column in range(len(columns))) for row in range(len(grid.layers))
        ),
        low=text_of(low),
        high=text_of(high),
        group_height=group_height,
        head_height=group_height + _LINE * max(len(lines) for lines in names) + 6,
        least_width=max(_LEAST_WIDTH, int(_LETTER_WIDTH * max(len(line) for lines in names for line in lines)) + 4),
    )


def _summaries(grid: OperatorGrid, kind: str) -> tuple[str, ...]:
    """What the columns of a kind summarize its operators by; nothing where there is one in every layer."""
    several = any(len(grid.cells.get((layer, kind), ())) > 1 for layer in grid.layers)
    return ("mean", "max") if several else ("",)


def _step(value: float, low: float, high: float) -> int | None:
    """Index of a number's colour."""
    if not math.isfinite(value):
        return None
    return min(STEPS - 1, int(STEPS * (value - low) / (high - low))) if high > low else 0


def _lines(name: str, summary: str = "", letters: int = _LETTERS) -> tuple[str, ...]:
    """A name in short lines, broken behind `_`, `.` and a blank and in front of `[`; what is too long stays whole."""
    parts = re.findall(r"\[?[^_. \[]*[_. ]*", name)[:-1] or [""]
    lines = [parts[0]]
    for part in parts[1:]:
        if len(lines[-1]) + len(part) <= letters:
            lines[-1] += part
        else:
            lines.append(part)
    return (*lines, summary) if summary else tuple(lines)


def _groups(modules: Sequence[str]) -> list[Group]:
    """Runs of columns of the same module."""
    groups: list[Group] = []
    for column, module in enumerate(modules):
        previous = groups[-1] if groups else None
        if previous is not None and modules[previous.start] == module:
            groups[-1] = Group(
                previous.start, previous.span + 1, _lines(module, letters=_LETTERS * (previous.span + 1))
            )
        else:
            groups.append(Group(column, 1, _lines(module)))
    return groups
