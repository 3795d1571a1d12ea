"""The page itself."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from optimum_fista.run.evaluation.evaluation_file import place_of
from optimum_fista.run.html_report import numbers
from optimum_fista.run.html_report.contents import ReportContents
from optimum_fista.run.html_report.convergence_charts import HEIGHT as CONVERGENCE_HEIGHT
from optimum_fista.run.html_report.convergence_charts import convergence_charts
from optimum_fista.run.html_report.heat_map import STEPS, HeatMap, heat_map
from optimum_fista.run.html_report.held_out import held_out_by_kind, held_out_ratio
from optimum_fista.run.html_report.histogram import HEIGHT as HISTOGRAM_HEIGHT
from optimum_fista.run.html_report.histogram import histogram
from optimum_fista.run.html_report.line_chart import HEIGHT as CHART_HEIGHT
from optimum_fista.run.html_report.line_chart import LineChart, line_chart
from optimum_fista.run.memory.peak_memory import MemoryPeak
from optimum_fista.run.reports.card import model_title
from optimum_fista.run.reports.operator_grid import OperatorGrid
from optimum_fista.run.reports.report import OperatorReport, PruningReport
from optimum_fista.solve.patterns import parse_pattern

_SHOWN = 10
_KINDS_OF_MEMORY = {"anonymous": "anonymous_bytes", "resident": "resident_bytes", "on the GPU": "device_bytes"}
_LONGEST_LIST = 300
_HERE = Path(__file__).parent


@dataclass(frozen=True)
class PerplexityTable:
    """Models beside each other, a row a text and its windows; a cell is `None` where nothing was measured."""

    models: tuple[str, ...]
    rows: tuple[tuple[str, tuple[float | None, ...]], ...]


def render_page(contents: ReportContents) -> str:
    """HTML of the page; everything that comes from files is escaped."""
    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "share": numbers.share,
        "error": numbers.error,
        "count": numbers.count,
        "duration": numbers.duration,
        "size": numbers.size,
        "breakable": _breakable,
    }
    report = contents.report
    grid = OperatorGrid.of(report.operators)
    held_out = [operator for operator in report.operators if operator.held_out_error is not None]
    sparsities = contents.sparsities.operators
    labels = [layer.name.rpartition(".")[2] for layer in report.layers]
    drifts, peaks = [layer.hidden_state_error for layer in report.layers], [layer.memory for layer in report.layers]
    by_time = sorted(report.operators, key=lambda o: o.solve_seconds, reverse=True)
    return environment.get_template("page.html").render(
        steps=range(STEPS),
        report=report,
        totals=report.totals,
        title=model_title(report),
        worst=max(report.operators, key=lambda o: o.relative_error),
        errors=heat_map(
            grid, "relative error", lambda o: o.relative_error, numbers.error, _short_error, from_zero=True
        ),
        held_out=_held_out_map(held_out) if held_out else None,
        held_out_kinds=held_out_by_kind(held_out),
        zeros=heat_map(grid, "zeros", lambda o: sparsities[o.name], _two_digits, numbers.share, from_zero=False),
        even=max(sparsities.values()) - min(sparsities.values()) < 5e-4,
        even_rows=all(map(_has_even_rows, report.operators)),
        histograms=[histogram(kind, contents.sparsities.rows[kind]) for kind in grid.kinds],
        histogram_height=HISTOGRAM_HEIGHT,
        drifts=line_chart(labels, {"error": drifts}, numbers.error),
        times=line_chart(labels, {"seconds": [layer.seconds for layer in report.layers]}, numbers.duration, (1.0, "s")),
        memory=_memory_chart(labels, peaks),
        memory_peak=_memory_peak(peaks),
        kinds_of_memory=_KINDS_OF_MEMORY,
        chart_height=CHART_HEIGHT,
        convergence=convergence_charts(report.operators),
        convergence_height=CONVERGENCE_HEIGHT,
        convergence_reason=_convergence_reason(report),
        drift_reason=_drift_reason(report),
        perplexities=_perplexity_table(contents),
        continuations=contents.continuations,
        slowest=by_time[:_SHOWN],
        unconverged=[o for o in by_time if not o.converged][:_SHOWN],
        seconds=_seconds(report),
        longest_list=_LONGEST_LIST,
        config=json.dumps(report.config, indent=2),
        command=_command(report),
    )


def _held_out_map(operators: list[OperatorReport]) -> HeatMap:
    """By how much errors grow on held-out tokens."""
    return heat_map(
        OperatorGrid.of(operators),
        "held-out error over calibration error",
        held_out_ratio,
        numbers.error,
        _short_error,
        from_zero=False,
    )


def _breakable(name: str) -> Markup:
    """A name that may be broken behind its dots."""
    return Markup(str(escape(name)).replace(".", ".<wbr>"))


def _short_error(value: float) -> str:
    return numbers.error(value, 3) if math.isfinite(value) else "?"


def _has_even_rows(operator: OperatorReport) -> bool:
    """Whether the pattern gives every row the same number of zeros."""
    return parse_pattern(operator.pattern).fixed or operator.scope == "row"


def _two_digits(value: float) -> str:
    return numbers.share(value, 2)


def _drift_reason(report: PruningReport) -> str:
    """Why there are no errors of hidden states."""
    if not report.layers:
        return "this report is of a version that did not measure it"
    correction = report.config["error_correction"]
    return (
        f"with error_correction={correction!r} the hidden states of the dense and of the pruned model were not both "
        "carried from layer to layer"
    )


def _convergence_reason(report: PruningReport) -> str:
    """Why there are no residuals."""
    methods = ", ".join(dict.fromkeys(operator.method for operator in report.operators))
    if any(operator.iterations for operator in report.operators):
        return f"the residuals of {methods} are not in this report"
    return f"{methods} takes no steps that could converge"


def _memory_chart(labels: Sequence[str], peaks: Sequence[MemoryPeak | None]) -> LineChart | None:
    """Peaks by decoder layer and kind of memory; `None` where the report has none."""
    series = {
        name: [None if peak is None else getattr(peak, key) for peak in peaks] for name, key in _KINDS_OF_MEMORY.items()
    }
    known = [value for values in series.values() for value in values if value is not None]
    large = max(known, default=0) >= numbers.GIB
    return line_chart(labels, series, numbers.size, (numbers.GIB, "GiB") if large else (numbers.MIB, "MiB"))


def _memory_peak(peaks: Sequence[MemoryPeak | None]) -> list[tuple[str, int]]:
    """The largest value of each kind of memory that is known."""
    found = {
        name: [value for peak in peaks if peak is not None and (value := getattr(peak, key)) is not None]
        for name, key in _KINDS_OF_MEMORY.items()
    }
    return [(name, max(values)) for name, values in found.items() if values]


def _perplexity_table(contents: ReportContents) -> PerplexityTable | None:
    """Perplexities by text and model; `None` without any."""
    if not contents.evaluations:
        return None

    models = list(dict.fromkeys((evaluation.model, evaluation.place) for evaluation in contents.evaluations))
    names = ["this model" if place == place_of(contents.folder) else Path(name).name or name for name, place in models]
    rows = []
    for protocol in dict.fromkeys(evaluation.protocol for evaluation in contents.evaluations):
        text, _, windows, length = protocol
        found = {(e.model, e.place): e.result.perplexity for e in contents.evaluations if e.protocol == protocol}
        label = f"{text or 'a text'}, {windows:,} windows of {length:,} tokens"
        rows.append((label, tuple(found.get(model) for model in models)))
    return PerplexityTable(tuple(names), tuple(rows))


def _seconds(report: PruningReport) -> list[tuple[str, float]]:
    """The parts of the run that were timed, and the rest."""
    parts = [("sharing the zeros over the operators", report.seconds.get("allocation", 0.0))]
    parts.append(("solving", report.totals["solve_seconds"]))
    rest = report.seconds.get("total", 0.0) - sum(seconds for _, seconds in parts)
    parts.append(("forward passes, Gram matrices, reading and writing", max(0.0, rest)))
    return [(name, seconds) for name, seconds in parts if seconds > 0]


def _command(report: PruningReport) -> str:
    """The command that prunes the same model in the same way, with the configuration in a file."""
    tokens, sequences = report.calibration["num_tokens"], report.calibration["num_sequences"]
    model = [
        "optimum-fista",
        "prune",
        report.model.get("name") or "MODEL",
        "--output",
        "DIR",
        "--config",
        "config.json",
    ]
    calibration = ["--calibration", report.calibration.get("source") or "SOURCE", "--num-samples", str(sequences)]
    if sequences and tokens % sequences == 0:
        calibration += ["--sequence-length", str(tokens // sequences)]
    return f"{shlex.join(model)} \\\n    {shlex.join(calibration)}"
