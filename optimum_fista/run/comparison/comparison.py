"""A finished or unfinished comparison: its table and its files."""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
import io
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
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

    @classmethod
    def read(cls, file: Path) -> Comparison:
        """Read a `table.json`.

        Raises:
            OSError: If it can't be read.
            ValueError: If it is none.
        """
        try:
            values = json.loads(file.read_text())
            return cls(dict(values["settings"]), list(values["recipe"]), [Row.from_dict(row) for row in values["rows"]])
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
        write_text(folder / "table.json", json.dumps(dataclasses.asdict(self), indent=1) + "\n")
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
    columns, table = _columns(texts, tasks, _errors(rows), removes=_removes(rows)), []
    for pattern, group in groupby(averages(rows), lambda line: line.pattern):
        lines = list(group)
        shown = [_cells([value(line) for line in lines], form, best) for _, value, form, best in columns]
        for line, *cells in zip(lines, *shown, strict=True):
            cells = cells if line.rows else ["failed", *[""] * (len(columns) - 1)]
            table.append(["" if pattern == NO_PATTERN else pattern, f"`{line.method}`", *cells])
    return "\n".join(markdown_lines(["pattern", "method", *(header for header, *_ in columns)], table))


def csv_table(rows: Sequence[Row], texts: Sequence[str], tasks: Sequence[str] = ()) -> str:
    """A line for each row, with every seed and every digit."""
    metrics = list(dict.fromkeys((t, metric) for t in tasks for row in rows for metric in row.accuracy.get(t, {})))
    errors, removes = _errors(rows), _removes(rows)

    def cells(row: Row) -> dict[str, Any]:
        found: dict[str, Any] = {"pattern": row.pattern, "method": row.method, "seed": row.seed}
        found |= {f"perplexity {text}": row.perplexity.get(text) for text in texts}
        for task, metric in metrics:
            score = row.accuracy.get(task, {}).get(metric)
            found[f"{task} {metric}"] = None if score is None else score.value
            found[f"{task} {metric} stderr"] = None if score is None else score.stderr
        found |= {f"mean {name}": row.totals.get(key) for name, key in errors.items()}
        found |= {"sparsity": row.totals.get("sparsity")}
        found |= {"removed": row.totals.get("share_removed")} if removes else {}
        found |= {"seconds": row.seconds.get("total")}
        return found | {"solve seconds": row.totals.get("solve_seconds"), "error": row.error}

    file = io.StringIO()
    writer = csv.DictWriter(file, list(cells(Row("", ""))), lineterminator="\n")
    writer.writeheader()
    writer.writerows(map(cells, rows))
    return file.getvalue()


def _errors(rows: Sequence[Row]) -> dict[str, str]:
    """Names of the errors that were measured, with their names in `PruningReport.totals`."""
    names = ("fit error", "output error", "held-out fit error", "held-out output error")
    keys = {name: f"mean_{name.replace(' ', '_').replace('-', '_')}" for name in names}
    known = {key for row in rows for key, value in row.totals.items() if value is not None}
    return {name: key for name, key in keys.items() if key in known or name == "fit error"}


def _removes(rows: Sequence[Row]) -> bool:
    """Whether a model lost whole parts: then sparsity, which counts zeros, does not tell how small it is."""
    return any(row.totals.get("share_removed") for row in rows)


def _columns(texts: Sequence[str], tasks: Sequence[str], errors: Mapping[str, str], *, removes: bool) -> list[Column]:
    columns: list[Column] = [(text, partial(Average.perplexity, text=text), "{:.2f}", min) for text in texts]
    columns += [(f"{task}, %", partial(Average.accuracy, task=task), "{:.1%}", max) for task in tasks]
    if len(tasks) > 1:
        columns.append(("mean of tasks, %", partial(Average.mean_accuracy, tasks=tasks), "{:.1%}", max))
    columns += [(name, partial(Average.total, name=key), "{:.4f}", None) for name, key in errors.items()]
    columns.append(("zeros, %", partial(Average.total, name="sparsity"), "{:.2%}", None))
    if removes:
        columns.append(("removed, %", partial(Average.total, name="share_removed"), "{:.2%}", None))
    columns.append(("seconds", Average.seconds, "{:.0f}", None))
    columns.append(("solving", partial(Average.total, name="solve_seconds"), "{:.0f}", None))
    return columns


def _cells(values: list[Spread | None], form: str, best: Callable[[list[float]], float] | None) -> list[str]:
    """A column of one pattern as it is shown, the best value in bold if there are several."""
    found = [value.mean for value in values if value is not None]
    bold = form.format(best(found)) if best is not None and len(found) > 1 else None
    cells = []
    for value in values:
        shown = "" if value is None else form.format(value.mean)
        deviation = "" if value is None or value.deviation is None else f" ± {form.format(value.deviation)}"
        cells.append((f"**{shown}**" if shown == bold else shown) + deviation)
    return [cell.replace("%", "") for cell in cells]  # the header has it
