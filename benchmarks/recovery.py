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

# In the order of the table; "lora" is only in rows of an earlier version.
KINDS = ("dense", "pruned", "once", "all", "lora", "norms")
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
    """Measure a row: the folder as it is (`pruned`), or recovered; `dense` is the model.

    A recovered model is made if it is not there.

    Args:
        arguments: Those of the command.
        folder: The pruned model.
        kind: What is trained, such as "all:98304@4e-4" (the module's docstring has more).
        text: File of the text to train on.
        texts: Windows to measure on, int64 [windows, length], by name.
    """
    row: dict[str, Any] = {"folder": folder.name, "row": kind, "seed": arguments.seed}
    if kind == "dense":
        measured = Path(arguments.model)
    elif kind == "pruned":
        measured = folder
    else:
        measured = folder.with_name(f"{folder.name}-{kind.replace(':', '-')}")
        if not measured.exists():
            options = options_of(kind, arguments, text)
            started = time.process_time()
            recover(folder, arguments.model, measured, seed=arguments.seed, device="cpu", **options)
            row["core_minutes"] = (time.process_time() - started) / 60
        row["recovery"] = dataclasses.asdict(read_report(measured).recoveries[-1])
    if kind != "dense":
        row["num_zeros"] = verify_checkpoint(measured).num_zeros

    model, _ = load_model(str(measured), dtype="float32", device="cpu")
    with torch.autocast("cpu", torch.bfloat16, enabled=arguments.bfloat16):
        row["perplexity"] = {
            name: evaluate_perplexity(model, windows, progress=False).perplexity
            for name, windows in texts.items()
        }
    return row


def options_of(kind: str, arguments: Namespace, text: Path) -> dict[str, Any]:
    """Return the arguments of `recover` for a kind of row, such as "once" or "all:98304@label_share=0".

    `text` is the file of the text to train on. `once` trains on the windows that the model was calibrated on, in the
    same order.
    """
    if kind == "once":
        return {
            "calibration": arguments.calibration,
            "train": "all",
            "accumulate": 1,
            "tokens": arguments.num_samples * arguments.test_length,
            "sequence_length": arguments.test_length,
            "batch_size": 1,
            "held_out": SELECTING,
        }
    trains, _, amount = kind.partition(":")
    tokens, *others = amount.split("@")
    options = {
        "calibration": str(text),
        "train": trains,
        "accumulate": 1,
        "tokens": int(tokens),
    }
    for other in others:  # "4e-4", a learning rate, or "label_share=0"
        name, _, value = other.rpartition("=")
        options[name or "relative_step"] = json.loads(value)
    return options


def trained(row: dict[str, Any]) -> str:
    """What was trained, without on how many tokens: `all`, `all@4e-4`."""
    kind, _, amount = row["row"].partition(":")
    _, at, options = amount.partition("@")
    return f"{kind}{at}{options}"


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Perplexities by what was trained, and the ratio of `of_texts` to that of `dense`, in Markdown."""
    dense_rows = [row for row in rows if row["row"] == "dense"]
    dense = of_texts(dense_rows[0]) if dense_rows else math.nan
    lines = []
    for row in sorted(rows, key=lambda row: KINDS.index(trained(row).partition("@")[0])):
        perplexities = [f"{value:.2f}" for value in row["perplexity"].values()]
        ratio = f"{of_texts(row) / dense:.3f}"
        weights = ""
        tokens = ""
        minutes = ""
        recovery = row.get("recovery")
        if recovery is not None:
            weights = f"{recovery['num_trained']:,}"
            tokens = f"{recovery['num_tokens']:,}"
            minutes = f"{recovery['seconds'] / 60:.1f}"
        lines.append((row["folder"], trained(row), *perplexities, ratio, weights, tokens, minutes))
    lines.sort(key=lambda cells: cells[0])
    headings = ("model", "trained", *rows[0]["perplexity"], "ratio", "weights", "tokens", "minutes")
    return markdown_lines(headings, lines)


def of_texts(row: dict[str, Any]) -> float:
    """The geometric mean of a row's perplexities on `--texts`."""
    return geometric_mean(
        value for name, value in row["perplexity"].items() if name not in ("calibrated", "held out")
    )


def table_of_seeds(rows: list[dict[str, Any]]) -> list[str]:
    """Means over seeds with their standard deviation, and the geometric mean over that of `pruned`, in Markdown.

    The geometric mean is that of the texts without `calibrated`. A model is a folder without its seed.
    """
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}  # by model and by what was trained
    for row in rows:
        if row["row"] != "dense":
            model, _, _ = row["folder"].rpartition("-")
            groups.setdefault((model, trained(row)), []).append(row)

    def place(key: tuple[str, str]) -> tuple[str, bool]:
        """Where a group is in the table: by model, `pruned` first."""
        model, kind = key
        return model, kind != "pruned"

    lines = []
    for model, kind in sorted(groups, key=place):
        group = groups[model, kind]
        cells = [
            shown([row["perplexity"][name] for row in group]) for name in group[0]["perplexity"]
        ]
        ratio = ""
        if kind != "pruned":
            before = {row["seed"]: mean(row) for row in groups[model, "pruned"]}
            ratio = shown([mean(row) / before[row["seed"]] for row in group], 3)
        lines.append((model, kind, *cells, ratio))
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
    starts = {row["folder"]: mean(row) / dense for row in rows if row["row"] == "pruned"}
    lines: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for row in rows:
        if "recovery" in row:
            start = (0.0, starts[row["folder"]])
            points = lines.setdefault((row["folder"], trained(row)), [start])
            points.append((row["recovery"]["seconds"] / 60, mean(row) / dense))
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for (folder, kind), points in lines.items():
        minutes, ratios = zip(*sorted(points), strict=True)
        axes.plot(minutes, ratios, marker="o", label=f"{folder}, {kind}")
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
    """Measure the rows that the output file lacks, and print the tables."""
    arguments = parse_arguments(
        __doc__,
        "model",
        "calibration",
        "texts",
        "folders",
        helps=_HELP,
        rows=["dense", "pruned", "once", "all:98304"],
        bfloat16=False,
        num_samples=24,
        max_windows=12,
        test_length=1024,
        threads=1,
        seed=0,
        output=Path("runs/recovery.json"),
        plot=Path,
    )
    torch.set_num_threads(arguments.threads)
    folders = [Path(folder) for folder in arguments.folders.split(",")]
    tokenizer = require_tokenizer(arguments.model)
    arguments.sequence_length = arguments.test_length
    num_fitted = arguments.num_samples + SELECTING
    windows = calibration_of(arguments, tokenizer, num_fitted + arguments.max_windows)
    held_out = windows[num_fitted:]
    texts = texts_of(arguments, tokenizer, arguments.test_length)
    texts["calibrated"] = windows[: min(arguments.num_samples, arguments.max_windows)]
    texts["held out"] = held_out
    # seeds may run at once
    stem = Path(arguments.calibration).stem
    file = folders[0].parent / f"{stem}-train-{arguments.seed}.txt"
    text = text_without(arguments.calibration, held_out, tokenizer, file)

    record = open_record(arguments, "folders", "rows", "threads", "seed")
    for folder in folders:
        for kind in arguments.rows:
            key = {"folder": folder.name, "row": kind}
            is_measured = any(key.items() <= row.items() for row in record["rows"])
            if not is_measured:
                record["rows"].append(measure(arguments, folder, kind, text, texts))
                save(arguments, record)
    print("\n".join(table(record["rows"])))
    if len({row["seed"] for row in record["rows"]}) > 1:
        print("\n".join(table_of_seeds(record["rows"])))
    if arguments.plot is not None:
        draw(record["rows"], arguments.plot)


if __name__ == "__main__":
    main()
