"""The table of a comparison, as Markdown and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from functools import partial

from optimum_fista.run.comparison.averages import Average, Spread, averages
from optimum_fista.run.comparison.candidates import NO_PATTERN
from optimum_fista.run.comparison.row import Row

Column = tuple[str, Callable[[Average], Spread | None], str, Callable[[list[float]], float] | None]
"""Header, value, format, and what makes a value the best of its pattern (`None`: values are not compared)."""


def markdown_table(rows: Sequence[Row], texts: Sequence[str], tasks: Sequence[str] = ()) -> str:
    """A line for each method and pattern, means over the seeds, the best of every pattern in bold."""
    lines, columns = averages(rows), _columns(texts, tasks, _has_held_out(rows))
    best = {
        (pattern, header): _best(lines, pattern, value, choose, form)
        for pattern in {line.pattern for line in lines}
        for header, value, form, choose in columns
    }
    header = ["pattern", "method", *(name for name, *_ in columns)]
    table = [_line(header), "|---" * len(header) + "|"]
    for line in lines:
        cells = ["" if line.pattern == NO_PATTERN else line.pattern, f"`{line.method}`"]
        for name, value, form, _ in columns:
            cells.append(_cell(value(line), form, best[line.pattern, name]))
        if not line.rows:
            cells[2:] = ["failed", *[""] * (len(columns) - 1)]
        table.append(_line(cells))
    return "\n".join(table)


def csv_table(rows: Sequence[Row], texts: Sequence[str], tasks: Sequence[str] = ()) -> str:
    """A line for each row, with every seed and every digit."""
    file = io.StringIO()
    metrics = list(dict.fromkeys((t, metric) for t in tasks for row in rows for metric in row.accuracy.get(t, {})))
    header = ["pattern", "method", "seed", *(f"perplexity {text}" for text in texts)]
    header += [name for task, metric in metrics for name in (f"{task} {metric}", f"{task} {metric} stderr")]
    errors = {"mean relative error": "mean_relative_error"}
    errors |= {"mean held-out error": "mean_held_out_error"} if _has_held_out(rows) else {}
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


def _has_held_out(rows: Sequence[Row]) -> bool:
    """Whether relative errors on held-out tokens were measured."""
    return any(row.totals.get("mean_held_out_error") is not None for row in rows)


def _columns(texts: Sequence[str], tasks: Sequence[str], held_out: bool) -> list[Column]:
    columns: list[Column] = [(text, partial(Average.perplexity, text=text), "{:.2f}", min) for text in texts]
    columns += [(f"{task}, %", partial(Average.accuracy, task=task), "{:.1%}", max) for task in tasks]
    if len(tasks) > 1:
        columns.append(("mean of tasks, %", lambda line: line.mean_accuracy(tasks), "{:.1%}", max))
    columns.append(("relative error", lambda line: line.relative_error, "{:.4f}", None))
    if held_out:
        columns.append(("on held-out tokens", lambda line: line.held_out_error, "{:.4f}", None))
    return [
        *columns,
        ("zeros, %", lambda line: line.sparsity, "{:.2%}", None),
        ("seconds", lambda line: line.seconds, "{:.0f}", None),
        ("solving", lambda line: line.solve_seconds, "{:.0f}", None),
    ]


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


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
