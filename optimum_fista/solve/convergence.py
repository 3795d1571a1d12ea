"""The convergence history of an iterative method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

POINTS = 32
"""Steps that are kept at most."""


@dataclass(frozen=True)
class Convergence:
    """How far a method still moved in its steps.

    Attributes:
        measure: What the residual is.
        steps: Some of the steps, counted from 1: all if there are few, otherwise evenly spread on a logarithmic
            scale, with the first and the last.
        residuals: Residual of each, in three digits.
    """

    measure: str
    steps: tuple[int, ...]
    residuals: tuple[float, ...]

    @classmethod
    def of(cls, measure: str, residuals: Sequence[float], first: int = 1) -> Convergence | None:
        """Keep at most `POINTS` of the residuals of the steps from `first` on; `None` if there are none."""
        count = len(residuals)
        if not count:
            return None
        kept: Sequence[int] = range(count)
        if count > POINTS:
            kept = sorted({round(count ** (i / (POINTS - 1))) - 1 for i in range(POINTS)})
        rounded = tuple(float(f"{residuals[index]:.3g}") for index in kept)
        return cls(measure, tuple(first + index for index in kept), rounded)
