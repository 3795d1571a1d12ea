"""The head of a report: its title and the numbers that a reader looks for first, as text.

The page shows them in boxes, a notebook as a table. The model card and the terminal say the same in sentences.

All is computed from a `PruningReport`, which no function here changes. A run is *given* a model and makes a *result*.
The *first* model is the one that the user began with; it is the given one if no run came before (`report.origin` is
then `None`). `report.measured("dense")` is the perplexity of the given model, `report.measured("pruned")` that of the
result, and `report.first_perplexity` that of the first model on the same text.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from optimum_fista.memory import size_text
from optimum_fista.origin import MeasuredPerplexity, patterns_of
from optimum_fista.records import TextReport
from optimum_fista.report import COST_OF_TOKENS_ELSEWHERE, PruningReport

_UNBROKEN = "\u00a0"  # a blank at which no line is broken

# What the peaks of memory are called for readers, and the fields of `MemoryPeak` that hold them.
MEMORY_KINDS = {
    "anonymous": "anonymous_bytes",
    "resident": "resident_bytes",
    "on the GPU": "device_bytes",
}


@dataclass(frozen=True)
class Headline:
    """One number, what it is, and what else a reader should know about it."""

    name: str
    value: str
    remark: str
    is_alert: bool = False


def title(report: PruningReport) -> str:
    """Name the result by the first model and the patterns of all runs, such as "Llama-3.2-1B, layers:0.5, then 2:4"."""
    # Of a Hub id only the last part.
    name = report.first_model.name.split("/")[-1]
    if not name:
        name = report.model["class"]
    return f"{name}, {patterns_of(report.steps)}"


def headlines(report: PruningReport) -> Iterator[Headline]:
    """Give the numbers that come first, those of the whole model before those of operators.

    Args:
        report: Of a finished run. Numbers that it lacks are left out.
    """
    if report.measured("pruned") is not None:
        yield _perplexity(report)
    if report.bits_per_byte is not None:
        yield _bits_per_byte(report)
    for text in report.texts:
        yield _bits_per_byte_of_text(report, text)
    if report.removed or report.removed_before:
        yield _removed(report)
    if not report.removed:
        yield _zeros(report)
    if report.operators:
        yield from _errors(report)
    yield _time(report)
    if memory_peaks(report):
        yield _peak_memory(report)
    if report.totals["num_not_converged"]:
        yield _not_converged(report)


def _perplexity(report: PruningReport) -> Headline:
    """Show the perplexity of the result, the verdict, and the perplexities to compare it with.

    Args:
        report: Of a run that measured a perplexity.
    """
    pruned = report.measured("pruned")
    assert pruned is not None
    remarks = [report.verdict, *perplexities_to_compare(report)]
    return Headline(
        name="Perplexity, before retraining" if report.retrained else "Perplexity",
        value=f"{pruned.perplexity:.2f}",
        remark=f"{'; '.join(remarks)}, on {report.measured_on}",
    )


def _bits_per_byte(report: PruningReport) -> Headline:
    """Show what the removal of tokens costs.

    Args:
        report: Of a run that removed tokens.
    """
    bits = report.bits_per_byte
    assert bits is not None
    return Headline(
        name="Bits per byte",
        value=f"{bits['pruned']:.3f}",
        remark=f"{report.verdict_of_tokens}; {report.cost_of_tokens}; {COST_OF_TOKENS_ELSEWHERE}",
    )


def _bits_per_byte_of_text(report: PruningReport, text: TextReport) -> Headline:
    """Show the loss of the result on one of the texts that the user named, `report.texts`."""
    before = ", before retraining" if report.retrained else ""
    lost_too_much = text in report.unprotected  # more than the user allowed
    first_model_is_not_known = report.times_of(text) is None
    return Headline(
        name=f"Bits per byte of {text.name}{before}",
        value=f"{text.pruned:.3f}",
        remark=report.words_on(text),
        is_alert=lost_too_much or first_model_is_not_known,
    )


def perplexities_to_compare(report: PruningReport) -> list[str]:
    """Say what the perplexity of the result is to be compared with, in one or two pieces of a sentence.

    These are the perplexity of the first model, called dense, and that of the given model if it was pruned already.

    Args:
        report: Of a run that measured a perplexity.
    """
    first = report.first_perplexity
    given = report.measured("dense")
    pruned = report.measured("pruned")
    if first is None:
        pieces = ["that of the dense model is not known on this text"]
    else:
        bits = ""
        if (
            first.bits_per_byte is not None
            and pruned is not None
            and pruned.bits_per_byte is not None
        ):
            bits = f" ({pruned.bits_per_byte:.3f} and {first.bits_per_byte:.3f} bits per byte)"
        pieces = [f"{first.perplexity:.2f} of the dense model{bits}"]
    if report.origin is not None and given is not None:
        pieces.append(f"{given.perplexity:.2f} of the model that this run began with")
    return pieces


def perplexity_line(report: PruningReport) -> str:
    """Say in one line of the terminal what the perplexity was before and after, and the verdict.

    Args:
        report: Of a run that measured a perplexity.
    """
    first = report.first_perplexity
    given = report.measured("dense")
    pruned = report.measured("pruned")
    assert given is not None
    assert pruned is not None

    if report.origin is None:
        before = f"{given.perplexity:.2f} before"
    elif first is None:
        before = f"{given.perplexity:.2f} of the model that this run began with"
    else:
        before = (
            f"{first.perplexity:.2f} of the dense model, "
            f"{given.perplexity:.2f} of the model that this run began with"
        )
    bits = ""
    if first is not None and first.bits_per_byte is not None and pruned.bits_per_byte is not None:
        bits = f"; {first.bits_per_byte:.3f} and {pruned.bits_per_byte:.3f} bits per byte"
    return (
        f"perplexity {before} and {pruned.perplexity:.2f} after ({report.verdict}), "
        f"on {report.measured_on}{bits}"
    )


STEP_HEADINGS = ("pattern", "method", "what it removed", "parameters left", "perplexity after it")


def step_rows(report: PruningReport) -> list[tuple[str, str, str, str, str]]:
    """Return the rows of the table of all runs, under `STEP_HEADINGS`; empty if there was only one run.

    Each row after the first is for one run, in order; the last is for the run of `report`. The first row is the model
    that the user began with. A perplexity that was measured on another text than that of the latest run is left out.
    """
    if report.origin is None:
        return []
    first = report.first_model
    unknown = "not measured" if report.perplexity is None else "not known on this text"

    name = first.name or "the first model, whose name is not known"
    first_perplexity = _perplexity_cell(report.first_perplexity, unknown)
    rows = [(name, "", "", _parameters_cell(first.num_parameters), first_perplexity)]
    for step, perplexity in zip(report.steps, report.perplexities_of_steps, strict=True):
        method = f"{step.method}, then retrained" if step.retrained else step.method
        rows.append(
            (
                step.pattern,
                method,
                step.removal,
                _parameters_cell(step.num_parameters),
                _perplexity_cell(perplexity, unknown),
            )
        )
    return rows


def _perplexity_cell(measured: MeasuredPerplexity | None, unknown: str) -> str:
    """Write a perplexity into a cell; `unknown` is what stands there if it was not measured."""
    return unknown if measured is None else f"{measured.perplexity:.2f}"


def _parameters_cell(number: int | None) -> str:
    """Write a number of parameters into a cell."""
    return "not known" if number is None else f"{number:,}"


def _removed(report: PruningReport) -> Headline:
    """Show how much of the first model is gone, after all runs.

    Args:
        report: Of a run after which the model has another size than the first one, or of which that is not known.
    """
    remaining = report.model["num_parameters"]
    first = report.first_model.num_parameters
    removed = report.num_removed_in_all
    if first is None or removed is None:
        return Headline(
            name="Removed",
            value="not known",
            remark=report.removed or report.removed_before,
        )
    zeros = ""
    if report.removed and not report.totals["num_zeros"]:
        zeros = ", none of them made zero"
    growth = f"; {report.growth}" if report.growth else ""
    return Headline(
        name="Removed",
        value=share(removed / first, 2),
        remark=f"{count(removed)} of {count(first)} parameters; {count(remaining)} are left{zeros}{growth}",
    )


def _zeros(report: PruningReport) -> Headline:
    """Show how many weights are zero.

    Args:
        report: Of a run that removed no parts.
    """
    totals = report.totals
    in_all = f"; {report.zeros_in_all}" if report.zeros_in_all else ""
    return Headline(
        name="Zeros",
        value=share(totals["sparsity"], 2),
        remark=(
            f"{count(totals['num_zeros'])} of {count(totals['num_weights'])} weights in "
            f"{totals['num_operators']:,} operators; {share(totals['model_sparsity'])} of all parameters{in_all}"
        ),
    )


def _errors(report: PruningReport) -> Iterator[Headline]:
    """Show the errors of the pruned operators.

    Args:
        report: Of a run that pruned at least one operator.
    """
    totals = report.totals
    retraining = ", before retraining" if report.retrained else ""
    network = "dense network" if report.origin is None else "network that this run began with"
    yield Headline(
        name=f"Mean fit error{retraining}",
        value=error(totals["mean_fit_error"], 3),
        remark="against the outputs that the operators were fitted to, on the calibration tokens",
    )
    if totals["mean_output_error"] is not None:
        yield Headline(
            name=f"Mean output error{retraining}",
            value=error(totals["mean_output_error"], 3),
            remark=f"against the outputs of the {network}",
        )
    worst = max(report.operators, key=lambda operator: operator.fit_error)
    yield Headline(
        name=f"Largest fit error{retraining}",
        value=error(totals["max_fit_error"], 3),
        remark=worst.name,
    )
    if totals["held_out_ratio"] is not None:
        num_tokens = report.calibration["held_out"]["num_tokens"]
        yield Headline(
            name=f"Held-out fit error{retraining}",
            value=error(totals["mean_held_out_fit_error"], 3),
            remark=(
                f"on average on {num_tokens:,} tokens that nothing was fitted to: "
                f"{totals['held_out_ratio']:.2f} times that on the calibration tokens"
            ),
        )


def _time(report: PruningReport) -> Headline:
    """Show how long the run took, and how much of that the methods."""
    return Headline(
        name="Time",
        value=duration(report.seconds.get("total", 0.0)),
        remark=f"of which solving {duration(report.totals['solve_seconds'])}",
    )


def _not_converged(report: PruningReport) -> Headline:
    """Show how many operators a method gave up on before it converged."""
    totals = report.totals
    return Headline(
        name="Not converged",
        value=f"{totals['num_not_converged']:,}",
        remark=f"of {totals['num_operators']:,} operators",
        is_alert=True,
    )


def _peak_memory(report: PruningReport) -> Headline:
    """Show the highest peak of memory: that of the GPU, or without one the first of `MEMORY_KINDS` that was measured.

    Args:
        report: Of a run that measured a peak.
    """
    peaks = memory_peaks(report)
    kind_to_show = "on the GPU" if "on the GPU" in peaks else next(iter(peaks))
    kinds = ", ".join(f"{size_text(peak)} {kind}" for kind, peak in peaks.items())
    return Headline(
        name="Peak memory",
        value=size_text(peaks[kind_to_show]),
        remark=f"{kinds}, while a layer was pruned",
    )


def memory_peaks(report: PruningReport) -> dict[str, int]:
    """Return the highest peak of memory over the decoder layers, in bytes, by the names in `MEMORY_KINDS`.

    A kind that was not measured is left out, such as "on the GPU" on a machine without one.
    """
    peaks = {}
    # Decoder layers without a pruned operator have none.
    peaks_of_layers = [layer.memory for layer in report.layers if layer.memory is not None]
    for name, field_of_peak in MEMORY_KINDS.items():
        values = [getattr(peak, field_of_peak) for peak in peaks_of_layers]
        measured = [value for value in values if value is not None]
        if measured:
            peaks[name] = max(measured)
    return peaks


def share(value: float, digits: int = 1) -> str:
    """Write a share, `0.5` as `50.0%`."""
    return f"{value:.{digits}%}" if math.isfinite(value) else "not finite"


def error(value: float, digits: int = 4, unknown: str = "not finite") -> str:
    """Write a relative error, such as `0.1234`; `unknown` if it is infinite or NaN."""
    return f"{value:.{digits}f}" if math.isfinite(value) else unknown


def count(value: int) -> str:
    """Write a large whole number in three digits, such as 106,234,000 as `106 M`; one below a thousand as it is."""
    if value < 1000:
        return str(value)
    # Rounded first: 999,600 is 1.00 M, and not 1000 K.
    mantissa, exponent = f"{value:.2e}".split("e")  # "1.06", "+08"
    thousands, digits_before_point = divmod(int(exponent), 3)
    rounded = float(mantissa) * 10**digits_before_point
    return f"{rounded:.{2 - digits_before_point}f}{_UNBROKEN}{' KMBT'[thousands]}"


def duration(seconds: float) -> str:
    """Write a time in seconds as `3 h 20 min`, `12 min 3 s` or `48.2 s`."""
    whole = int(seconds)
    if whole >= 3600:
        text = f"{whole // 3600} h {whole % 3600 // 60} min"
    elif whole >= 60:
        text = f"{whole // 60} min {whole % 60} s"
    else:
        text = f"{seconds:.3g} s"
    return text.replace(" ", _UNBROKEN)
