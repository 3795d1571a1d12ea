"""Fine-tuning of decoder layers after pruning (`finetune="layer"`): perplexity and time, with it and without.

One row a method, `wanda`; with 32 steps a decoder layer, `wanda+32`; or on 32 instead of `--num-samples` windows,
`wanda@32`. Every row prunes the model again. Seconds are those of the processor, which other programs of the machine
lengthen less. Finished rows are read from the output file.

    python benchmarks/reconstruction.py MODEL --calibration TEXT --texts TEXT1,TEXT2 --patterns 0.5,2:4
"""

from __future__ import annotations

import dataclasses
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from shared import calibration_of, open_record, parse_arguments, save, texts_of
from torch import Tensor

from optimum_fista import FistaPruner
from optimum_fista.run.checkpoints.loading import load_model
from optimum_fista.run.comparison.settings import parse_config
from optimum_fista.run.evaluation.perplexity import evaluate_perplexity
from optimum_fista.run.reports.markdown import markdown_lines


def way_of(name: str) -> tuple[str, int, int]:
    """Method, steps a decoder layer and calibration windows of a row; 0 stands for none, and for `--num-samples`."""
    rest, _, windows = name.partition("@")
    method, _, steps = rest.partition("+")
    return method, int(steps or 0), int(windows or 0)


def measure(arguments: Namespace, pattern: str, name: str, windows: Tensor, texts: dict[str, Tensor]) -> dict[str, Any]:
    """Prune on `windows` in one way and measure."""
    row: dict[str, Any] = {"pattern": pattern, "row": name}
    model, _ = load_model(arguments.model, dtype="float32", device="cpu")
    if name != "dense":
        method, steps, _ = way_of(name)
        options = f":finetune=layer:finetune_steps={steps}:finetune_learning_rate={arguments.learning_rate}"
        config = parse_config(method + (options if steps else ""), pattern, arguments.seed)
        config = dataclasses.replace(config, include=(arguments.include,))
        started, processor = time.perf_counter(), time.process_time()
        report = FistaPruner(config).prune(model, windows.split(1))
        row |= {"seconds": time.perf_counter() - started, "processor_seconds": time.process_time() - processor}
        row |= {"config": report.config, "totals": report.totals, "layers": [vars(layer) for layer in report.layers]}
    row["perplexity"] = {
        text: evaluate_perplexity(model, ids, batch_size=4, progress=False).perplexity for text, ids in texts.items()
    }
    return row


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Lines of the table: a row each, in the order measured."""
    texts, lines = list(rows[0]["perplexity"]), []
    for row in rows:
        seconds = f"{row['processor_seconds']:.0f}" if "processor_seconds" in row else ""
        perplexities = (f"{row['perplexity'][text]:.2f}" for text in texts)
        lines.append((row["pattern"], f"`{row['row']}`", *perplexities, seconds))
    return markdown_lines(("zeros", "row", *texts, "processor seconds"), lines)


_HELP = {
    "rows": "method, method+steps, method@windows",
    "include": "name pattern of the operators to prune, such as *.layers.?.*",
    "held_out": "windows of the calibration text to measure on besides",
}


def main() -> None:
    ways = {"patterns": ["0.5"], "rows": ["default", "default+32", "default@32", "wanda", "wanda+32"]}
    sizes = {"num_samples": 16, "held_out": 8, "sequence_length": 512, "max_windows": 12, "threads": 1, "seed": 0}
    others = {"include": "*", "learning_rate": 3e-4, "output": Path("runs/reconstruction.json")}
    arguments = parse_arguments(__doc__, "model", "calibration", "texts", helps=_HELP, **ways, **sizes, **others)
    torch.set_num_threads(arguments.threads)
    _, tokenizer = load_model(arguments.model, dtype="float32", device="cpu")
    wanted = [("", "dense"), *((pattern, row) for pattern in arguments.patterns for row in arguments.rows)]
    number, held_out = arguments.num_samples, arguments.held_out
    most = max(number, *(way_of(name)[2] for _, name in wanted))
    windows = calibration_of(arguments, tokenizer, most + held_out)
    texts = texts_of(arguments, tokenizer, arguments.sequence_length)
    texts["held out"] = windows[number : number + held_out]
    windows = torch.cat([windows[:number], windows[number + held_out :]])
    record = open_record(arguments, "rows", "patterns")
    for pattern, name in wanted:
        if (pattern, name) not in {(row["pattern"], row["row"]) for row in record["rows"]}:
            calibration = windows[: way_of(name)[2] or number]
            record["rows"].append(measure(arguments, pattern, name, calibration, texts))
            save(arguments, record)
    print("\n".join(table(record["rows"])))


if __name__ == "__main__":
    main()
