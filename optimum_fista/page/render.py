"""Make one HTML page about a pruned model folder, without scripts, so that it opens anywhere and can be sent by mail.

The templates have the words, and show a part of the page only if there is something to say. This file gives them the
numbers as text.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from optimum_fista.folder.checkpoint import REPORT_FILE, read_report
from optimum_fista.memory import size_text
from optimum_fista.report import OperatorGrid, OperatorReport, PruningReport
from optimum_fista.solve.patterns import parse_pattern

STEPS = 9  # colours of a table's scale; style.css has them
_JOINED = "\u00a0"  # a blank that no line is broken at


def read_pruned_report(folder: Path) -> PruningReport:
    """Read the report of a pruned folder, packed or not, of whose operators, mixtures or tokens a page can be made."""
    report = read_report(folder)
    if not report.operators and not report.mixtures and "vocabulary" not in report.model:
        why = (
            "only decoder layers were removed, the model card says which"
            if report.removed
            else "pass another folder"
        )
        raise ValueError(f"{str(folder / REPORT_FILE)!r} names no pruned operator: {why}.")
    return report


def render_page(report: PruningReport) -> str:
    """HTML of the page; everything that comes from files is escaped."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # names and messages come from files of others
        undefined=StrictUndefined,  # a name that is not passed is an error, not an empty place
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "size": size_text,
        **{written.__name__: written for written in (share, error, count, duration)},
        "thousands": "{:,}".format,
        # long names may be broken after a dot or an underscore
        "breakable": lambda name: Markup(re.sub("([._])", r"\1<wbr>", str(escape(name)))),
    }
    three = partial(error, digits=3, unknown="?")
    pattern = parse_pattern(report.config["pattern"], report.config["sparsity"])
    shown = pattern if pattern.fixed else f"{100 * pattern.sparsity:g}% {pattern}"
    zeros = [operator.sparsity for operator in report.operators]
    outputs = [operator for operator in report.operators if operator.output_error is not None]
    held_out = [
        operator for operator in report.operators if operator.held_out_fit_error is not None
    ]
    kinds = {
        "anonymous": "anonymous_bytes",
        "resident": "resident_bytes",
        "on the GPU": "device_bytes",
    }
    memory = {
        name: [getattr(layer.memory, key, None) for layer in report.layers]
        for name, key in kinds.items()
    }
    memory_peaks = {
        name: max(known)
        for name, held in memory.items()
        if (known := [h for h in held if h is not None])
    }
    names = [layer.name for layer in report.layers]
    moved = {"hidden states": [layer.hidden_state_error for layer in report.layers]}
    return environment.get_template("page.html").render(
        report=report,
        totals=report.totals,
        title=f"{report.model['name'].split('/')[-1] or report.model['class']}, {shown}",
        colours=range(STEPS),
        errors=by_operator(report.operators, "fit error", lambda o: o.fit_error, three),
        output_errors=outputs
        and by_operator(outputs, "output error", lambda o: o.output_error or 0.0, three),
        held_out=held_out
        and by_operator(held_out, "held-out fit error over fit error", _over_fit, three),
        zeros=by_operator(report.operators, "zeros", lambda o: o.sparsity, share),
        even=max(zeros, default=0.0) - min(zeros, default=0.0)
        < 5e-4,  # counts are whole, so shares differ a little
        columns_left=_columns_left(report),
        moved=coloured("error of the hidden states", names, moved, three),
        times=coloured(
            "time", names, {"time": [layer.seconds for layer in report.layers]}, duration
        ),
        memory=coloured("memory", names, memory, size_text),
        memory_peaks=memory_peaks,
        config=json.dumps(report.config, indent=2),
        command=report.command(),
    )


@dataclass(frozen=True)
class Coloured:
    """A table of numbers by decoder layer: texts, and the index of each one's colour."""

    name: str  # what the numbers are
    columns: Sequence[str]
    rows: Sequence[
        tuple[str, list[tuple[str, int | None]]]
    ]  # an empty text if a number is not known
    low: str  # of the first colour
    high: str


def coloured(
    name: str,
    layers: Sequence[str],
    columns: Mapping[str, Sequence[float | None]],
    text_of: Callable[[float], str],
) -> Coloured | None:
    """Colour all finite numbers by one scale, and drop columns without a number; `None` if no column is left."""
    known = {
        key: column for key, column in columns.items() if any(value is not None for value in column)
    }
    finite = [
        value
        for column in known.values()
        for value in column
        if value is not None and math.isfinite(value)
    ]
    low, high = min(finite, default=0.0), max(finite, default=0.0)

    def cell(value: float | None) -> tuple[str, int | None]:
        if value is None:
            return "", None
        step = int(STEPS * (value - low) / (high - low or 1.0)) if math.isfinite(value) else None
        return text_of(value), step if step is None else min(
            step, STEPS - 1
        )  # the highest is no step of its own

    rows = [
        (layer.rpartition(".")[2], [cell(c[i]) for c in known.values()])
        for i, layer in enumerate(layers)
    ]
    return Coloured(name, list(known), rows, text_of(low), text_of(high)) if known else None


def by_operator(
    operators: Iterable[OperatorReport],
    name: str,
    value_of: Callable[[OperatorReport], float],
    text_of: Callable[[float], str],
) -> Coloured | None:
    """Colour a number of every operator, by decoder layer and kind.

    Kinds with several operators in a layer, the experts of a mixture, get two columns: mean and maximum.
    """
    grid, columns = OperatorGrid(operators), dict[str, list[float | None]]()
    for kind in grid.kinds:
        found = [
            [value_of(operator) for operator in grid.cells.get((layer, kind), ())]
            for layer in grid.layers
        ]
        if all(len(values) < 2 for values in found):
            columns[kind] = [values[0] if values else None for values in found]
        else:
            columns[f"{kind} mean"] = [fmean(values) if values else None for values in found]
            columns[f"{kind} max"] = [max(values, default=None) for values in found]
    return coloured(name, grid.layers, columns, text_of)


def _columns_left(report: PruningReport) -> list[tuple[str, int, int]]:
    """For each kind of operator that lost columns: its name, how many stayed, and how many there were."""
    grid = OperatorGrid(
        operator for operator in report.operators if operator.groups_kept is not None
    )
    kinds = [(kind, found[0]) for kind, found in grid.kinds.items()]  # all layers lose as many
    return [(kind, o.shape[1], round(o.shape[1] / (1 - o.target_sparsity))) for kind, o in kinds]


def _over_fit(operator: OperatorReport) -> float:
    """The fit error on held-out tokens over that on the calibration tokens."""
    fitted, held_out = operator.fit_error, operator.held_out_fit_error or 0.0
    if not fitted:
        return math.inf if held_out else 1.0  # 1 if nothing was pruned, so that both are 0
    return held_out / fitted


def share(value: float, digits: int = 1) -> str:
    """`50.0%`."""
    return f"{value:.{digits}%}" if math.isfinite(value) else "not finite"


def error(value: float, digits: int = 4, unknown: str = "not finite") -> str:
    """A relative error, `0.1234`."""
    return f"{value:.{digits}f}" if math.isfinite(value) else unknown


def count(value: int) -> str:
    """A large number in three digits: `106 M`."""
    for unit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if value >= unit:
            return f"{value / unit:.{max(0, 2 - int(math.log10(value / unit)))}f}{_JOINED}{letter}"
    return str(value)


def duration(seconds: float) -> str:
    """`3 h 20 min`, `12 min 3 s`, `48.2 s`."""
    text, whole = f"{seconds:.3g} s", int(seconds)
    if whole >= 3600:
        text = f"{whole // 3600} h {whole % 3600 // 60} min"
    elif whole >= 60:
        text = f"{whole // 60} min {whole % 60} s"
    return text.replace(" ", _JOINED)
