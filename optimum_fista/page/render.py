"""Make one HTML page about a pruned model folder, without scripts, so that it opens anywhere and can be sent by mail.

`read_pruned_report` reads the report of a folder, `render_page` makes the page of it. The template page.html has the
words, and shows a part of the page only if there is something to say. This file gives the template the numbers as text.
A *heat table* is a table of numbers by decoder layer (rows) and kind of operator (columns), coloured by size.

An operator is a pruned linear map, and its kind its name without the layer, such as "mlp.down_proj". A mixture is a
layer of experts that lost some of them. `OperatorGrid` sorts the operators of a report by layer and kind. No function
changes the report.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from optimum_fista.folder.checkpoint import REPORT_FILE, read_report
from optimum_fista.headlines import (
    MEMORY_KINDS,
    STEP_HEADINGS,
    count,
    duration,
    error,
    headlines,
    share,
    step_rows,
    title,
)
from optimum_fista.memory import size_text
from optimum_fista.operator_grid import OperatorGrid
from optimum_fista.page.expert_maps import COLOURS, expert_maps
from optimum_fista.page.figure import figure_of
from optimum_fista.records import OperatorReport
from optimum_fista.report import PruningReport

# Numbers of zeros are whole, so equal shares of them differ a little.
_EVEN = 5e-4


def read_pruned_report(folder: Path) -> PruningReport:
    """Read the report of a pruned folder, packed or not, of whose operators, mixtures or tokens a page can be made.

    Raises:
        FileNotFoundError: If there is no report.
        ValueError: If it is damaged, or if there is nothing that a page could show.
    """
    report = read_report(folder)
    has_lost_tokens = "vocabulary" in report.model
    if report.operators or report.mixtures or has_lost_tokens:
        return report

    file = str(folder / REPORT_FILE)
    if report.removed:
        raise ValueError(
            f"{file!r} names no pruned operator: only decoder layers were removed, so a page has nothing to show. The "
            "model card, README.md in this folder, says which layers."
        )
    raise ValueError(f"{file!r} names no pruned operator: pass another folder.")


def render_page(report: PruningReport, weight_bytes: int | None = None) -> str:
    """Return the HTML of the page; everything that comes from files is escaped.

    Args:
        report: As `read_pruned_report` returns it.
        weight_bytes: The size of the weight files that the report is about; `None` if there are none.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # names and messages come from files of others
        undefined=StrictUndefined,  # a name that is not passed is an error, not an empty place
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "breakable": _breakable,
        "count": count,
        "duration": duration,
        "error": error,
        "share": share,
        "size": size_text,
        "thousands": "{:,}".format,
    }
    sparsities = [operator.sparsity for operator in report.operators]
    has_even_zeros = max(sparsities, default=0.0) - min(sparsities, default=0.0) < _EVEN
    return environment.get_template("page.html").render(
        report=report,
        totals=report.totals,
        title=title(report),
        figure=figure_of(report, weight_bytes),
        expert_maps=expert_maps(report),
        headlines=list(headlines(report)),
        steps=step_rows(report),
        step_headings=STEP_HEADINGS,
        colours=range(COLOURS),
        has_even_zeros=has_even_zeros,
        columns_left=_columns_left(report),
        config=json.dumps(report.config, indent=2),
        command=report.command(),
        **_tables_of_operators(report),
        **_tables_of_layers(report),
    )


def _breakable(name: str) -> Markup:
    """Escape a long name, and let a browser break its line after a dot or an underscore."""
    return Markup(re.sub("([._])", r"\1<wbr>", str(escape(name))))


@dataclass(frozen=True)
class Coloured:
    """A heat table: texts, and the index of each one's colour."""

    # What the numbers are.
    name: str
    columns: Sequence[str]
    # Of each decoder layer its number and its cells; the text of a cell is empty if its number is not known.
    rows: Sequence[tuple[str, list[tuple[str, int | None]]]]
    # Texts of the lowest and of the highest number.
    low: str
    high: str


def coloured(
    name: str,
    layers: Sequence[str],
    columns: Mapping[str, Sequence[float | None]],
    text_of: Callable[[float], str],
) -> Coloured | None:
    """Make a heat table: colour all finite numbers by one scale, and drop columns without a number.

    Args:
        name: What the numbers are.
        layers: Names of the decoder layers, such as "model.layers.3".
        columns: For each heading, such as "mlp.down_proj", a number for each of `layers`; `None` if it is not known.
        text_of: Writes a number, such as `0.5` as "50.0%".

    Returns:
        The table; `None` if no column is left.
    """
    shown = {
        heading: numbers
        for heading, numbers in columns.items()
        if any(number is not None for number in numbers)
    }
    if not shown:
        return None

    finite = []
    for numbers in shown.values():
        finite += [n for n in numbers if n is not None and math.isfinite(n)]
    scale = _Scale(low=min(finite, default=0.0), high=max(finite, default=0.0))

    rows = []
    for index, layer in enumerate(layers):
        cells = []
        for numbers in shown.values():
            number = numbers[index]
            text = "" if number is None else text_of(number)
            cells.append((text, scale.colour_of(number)))
        layer_number = layer.rpartition(".")[2]
        rows.append((layer_number, cells))
    return Coloured(name, list(shown), rows, low=text_of(scale.low), high=text_of(scale.high))


@dataclass(frozen=True)
class _Scale:
    """Colours for the numbers from a lowest to a highest one: the first for the lowest, the last for the highest."""

    low: float
    high: float

    def colour_of(self, number: float | None) -> int | None:
        """Return the index of the colour of a number; `None` if it is not known or not finite."""
        if number is None or not math.isfinite(number):
            return None
        # If all numbers are equal, any width gives them the first colour.
        width = self.high - self.low if self.high > self.low else 1.0
        colour = int(COLOURS * (number - self.low) / width)
        # The highest number has the last colour, not one of its own.
        return min(colour, COLOURS - 1)


def by_operator(
    operators: Iterable[OperatorReport],
    name: str,
    value_of: Callable[[OperatorReport], float],
    text_of: Callable[[float], str],
) -> Coloured | None:
    """Make a heat table of one number of every operator; `None` if there are no operators.

    Kinds with several operators in a layer, the experts of a mixture, get two columns: mean and maximum.

    Args:
        operators: Reports of the operators to show.
        name: What the number is, such as "fit error".
        value_of: Takes the number from the report of an operator.
        text_of: Writes a number.
    """
    grid = OperatorGrid(operators)
    columns: dict[str, list[float | None]] = {}
    for kind in grid.kinds:
        # For each decoder layer, the numbers of its operators of this kind: none, one, or one for each expert.
        numbers = [
            [value_of(operator) for operator in grid.cells.get((layer, kind), ())]
            for layer in grid.layers
        ]
        is_single = all(len(of_layer) < 2 for of_layer in numbers)
        if is_single:
            columns[kind] = [of_layer[0] if of_layer else None for of_layer in numbers]
        else:
            columns[f"{kind} mean"] = [fmean(values) if values else None for values in numbers]
            columns[f"{kind} max"] = [max(values, default=None) for values in numbers]
    return coloured(name, grid.layers, columns, text_of)


def _tables_of_operators(report: PruningReport) -> dict[str, Coloured | None]:
    """Make the heat tables that have a number for each operator, by their names in the template page.html.

    `None` stands for a table without a number.
    """
    # Only these are asked for the error, so `or 0.0` below is never needed; it is for the type checker.
    with_output_error = [o for o in report.operators if o.output_error is not None]
    with_held_out_error = [o for o in report.operators if o.held_out_fit_error is not None]
    return {
        "errors": by_operator(
            report.operators, "fit error", lambda o: o.fit_error, text_of=_short_error
        ),
        "output_errors": by_operator(
            with_output_error, "output error", lambda o: o.output_error or 0.0, text_of=_short_error
        ),
        "held_out": by_operator(
            with_held_out_error,
            "held-out fit error over fit error",
            _held_out_ratio,
            text_of=_short_error,
        ),
        "zeros": by_operator(report.operators, "zeros", lambda o: o.sparsity, text_of=share),
    }


def _tables_of_layers(report: PruningReport) -> dict[str, Coloured | None]:
    """Make the heat tables that have a number for each decoder layer, by their names in the template page.html.

    They show the error of the hidden states, the time, and the largest memory. `None` stands for a table without a
    number.
    """
    layer_names = [layer.name for layer in report.layers]
    # The columns of a table, by their headings: a number for each layer.
    errors = {"hidden states": [layer.hidden_state_error for layer in report.layers]}
    times = {"time": [layer.seconds for layer in report.layers]}
    memory: dict[str, list[float | None]] = {}
    for heading, field_of_peak in MEMORY_KINDS.items():  # such as "resident", "resident_bytes"
        # A layer without a pruned operator has no `MemoryPeak`.
        memory[heading] = [
            None if layer.memory is None else getattr(layer.memory, field_of_peak)
            for layer in report.layers
        ]
    return {
        "moved": coloured("error of the hidden states", layer_names, errors, text_of=_short_error),
        "times": coloured("time", layer_names, times, text_of=duration),
        "memory": coloured("memory", layer_names, memory, text_of=size_text),
    }


def _short_error(value: float) -> str:
    """An error in three digits; "?" if it is not finite."""
    return error(value, digits=3, unknown="?")


def _held_out_ratio(operator: OperatorReport) -> float:
    """Divide the fit error on held-out tokens by that on the calibration tokens; infinite if only the latter is 0."""
    held_out = operator.held_out_fit_error or 0.0
    if operator.fit_error:
        return held_out / operator.fit_error
    # Nothing was pruned if both are 0.
    return math.inf if held_out else 1.0


def _columns_left(report: PruningReport) -> list[tuple[str, int, int]]:
    """Return for each kind of operator that lost columns: its name, how many stayed, and how many there were.

    `groups_kept` of such an operator is not `None`, and `target_sparsity` is the share of columns that went. A kind has
    a row for each size that decoder layers give it.
    """
    grid = OperatorGrid(o for o in report.operators if o.groups_kept is not None)
    rows = []
    for kind, operators in grid.kinds.items():
        sizes = set()
        for operator in operators:
            num_left = operator.shape[1]  # the shape is that without the lost columns
            num_before = round(num_left / (1 - operator.target_sparsity))
            sizes.add((num_left, num_before))
        rows += [(kind, num_left, num_before) for num_left, num_before in sorted(sizes)]
    return rows
