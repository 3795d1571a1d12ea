"""What the recipes of this folder share: a table of the literature measured again, the published values beside it.

Published values are from the FISTAPruner paper (arXiv 2408.03728). Calibration as there: 128 sequences of 2048 tokens
of C4. BOS stands where the scripts of SparseGPT and Wanda have it, at the start of a text only.
"""

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from optimum_fista.run.comparison.compare import compare
from optimum_fista.run.comparison.comparison import Comparison
from optimum_fista.run.comparison.rows import Average, averages
from optimum_fista.run.comparison.settings import NO_PATTERN, ComparisonSettings
from optimum_fista.run.reports.markdown import markdown_lines

SOURCE = "arXiv 2408.03728"
LITERATURE = {"calibration": "c4", "num_samples": 128, "calibration_length": 2048, "bos": "start"}
NUMBERS = ("num_samples", "calibration_length", "sequence_length", "max_windows", "batch_size", "limit")
WORDS = ("calibration", "device", "device_map", "dtype", "include_path")
LISTS = ("texts", "tasks", "methods", "patterns")

Published = Mapping[tuple[str, str], Mapping[str, float]]
"""Values by (pattern, method) and text; the dense model is `("-", "dense")`."""


def measure(description: str, model: str, name: str, **settings: Any) -> Comparison:
    """Run a comparison with the settings of a table; flags of the command line replace them."""
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    parser.add_argument("--model", help=f"measure another model than {model}")
    parser.add_argument("--output", type=Path, default=Path("runs/paper") / name, help="folder of rows, table, plots")
    for option in (*NUMBERS, *WORDS, *LISTS):
        kind = int if option in NUMBERS else str if option in WORDS else _words
        parser.add_argument(f"--{option.replace('_', '-')}", type=kind, help=f"instead of the table's {option}")
    flags = vars(parser.parse_args())
    output = flags.pop("output")
    chosen = {"model": model} | LITERATURE | settings | {k: v for k, v in flags.items() if v is not None}
    print(f"{description.splitlines()[0]} Published for {model}, {SOURCE}; measured here on {chosen['model']}.")
    counts = chosen["num_samples"]
    if isinstance(counts, int):
        return compare(ComparisonSettings(**chosen), output)
    whole = Comparison()
    for count in counts:
        part = compare(ComparisonSettings(**chosen | {"num_samples": count}), output / f"samples-{count}")
        rows = [dataclasses.replace(row, method=f"{row.method}, {count} sequences") for row in part.rows]
        whole.rows += rows if not whole.rows else rows[1:]
        whole.recipe += [line for line in part.recipe if line not in whole.recipe]
    return whole


def show(
    comparison: Comparison, published: Published | None = None, kept: Mapping[tuple[str, str], float] | None = None
) -> None:
    """Print the measured values, what failed and the recipe.

    Args:
        comparison: What was measured.
        published: Published perplexities, shown beside those measured on texts of the same name.
        kept: Published shares of the dense model's mean accuracy, by (pattern, method).
    """
    published, kept = published or {}, kept or {}
    texts, lines = comparison.texts, averages(comparison.rows)
    header = ["pattern", "method", *(cell for text in texts for cell in (text, "published"))]
    if comparison.tasks:
        header += ["accuracy", "of the dense", "published"]
    rows = []
    for line in lines:
        values = published.get((line.pattern, line.method), {})
        cells = [line.pattern, f"`{line.method}`"]
        for text in texts:
            spread = line.perplexity(text)
            cells += ["failed" if spread is None else f"{spread.mean:.2f}", f"{values[text]}" if text in values else ""]
        if comparison.tasks:
            cells += _accuracies(line, lines, comparison.tasks, kept.get((line.pattern, line.method)))
        rows.append(cells)
    print("", *markdown_lines(header, rows), sep="\n")
    print("", *(f"- {line}" for line in [*comparison.recipe, *comparison.failures]), sep="\n")


def _accuracies(line: Average, lines: Sequence[Average], tasks: Sequence[str], published: float | None) -> list[str]:
    """Mean accuracy, its share of the dense model's, and the published share."""
    own = line.mean_accuracy(tasks)
    dense = next(other.mean_accuracy(tasks) for other in lines if other.pattern == NO_PATTERN)
    if own is None or dense is None:
        return ["", "", ""]
    return [f"{own.mean:.1%}", f"{own.mean / dense.mean:.1%}", "" if published is None else f"{published:.1%}"]


def _words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]
