"""One row of a comparison: a model pruned in one way, and what was measured of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Score:
    """One metric of a task.

    Attributes:
        value: Its mean over the task's documents.
        stderr: Standard error of that mean, if it is known.
    """

    value: float
    stderr: float | None = None


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

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Row:
        """Inverse of `to_dict`."""
        accuracy = {
            task: {metric: Score(**score) for metric, score in metrics.items()}
            for task, metrics in values.get("accuracy", {}).items()
        }
        return cls(**{**values, "accuracy": accuracy})
