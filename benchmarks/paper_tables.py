"""The tables of docs/paper.md, made of rows: those of `paper.py` and of other files in benchmarks/results.

The page has the name of each table in a comment, `<!-- table: NAME -->`, and an end after it. `tables_in` writes the
tables between them. Numbers in the page's sentences are those of a table in the same section, or of `facts` of its
question. A test holds both. If no row of a table was measured, it has the line `NOT_MEASURED`.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ablations import geometric_mean

from optimum_fista.folder.card import markdown_lines

Row = dict[str, Any]
NOT_MEASURED = "*Not measured.*"
_ROOT = Path(__file__).parent.parent
_TEXTS = ("wikitext2-raw-test", "lambada")
_DECODER_WEIGHTS = 30 * 3_538_944
"""Weights of the linear operators in the 30 decoder layers of SmolLM2-135M."""
_MIB = 2**20
_GIB = 2**30


class Results:
    """Rows of `paper.py`, and the files of other benchmarks."""

    def __init__(self, rows: Sequence[Row], folder: Path) -> None:
        """Keep the rows; `folder` is benchmarks/results, whose files are read when they are needed."""
        self._rows = rows
        self.file = cache(lambda name: json.loads((folder / name).read_text()))

    def part(self, name: str, **wanted: Any) -> list[Row]:
        """Return the rows of a part of `paper.py`, such as "descents", that have the values `wanted`."""
        wanted = {"part": name} | wanted
        return [row for row in self._rows if wanted.items() <= row.items()]

    def of_file(self, name: str, **wanted: Any) -> list[Row]:
        """Return the rows of a file, such as "perplexity.json", that have the values `wanted`."""
        return [row for row in self.file(name)["rows"] if wanted.items() <= row.items()]


def mean_error(rows: Iterable[Row], text: str) -> float:
    """Return the geometric mean of the errors on a text over operators, layers and seeds."""
    return geometric_mean(row[text] for row in rows)


def percent(value: float, digits: int = 2) -> str:
    """Write a share in percent, without the sign."""
    return f"{100 * value:.{digits}f}"


def perplexities(row: Row) -> str:
    """Write the perplexities of a row on all texts, such as "57.44/50.85"."""
    return "/".join(f"{value:.2f}" for value in row["perplexity"].values())


def ratio(row: Row, reference: Row) -> float:
    """Return the geometric mean of the perplexities of a row divided by that of another row."""
    texts = row["perplexity"].keys() & reference["perplexity"].keys()
    return geometric_mean(row["perplexity"][text] / reference["perplexity"][text] for text in texts)


def unique(values: Iterable[Any]) -> list[Any]:
    """Return values in their order, each once."""
    return list(dict.fromkeys(values))


# --- error correction -----------------------------------------------------------------------------------------------

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
        lines.append([_zeros(pattern), *cells])
    return markdown_lines(["zeros", *(f"`{name}`" for name in _CORRECTIONS)], lines)


def _zeros(pattern: str) -> str:
    """Write a pattern: "0.5" is "50%"."""
    return pattern if ":" in pattern else f"{float(pattern):.0%}"


def own_correction(results: Results) -> list[str]:
    """Make the table of SmolLM2-135M by error correction, of two methods."""
    lines = []
    study = results.file("ablations.json")["correction"]["rows"]
    for pattern in ("0.05", "0.1", "0.2", "0.5", "2:4"):
        rows = {row["label"].rpartition("=")[2]: row for row in study if row["pattern"] == pattern}
        cells = [perplexities(rows[name]) for name in _CORRECTIONS]
        lines.append([f"`obs_admm`, {_zeros(pattern)}", *cells])
    for pattern in ("0.3", "0.5", "0.6", "0.7", "2:4"):
        cells = []
        for name in _CORRECTIONS:
            suffix = "" if name == "intra" else f":error_correction={name}"
            rows = results.part("models", method=f"paper:max_trials=4{suffix}", pattern=pattern)
            cells.append(perplexities(rows[0]) if rows else "")
        if any(cells):
            lines.append([f"FISTAPruner, {_zeros(pattern)}", *cells])
    return markdown_lines(["method, zeros", *(f"`{name}`" for name in _CORRECTIONS)], lines)


# --- FISTA against SGD ----------------------------------------------------------------------------------------------


def descents(results: Results) -> list[str]:
    """Make the table of FISTA and gradient descent on the same LASSO."""
    rows = results.part("descents")
    lines = []
    for penalty in unique(row["penalty"] for row in rows):
        for way in unique(row["way"] for row in rows):
            cells: dict[str, list[str]] = {"fall": [], "calibration": [], "other": []}
            for steps in (20, 80):
                group = [
                    row
                    for row in rows
                    if (row["penalty"], row["way"]) == (penalty, way) and row["steps"] in (0, steps)
                ]
                cells["fall"].append(percent(statistics.fmean(row["fall"] for row in group), 1))
                for text in ("calibration", "other"):
                    cells[text].append(percent(mean_error(group, text)))
            fall, calibration, other = ("/".join(cell) for cell in cells.values())
            lines.append([penalty, way, fall, calibration, other])
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


# --- the search of the penalty --------------------------------------------------------------------------------------


def searches(results: Results) -> list[str]:
    """Make the table of searches by the FISTA steps that they spend."""
    rows = results.part("searches")
    budgets = ("20", "40", "80", "160", "240")
    lines = []
    for pattern in unique(row["pattern"] for row in rows):
        for way in unique(row["way"] for row in rows):
            group = [row for row in rows if row["way"] == way and row["pattern"] == pattern]
            cells = [percent(mean_error(group, budget)) for budget in budgets]
            lines.append([_zeros(pattern), way, *cells])
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
            after_80 = []
            for row in group:
                errors = [error for steps, error in row["curve"] if steps <= 80]
                after_80.append(errors[-1])
            cells.append(percent(geometric_mean(after_80)))
            steps = statistics.fmean(row["steps"] for row in group)
            cells.append(f"{percent(mean_error(group, 'rounded'))} ({steps:.0f})")
            cells.append(percent(mean_error(group, "refitted")))
        lines.append([name, *cells])
    columns = ["rounded, 80 steps", "at the end (steps)", "refitted"]
    headings = [f"{zeros}: {column}" for zeros in ("50%", "2:4") for column in columns]
    return markdown_lines(["search", *headings], lines)


# --- warm starts ----------------------------------------------------------------------------------------------------


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
            lines.append([_zeros(pattern), way, *cells])
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
            cell = "/".join(f"{row['perplexity'][text]:.2f}" for text in (*_TEXTS, "held-out"))
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


# --- every part -----------------------------------------------------------------------------------------------------

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
            rows += results.of_file("correction.json", method=method, pattern=pattern, seed=0)
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


# --- DSnoT, PERP ----------------------------------------------------------------------------------------------------


def swaps(results: Results) -> list[str]:
    """Make the table of DSnoT after other methods, on single operators."""
    rows = results.part("swaps")
    lines = []
    for pattern in unique(row["pattern"] for row in rows):
        for way in unique(row["way"] for row in rows):
            group = [row for row in rows if row["way"] == way and row["pattern"] == pattern]
            swapped = percent(statistics.fmean(row["swapped"] for row in group), 3)
            errors = [percent(mean_error(group, text)) for text in ("calibration", "other")]
            lines.append([_zeros(pattern), way, swapped, *errors])
    headings = ["zeros", "method", "swapped, %", "calibration", "WikiText-2"]
    return markdown_lines(headings, lines)


def dsnot(results: Results) -> list[str]:
    """Make the table of whole models by DSnoT and others."""
    methods = {
        "wanda": "Wanda",
        "dsnot": "DSnoT",
        "paper": "FISTAPruner",
        "sparsegpt": "SparseGPT",
        "default": "default",
    }
    lines = []
    for method, name in methods.items():
        cells = []
        for pattern in ("0.5", "0.6", "0.7", "2:4"):
            rows = results.of_file("perplexity.json", method=method, pattern=pattern)
            cell = ""
            if rows:
                texts = (*_TEXTS, "held-out")
                cell = "/".join(f"{rows[0]['perplexity'][text]:.2f}" for text in texts)
            cells.append(cell)
        lines.append([name, *cells])
    return markdown_lines(["method", "50%", "60%", "70%", "2:4"], lines)


def trained_parts(results: Results) -> list[str]:
    """Make the table of what PERP trains: norms, or adapters, beside all weights, at 2:4."""
    names = {
        "pruned": "nothing",
        "norms:49152": "norms (PERP)",
        "lora:49152": "LoRA, merged under the mask (PERP)",
        "all:49152": "all kept weights (`recover`)",
    }
    lines = []
    for kind, name in names.items():
        (row,) = results.of_file("recovery.json", folder="s24", row=kind)
        texts = ("wikitext2-test", "lambada", "held out")
        cells = [f"{row['perplexity'][text]:.2f}" for text in texts]
        recovery = row.get("recovery")
        cells.append("" if recovery is None else f"{recovery['seconds'] / 60:.0f}")
        lines.append([name, *cells])
    headings = ["trained on 49,152 tokens", "WikiText-2", "LAMBADA", "held out", "minutes"]
    return markdown_lines(headings, lines)


def retrained(results: Results) -> list[str]:
    """Make the table of training after each method."""
    rows = results.part("retrained")
    lines = []
    for method in unique(row["method"] for row in rows):
        group = [row for row in rows if row["method"] == method]
        cells = []
        for trained in ("nothing", "norms", "all"):
            (row,) = [row for row in group if row["trained"] == trained]
            minutes = f" ({row['core_minutes']:.0f})" if row["core_minutes"] else ""
            cells.append(f"{perplexities(row)}{minutes}")
        lines.append([f"`{method}`", *cells])
    return markdown_lines(["method", "nothing", "norms", "all kept weights"], lines)


# --- structured competitors -----------------------------------------------------------------------------------------

_STRUCTURED = (
    ("channels:0.25", "default", "default"),
    ("channels:0.25", "flap", "FLAP"),
    ("channels:0.25", "taylor", "LLM-Pruner's importance"),
    ("layers:0.2", "default", "default"),
    ("layers:0.2", "default:residual_correction=0", "SLEB"),
    ("heads:0.34+channels:0.156/16", "default", "default"),
    ("heads:0.34+channels:0.156/16", "flap", "FLAP"),
    ("heads:0.34+channels:0.156/16", "taylor", "LLM-Pruner's importance"),
)


def structured(results: Results) -> list[str]:
    """Make the table of methods that remove a fifth of the decoder layers' weights."""
    lines = []
    for pattern, method, name in _STRUCTURED:
        (row,) = results.of_file("smaller.json", pattern=pattern, method=method)
        removed = percent(row["totals"]["num_removed"] / _DECODER_WEIGHTS, 0)
        cells = [f"{value:.2f}" for value in row["perplexity"].values()]
        lines.append([f"`{pattern}`", f"{removed}%", name, *cells])
    headings = ["pattern", "removed", "method", "WikiText-2", "LAMBADA", "OpenWebText"]
    return markdown_lines(headings, lines)


# --- calibration text -----------------------------------------------------------------------------------------------


def samples(results: Results) -> list[str]:
    """Make the table of methods by the amount of calibration text."""
    rows = results.part("samples")
    counts = unique(row["samples"] for row in rows)
    lines = []
    for pattern in unique(row["pattern"] for row in rows):
        for way in unique(row["way"] for row in rows):
            cells = []
            for count in counts:
                group = [
                    row
                    for row in rows
                    if (row["pattern"], row["way"], row["samples"]) == (pattern, way, count)
                ]
                cells.append(
                    "/".join(percent(mean_error(group, text)) for text in ("fresh", "other"))
                )
            lines.append([_zeros(pattern), way, *cells])
    return markdown_lines(["zeros", "method", *(f"{count}" for count in counts)], lines)


def whole_samples(results: Results) -> list[str]:
    """Make the table of the earlier default by windows, on whole models."""
    study = results.file("ablations.json")["samples"]["rows"]
    lines = []
    for pattern in ("0.5", "0.7"):
        group = [row for row in study if row["pattern"] == pattern]
        lines.append([_zeros(pattern), *(perplexities(row) for row in group)])
    labels = unique(row["label"] for row in study if row["pattern"] != "-")
    return markdown_lines(["zeros", *labels], lines)


# --- families -------------------------------------------------------------------------------------------------------

_FAMILIES = {
    "opt": "OPT",
    "llama": "LLaMA",
    "phi": "Phi",
    "phi3": "Phi-3",
    "gemma": "Gemma",
    "gemma3_text": "Gemma 3",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
}


@cache
def architectures() -> list[Row]:
    """Read the outcomes of the test of all families."""
    lines = (_ROOT / "tests" / "architectures.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def families(_: Results) -> list[str]:
    """Make the table of families whose tiny models are pruned end to end."""
    status = {row["family"]: row["status"] for row in architectures()}
    cells = [status[family] for family in _FAMILIES]
    return markdown_lines(list(_FAMILIES.values()), [cells])


def newer_models(results: Results) -> list[str]:
    """Make the table of the two Qwen2.5 models at 50%."""
    names = {"dense": "dense", "default": "default", "wanda": "Wanda", "sparsegpt": "SparseGPT"}
    lines = []
    for file, model in (("known_0.5b.json", "0.5B"), ("known_1.5b.json", "1.5B")):
        for method, name in names.items():
            rows = results.of_file(file, method=method)
            rows = [row for row in rows if row["folder"].endswith("-0") or method == "dense"]
            if method != "dense":
                rows = [row for row in rows if row["pattern"] == "0.5"]
            if rows:
                row = rows[0]
                cells = [f"{value:.2f}" for value in row["perplexity"].values()]
                lines.append([model, name, *cells])
    return markdown_lines(["model", "method", "web", "WikiText-2", "Python"], lines)


# --- 70B ------------------------------------------------------------------------------------------------------------


def size(results: Results) -> list[str]:
    """Make the table of the estimate of LLaMA-3-70B; all of it is arithmetic."""
    lines = []
    for row in results.part("estimates"):
        sizes = [row["weight_bytes"], row["peak_bytes"]["device"], row["peak_bytes"]["host"]]
        sizes.append(row["disk_bytes"])
        name = {"paper": "FISTAPruner"}.get(row["method"], row["method"])
        lines.append([name, *(f"{value / _GIB:.1f} GiB" for value in sizes)])
    return markdown_lines(["method", "weights", "GPU, peak", "host, peak", "disk"], lines)


# --- 2:4 ------------------------------------------------------------------------------------------------------------


_KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def against_sparsegpt(results: Results, method: str, pattern: str, kind: str = "") -> float:
    """Return the error of a method on fresh tokens, divided by SparseGPT's; the geometric mean over operators.

    `kind` is the end of the operators' names, such as "o_proj"; all operators if it is empty.
    """
    errors = {}
    for name in (method, "sparsegpt"):
        rows = results.of_file("solvers.json", method=name, pattern=pattern)
        errors[name] = {row["operator"].removesuffix(".weight"): row["fresh"] for row in rows}
    return geometric_mean(
        errors[method][operator] / error
        for operator, error in errors["sparsegpt"].items()
        if operator.endswith(kind)
    )


def two_of_four(results: Results) -> list[str]:
    """Make the table of errors divided by SparseGPT's, by pattern and operator."""
    patterns = ("0.5", "0.6", "0.7", "2:4", "4:8")
    lines = []
    for method, name in (("fista", "FISTA"), ("obs_admm", "default")):
        for kind in (*_KINDS, "") if method == "fista" else ("",):
            cells = [f"{against_sparsegpt(results, method, p, kind):.3f}" for p in patterns]
            lines.append([f"{name}, {kind or 'all operators'}", *cells])
    errors = []
    for pattern in patterns:
        rows = results.of_file("solvers.json", method="sparsegpt", pattern=pattern)
        errors.append(percent(mean_error(rows, "fresh")))
    lines.append(["the error of SparseGPT, %", *errors])
    return markdown_lines(["", *(_zeros(pattern) for pattern in patterns)], lines)


def plot(results: Results, path: Path) -> None:
    """Draw errors divided by SparseGPT's, a panel for each method and a line for each kind of operator."""
    import matplotlib.pyplot as plt

    patterns = ("0.5", "0.6", "0.7", "16:32", "8:16", "4:8", "2:4")
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained", sharey=True)
    panels = (("fista", "FISTA with a refit"), ("obs_admm", "the default's solver"))
    for axis, (method, title) in zip(axes, panels, strict=True):
        for kind in _KINDS:
            heights = [against_sparsegpt(results, method, pattern, kind) for pattern in patterns]
            axis.plot([_zeros(pattern) for pattern in patterns], heights, marker=".", label=kind)
        axis.set(title=title, ylim=(0.65, 1.02))
        axis.axhline(1, color="gray", linestyle=":")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("error on fresh tokens / SparseGPT's")
    axes[1].legend(fontsize=7, ncols=2)
    figure.savefig(path, dpi=110)


# --- quantization ---------------------------------------------------------------------------------------------------


def quantized(results: Results) -> list[str]:
    """Make the table of pruned models that are rounded to fewer bits."""
    rows = results.part("quantized")
    lines = []
    for pattern in unique(row["pattern"] for row in rows):
        group = {row["bits"]: row for row in rows if row["pattern"] == pattern}
        cells = [perplexities(group[32])]
        cells += [
            f"{perplexities(group[bits])} ({ratio(group[bits], group[32]):.3f})" for bits in (8, 4)
        ]
        lines.append(["dense" if pattern == "-" else _zeros(pattern), *cells])
    return markdown_lines(["zeros", "as it is", "8 bits", "4 bits"], lines)


_REMOVED = ("dense", "channels:0.1", "channels:0.2", "channels:0.3", "layers:0.2")


def bits_per_byte(results: Results, variant: str, form: str) -> float:
    """Return the mean bits per byte of a model of `frontier.py` that was not trained."""
    (row,) = results.of_file("frontier.json", variant=variant, tokens=0, format=form)
    return row["mean"]


def quantized_parts(results: Results) -> list[str]:
    """Make the table of models without whole parts in 8 and 4 bits, which llama.cpp reads."""
    lines = []
    for variant in _REMOVED:
        eight = bits_per_byte(results, variant, "8")
        four = bits_per_byte(results, variant, "IQ4_NL")
        name = variant if variant == "dense" else f"`{variant}`"
        lines.append([name, f"{eight:.3f}", f"{four:.3f}", f"{four - eight:.3f}"])
    return markdown_lines(["removed", "8 bits", "4 bits", "4 bits lose"], lines)


def quantize_facts(results: Results) -> dict[str, str]:
    """Give bits per byte and megabytes of the dense model with 16 and 4 bits, and of 50% zeros with 16 bits."""
    facts = {}
    for variant, form in (("dense", "16"), ("dense", "IQ4_NL"), ("0.5", "packed")):
        (row,) = results.of_file("frontier.json", variant=variant, tokens=0, format=form)
        facts[f"{variant}, {form}: bits per byte"] = f"{row['mean']:.3f}"
        facts[f"{variant}, {form}: MB"] = f"{row['bytes'] / 1e6:.0f}"
    return facts


# --- numbers in sentences -------------------------------------------------------------------------------------------


def correction_facts(results: Results) -> dict[str, str]:
    """Compute by how much less perplexity `intra` has than `none`, in percent."""
    study = results.file("ablations.json")["correction"]["rows"]
    facts = {}
    for pattern in ("0.5", "2:4"):
        rows = {row["label"].rpartition("=")[2]: row for row in study if row["pattern"] == pattern}
        facts[f"intra gains at {pattern}"] = percent(1 - ratio(rows["intra"], rows["none"]), 1)
    return facts


def search_facts(results: Results) -> dict[str, str]:
    """Compute by how much other searches are worse than bisection after 80 steps, and what the refit leaves."""
    excess = []
    refitted = []
    gains = []
    for pattern in ("50% unstructured", "2:4"):

        def error(way: str, name: str, pattern: str = pattern) -> float:
            """Return the mean error of a search: "refitted", or after 80 steps."""
            rows = results.of_file("penalty_search.json", way=way, pattern=pattern)
            if name != "80 steps":
                return mean_error(rows, name)
            return geometric_mean(
                [error for steps, error in row["curve"] if steps <= 80][-1] for row in rows
            )

        ours = "bisection, four trials (default)"
        others = ("TPE, chained", "random, chained", "TPE", "TPE with Hyperband", "grid, 20 steps")
        excess += [error(way, "80 steps") / error(ours, "80 steps") - 1 for way in others]
        published = error("bisection, published", "refitted")
        refitted += [error(way, "refitted") / published - 1 for way in (ours, *others)]
        judged = error("grid, up to 80 steps, judged after the refit", "refitted")
        gains.append(1 - judged / published)
    return {
        "least excess after 80 steps": percent(min(excess), 0),
        "most excess after 80 steps": percent(max(excess), 0),
        "most excess after the refit": percent(max(refitted), 1),
        "gain of judging after the refit, 50%": percent(gains[0], 1),
        "gain of judging after the refit, 2:4": percent(gains[1], 1),
    }


def dsnot_facts(results: Results) -> dict[str, str]:
    """Compute by how much less perplexity DSnoT has than Wanda, in percent, over the texts."""
    facts = {}
    for pattern in ("0.6", "0.7", "2:4"):
        (wanda,) = results.of_file("perplexity.json", method="wanda", pattern=pattern)
        (swapped,) = results.of_file("perplexity.json", method="dsnot", pattern=pattern)
        texts = (*_TEXTS, "held-out")
        gains = [1 - swapped["perplexity"][text] / wanda["perplexity"][text] for text in texts]
        facts[f"least gain at {pattern}"] = percent(min(gains), 0)
        facts[f"most gain at {pattern}"] = percent(max(gains), 0)
    return facts


def samples_facts(results: Results) -> dict[str, str]:
    """Compute by how much errors fall from 4 to 64 windows, and perplexities from 8 to 128, in percent."""
    study = results.file("ablations.json")["samples"]["rows"]
    facts = {}
    for pattern in ("0.5", "0.7"):
        rows = {row["label"]: row for row in study if row["pattern"] == pattern}
        fall = 1 - ratio(rows["128 windows"], rows["8 windows"])
        facts[f"fall of the perplexity at {pattern}"] = percent(fall, 0)
    few = results.part("samples", pattern="0.5", samples=4)
    many = results.part("samples", pattern="0.5", samples=64)
    for way in unique(row["way"] for row in many):
        errors = [
            mean_error([row for row in rows if row["way"] == way], "fresh") for rows in (few, many)
        ]
        facts[f"fall of the error, {way}"] = percent(1 - errors[1] / errors[0], 0)
    return facts


def families_facts(_: Results) -> dict[str, str]:
    """Count the model classes that were tried, and those that work."""
    status = [row["status"] for row in architectures()]
    return {"tried": str(len(status)), "works": str(status.count("works"))}


def size_facts(results: Results) -> dict[str, str]:
    """Tell how much longer two processes take than two threads."""
    return {"two processes": f"{results.file('ranks.json')['ratio']:.2f}"}


def two_of_four_facts(results: Results) -> dict[str, str]:
    """Compute how much less perplexity FISTAPruner has than SparseGPT, in percent: as published, and here."""

    def published(method: str, pattern: str) -> float:
        """Return the perplexity of OPT-125M."""
        (row,) = results.of_file("paper.json", method=method, pattern=pattern)
        return row["perplexity"]["OPT-125M wikitext2"]

    facts = {}
    for pattern in ("0.5", "2:4"):
        for suffix, name in ((":error_correction=none", "without"), ("", "with")):
            gain = 1 - published(f"paper{suffix}", pattern) / published("sparsegpt", pattern)
            facts[f"gain {name} correction at {pattern}"] = percent(gain, 0)
    errors = [
        mean_error(results.of_file("solvers.json", method="sparsegpt", pattern=pattern), "fresh")
        for pattern in ("0.5", "2:4")
    ]
    facts["errors at 2:4 by those at 50%"] = f"{errors[1] / errors[0]:.1f}"
    for pattern in ("0.5", "0.6", "0.7", "2:4"):
        (ours,) = results.of_file("perplexity.json", method="fista", pattern=pattern)
        (theirs,) = results.of_file("perplexity.json", method="sparsegpt", pattern=pattern)
        texts = (*_TEXTS, "held-out")
        gain = 1 - geometric_mean(ours["perplexity"][t] / theirs["perplexity"][t] for t in texts)
        facts[f"gain of FISTA here at {pattern}"] = percent(gain, 0)
    return facts


# --- how long it takes ----------------------------------------------------------------------------------------------

_PARTS_OF_QUESTIONS = {
    "correction and parts": ("models",),
    "sgd": ("descents", "blocks"),
    "search": ("searches",),
    "start": ("starts",),
    "competitors": ("swaps", "retrained"),
    "samples": ("samples",),
    "quantize": ("quantized",),
}


def minutes(results: Results) -> list[str]:
    """Make the table of the time that rows took, in minutes of the processor."""
    lines = []
    for question, parts in _PARTS_OF_QUESTIONS.items():
        for part in parts:
            units = [row for row in results.part(part) if "unit_seconds" in row]
            if units:
                total = sum(row["unit_seconds"] for row in units) / 60
                lines.append([question, part, len(units), f"{total:.1f}"])
    return markdown_lines(["question", "part", "units in the rows", "minutes"], lines)


# --- the page -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """A section of the page: its tables by name, and numbers of its sentences that no table has."""

    tables: dict[str, Callable[[Results], list[str]]]
    facts: Callable[[Results], dict[str, str]] = lambda _: {}

    def table(self, results: Results) -> list[str]:
        """Make all tables, one after the other, and the facts, a line each."""
        lines = []
        for name, make in self.tables.items():
            lines += [f"{name}:", "", *make(results), ""]
        lines += [f"{name}: {number}" for name, number in self.facts(results).items()]
        return lines


QUESTIONS: dict[str, Question] = {
    "correction": Question(
        {"published-correction": published_correction, "correction": own_correction},
        correction_facts,
    ),
    "sgd": Question({"descents": descents, "blocks": blocks}),
    "search": Question({"searches": searches, "earlier-searches": earlier_searches}, search_facts),
    "start": Question({"earlier-starts": earlier_starts, "starts": starts}, start_facts),
    "parts": Question({"parts-of-solvers": parts_of_solvers, "parts-of-models": parts_of_models}),
    "competitors": Question(
        {"dsnot": dsnot, "swaps": swaps, "trained-parts": trained_parts, "retrained": retrained},
        dsnot_facts,
    ),
    "structured": Question({"structured": structured}),
    "samples": Question({"samples": samples, "whole-samples": whole_samples}, samples_facts),
    "families": Question({"families": families, "newer-models": newer_models}, families_facts),
    "size": Question({"size": size}, size_facts),
    "two-of-four": Question({"two-of-four": two_of_four}, two_of_four_facts),
    "quantize": Question(
        {"quantized-parts": quantized_parts, "quantized": quantized}, quantize_facts
    ),
}
_TABLE = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def tables_in(page: str, results: Results) -> str:
    """Return the text of the page with its tables made anew; names of tables that do not exist are an error."""
    tables = {
        name: make for question in QUESTIONS.values() for name, make in question.tables.items()
    }
    tables["minutes"] = minutes

    def table(match: re.Match[str]) -> str:
        """Make the table that a comment names."""
        begin, name, end = match.groups()
        lines = tables[name](results)
        has_rows = len(lines) > 2  # besides headings and their rule
        # Markdown wants an empty line around a table.
        return "\n".join([begin, *(lines if has_rows else [NOT_MEASURED]), "", end])

    return _TABLE.sub(table, page)
