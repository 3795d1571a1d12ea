"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any


def markdown_lines(headings: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """Lines of a table; cells are written by `str`."""
    first, *others = (f"| {' | '.join(map(str, cells))} |" for cells in (headings, *rows))
    return [first, "|---" * len(headings) + "|", *others]
