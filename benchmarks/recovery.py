"""What a recovery gains: perplexity before and after, and against minutes, by what is trained.

`--folders` are models that were pruned on the first `--num-samples` windows of the calibration text (`optimum-fista
prune` with the same `--num-samples` and `--test-length`, seed 0). Perplexity is measured on the first windows of
`--texts`, on the first windows that the model was calibrated on, and on as many of the same text that nothing was
fitted to. Rows are `dense`, `pruned`, what is trained on how many tokens of the text without the latter (`all:98304`,
`norms:49152`; `all:98304@4e-4` with a learning rate and `all:98304@label_share=0` with an option of its own), and
`once`: all weights, once on the calibration windows, the best state chosen on two others. Recovered models lie beside
their folders, as FOLDER-all-98304 and so on; those that are there are not made again. Finished rows are read from the
output file.

Folders that were pruned with the seeds 0 and 1 are called NAME-0 and NAME-1, and each seed is a call with its `--seed`
and the same output file. A second table then has the means over the seeds.

    python benchmarks/recovery.py MODEL --calibration TEXT --texts TEXT1,TEXT2 --folders runs/s50 --rows all:98304
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from argparse import Namespace
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from ablations import geometric_mean, shown
from shared import calibration_of, open_record, parse_arguments, save, texts_of
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from optimum_fista import recover
from optimum_fista.evaluate.perplexity import evaluate_perplexity
from optimum_fista.evaluate.verification import verify_checkpoint
from optimum_fista.folder.card import markdown_lines
from optimum_fista.folder.checkpoint import read_report
from optimum_fista.source.loading import load_model, require_tokenizer

KINDS = (
    "dense",
    "pruned",
    "once",
    "all",
    "lora",
    "norms",
)  # "lora" only in rows of an earlier version
SELECTING = 2
"""Windows after the calibrated ones that choose the best state of `once`."""


def text_without(
    source: str, windows: Tensor, tokenizer: PreTrainedTokenizerBase, file: Path
) -> Path:
    """Write a text without some windows of its tokens to a file, and return it."""
    text = Path(source).read_text()
    for window in windows:
        # A character of several bytes may be cut at either end.
        part = tokenizer.decode(window, clean_up_tokenization_spaces=False).strip("\ufffd")
        if text.count(part) != 1:
            raise SystemExit(f"{source}: a held-out window is not in the text once.")
        text = text.replace(part, "\n\n")
    file.write_text(text)
    return file


def measure(
    arguments: Namespace, folder: Path, kind: str, text: Path, texts: dict[str, Tensor]
) -> dict[str, Any]:
    """A row: the folder as it is (`pruned`), or recovered; `dense` is the model."""
    row: dict[str, Any] = {"folder": folder.name, "row": kind, "seed": arguments.seed}
    beside = folder.with_name(f"{folder.name}-{kind.replace(':', '-')}")
    source = {"dense": Path(arguments.model), "pruned": folder}.get(kind, beside)
    if kind not in ("dense", "pruned"):
        if not source.exists():
            trains, _, amount = kind.partition(":")
            tokens, *others = amount.split("@")
            options: dict[str, Any] = {"calibration": str(text), "train": trains, "accumulate": 1}
            options |= {} if kind == "once" else {"tokens": int(tokens)}
            for other in others:
                name, _, value = other.rpartition("=")
                options[name or "relative_step"] = json.loads(value)
            if kind == "once":  # the windows that the model was calibrated on, in the same order
                length, count = arguments.test_length, arguments.num_samples
                options |= {
                    "calibration": arguments.calibration,
                    "train": "all",
                    "tokens": count * length,
                }
                options |= {"sequence_length": length, "batch_size": 1, "held_out": SELECTING}
            started = time.process_time()
            recover(folder, arguments.model, source, seed=arguments.seed, device="cpu", **options)
            row["core_minutes"] = (time.process_time() - started) / 60
        row["recovery"] = dataclasses.asdict(read_report(source).recoveries[-1])
    if kind != "dense":
        row["num_zeros"] = verify_checkpoint(source).num_zeros
    model, _ = load_model(str(source), dtype="float32", device="cpu")
    with torch.autocast("cpu", torch.bfloat16) if arguments.bfloat16 else nullcontext():
        row["perplexity"] = {
            name: evaluate_perplexity(model, windows, progress=False).perplexity
            for name, windows in texts.items()
        }
    return row


def trained(row: dict[str, Any]) -> str:
    """What was trained, without on how many tokens: `all`, `all@4e-4`."""
    kind, _, amount = row["row"].partition(":")
    return kind + "".join(amount.partition("@")[1:])


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Perplexities by what was trained, and the ratio of `of_texts` to that of `dense`, in Markdown."""
    shown, dense = [], next((of_texts(row) for row in rows if row["row"] == "dense"), math.nan)
    for row in sorted(rows, key=lambda row: KINDS.index(trained(row).partition("@")[0])):
        found = row.get("recovery", {"num_trained": 0, "num_tokens": 0})
        cells = (f"{value:.2f}" for value in row["perplexity"].values())
        done = (f"{found[name]:,}" if found[name] else "" for name in ("num_trained", "num_tokens"))
        minutes = f"{found['seconds'] / 60:.1f}" if "seconds" in found else ""
        shown.append(
            (row["folder"], trained(row), *cells, f"{of_texts(row) / dense:.3f}", *done, minutes)
        )
    shown.sort(key=lambda cells: cells[0])
    names = ("ratio", "weights", "tokens", "minutes")
    return markdown_lines(("model", "trained", *rows[0]["perplexity"], *names), shown)


def of_texts(row: dict[str, Any]) -> float:
    """The geometric mean of a row's perplexities on `--texts`."""
    return geometric_mean(
        value for name, value in row["perplexity"].items() if name not in ("calibrated", "held out")
    )


def table_of_seeds(rows: list[dict[str, Any]]) -> list[str]:
    """Means over seeds with their standard deviation, and the geometric mean over that of `pruned`, in Markdown.

    The geometric mean is that of the texts without `calibrated`. A model is a folder without its seed.
    """
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        if row["row"] != "dense":
            found.setdefault((row["folder"].rpartition("-")[0], trained(row)), []).append(row)
    lines = []
    for (model, kind), group in sorted(
        found.items(), key=lambda item: (item[0][0], item[0][1] != "pruned")
    ):
        cells = [
            shown([row["perplexity"][name] for row in group]) for name in group[0]["perplexity"]
        ]
        before = {row["seed"]: mean(row) for row in found[model, "pruned"]}
        ratios = [mean(row) / before[row["seed"]] for row in group if kind != "pruned"]
        lines.append((model, kind, *cells, shown(ratios, 3) if ratios else ""))
    return markdown_lines(("model", "trained", *rows[0]["perplexity"], "ratio"), lines)


def mean(row: dict[str, Any]) -> float:
    """The geometric mean of a row's perplexities, without `calibrated`."""
    return geometric_mean(
        value for name, value in row["perplexity"].items() if name != "calibrated"
    )


def draw(rows: list[dict[str, Any]], file: Path) -> None:
    """Perplexity (the geometric mean of the texts without `calibrated`), relative to the dense model's, by minutes."""
    from matplotlib.figure import Figure

    dense = mean(next(row for row in rows if row["row"] == "dense"))
    lines: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for row in rows:
        if "recovery" in row:
            start = next(
                other
                for other in rows
                if (other["folder"], other["row"]) == (row["folder"], "pruned")
            )
            points = lines.setdefault((row["folder"], trained(row)), [(0.0, mean(start) / dense)])
            points.append((row["recovery"]["seconds"] / 60, mean(row) / dense))
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for (folder, kind), points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=f"{folder}, {kind}")
    axes.set(xlabel="minutes of training", ylabel="perplexity / dense perplexity")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=110, metadata={"Software": None})


_HELP = {
    "folders": "pruned models",
    "rows": "dense, pruned, once, or what is trained, a colon, tokens, and maybe @ and an option",
    "test_length": "tokens a window to measure on",
    "bfloat16": "measure perplexity with products in bfloat16",
}


def main() -> None:
    ways = {"rows": ["dense", "pruned", "once", "all:98304"], "bfloat16": False}
    sizes = {"num_samples": 24, "max_windows": 12, "test_length": 1024}
    others = {"threads": 1, "seed": 0, "output": Path("runs/recovery.json"), "plot": Path}
    required = ("model", "calibration", "texts", "folders")
    arguments = parse_arguments(__doc__, *required, helps=_HELP, **ways, **sizes, **others)
    torch.set_num_threads(arguments.threads)
    folders = [Path(folder) for folder in arguments.folders.split(",")]
    tokenizer = require_tokenizer(arguments.model)
    arguments.sequence_length = arguments.test_length
    first = arguments.num_samples + SELECTING
    windows = calibration_of(arguments, tokenizer, first + arguments.max_windows)
    unseen, calibrated = (
        windows[first:],
        windows[: min(arguments.num_samples, arguments.max_windows)],
    )
    texts = texts_of(arguments, tokenizer, arguments.test_length) | {
        "calibrated": calibrated,
        "held out": unseen,
    }
    file = (
        folders[0].parent / f"{Path(arguments.calibration).stem}-train-{arguments.seed}.txt"
    )  # seeds may run at once
    text = text_without(arguments.calibration, unseen, tokenizer, file)
    record = open_record(arguments, "folders", "rows", "threads", "seed")
    for folder in folders:
        for kind in arguments.rows:
            name = {"folder": folder.name, "row": kind}
            if not any(name.items() <= row.items() for row in record["rows"]):
                record["rows"].append(measure(arguments, folder, kind, text, texts))
                save(arguments, record)
    print("\n".join(table(record["rows"])))
    if len({row["seed"] for row in record["rows"]}) > 1:
        print("\n".join(table_of_seeds(record["rows"])))
    if arguments.plot is not None:
        draw(record["rows"], arguments.plot)


if __name__ == "__main__":
    main()
