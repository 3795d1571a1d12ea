"""Means and deviations over the seeds of a method and pattern."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from optimum_fista.run.comparison.row import Row


@dataclass(frozen=True)
class Spread:
    """A mean over seeds.

    Attributes:
        mean: Over the seeds.
        deviation: Standard deviation over several seeds; for one seed the standard error if it is known.
    """

    mean: float
    deviation: float | None = None


@dataclass(frozen=True)
class Average:
    """Rows of one method and pattern.

    Attributes:
        rows: Those that did not fail.
        failures: Those that did.
    """

    method: str
    pattern: str
    rows: Sequence[Row]
    failures: Sequence[Row]

    def perplexity(self, text: str) -> Spread | None:
        """On one text."""
        return self._spread(lambda row: row.perplexity.get(text))

    def accuracy(self, task: str) -> Spread | None:
        """On one task, in [0, 1]."""
        scores = [score for row in self.rows if (score := row.score(task)) is not None]
        if len(scores) == 1:
            return Spread(scores[0].value, scores[0].stderr)
        return spread([score.value for score in scores])

    def mean_accuracy(self, tasks: Sequence[str]) -> Spread | None:
        """Mean over tasks, in [0, 1], of the rows that have them all."""
        complete = [[s.value for task in tasks if (s := row.score(task)) is not None] for row in self.rows]
        return spread([statistics.fmean(values) for values in complete if values and len(values) == len(tasks)])

    @property
    def relative_error(self) -> Spread | None:
        """Mean relative error of the operators on the calibration tokens."""
        return self._spread(lambda row: row.totals.get("mean_relative_error"))

    @property
    def held_out_error(self) -> Spread | None:
        """The same on held-out tokens."""
        return self._spread(lambda row: row.totals.get("mean_held_out_error"))

    @property
    def sparsity(self) -> Spread | None:
        """Fraction of zeros in the pruned operators."""
        return self._spread(lambda row: row.totals.get("sparsity"))

    @property
    def seconds(self) -> Spread | None:
        """Wall time of pruning."""
        return self._spread(lambda row: row.seconds.get("total"))

    @property
    def solve_seconds(self) -> Spread | None:
        """Of which solving."""
        return self._spread(lambda row: row.totals.get("solve_seconds"))

    def _spread(self, value: Callable[[Row], float | None]) -> Spread | None:
        return spread([found for row in self.rows if (found := value(row)) is not None])


def averages(rows: Iterable[Row]) -> list[Average]:
    """One for each method and pattern, pattern by pattern in the order in which they first occur."""
    groups: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        groups.setdefault(row.pattern, {}).setdefault(row.method, []).append(row)
    return [
        Average(method, pattern, [r for r in group if r.error is None], [r for r in group if r.error is not None])
        for pattern, methods in groups.items()
        for method, group in methods.items()
    ]


def spread(values: Sequence[float]) -> Spread | None:
    """Mean and, of several values, standard deviation; `None` without values."""
    if not values:
        return None
    return Spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)
