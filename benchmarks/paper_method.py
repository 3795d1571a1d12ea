"""Tables and facts of docs/paper.md on FISTAPruner itself, with one part of it changed at a time.

Each function makes a table from the rows of `Results`, as lines of Markdown. A function whose name ends with `_facts`
computes numbers that stand in sentences of its section, by a name that `paper.py` prints.
"""

from __future__ import annotations

import statistics

from ablations import geometric_mean
from paper_rows import (
    TEXTS,
    Results,
    Row,
    mean_error,
    percent,
    perplexities,
    ratio,
    ratio_over_seeds,
    unique,
    zeros_text,
)

from optimum_fista.folder.card import markdown_lines

_MIB = 2**20

# --- error correction ------------------------------------------------------------------------------------------------

_CORRECTIONS = ("none", "intra", "full")


def published_correction(results: Results) -> list[str]:
    """Make the table of what the authors published: OPT-125M by error correction."""
    lines = []
    for pattern in ("0.05", "0.1", "0.2", "0.5", "2:4"):
        cells = []
        for suffix in (":error_correction=none", "", ":error_correction=full"):
            rows = results.of_file("paper.json", method=f"paper{suffix}", pattern=pattern)
            cell = ""
            if rows:
                (row,) = rows
                texts = [f"OPT-125M {text}" for text in ("wikitext2", "c4", "ptb")]
                cell = "/".join(f"{row['perplexity'][text]:.2f}" for text in texts)
            cells.append(cell)
        lines.append([zeros_text(pattern), *cells])
    return markdown_lines(["zeros", *(f"`{name}`" for name in _CORRECTIONS)], lines)


def own_correction(results: Results) -> list[str]:
    """Make the table of SmolLM2-135M by error correction, of two methods."""
    lines = []
    for pattern in ("0.05", "0.1", "0.2", "0.5", "2:4"):
        rows = _rows_by_correction(results, pattern)
        cells = [perplexities(rows[name]) for name in _CORRECTIONS]
        lines.append([f"`obs_admm`, {zeros_text(pattern)}", *cells])
    for pattern in ("0.3", "0.5", "0.6", "0.7", "2:4"):
        cells = []
        for name in _CORRECTIONS:
            suffix = "" if name == "intra" else f":error_correction={name}"
            rows = results.part("models", method=f"paper:max_trials=4{suffix}", pattern=pattern)
            cells.append(perplexities(rows[0]) if rows else "")
        if any(cells):
            lines.append([f"FISTAPruner, {zeros_text(pattern)}", *cells])
    return markdown_lines(["method, zeros", *(f"`{name}`" for name in _CORRECTIONS)], lines)


def _rows_by_correction(results: Results, pattern: str) -> dict[str, Row]:
    """Return the rows of `ablations.py` with one pattern, by error correction, such as "intra"."""
    rows = {}
    for row in results.file("ablations.json")["correction"]["rows"]:
        if row["pattern"] == pattern:
            _, _, correction = row["label"].rpartition("=")
            rows[correction] = row
    return rows


def small_correction(results: Results) -> list[str]:
    """Make the table of the small model by error correction, of two methods: ratios to `intra`."""
    others = ("none", "0.5", "full")
    lines = []
    for method, name in (("paper:max_trials=4", "FISTAPruner"), ("default", "the default")):
        for pattern in ("0.3", "0.5", "0.6", "0.7", "2:4"):
            ratios = [
                ratio_over_seeds(results, f"{method}:error_correction={other}", pattern, method)
                for other in others
            ]
            if any(ratios):
                lines.append([f"{name}, {zeros_text(pattern)}", *ratios])
    return markdown_lines(["method, zeros", *(f"`{other}`" for other in others)], lines)


def correction_facts(results: Results) -> dict[str, str]:
    """Compute by how much less perplexity `intra` has than `none`, in percent."""
    facts = {}
    for pattern in ("0.5", "2:4"):
        rows = _rows_by_correction(results, pattern)
        facts[f"intra gains at {pattern}"] = percent(1 - ratio(rows["intra"], rows["none"]), 1)
    return facts


# --- FISTA against SGD -----------------------------------------------------------------------------------------------


def descents(results: Results) -> list[str]:
    """Make the table of FISTA and gradient descent on the same LASSO."""
    rows = results.part("descents")
    lines = []
    for penalty in unique(row["penalty"] for row in rows):
        for way in unique(row["way"] for row in rows):
            # After 20 and after 80 steps.
            falls = []
            errors_on_calibration = []
            errors_on_other_text = []
            for steps in (20, 80):
                # The line of Wanda's own weights has rows without steps only, which stand for both numbers.
                group = [
                    row
                    for row in rows
                    if row["penalty"] == penalty
                    and row["way"] == way
                    and row["steps"] in (0, steps)
                ]
                falls.append(percent(statistics.fmean(row["fall"] for row in group), 1))
                errors_on_calibration.append(percent(mean_error(group, "calibration")))
                errors_on_other_text.append(percent(mean_error(group, "other")))
            numbers = (falls, errors_on_calibration, errors_on_other_text)
            lines.append([penalty, way, *map("/".join, numbers)])
    headings = ["penalty", "method", "objective falls by, %", "error, rounded", "WikiText-2"]
    return markdown_lines(headings, lines)


def blocks(results: Results) -> list[str]:
    """Make the table of a decoder layer that is trained by SGD, at equal time."""
    rows = results.part("blocks")
    references = {row["layer"]: row for row in rows if row["way"] == "Wanda"}
    lines = []
    for way in unique(row["way"] for row in rows):
        group = [row for row in rows if row["way"] == way]
        errors = []
        for text in ("calibration", "other"):
            ratios = [row[text] / references[row["layer"]][text] for row in group]
            errors.append("/".join(f"{value:.2f}" for value in ratios))
        seconds = "/".join(f"{row['seconds']:.0f}" for row in group)
        memory = "/".join(f"{row['peak_bytes'] / _MIB:.0f}" for row in group)
        lines.append([way, *errors, seconds, memory])
    headings = ["method", "error, calibration", "WikiText-2", "seconds", "peak MiB"]
    return markdown_lines(headings, lines)


# --- the search of the penalty ---------------------------------------------------------------------------------------


def searches(results: Results) -> list[str]:
    """Make the table of searches by the FISTA steps that they spend."""
    rows = results.part("searches")
    budgets = ("20", "40", "80", "160", "240")
    lines = []
    for pattern in unique(row["pattern"] for row in rows):
        for way in unique(row["way"] for row in rows):
            group = [row for row in rows if row["way"] == way and row["pattern"] == pattern]
            cells = [percent(mean_error(group, budget)) for budget in budgets]
            lines.append([zeros_text(pattern), way, *cells])
    return markdown_lines(["zeros", "search", *(f"{budget} steps" for budget in budgets)], lines)


_EARLIER_SEARCHES = {
    "SparseGPT, no trial": "no trial",
    "bisection, four trials (default)": "bisection, four trials",
    "bisection, published": "bisection, as published",
    "TPE, chained": "TPE",
    "random, chained": "random",
    "TPE": "TPE, each trial from SparseGPT",
    "TPE with Hyperband": "BOHB, each trial from SparseGPT",
    "grid, 20 steps": "grid, each trial from SparseGPT",
    "grid, up to 80 steps, judged after the refit": "the same, judged after a refit, 80 steps each",
}


def earlier_searches(results: Results) -> list[str]:
    """Make the table of searches that start from SparseGPT, which an earlier version measured."""
    lines = []
    for way, name in _EARLIER_SEARCHES.items():
        cells = []
        for pattern in ("50% unstructured", "2:4"):
            group = results.of_file("penalty_search.json", way=way, pattern=pattern)
            cells.append(percent(_error_after_80_steps(group)))
            steps = statistics.fmean(row["steps"] for row in group)
            cells.append(f"{percent(mean_error(group, 'rounded'))} ({steps:.0f})")
            cells.append(percent(mean_error(group, "refitted")))
        lines.append([name, *cells])
    columns = ["rounded, 80 steps", "at the end (steps)", "refitted"]
    headings = [f"{zeros}: {column}" for zeros in ("50%", "2:4") for column in columns]
    return markdown_lines(["search", *headings], lines)


def _error_after_80_steps(rows: list[Row]) -> float:
    """Return the geometric mean over operators of the least error that a search reached within 80 steps."""
    errors = []
    for row in rows:
        # The curve has the steps and the error at each improvement.
        within_80_steps = [error for steps, error in row["curve"] if steps <= 80]
        errors.append(within_80_steps[-1])
    return geometric_mean(errors)


def search_facts(results: Results) -> dict[str, str]:
    """Compute by how much other searches are worse than bisection after 80 steps, and what the refit leaves."""
    bisection = "bisection, four trials (default)"
    others = ("TPE, chained", "random, chained", "TPE", "TPE with Hyperband", "grid, 20 steps")
    published = "bisection, published"
    judged_after_refit = "grid, up to 80 steps, judged after the refit"
    excess = []
    refitted = []
    gains = []
    for pattern in ("50% unstructured", "2:4"):
        rows = {
            way: results.of_file("penalty_search.json", way=way, pattern=pattern)
            for way in (bisection, *others, published, judged_after_refit)
        }
        after_80 = {way: _error_after_80_steps(rows[way]) for way in (bisection, *others)}
        after_refit = {
            way: mean_error(rows_of_way, "refitted") for way, rows_of_way in rows.items()
        }

        excess += [after_80[way] / after_80[bisection] - 1 for way in others]
        refitted += [after_refit[way] / after_refit[published] - 1 for way in (bisection, *others)]
        gains.append(1 - after_refit[judged_after_refit] / after_refit[published])
    return {
        "least excess after 80 steps": percent(min(excess), 0),
        "most excess after 80 steps": percent(max(excess), 0),
        "most excess after the refit": percent(max(refitted), 1),
        "gain of judging after the refit, 50%": percent(gains[0], 1),
        "gain of judging after the refit, 2:4": percent(gains[1], 1),
    }


# --- warm starts -----------------------------------------------------------------------------------------------------


def starts(results: Results) -> list[str]:
    """Make the table of warm starts."""
    rows = results.part("starts")
    lines = []
    for pattern in unique(row["pattern"] for row in rows):
        for way in unique(row["way"] for row in rows):
            group = [row for row in rows if row["way"] == way and row["pattern"] == pattern]
            cells = [
                f"{sum(row['start_seconds'] for row in group):.1f}",
                f"{sum(row['search_seconds'] for row in group):.0f}",
            ]
            for stage in ("start", "searched", "refitted"):
                cells.append(percent(mean_error([row[stage] for row in group], "calibration")))
            cells.append(percent(mean_error([row["refitted"] for row in group], "other")))
            lines.append([zeros_text(pattern), way, *cells])
    headings = ["zeros", "start", "seconds, start", "search", "error at the start"]
    headings += ["after the search", "after a refit", "after a refit, WikiText-2"]
    return markdown_lines(headings, lines)


_EARLIER_STARTS = {
    "dense": 'fista:warm_start="dense"',
    "magnitude": 'fista:warm_start="magnitude"',
    "wanda": 'fista:warm_start="wanda"',
    "sparsegpt": "fista",
}


def earlier_starts(results: Results) -> list[str]:
    """Make the table of warm starts that earlier versions measured, on operators and on whole models."""
    whole = {"wanda": "paper", "sparsegpt": "paper:warm_start=sparsegpt"}
    lines = []
    for start, method in _EARLIER_STARTS.items():
        group = results.of_file("solver_ablations.json", method=method)
        errors = [percent(mean_error(group, text)) for text in ("calibration", "other")]
        timed = results.of_file("solvers.json", method=start, pattern="0.5")
        seconds = f"{sum(row['cpu_seconds'] for row in timed):.1f}" if timed else ""
        cell = ""
        if start in whole:
            (row,) = results.of_file("perplexity.json", method=whole[start], pattern="0.5")
            cell = "/".join(f"{row['perplexity'][text]:.2f}" for text in (*TEXTS, "held-out"))
        lines.append([start, seconds, *errors, cell])
    headings = ["start", "seconds, start", "error after a refit", "WikiText-2"]
    return markdown_lines([*headings, "whole model as published"], lines)


def start_facts(results: Results) -> dict[str, str]:
    """Compute by how much the error and the perplexity are lower from SparseGPT, in percent."""
    errors = {
        start: mean_error(results.of_file("solver_ablations.json", method=method), "calibration")
        for start, method in _EARLIER_STARTS.items()
    }
    facts = {
        f"error from SparseGPT against {start}": percent(1 - errors["sparsegpt"] / error, 0)
        for start, error in errors.items()
        if start != "sparsegpt"
    }
    (wanda,) = results.of_file("perplexity.json", method="paper", pattern="0.5")
    (ours,) = results.of_file("perplexity.json", method="paper:warm_start=sparsegpt", pattern="0.5")
    facts["perplexity from SparseGPT against Wanda"] = percent(1 - ratio(ours, wanda), 0)
    seconds = sum(
        row["cpu_seconds"] for row in results.of_file("solvers.json", method="fista", pattern="0.5")
    )
    facts["seconds of FISTA, all in all"] = f"{seconds:.1f}"
    return facts


# --- every part ------------------------------------------------------------------------------------------------------

_PARTS_OF_SOLVERS = {
    "fista": "FISTA: four trials from SparseGPT, then a refit",
    "fista:refit_iterations=0": "without the refit",
    "fista:max_trials=1": "without the search: one trial",
    'fista:warm_start="wanda"': "Wanda as the start",
    'fista:warm_start="magnitude"': "magnitude as the start",
    "obs_admm": "the default's solver",
    "obs_admm:refit_iterations=0": "without the refit",
    "obs_admm:stages=1:iterations=1": "without a search of the mask: one iteration",
    "obs_admm:ridge=0.000001": "without the ridge",
}


def parts_of_solvers(results: Results) -> list[str]:
    """Make the table of solvers without one of their parts."""
    lines = []
    for method, name in _PARTS_OF_SOLVERS.items():
        group = results.of_file("solver_ablations.json", method=method)
        errors = [percent(mean_error(group, text)) for text in ("calibration", "fresh", "other")]
        lines.append([name, *errors])
    return markdown_lines(["method", "calibration", "fresh", "WikiText-2"], lines)


_PARTS_OF_MODELS = {
    "default": "default",
    "default:error_correction=none": "without error correction",
    "default:allocation=uniform": "without allocation",
    "default:refit_iterations=0": "without the refit",
    "default:residual_correction=1": "with residual correction",
    "paper:max_trials=4": "FISTAPruner, four trials",
    "paper:max_trials=4:error_correction=none": "without error correction",
    "paper:max_trials=1": "without the search: one trial",
    "paper:max_trials=4:refit_iterations=20": "with a refit",
    "paper:max_trials=4:warm_start=sparsegpt": "SparseGPT as the start",
}


def parts_of_models(results: Results) -> list[str]:
    """Make the table of whole models without one part; ratios are to the first line of each method."""
    lines = []
    references: dict[str, Row] = {}
    for method, name in _PARTS_OF_MODELS.items():
        cells = []
        for pattern in ("0.5", "2:4"):
            rows = results.part("models", method=method, pattern=pattern)
            if not rows:
                cells.append("")
                continue
            row = rows[0]
            cell = perplexities(row)
            if method in ("default", "paper:max_trials=4"):
                references[pattern] = row
            elif pattern in references:
                cell += f" ({ratio(row, references[pattern]):.3f})"
            cells.append(cell)
        if any(cells):
            lines.append([name, *cells])
    return markdown_lines(["method", "50%", "2:4"], lines)


def parts_of_small_models(results: Results) -> list[str]:
    """Make the table of the small model without one part: ratios to the complete method."""
    lines = []
    reference = ""  # the complete method; those after it lack a part of it
    for method, name in _PARTS_OF_MODELS.items():
        if method in ("default", "paper:max_trials=4"):
            reference = method
            continue
        ratios = [
            ratio_over_seeds(results, method, pattern, reference) for pattern in ("0.5", "2:4")
        ]
        if any(ratios):
            of_method = "default" if reference == "default" else "FISTAPruner"
            lines.append([f"{of_method}, {name}", *ratios])
    return markdown_lines(["method", "50%", "2:4"], lines)
