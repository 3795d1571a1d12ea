"""Texts in columns side by side, as wide as the terminal."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Sequence

_GAP = 3
_NARROWEST = 24


def side_by_side(texts: Sequence[tuple[str, str]], width: int) -> list[str]:
    """Lines that show texts below their names, in columns of equal width; one after another if these are too narrow.

    Args:
        texts: Names and texts; of a long name the end is shown.
        width: Characters a line has at most.
    """
    room = _room(len(texts), width)
    if not fits(len(texts), width):
        wrapped = [[name, *_wrap(text, width), ""] for name, text in texts]
        return [line for lines in wrapped for line in lines][:-1]
    columns = [[name[-room:], "-" * room, *_wrap(text, room)] for name, text in texts]
    rows = itertools.zip_longest(*columns, fillvalue="")
    return [(" " * _GAP).join(f"{cell:{room}}" for cell in row).rstrip() for row in rows]


def fits(count: int, width: int) -> bool:
    """Whether as many columns are wide enough to be read."""
    return _room(count, width) >= _NARROWEST


def _room(count: int, width: int) -> int:
    return (width - _GAP * (count - 1)) // count


def _wrap(text: str, width: int) -> list[str]:
    """Lines of at most `width` characters; the text's own ends of lines stay."""
    return [part for line in text.splitlines() for part in textwrap.wrap(line, width) or [""]]
