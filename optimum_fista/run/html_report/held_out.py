"""Errors on held-out tokens beside those on the tokens that weights were fitted to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from optimum_fista.run.reports.operator_grid import OperatorGrid
from optimum_fista.run.reports.report import OperatorReport


@dataclass(frozen=True)
class KindErrors:
    """Mean relative errors of the operators of a kind, on the calibration tokens and on those held out."""

    kind: str
    fitted: float
    held_out: float

    @property
    def ratio(self) -> float:
        """Held-out error over calibration error."""
        return _ratio(self.held_out, self.fitted)


def held_out_by_kind(operators: Sequence[OperatorReport]) -> list[KindErrors]:
    """Means over the operators of each kind, of those that have a held-out error."""
    grid = OperatorGrid.of(operators)
    found = []
    for kind in grid.kinds:
        both = [(o.relative_error, o.held_out_error) for o in grid.of_kind(kind) if o.held_out_error is not None]
        if both:
            found.append(KindErrors(kind, *(sum(errors) / len(errors) for errors in zip(*both, strict=True))))
    return found


def held_out_ratio(operator: OperatorReport) -> float:
    """Held-out error over calibration error of an operator; not finite where it has none."""
    return math.nan if operator.held_out_error is None else _ratio(operator.held_out_error, operator.relative_error)


def _ratio(held_out: float, fitted: float) -> float:
    if fitted > 0:
        return held_out / fitted
    return 1.0 if held_out == fitted else math.inf
