"""Rows of `paper.py` and of other benchmarks, and how their numbers are written in the tables of docs/paper.md."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ablations import geometric_mean, shown

Row = dict[str, Any]

TEXTS = ("wikitext2-raw-test", "lambada")
# Whole models of a small GPT-NeoX, with three seeds, by `compare.py`.
_SMALL = "paper_small.json"
_SMALL_TEXTS = (
    "wikitext2-raw-test-held-out",
    "openwebtext-calibration-held-out",
    "lambada",
)


class Results:
    """Rows of `paper.py`, and the files of other benchmarks."""

    def __init__(self, rows: Sequence[Row], folder: Path) -> None:
        """Keep the rows; `folder` is benchmarks/results, whose files are read when they are needed."""
        self._rows = rows
        self._folder = folder
        self._files: dict[str, Any] = {}  # those that were read

    def file(self, name: str) -> Any:
        """Return what a file such as "ranks.json" holds, which is read once."""
        if name not in self._files:
            self._files[name] = json.loads((self._folder / name).read_text())
        return self._files[name]

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


def ratio_over_seeds(results: Results, method: str, pattern: str, reference: str) -> str:
    """Write the ratio of two methods on the small model, such as "1.003±0.002"; "" if `method` was not measured.

    It is the mean over the seeds, and the standard deviation. The ratio of a seed is the geometric mean, over the
    texts, of the perplexity of `method` divided by that of `reference`.
    """
    ratios = []
    for row in results.of_file(_SMALL, method=method, pattern=pattern):
        (base,) = results.of_file(_SMALL, method=reference, pattern=pattern, seed=row["seed"])
        of_texts = [row["perplexity"][text] / base["perplexity"][text] for text in _SMALL_TEXTS]
        ratios.append(geometric_mean(of_texts))
    return shown(ratios, digits=3) if ratios else ""


def unique(values: Iterable[Any]) -> list[Any]:
    """Return values in their order, each once."""
    return list(dict.fromkeys(values))


def zeros_text(pattern: str) -> str:
    """Write a pattern: "0.5" is "50%"."""
    return pattern if ":" in pattern else f"{float(pattern):.0%}"
