"""A finished or unfinished comparison: its table and its files."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from optimum_fista.run.checkpoints.atomic import write_text
from optimum_fista.run.comparison.plots import plot_bars, plot_lines
from optimum_fista.run.comparison.rows import Average, Row, Spread, averages
from optimum_fista.run.comparison.settings import NO_PATTERN
from optimum_fista.run.reports.markdown import markdown_lines

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


Column = tuple[str, Callable[[Average], Spread | None], str, Callable[[list[float]], float] | None]
"""Header, value, format, and what makes a value the best of its pattern (`None`: values are not compared)."""


def markdown_table(rows: Sequence[Row], texts: Sequence[str], tasks: Sequence[str] = ()) -> str:
    """A line for each method and pattern, means over the seeds, the best of every pattern in bold."""
    lines, columns = averages(rows), _columns(texts, tasks, _errors(rows))
    best = {
        (pattern, header): _best(lines, pattern, value, choose, form)
        for pattern in {line.pattern for line in lines}
        for header, value, form, choose in columns
    }
    header = ["pattern", "method", *(name for name, *_ in columns)]
    table = []
    for line in lines:
        cells = ["" if line.pattern == NO_PATTERN else line.pattern, f"`{line.method}`"]
        for name, value, form, _ in columns:
            cells.append(_cell(value(line), form, best[line.pattern, name]))
        if not line.rows:
            cells[2:] = ["failed", *[""] * (len(columns) - 1)]
        table.append(cells)
    return "\n".join(markdown_lines(header, table))


def csv_table(rows: Sequence[Row], texts: Sequence[str], tasks: Sequence[str] = ()) -> str:
    """A line for each row, with every seed and every digit."""
    file = io.StringIO()
    metrics = list(dict.fromkeys((t, metric) for t in tasks for row in rows for metric in row.accuracy.get(t, {})))
    header = ["pattern", "method", "seed", *(f"perplexity {text}" for text in texts)]
    header += [name for task, metric in metrics for name in (f"{task} {metric}", f"{task} {metric} stderr")]
    errors = {f"mean {name}": key for name, key in _errors(rows).items()}
    header += [*errors, "sparsity", "seconds", "solve seconds", "error"]
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(header)
    for row in rows:
        scores = [row.accuracy.get(task, {}).get(metric) for task, metric in metrics]
        cells = [row.pattern, row.method, row.seed, *(row.perplexity.get(text) for text in texts)]
        cells += [value for s in scores for value in ((None, None) if s is None else (s.value, s.stderr))]
        cells += [row.totals.get(key) for key in (*errors.values(), "sparsity")] + [row.seconds.get("total")]
        writer.writerow([*cells, row.totals.get("solve_seconds"), row.error])
    return file.getvalue()


def _errors(rows: Sequence[Row]) -> dict[str, str]:
    """Names of the errors that were measured, with their names in `PruningReport.totals`."""
    names = {"fit error": "mean_fit_error", "output error": "mean_output_error"}
    names |= {"held-out fit error": "mean_held_out_fit_error", "held-out output error": "mean_held_out_output_error"}
    known = {key for row in rows for key, value in row.totals.items() if value is not None}
    return {name: key for name, key in names.items() if key in known or name == "fit error"}


def _columns(texts: Sequence[str], tasks: Sequence[str], errors: Mapping[str, str]) -> list[Column]:
    columns: list[Column] = [(text, partial(Average.perplexity, text=text), "{:.2f}", min) for text in texts]
    columns += [(f"{task}, %", partial(Average.accuracy, task=task), "{:.1%}", max) for task in tasks]
    if len(tasks) > 1:
        columns.append(("mean of tasks, %", lambda line: line.mean_accuracy(tasks), "{:.1%}", max))
    totals = [(name, key, "{:.4f}") for name, key in errors.items()]
    totals += [("zeros, %", "sparsity", "{:.2%}")]
    columns += [(header, partial(Average.total, name=name), form, None) for header, name, form in totals]
    columns.append(("seconds", lambda line: line.seconds, "{:.0f}", None))
    columns.append(("solving", partial(Average.total, name="solve_seconds"), "{:.0f}", None))
    return columns


def _best(
    lines: list[Average],
    pattern: str,
    value: Callable[[Average], Spread | None],
    choose: Callable[[list[float]], float] | None,
    form: str,
) -> str | None:
    """The best value of a pattern as it is shown; `None` if there is nothing to choose from."""
    found = [spread.mean for line in lines if line.pattern == pattern and (spread := value(line)) is not None]
    return form.format(choose(found)) if choose is not None and len(found) > 1 else None


def _cell(value: Spread | None, form: str, best: str | None) -> str:
    if value is None:
        return ""
    shown = form.format(value.mean)
    deviation = "" if value.deviation is None else f" ± {form.format(value.deviation)}"
    cell = f"**{shown}**{deviation}" if shown == best else f"{shown}{deviation}"
    return cell.replace("%", "")  # the header has it
