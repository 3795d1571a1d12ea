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
_CORRECTIONS = (
    "default default:error_correction=0 default:error_correction=1 default:residual_correction=0"
)
_SHARED = f"default default:error_correction=0 default:allocation=uniform alps:{_WHOLE}"
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
            f"{_CORRECTIONS} default:allocation=uniform default:scope=row alps:{_WHOLE} wanda:{_WHOLE} sparsegpt "
            "sparsegpt:allocation=fisher:scope=row sparsegpt:allocation=fisher:scope=matrix "
            f"sparsegpt:{_WHOLE}:scope=matrix",
        ),
        _methods("2:4", f"{_CORRECTIONS} alps:{_PIPELINE} sparsegpt:{_PIPELINE} wanda:{_PIPELINE}"),
    ],
    "seeds": lambda arguments: [
        _methods("0.5", f"{_SHARED} default:scope=row", arguments.seeds),
        _methods("0.7", _SHARED, arguments.seeds),
        _methods("2:4", f"default default:error_correction=0 alps:{_PIPELINE}", arguments.seeds),
    ],
    "order": lambda arguments: [
        _methods(
            "2:4",
            "default default:reorder_channels=true wanda wanda:reorder_channels=true sparsegpt",
            arguments.seeds,
        )
    ],
    "groups": lambda _: [
        _methods(pattern, "default sparsegpt wanda") for pattern in ("2:4", "4:8", "8:16", "16:32")
    ],
    "gradients": lambda arguments: [
        _methods("0.5", "default default:allocation_tokens=8192", arguments.seeds)
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
            {"num_samples": count, "patterns": ["0.5", "0.7"], "methods": ["default"]},
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
        for _, case in [_methods("0.5", "default"), _methods("2:4", "default")]
    ],
    "calibration": lambda arguments: [
        (
            Path(source).stem,
            {
                "calibration": source,
                "patterns": ["0.5"],
                "methods": ["default"],
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
    choices = {
        "other_calibrations": [],
        "studies": list(STUDIES),
        "seeds": [0, 1, 2],
        "lengths": [512, 1024],
    }
    sizes = {
        "sample_counts": [8, 16, 32, 64, 128],
        "num_samples": 16,
        "sequence_length": 512,
        "max_windows": 16,
    }
    machine = {"batch_size": 4, "threads": 1}
    files = {"output": Path("runs/ablations.json"), "plot": Path}
    required = ("model", "calibration", "texts")
    arguments = parse_arguments(
        __doc__, *required, helps=_HELP, **choices, **sizes, **machine, **files
    )
    for study in arguments.studies:
        if study not in STUDIES:
            raise SystemExit(f"--studies: {study!r} is unknown; pass some of {', '.join(STUDIES)}.")
    return arguments


def run_study(study: str, arguments: Namespace) -> dict[str, Any]:
    """All rows of a study, labelled, with the recipes of its comparisons; those in `--output` are taken from there."""
    alone = {"held_out": 0, "bos": "auto", "device": "cpu", "dtype": "float32", "device_map": None}
    base = (
        vars(arguments)
        | alone
        | {"storage_device": None, "calibration_length": arguments.sequence_length}
    )
    every = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
    found = every.setdefault(study, {"recipe": [], "rows": []})
    done = {(row["label"], row["pattern"], row["seed"]) for row in found["rows"]}
    for label, changes in STUDIES[study](arguments):
        case = Namespace(**base | {"methods": ["default"], "seeds": [0]} | changes)
        for method, pattern, seed in wanted(case):
            name = (
                method.removeprefix("default:")
                if (method, pattern) == DENSE or not label
                else label
            )
            if (name, pattern, seed) in done:
                continue
            row, recipe = measure(case, method, pattern, seed)
            if row["error"] is not None:
                raise SystemExit(f"{method}, {pattern}: {row['error']}")
            done.add((name, pattern, seed))
            found["rows"].append({"label": name} | {key: row[key] for key in KEPT})
            found["recipe"] += [line for line in recipe if line not in found["recipe"]]
            arguments.output.parent.mkdir(parents=True, exist_ok=True)
            arguments.output.write_text(json.dumps(every, indent=1) + "\n")
    return found


def table(study: dict[str, Any]) -> list[str]:
    """A column a pattern: perplexity on each text and, in brackets, against the first line of the column.

    Perplexities are means over the seeds, the ratios are geometric means over the texts, paired by seed. The dense
    model is left out: it is the same in every study.
    """
    rows = [row for row in study["rows"] if row["pattern"] != "-"]
    patterns, labels = (
        list(dict.fromkeys(row[key] for row in rows)) for key in ("pattern", "label")
    )
    lines = [f"| | {' | '.join(patterns)} |", "|---" * (len(patterns) + 1) + "|"]
    first: dict[str, dict[int, float]] = {}
    for label in labels:
        cells = []
        for pattern in patterns:
            found = [row for row in rows if (row["pattern"], row["label"]) == (pattern, label)]
            if not found:
                cells.append("")
                continue
            mean = {row["seed"]: geometric_mean(row["perplexity"].values()) for row in found}
            reference = first.setdefault(pattern, mean)
            cell = "/".join(
                shown([row["perplexity"][text] for row in found]) for text in found[0]["perplexity"]
            )
            ratios = [mean[seed] / reference[seed] for seed in mean if seed in reference]
            cells.append(cell if reference is mean else f"{cell} ({shown(ratios, 3)})")
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return lines


def plot(study: dict[str, Any], path: Path) -> None:
    """Geometric mean of the perplexities over that of the first line, a panel a pattern."""
    import matplotlib.pyplot as plt

    panels: dict[str, dict[str, float]] = {}
    for row in study["rows"]:
        if row["pattern"] != "-":
            panels.setdefault(row["pattern"], {})[row["label"]] = geometric_mean(
                row["perplexity"].values()
            )
    heights = [len(found) for found in panels.values()]
    size = (9, 0.34 * sum(heights) + 1.2)
    figure, axes = plt.subplots(
        len(panels), 1, figsize=size, layout="constrained", sharex=True, height_ratios=heights
    )
    for axis, (pattern, found) in zip(axes, panels.items(), strict=True):
        labels, means = list(found)[::-1], list(found.values())[::-1]
        ratios = [mean / means[-1] for mean in means]
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
    """The mean, and of several values the standard deviation."""
    found = spread(values)
    assert found is not None
    mean, deviation = found
    return f"{mean:.{digits}f}" + ("" if deviation is None else f"±{deviation:.{digits}f}")


def geometric_mean(values: Iterable[float]) -> float:
    """The exponential of the mean logarithm."""
    return math.exp(statistics.fmean(math.log(value) for value in values))


def main() -> None:
    arguments = arguments_given()
    torch.set_num_threads(arguments.threads)
    for study in arguments.studies:
        found = run_study(study, arguments)
        print("\n".join(["", study, "", *table(found)]), flush=True)
    if arguments.plot:
        plot(json.loads(arguments.output.read_text())["parts"], arguments.plot)


if __name__ == "__main__":
    main()
