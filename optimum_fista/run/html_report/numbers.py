"""How the page writes numbers."""

from __future__ import annotations

import math

MIB, GIB = 2**20, 2**30


def share(value: float, digits: int = 1) -> str:
    """`50.0%`."""
    return f"{value:.{digits}%}" if math.isfinite(value) else "not finite"


def error(value: float, digits: int = 4) -> str:
    """A relative error, `0.1234`."""
    return f"{value:.{digits}f}" if math.isfinite(value) else "not finite"


def count(value: int) -> str:
    """A large number in three digits: `106 M`."""
    for size, unit in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " K")):
        if value >= size:
            return f"{value / size:.{max(0, 2 - int(math.log10(value / size)))}f}{unit}"
    return str(value)


def size(value: float) -> str:
    """`1.4 GiB`, `178 MiB`."""
    return f"{value / GIB:.1f} GiB" if value >= GIB else f"{value / MIB:.0f} MiB"


def duration(seconds: float) -> str:
    """`3 h 20 min`, `12 min 3 s`, `48.2 s`, `5 ms`."""
    if seconds >= 3600:
        return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60)} min"
    if seconds >= 60:
        return f"{int(seconds // 60)} min {int(seconds % 60)} s"
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1000 * seconds:.0f} ms"
