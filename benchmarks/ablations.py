"""Ablations: perplexity of a whole model when one part of the method, or of the calibration, is changed.

Every study is a few comparisons (`compare.py`). The same command resumes: rows in `--output` are not measured again.

    python benchmarks/ablations.py MODEL --calibration TEXT --texts TEXT1,TEXT2
"""

from __future__ import annotations

import json
import math
import statistics
from argparse import Namespace
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from compare import DENSE, measure, spread, wanted
from shared import parse_arguments

_PIPELINE = "error_correction=0.5:residual_correction=1"
_WHOLE = f"{_PIPELINE}:allocation=fisher"
# The default until the end of November 2026, of which the rows in results/ are.
_EARLIER = f"default:{_PIPELINE}"
_NO_CORRECTION = "default:error_correction=0:residual_correction=1"
_CORRECTIONS = (
    f"{_EARLIER} {_NO_CORRECTION} default:error_correction=1:residual_correction=1 "
    "default:error_correction=0.5"
)
_SHARED = f"{_EARLIER} {_NO_CORRECTION} {_EARLIER}:allocation=uniform alps:{_WHOLE}"
_BARE = "obs_admm:allocation=uniform:residual_correction=0"
KEPT = ("method", "pattern", "seed", "perplexity", "totals", "seconds", "versions")
Case = tuple[str, dict[str, Any]]
"""What the table calls it, and the settings it changes."""


def _methods(pattern: str, methods: str, seeds: Sequence[int] = (0,)) -> Case:
    return "", {"patterns": [pattern], "methods": tuple(methods.split()), "seeds": seeds}


STUDIES: dict[str, Callable[[Namespace], list[Case]]] = {
    "parts": lambda _: [
        _methods(
            "0.5",
            f"{_CORRECTIONS} {_EARLIER}:allocation=uniform {_EARLIER}:scope=row alps:{_WHOLE} wanda:{_WHOLE} sparsegpt "
            "sparsegpt:allocation=fisher:scope=row sparsegpt:allocation=fisher:scope=matrix "
            f"sparsegpt:{_WHOLE}:scope=matrix",
        ),
        _methods("2:4", f"{_CORRECTIONS} alps:{_PIPELINE} sparsegpt:{_PIPELINE} wanda:{_PIPELINE}"),
    ],
    "seeds": lambda arguments: [
        _methods("0.5", f"{_SHARED} {_EARLIER}:scope=row", arguments.seeds),
        _methods("0.7", _SHARED, arguments.seeds),
        _methods("2:4", f"{_EARLIER} {_NO_CORRECTION} alps:{_PIPELINE}", arguments.seeds),
    ],
    "order": lambda arguments: [
        _methods(
            "2:4",
            f"{_EARLIER} {_EARLIER}:reorder_channels=true wanda wanda:reorder_channels=true sparsegpt",
            arguments.seeds,
        )
    ],
    "groups": lambda _: [
        _methods(pattern, f"{_EARLIER} sparsegpt wanda")
        for pattern in ("2:4", "4:8", "8:16", "16:32")
    ],
    "gradients": lambda arguments: [
        _methods("0.5", f"{_EARLIER} {_EARLIER}:allocation_tokens=8192", arguments.seeds)
    ],
    "correction": lambda _: [
        _methods(
            pattern,
            " ".join(f"{_BARE}:error_correction={value}" for value in ("none", "intra", "full")),
        )
        for pattern in ("0.05", "0.1", "0.2", "0.5", "2:4")
    ],
    "samples": lambda arguments: [
        (
            f"{count} windows",
            {"num_samples": count, "patterns": ["0.5", "0.7"], "methods": [_EARLIER]},
        )
        for count in arguments.sample_counts
    ],
    "lengths": lambda arguments: [
        (
            f"{tokens // length} windows of {length}",
            {
                "num_samples": tokens // length,
                "calibration_length": length,
                **case,
                "seeds": arguments.seeds,
            },
        )
        for tokens in [arguments.num_samples * arguments.sequence_length]
        for length in arguments.lengths
        for _, case in [_methods("0.5", _EARLIER), _methods("2:4", _EARLIER)]
    ],
    "calibration": lambda arguments: [
        (
            Path(source).stem,
            {
                "calibration": source,
                "patterns": ["0.5"],
                "methods": [_EARLIER],
                "seeds": arguments.seeds,
            },
        )
        for source in (arguments.calibration, *arguments.other_calibrations)
    ],
}


_HELP = {
    "other_calibrations": "others for the study `calibration`",
    "studies": f"some of {', '.join(STUDIES)}",
    "seeds": "of the studies `seeds`, `order`, `gradients`, `lengths` and `calibration`",
    "sample_counts": "of the study `samples`",
    "lengths": "tokens of a window in the study `lengths`, which has as many tokens as the others",
    "sequence_length": "tokens of a window, here and in the texts",
    "plot": "picture of the study `parts`, once --output has it",
}


def arguments_given() -> Namespace:
    """Read the command line; SystemExit if a study is not known.

    Values are defaults. A type, such as `Path`, is that of an argument without a default (`parse_arguments`).
    """
    arguments = parse_arguments(
        __doc__,
        "model",
        "calibration",
        "texts",
        helps=_HELP,
        other_calibrations=[],
        studies=list(STUDIES),
        seeds=[0, 1, 2],
        lengths=[512, 1024],
        sample_counts=[8, 16, 32, 64, 128],
        num_samples=16,
        sequence_length=512,
        max_windows=16,
        batch_size=4,
        threads=1,
        output=Path("runs/ablations.json"),
        plot=Path,
    )
    for study in arguments.studies:
        if study not in STUDIES:
            raise SystemExit(f"--studies: {study!r} is unknown; pass some of {', '.join(STUDIES)}.")
    return arguments


def run_study(study: str, arguments: Namespace) -> dict[str, Any]:
    """Return all rows of a study, labelled, with the recipes of its comparisons.

    Rows that `--output` has are taken from there; each new one is written.
    """
    usual = vars(arguments) | {
        "methods": ["default"],
        "seeds": [0],
        "held_out": 0,
        "bos": "auto",
        "device": "cpu",
        "dtype": "float32",
        "device_map": None,
        "storage_device": None,
        "calibration_length": arguments.sequence_length,
    }
    studies = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
    record = studies.setdefault(study, {"recipe": [], "rows": []})
    done = {(row["label"], row["pattern"], row["seed"]) for row in record["rows"]}
    for label, changes in STUDIES[study](arguments):
        case = Namespace(**usual | changes)
        for method, pattern, seed in wanted(case):
            name = label
            if not label or (method, pattern) == DENSE:
                name = method.removeprefix("default:")
            if (name, pattern, seed) in done:
                continue
            row, recipe = measure(case, method, pattern, seed)
            if row["error"] is not None:
                raise SystemExit(f"{method}, {pattern}: {row['error']}")
            done.add((name, pattern, seed))
            record["rows"].append({"label": name} | {key: row[key] for key in KEPT})
            record["recipe"] += [line for line in recipe if line not in record["recipe"]]
            arguments.output.parent.mkdir(parents=True, exist_ok=True)
            arguments.output.write_text(json.dumps(studies, indent=1) + "\n")
    return record


def table(study: dict[str, Any]) -> list[str]:
    """A column a pattern: perplexity on each text and, in brackets, against the first line of the column.

    Perplexities are means over the seeds, the ratios are geometric means over the texts, paired by seed. The dense
    model is left out: it is the same in every study.
    """
    rows = [row for row in study["rows"] if row["pattern"] != "-"]
    patterns = list(dict.fromkeys(row["pattern"] for row in rows))
    lines = [f"| | {' | '.join(patterns)} |", "|---" * (len(patterns) + 1) + "|"]
    # Of the first line of a column, by pattern: the mean over the texts by seed.
    references: dict[str, dict[int, float]] = {}
    for label in dict.fromkeys(row["label"] for row in rows):
        cells = []
        for pattern in patterns:
            group = [row for row in rows if row["pattern"] == pattern and row["label"] == label]
            if not group:
                cells.append("")
                continue
            perplexities = []
            for text in group[0]["perplexity"]:
                perplexities.append(shown([row["perplexity"][text] for row in group]))
            cell = "/".join(perplexities)
            means = {row["seed"]: geometric_mean(row["perplexity"].values()) for row in group}
            if pattern not in references:
                references[pattern] = means
            else:
                reference = references[pattern]
                ratios = [means[seed] / reference[seed] for seed in means if seed in reference]
                cell = f"{cell} ({shown(ratios, 3)})"
            cells.append(cell)
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return lines


def plot(study: dict[str, Any], path: Path) -> None:
    """Geometric mean of the perplexities over that of the first line, a panel a pattern."""
    import matplotlib.pyplot as plt

    panels: dict[str, dict[str, float]] = {}  # means by label, by pattern
    for row in study["rows"]:
        if row["pattern"] != "-":
            means = panels.setdefault(row["pattern"], {})
            means[row["label"]] = geometric_mean(row["perplexity"].values())
    heights = [len(means) for means in panels.values()]
    size = (9, 0.34 * sum(heights) + 1.2)
    figure, axes = plt.subplots(
        len(panels), 1, figsize=size, layout="constrained", sharex=True, height_ratios=heights
    )
    for axis, (pattern, means) in zip(axes, panels.items(), strict=True):
        # Bars are drawn from below, and the first line is on top.
        labels = list(reversed(means))
        first = means[labels[-1]]
        ratios = [means[label] / first for label in labels]
        axis.barh(labels, [ratio - 1 for ratio in ratios], left=1, color="tab:blue")
        for place, ratio in enumerate(ratios):
            axis.annotate(f" {ratio:.3f}", (max(ratio, 1), place), va="center", fontsize=8)
        axis.tick_params(axis="y", labelsize=8)
        axis.set(title=f"{pattern} zeros", xscale="log")
    axes[-1].set_xlabel("perplexity, times that of the default")
    axes[-1].set_xlim(right=1.15 * axes[-1].get_xlim()[1])
    axes[-1].xaxis.set_major_formatter("{x:g}")
    axes[-1].xaxis.set_minor_formatter("{x:g}")
    figure.savefig(path, dpi=110)


def shown(values: Sequence[float], digits: int = 2) -> str:
    """Write the mean, and of several values the standard deviation."""
    value = spread(values)
    assert value is not None
    mean, deviation = value
    if deviation is None:
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f}±{deviation:.{digits}f}"


def geometric_mean(values: Iterable[float]) -> float:
    """Compute the exponential of the mean logarithm."""
    return math.exp(statistics.fmean(math.log(value) for value in values))


def main() -> None:
    """Run the studies, and print the table of each."""
    arguments = arguments_given()
    torch.set_num_threads(arguments.threads)
    for study in arguments.studies:
        record = run_study(study, arguments)
        print("\n".join(["", study, "", *table(record)]), flush=True)
    if arguments.plot:
        plot(json.loads(arguments.output.read_text())["parts"], arguments.plot)


if __name__ == "__main__":
    main()
