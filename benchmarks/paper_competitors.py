"""Tables and facts of docs/paper.md that set FISTAPruner and the default beside other methods.

Each function makes a table from the rows of `Results`, as lines of Markdown. A function whose name ends with `_facts`
computes numbers that stand in sentences of its section, by a name that `paper.py` prints.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from ablations import geometric_mean
from paper_rows import TEXTS, Results, Row, mean_error, percent, perplexities, unique, zeros_text

from optimum_fista.folder.card import markdown_lines

# --- DSnoT, PERP -----------------------------------------------------------------------------------------------------


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
                texts = (*TEXTS, "held-out")
                cell = "/".join(f"{rows[0]['perplexity'][text]:.2f}" for text in texts)
            cells.append(cell)
        lines.append([name, *cells])
    return markdown_lines(["method", "50%", "60%", "70%", "2:4"], lines)


def swaps(results: Results) -> list[str]:
    """Make the table of DSnoT after other methods, on single operators."""
    rows = results.part("swaps")
    lines = []
    for pattern in unique(row["pattern"] for row in rows):
        for way in unique(row["way"] for row in rows):
            group = [row for row in rows if row["way"] == way and row["pattern"] == pattern]
            swapped = percent(statistics.fmean(row["swapped"] for row in group), 3)
            errors = [percent(mean_error(group, text)) for text in ("calibration", "other")]
            lines.append([zeros_text(pattern), way, swapped, *errors])
    headings = ["zeros", "method", "swapped, %", "calibration", "WikiText-2"]
    return markdown_lines(headings, lines)


def dsnot_facts(results: Results) -> dict[str, str]:
    """Compute by how much less perplexity DSnoT has than Wanda, in percent, over the texts."""
    facts = {}
    for pattern in ("0.6", "0.7", "2:4"):
        (wanda,) = results.of_file("perplexity.json", method="wanda", pattern=pattern)
        (swapped,) = results.of_file("perplexity.json", method="dsnot", pattern=pattern)
        texts = (*TEXTS, "held-out")
        gains = [1 - swapped["perplexity"][text] / wanda["perplexity"][text] for text in texts]
        facts[f"least gain at {pattern}"] = percent(min(gains), 0)
        facts[f"most gain at {pattern}"] = percent(max(gains), 0)
    return facts


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


_RETRAINED = {
    "wanda": "Wanda",
    "sparsegpt": "SparseGPT",
    "paper:max_trials=4": "FISTAPruner, four trials",
    "default": "default",
}


def retrained(results: Results) -> list[str]:
    """Make the table of training after each method."""
    lines = []
    for method, name in _RETRAINED.items():
        rows = results.part("retrained", method=method) + results.part("adapted", method=method)
        if rows:
            lines.append([name, *_cells_of_training(rows, ("nothing", "norms", "adapters", "all"))])
    headings = ["method", "nothing", "norms", "adapters", "all kept weights"]
    return markdown_lines(headings, lines)


def _cells_of_training(rows: list[Row], kinds: Sequence[str]) -> list[str]:
    """Write the perplexities of one model after each kind of training, with minutes in brackets.

    If a kind was trained with several learning rates, the best one counts, by the geometric mean of the perplexities.
    """
    cells = []
    for kind in kinds:
        group = [row for row in rows if row["trained"] == kind]
        if not group:
            cells.append("")
            continue
        best = min(group, key=lambda row: geometric_mean(row["perplexity"].values()))
        minutes = f" ({best['core_minutes']:.0f})" if best["core_minutes"] else ""
        cells.append(f"{perplexities(best)}{minutes}")
    return cells


# --- structured competitors ------------------------------------------------------------------------------------------

_DECODER_WEIGHTS = 30 * 3_538_944
"""Weights of the linear operators in the 30 decoder layers of SmolLM2-135M."""

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


_STRUCTURED_TRAINED = {
    "default": "default",
    "flap": "FLAP",
    "llm-pruner": "LLM-Pruner",
    "default:residual_correction=0": "SLEB",
}


def structured_trained(results: Results) -> list[str]:
    """Make the table of training after methods that remove whole parts."""
    lines = []
    patterns = unique(row["pattern"] for row in results.part("structured"))
    for pattern in patterns:
        for method, name in _STRUCTURED_TRAINED.items():
            rows = results.part("structured", method=method, pattern=pattern)
            if rows:
                cells = _cells_of_training(rows, ("nothing", "adapters", "all"))
                lines.append([f"`{pattern}`", name, *cells])
    headings = ["pattern", "method", "nothing", "adapters (LoRA)", "all weights (`recover`)"]
    return markdown_lines(headings, lines)


def structured_facts(results: Results) -> dict[str, str]:
    """Count the tokens that adapters were trained on."""
    counts = [row["num_tokens"] for row in results.part("structured", trained="adapters")]
    return {
        "fewest tokens of adapters": str(min(counts, default=0)),
        "most tokens of adapters": str(max(counts, default=0)),
    }


# --- SparseGPT at 2:4 ------------------------------------------------------------------------------------------------

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
    methods = (("fista", "FISTA", (*_KINDS, "")), ("obs_admm", "default", ("",)))
    for method, name, kinds in methods:
        for kind in kinds:
            cells = [f"{against_sparsegpt(results, method, p, kind):.3f}" for p in patterns]
            lines.append([f"{name}, {kind or 'all operators'}", *cells])
    errors = []
    for pattern in patterns:
        rows = results.of_file("solvers.json", method="sparsegpt", pattern=pattern)
        errors.append(percent(mean_error(rows, "fresh")))
    lines.append(["the error of SparseGPT, %", *errors])
    return markdown_lines(["", *(zeros_text(pattern) for pattern in patterns)], lines)


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
        texts = (*TEXTS, "held-out")
        gain = 1 - geometric_mean(ours["perplexity"][t] / theirs["perplexity"][t] for t in texts)
        facts[f"gain of FISTA here at {pattern}"] = percent(gain, 0)
    return facts


def plot(results: Results, path: Path) -> None:
    """Draw errors divided by SparseGPT's, a panel for each method and a line for each kind of operator."""
    import matplotlib.pyplot as plt

    patterns = ("0.5", "0.6", "0.7", "16:32", "8:16", "4:8", "2:4")
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained", sharey=True)
    panels = (("fista", "FISTA with a refit"), ("obs_admm", "the default's solver"))
    for axis, (method, title) in zip(axes, panels, strict=True):
        for kind in _KINDS:
            heights = [against_sparsegpt(results, method, pattern, kind) for pattern in patterns]
            axis.plot(
                [zeros_text(pattern) for pattern in patterns], heights, marker=".", label=kind
            )
        axis.set(title=title, ylim=(0.65, 1.02))
        axis.axhline(1, color="gray", linestyle=":")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("error on fresh tokens / SparseGPT's")
    axes[1].legend(fontsize=7, ncols=2)
    figure.savefig(path, dpi=110)
