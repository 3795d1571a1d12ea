"""Rows of a comparison, and their means over the seeds."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from optimum_fista.run.evaluation.zero_shot import Score
from optimum_fista.run.records import as_record
from optimum_fista.run.reports.report import renamed_totals


@dataclass(frozen=True)
class Row:
    """A model pruned in one way, and what was measured of it.

    Attributes:
        method: The method as the user wrote it, or `"dense"`.
        pattern: The pattern as the user wrote it, or `"-"`.
        seed: Seed of the calibration tokens and of the configuration.
        perplexity: By text.
        accuracy: By task and metric; a task's first metric is the one of the table.
        totals: `PruningReport.totals`; empty for the dense model.
        seconds: `PruningReport.seconds`; empty for the dense model.
        config: The resolved configuration; empty for the dense model.
        calibration: `PruningReport.calibration`.
        versions: Versions of the libraries.
        error: One line that says why the row failed; `None` if it did not.
        key: Digest of everything the row depends on.
    """

    method: str
    pattern: str
    seed: int = 0
    perplexity: Mapping[str, float] = field(default_factory=dict)
    accuracy: Mapping[str, Mapping[str, Score]] = field(default_factory=dict)
    totals: Mapping[str, Any] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    calibration: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    error: str | None = None
    key: str = ""

    def score(self, task: str) -> Score | None:
        """The metric of a task that the table shows."""
        return next(iter(self.accuracy[task].values())) if self.accuracy.get(task) else None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Row:
        """Inverse of `dataclasses.asdict`, read from JSON."""
        return as_record(cls, {**values, "totals": renamed_totals(values.get("totals", {}))})


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
    """Rows of one method and pattern; those that failed are left out."""

    method: str
    pattern: str
    rows: Sequence[Row]

    def perplexity(self, text: str) -> Spread | None:
        """On one text."""
        return spread([row.perplexity.get(text) for row in self.rows])

    def accuracy(self, task: str) -> Spread | None:
        """On one task, in [0, 1]."""
        scores = [score for row in self.rows if (score := row.score(task)) is not None]
        if len(scores) == 1:
            return Spread(scores[0].value, scores[0].stderr)
        return spread([score.value for score in scores])

    def mean_accuracy(self, tasks: Sequence[str]) -> Spread | None:
        """Mean over tasks, in [0, 1], of the rows that have them all."""
        found = [[row.score(task) for task in tasks] for row in self.rows]
        complete = [[score.value for score in scores if score is not None] for scores in found]
        return spread([statistics.fmean(values) for values in complete if values and len(values) == len(tasks)])

    def total(self, name: str) -> Spread | None:
        """One of `PruningReport.totals`; `None` for the errors of operators if no operator was pruned."""
        rows = [row for row in self.rows if not name.endswith("_error") or row.totals.get("num_operators", 1)]
        return spread([row.totals.get(name) for row in rows])

    def seconds(self) -> Spread | None:
        """Wall time of pruning."""
        return spread([row.seconds.get("total") for row in self.rows])


def averages(rows: Iterable[Row]) -> list[Average]:
    """One for each method and pattern, pattern by pattern in the order in which they first occur."""
    groups: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        groups.setdefault(row.pattern, {}).setdefault(row.method, []).append(row)
    return [
        Average(method, pattern, [row for row in group if row.error is None])
        for pattern, methods in groups.items()
        for method, group in methods.items()
    ]


def spread(values: Iterable[float | None]) -> Spread | None:
    """Mean and, of several values, standard deviation; `None` without values. Those that are `None` do not count."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    return Spread(statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None)
