"""Texts in columns side by side, as wide as the terminal."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Mapping

_GAP = 3
NARROWEST = 24
"""Characters a column has at least."""


def side_by_side(texts: Mapping[str, str], width: int) -> list[str]:
    """Lines that show texts below their names, in columns of equal width; one after another if these are too narrow.

    Args:
        texts: Text by name.
        width: Characters a line has at most.
    """
    room = (width - _GAP * (len(texts) - 1)) // len(texts)
    if room < NARROWEST:
        wrapped = [[name, *_wrap(text, width), ""] for name, text in texts.items()]
        return [line for lines in wrapped for line in lines][:-1]
    columns = [[name, "-" * room, *_wrap(text, room)] for name, text in texts.items()]
    rows = itertools.zip_longest(*columns, fillvalue="")
    return [(" " * _GAP).join(f"{cell:{room}}" for cell in row).rstrip() for row in rows]


def _wrap(text: str, width: int) -> list[str]:
    """Lines of at most `width` characters; the text's own ends of lines stay."""
    return [part for line in text.splitlines() for part in textwrap.wrap(line, width) or [""]]
