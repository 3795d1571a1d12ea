"""How the slowest operators came to rest: a small chart each, on one logarithmic scale."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from optimum_fista.run.reports.operator_grid import layer_and_kind, layer_index
from optimum_fista.run.reports.report import OperatorReport
from optimum_fista.solve.convergence import Convergence

HEIGHT = 84
"""Pixels between the lowest tick and the highest."""

_CHARTS = 12
_TICKS = 5


@dataclass(frozen=True)
class Step:
    """A step of a method: `x` in percent of the width, `y` in pixels from the top."""

    x: float
    y: float
    title: str


@dataclass(frozen=True)
class ConvergenceChart:
    """Operators that were solved together, or one.

    Attributes:
        name: Their decoder layer and kinds.
        seconds: Their time.
        summary: First and last residual in words.
        steps: The steps that have a place: those with a residual above zero.
        table: All steps and residuals that are kept, in words.
    """

    name: str
    seconds: float
    summary: str
    steps: tuple[Step, ...]
    table: str


@dataclass(frozen=True)
class ConvergenceCharts:
    """What is drawn.

    Attributes:
        measures: What the residuals are.
        charts: The slowest operators first.
        ticks: Places and texts of the horizontal lines, the same in all charts.
        last: The last step of all charts, at the right end.
    """

    measures: tuple[str, ...]
    charts: tuple[ConvergenceChart, ...]
    ticks: tuple[tuple[float, str], ...]
    last: int


def convergence_charts(operators: Iterable[OperatorReport]) -> ConvergenceCharts | None:
    """The charts of the slowest operators whose methods told of their steps; `None` where there are none."""
    groups: dict[tuple[str, Convergence], list[OperatorReport]] = {}
    for operator in operators:
        if operator.convergence is not None:
            groups.setdefault((layer_and_kind(operator.name)[0], operator.convergence), []).append(operator)
    slowest = sorted(groups.items(), key=lambda found: _seconds(found[1]), reverse=True)[:_CHARTS]
    exponents = [math.log10(r) for (_, c), _ in slowest for r in c.residuals if r > 0 and math.isfinite(r)]
    if not exponents:
        return None
    low, high = math.floor(min(exponents)), math.ceil(max(exponents))
    high = max(high, low + 1)
    every = math.ceil((high - low) / (_TICKS - 1))
    low = high - every * math.ceil((high - low) / every)
    last = max(convergence.steps[-1] for (_, convergence), _ in slowest)

    def height(exponent: float) -> float:
        return HEIGHT * (high - exponent) / (high - low)

    def chart(layer: str, found: Convergence, group: list[OperatorReport]) -> ConvergenceChart:
        pairs = list(zip(found.steps, found.residuals, strict=True))
        steps = tuple(
            Step(100 * (step - 1) / max(1, last - 1), height(math.log10(value)), f"step {step}: {value:g}")
            for step, value in pairs
            if value > 0 and math.isfinite(value)
        )
        summary = f"{found.residuals[0]:g} → {found.residuals[-1]:g} in {found.steps[-1]:,} steps"
        table = ", ".join(f"{step}: {value:g}" for step, value in pairs)
        return ConvergenceChart(_name(layer, group), _seconds(group), summary, steps, table)

    return ConvergenceCharts(
        tuple(dict.fromkeys(convergence.measure for (_, convergence), _ in slowest)),
        tuple(chart(layer, convergence, group) for (layer, convergence), group in slowest),
        tuple((height(exponent), f"1e{exponent}" if exponent else "1") for exponent in range(low, high + 1, every)),
        last,
    )


def _seconds(group: list[OperatorReport]) -> float:
    return sum(operator.solve_seconds for operator in group)


def _name(layer: str, group: list[OperatorReport]) -> str:
    """`layer 3: self_attn.q_proj, k_proj, v_proj`."""
    kinds = [layer_and_kind(operator.name)[1] for operator in group]
    module = kinds[0].rpartition(".")[0]
    shown = [kinds[0], *(kind.removeprefix(f"{module}.") if module else kind for kind in kinds[1:])]
    return f"layer {layer_index(layer)}: {', '.join(shown)}" if layer else ", ".join(shown)
