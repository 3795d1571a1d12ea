"""A finished or unfinished comparison, and its files."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from optimum_fista.run.checkpoints.atomic import write_text
from optimum_fista.run.comparison.plots import plot_bars, plot_lines
from optimum_fista.run.comparison.row import Row
from optimum_fista.run.comparison.table import csv_table, markdown_table

_FILES = ("table.json", "table.csv", "table.md", "perplexity.png", "sparsity.png")


@dataclass
class Comparison:
    """Rows, and how they were measured.

    Attributes:
        settings: What was compared.
        recipe: How perplexity and accuracy were measured, a line each.
        rows: One a method, pattern and seed.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    recipe: list[str] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)

    @property
    def texts(self) -> list[str]:
        """Names of the texts that perplexity was measured on."""
        return list(dict.fromkeys(text for row in self.rows for text in row.perplexity))

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks."""
        return list(dict.fromkeys(task for row in self.rows for task in row.accuracy))

    @property
    def failures(self) -> list[str]:
        """A line for each row that failed."""
        return [f"{r.method}, {r.pattern}, seed {r.seed}: {r.error}" for r in self.rows if r.error is not None]

    def table(self) -> str:
        """The table as Markdown."""
        return markdown_table(self.rows, self.texts, self.tasks)

    def to_markdown(self) -> str:
        """The table, what failed, and the recipe."""
        lines = [self.table(), "", *(f"- {line}" for line in self.recipe)]
        if len({json.dumps(dict(row.versions), sort_keys=True) for row in self.rows if row.versions}) > 1:
            lines.append("- Rows were measured with different versions of libraries: table.json has them.")
        if self.failures:
            lines += ["", "Failed:", "", *(f"- {line}" for line in self.failures)]
        return "\n".join(lines) + "\n"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {"settings": self.settings, "recipe": self.recipe, "rows": [row.to_dict() for row in self.rows]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Comparison:
        """Inverse of `to_dict`."""
        return cls(dict(values["settings"]), list(values["recipe"]), [Row.from_dict(row) for row in values["rows"]])

    @classmethod
    def read(cls, file: Path) -> Comparison:
        """Read a `table.json`.

        Raises:
            OSError: If it can't be read.
            ValueError: If it is none.
        """
        try:
            return cls.from_dict(json.loads(file.read_text()))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{str(file)!r} is no table.json of a comparison ({error}): pass one.") from error

    @classmethod
    def require_own(cls, folder: Path) -> None:
        """Refuse a folder in which something else has the name of a comparison's file.

        Raises:
            FileExistsError: If so.
        """
        taken = [name for name in _FILES if os.path.lexists(folder / name)]
        try:
            if taken:
                cls.read(folder / "table.json")
        except (OSError, ValueError) as error:
            raise FileExistsError(
                f"output {str(folder)!r} holds {', '.join(taken)} of something else than a comparison: pass another "
                "folder, or move them away."
            ) from error

    def write_tables(self, folder: Path) -> None:
        """Write `table.md`, `table.csv` and `table.json`."""
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "table.json", json.dumps(self.to_dict(), indent=1) + "\n")
        write_text(folder / "table.csv", csv_table(self.rows, self.texts, self.tasks))
        write_text(folder / "table.md", self.to_markdown())

    def write_plots(self, folder: Path) -> list[Path]:
        """Draw `perplexity.png`, and `sparsity.png` if there are several sparsities; nothing without matplotlib."""
        if importlib.util.find_spec("matplotlib") is None or not self.texts:
            return []
        drawn = [plot(self.rows, self.texts, folder) for plot in (plot_bars, plot_lines)]
        return [path for path in drawn if path is not None]
