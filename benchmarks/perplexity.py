"""Perplexity of a model pruned by every method and pattern, on texts none of it was calibrated with.

One run is one (method, pattern). Finished runs are read from the output file, so an interrupted benchmark goes on
where it stopped. Prints one table; `--plot` draws it.

    python benchmarks/perplexity.py MODEL --calibration TEXT --texts TEXT1,TEXT2 --patterns 0.5,2:4 \
        --methods wanda,sparsegpt,fista,paper:warm_start=sparsegpt

A method is `name:option=value:...`; options are those of FistaPruningConfig or of the method. `paper` stands for the
published settings of FISTAPruner. The text `held-out` is fresh windows of the calibration text.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from optimum_fista import FistaPruner, FistaPruningConfig
from optimum_fista.run.loading import load_model
from optimum_fista.run.perplexity import evaluate_perplexity
from optimum_fista.run.report import library_versions
from optimum_fista.run.text import load_text
from optimum_fista.run.windows import calibration_windows, evaluation_windows


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True, help="text source")
    parser.add_argument("--texts", required=True, help="text sources to measure on, or held-out")
    parser.add_argument("--methods", default="magnitude,wanda,sparsegpt,fista")
    parser.add_argument("--patterns", default="0.5,2:4")
    parser.add_argument("--num-samples", type=int, default=24)
    parser.add_argument("--num-held-out", type=int, default=8)
    parser.add_argument("--max-windows", type=int, default=12)
    parser.add_argument("--sequence-length", type=int, default=1024)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("runs/perplexity.json"))
    parser.add_argument("--plot", type=Path)
    return parser.parse_args()


def parse_config(method: str, pattern: str) -> FistaPruningConfig:
    """`name:option=value` and `0.5` or `2:4` as a configuration."""
    name, *pairs = method.split(":")
    options: dict[str, Any] = {}
    for pair in pairs:
        key, value = pair.split("=")
        try:
            options[key] = json.loads(value)
        except json.JSONDecodeError:
            options[key] = value
    fields = {field.name for field in dataclasses.fields(FistaPruningConfig)}
    settings: dict[str, Any] = {key: value for key, value in options.items() if key in fields}
    settings |= {"pattern": pattern} if ":" in pattern else {"sparsity": float(pattern)}
    if name == "paper":
        return FistaPruningConfig.paper(**settings)
    method_options = {key: value for key, value in options.items() if key not in fields}
    if name != "default":
        settings["method"] = name
    return FistaPruningConfig(method_options=method_options, **settings)


def measure(arguments: argparse.Namespace, method: str, pattern: str, calibration, texts) -> dict[str, Any]:
    """Prune a fresh copy of the model and measure it on every text."""
    model, _ = load_model(arguments.model, dtype="float32")
    row: dict[str, Any] = {"method": method, "pattern": pattern}
    if method != "dense":
        report = FistaPruner(parse_config(method, pattern)).prune(model, calibration.split(arguments.batch_size))
        row |= {"totals": report.totals, "seconds": report.seconds, "config": report.config}
        row["calibration_sha256"] = report.calibration["sha256"]
    row["perplexity"] = {
        name: evaluate_perplexity(model, windows, progress=False).perplexity for name, windows in texts.items()
    }
    return row


def table(rows: list[dict[str, Any]], texts: list[str]) -> str:
    lines = ["| pattern | method | " + " | ".join(texts) + " | seconds | solving |", "|---" * (4 + len(texts)) + "|"]
    for row in rows:
        cells = " | ".join(f"{row['perplexity'][text]:.2f}" for text in texts)
        seconds = f"{row['seconds']['total']:.0f} | {row['totals']['solve_seconds']:.0f}" if "totals" in row else "|"
        lines.append(f"| {row['pattern']} | {row['method']} | {cells} | {seconds} |")
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], texts: list[str], path: Path) -> None:
    """Bars by method, one panel a pattern; bars beyond four times the dense perplexity are cut and labelled."""
    import matplotlib.pyplot as plt

    patterns = [p for p in dict.fromkeys(row["pattern"] for row in rows) if p != "-"]
    limit = 4 * max(row["perplexity"][text] for row in rows if row["method"] == "dense" for text in texts)
    tallest = max(sum(row["pattern"] in (pattern, "-") for row in rows) for pattern in patterns)
    size = (4 + 5 * len(patterns), 1.6 + 0.5 * tallest)
    figure, axes = plt.subplots(1, len(patterns), figsize=size, squeeze=False, layout="constrained")
    for axis, pattern in zip(axes[0], patterns, strict=True):
        chosen = [row for row in rows if row["pattern"] in (pattern, "-")]
        for offset, text in enumerate(texts):
            places = [i + 0.8 / len(texts) * (offset - (len(texts) - 1) / 2) for i in range(len(chosen))]
            values = [row["perplexity"][text] for row in chosen]
            bars = axis.barh(places, [min(value, limit) for value in values], 0.75 / len(texts), label=text)
            axis.bar_label(bars, [f"{value:.1f}" for value in values], fontsize=7, padding=2)
        axis.set(title=f"sparsity {pattern}", yticks=range(len(chosen)), yticklabels=[row["method"] for row in chosen])
        axis.set(xlabel="perplexity, lower is better", xlim=(0, 1.08 * limit))
        axis.invert_yaxis()
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=len(texts), fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    arguments = parse_arguments()
    _, tokenizer = load_model(arguments.model, dtype="float32", device="cpu")
    length = arguments.sequence_length
    windows = calibration_windows(
        tokenizer,
        load_text(arguments.calibration, "calibration"),
        arguments.num_samples + arguments.num_held_out,
        length,
        arguments.seed,
    )
    calibration, held_out = windows[: arguments.num_samples], windows[arguments.num_samples :]
    texts: dict[str, torch.Tensor] = {}
    for source in arguments.texts.split(","):
        fresh = source == "held-out"
        name = source if fresh else Path(source).stem
        if fresh:
            texts[name] = held_out
        else:
            texts[name] = evaluation_windows(tokenizer, load_text(source, "test"), length, arguments.max_windows)
    settings = {k: str(v) for k, v in vars(arguments).items() if k not in ("methods", "patterns", "output", "plot")}
    record: dict[str, Any] = {"settings": settings, "versions": library_versions(), "rows": []}
    if arguments.output.exists():
        previous = json.loads(arguments.output.read_text())
        if previous["settings"] != settings:
            raise SystemExit(f"{arguments.output} holds runs with other settings: pass another --output.")
        record["rows"] = previous["rows"]
    wanted = [("dense", "-")]
    patterns, methods = arguments.patterns.split(","), arguments.methods.split(",")
    wanted += [(method, pattern) for pattern in patterns for method in methods]
    done = {(row["method"], row["pattern"]) for row in record["rows"]}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    for method, pattern in wanted:
        if (method, pattern) not in done:
            print(f"{method}, {pattern}", flush=True)
            record["rows"].append(measure(arguments, method, pattern, calibration, texts))
            arguments.output.write_text(json.dumps(record, indent=1))
            print(table(record["rows"][-1:], list(texts)).splitlines()[-1], flush=True)
    rows = sorted(record["rows"], key=lambda row: row["pattern"])
    print(table(rows, list(texts)))
    if arguments.plot:
        plot(rows, list(texts), arguments.plot)


if __name__ == "__main__":
    main()
