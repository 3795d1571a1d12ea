"""The first figure of the page: what a run removed, and what the model has before and after it, as pairs of bars.

`figure_of` makes it of a report. A row has one number of the model that the user began with, and the same number of the
result: parameters, bytes of the weight files, the loss on each text. Both bars of a row have one scale, which begins at
0, so that a loss that hardly rose looks like that. The template page.html draws the bars. Nothing here changes the
report.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from optimum_fista.headlines import count, share
from optimum_fista.memory import size_text
from optimum_fista.report import PruningReport

_MOST_TEXTS = 8  # with a row each; the tiles below the figure have all texts


@dataclass(frozen=True)
class Bars:
    """One row: a number before and after, as text, and how long both bars are, in percent of the longest."""

    name: str
    before: str
    after: str
    # Such as "-25.0%"; empty if it is not known.
    change: str
    width_before: float
    width_after: float
    # Whether a loss rose more than the user allowed.
    is_alert: bool = False


@dataclass(frozen=True)
class Figure:
    """The figure: a sentence that says what was removed, and its rows."""

    caption: str
    rows: list[Bars]


def figure_of(report: PruningReport, weight_bytes: int | None = None) -> Figure | None:
    """Make the figure of a finished run; `None` if nothing is known of the model before it.

    `weight_bytes` is the size of the result's weight files, `None` if it has no files.
    """
    rows = [*_sizes(report, weight_bytes), *_losses(report), *_loops(report)]
    if not rows:
        return None
    return Figure(_caption(report), rows)


def _caption(report: PruningReport) -> str:
    """Say what was removed from the model, or how many weights became zero."""
    if report.model.get("parts_removed"):
        return f"Removed: {'; '.join(report.model['parts_removed'])}"
    vocabulary = report.model.get("vocabulary")  # numbers of tokens, if the run removed some
    if vocabulary:
        removed = vocabulary["before"] - vocabulary["kept"]
        return f"Removed: {removed:,} of {vocabulary['before']:,} tokens of the vocabulary"
    totals = report.totals
    return (
        f"{share(totals['sparsity'], 1)} of the weights of {totals['num_operators']:,} operators are zero "
        f"({report.pattern})"
    )


def _sizes(report: PruningReport, weight_bytes: int | None) -> Iterator[Bars]:
    """Give the rows on the size of the model. `weight_bytes` is the size of the result's weight files, if it has any.

    `report.origin` is `None` if the model that the run was given is the one that the user began with. Otherwise only
    the number of parameters of that model is known, and perhaps not even that.
    """
    first = report.first_model.num_parameters
    remaining = report.model["num_parameters"]
    if first:
        yield _bars("Parameters", first, remaining, count)
        zeros = report.num_zeros
        if zeros:
            yield _bars("Parameters that are not zero", first, remaining - zeros, count)
    if report.origin is None:
        active = report.model.get("active_parameters")
        if active:
            name = "Parameters that a token uses"
            yield _bars(name, active["before"], active["after"], count)
        if report.weight_bytes_before and weight_bytes:
            yield _bars("Weight files", report.weight_bytes_before, weight_bytes, size_text)


def _losses(report: PruningReport) -> Iterator[Bars]:
    """Give the rows on the loss: in bits per byte for each text that the user named, otherwise the perplexity.

    A text whose loss by the first model is not known has no row.
    """
    shown = report.texts[:_MOST_TEXTS]
    for text in shown:
        first = report.first_bits_per_byte(text)
        if first is not None:
            yield _bars(
                f"Bits per byte of {text.name}",
                first,
                text.pruned,
                "{:.3f}".format,
                is_alert=text in report.unprotected,
            )
    before = report.first_perplexity
    after = report.measured("pruned")
    if not shown and before is not None and after is not None:
        yield _bars(
            f"Perplexity on {after.text or 'text'}",
            before.perplexity,
            after.perplexity,
            "{:.2f}".format,
        )
    bits = report.bits_per_byte  # of a run that removed tokens, on a text of its own
    if not shown and bits is not None and report.origin is None:
        yield _bars(
            f"Bits per byte of {bits['text'] or 'text'}",
            bits["dense"],
            bits["pruned"],
            "{:.3f}".format,
        )


def _loops(report: PruningReport) -> Iterator[Bars]:
    """Give the row on loops, of all texts together; none if they were not counted, or not of the first model.

    The bars have the whole width if all continuations are loops.
    """
    before = [text.loops_dense for text in report.texts if text.loops_dense is not None]
    after = [text.loops_pruned for text in report.texts if text.loops_pruned is not None]
    num_before = sum(loops.num_prompts for loops in before)
    num_after = sum(loops.num_prompts for loops in after)
    if report.origin is not None or not num_before or not num_after:
        return
    loops_before = sum(loops.num_loops for loops in before)
    loops_after = sum(loops.num_loops for loops in after)
    yield Bars(
        name="Greedy continuations that end in a loop",
        before=f"{loops_before} of {num_before}",
        after=f"{loops_after} of {num_after}",
        change="",
        width_before=100 * loops_before / num_before,
        width_after=100 * loops_after / num_after,
    )


def _bars(
    name: str,
    before: float,
    after: float,
    text_of: Callable[[Any], str],
    *,
    is_alert: bool = False,
) -> Bars:
    """Make a row of two numbers; `text_of` writes one of them."""
    longest = max(before, after)
    # Both are tested, because the larger of a number and NaN may be either.
    is_comparable = math.isfinite(before) and math.isfinite(after) and longest > 0
    change = ""
    if is_comparable and before > 0:
        change = f"{after / before - 1:+.1%}"
    return Bars(
        name=name,
        before=text_of(before),
        after=text_of(after),
        change=change,
        # If a number is not finite, or both are 0, both bars have the whole width.
        width_before=100 * before / longest if is_comparable else 100.0,
        width_after=100 * after / longest if is_comparable else 100.0,
        is_alert=is_alert,
    )
