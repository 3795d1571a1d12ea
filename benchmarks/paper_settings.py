"""Tables and facts of docs/paper.md on other amounts of text, other models, and fewer bits.

Each function makes a table from the rows of `Results`, as lines of Markdown. A function whose name ends with `_facts`
computes numbers that stand in sentences of its section, by a name that `paper.py` prints.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

from paper_rows import Results, Row, mean_error, percent, perplexities, ratio, unique, zeros_text

from optimum_fista.folder.card import markdown_lines

_ROOT = Path(__file__).parent.parent
_GIB = 2**30

# --- calibration text ------------------------------------------------------------------------------------------------


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
            lines.append([zeros_text(pattern), way, *cells])
    return markdown_lines(["zeros", "method", *(f"{count}" for count in counts)], lines)


def whole_samples(results: Results) -> list[str]:
    """Make the table of the earlier default by windows, on whole models."""
    study = results.file("ablations.json")["samples"]["rows"]
    lines = []
    for pattern in ("0.5", "0.7"):
        group = [row for row in study if row["pattern"] == pattern]
        lines.append([zeros_text(pattern), *(perplexities(row) for row in group)])
    labels = unique(row["label"] for row in study if row["pattern"] != "-")
    return markdown_lines(["zeros", *labels], lines)


_SAMPLED = {
    "default": "default",
    "paper:max_trials=4": "FISTAPruner, four trials",
    "sparsegpt": "SparseGPT",
    "wanda": "Wanda",
}


def sampled(results: Results) -> list[str]:
    """Make the table of whole models at 50% by windows; the usual 16 windows are those of other questions."""
    counts = (4, 16, 256)
    lines = []
    for method, name in _SAMPLED.items():
        rows = {row["samples"]: row for row in results.part("sampled", method=method)}
        usual = results.part("models", method=method, pattern="0.5")
        usual += results.part("retrained", method=method, pattern="0.5", trained="nothing")
        if rows and usual:
            rows[16] = usual[0]
            cells = [perplexities(rows[count]) if count in rows else "" for count in counts]
            lines.append([name, *cells])
    return markdown_lines(["method", *(f"{count} windows" for count in counts)], lines)


def samples_facts(results: Results) -> dict[str, str]:
    """Compute by how much errors fall from 4 to 64 windows, and perplexities from 4 to 256, in percent."""
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
    for method, name in _SAMPLED.items():
        rows = {row["samples"]: row for row in results.part("sampled", method=method)}
        if {4, 256} <= rows.keys():
            fall = 1 - ratio(rows[256], rows[4])
            facts[f"fall of the perplexity from 4 to 256 windows, {name}"] = percent(fall, 0)
    return facts


# --- families --------------------------------------------------------------------------------------------------------

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


def families_facts(_: Results) -> dict[str, str]:
    """Count the model classes that were tried, and those that work."""
    status = [row["status"] for row in architectures()]
    return {"tried": str(len(status)), "works": str(status.count("works"))}


def newer_models(results: Results) -> list[str]:
    """Make the table of the two Qwen2.5 models at 50%."""
    names = {
        "dense": "dense",
        "default": "default",
        "wanda": "Wanda",
        "alps:error_correction=intra": "ALPS",
        "sparsegpt": "SparseGPT",
        "paper:max_trials=4": "FISTAPruner, four trials",
    }
    lines = []
    for file, model in (("known_0.5b.json", "0.5B"), ("known_1.5b.json", "1.5B")):
        for method, name in names.items():
            rows = results.of_file(file, method=method)
            if method != "dense":
                rows = [row for row in rows if row["pattern"] == "0.5"]
                # Folders end with the seed, unless the row was trained, or calibrated on other texts.
                rows = [row for row in rows if row["folder"].endswith("-0")]
            if rows:
                row = rows[0]
                cells = [f"{value:.2f}" for value in row["perplexity"].values()]
                lines.append([model, name, *cells])
    return markdown_lines(["model", "method", "web", "WikiText-2", "Python"], lines)


# --- 70B -------------------------------------------------------------------------------------------------------------


def size(results: Results) -> list[str]:
    """Make the table of the estimate of LLaMA-3-70B; all of it is arithmetic."""
    lines = []
    for row in results.part("estimates"):
        sizes = [row["weight_bytes"], row["peak_bytes"]["device"], row["peak_bytes"]["host"]]
        sizes.append(row["disk_bytes"])
        name = {"paper": "FISTAPruner"}.get(row["method"], row["method"])
        lines.append([name, *(f"{value / _GIB:.1f} GiB" for value in sizes)])
    return markdown_lines(["method", "weights", "GPU, peak", "host, peak", "disk"], lines)


def size_facts(results: Results) -> dict[str, str]:
    """Tell how much longer two processes take than two threads."""
    return {"two processes": f"{results.file('ranks.json')['ratio']:.2f}"}


# --- quantization ----------------------------------------------------------------------------------------------------


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
        lines.append(["dense" if pattern == "-" else zeros_text(pattern), *cells])
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
