"""Fine-tuning of decoder layers after pruning (`finetune="layer"`): perplexity and time, with it and without.

One row a method, `wanda`; with 32 steps a decoder layer, `wanda+32`; or on 32 instead of `--num-samples` windows,
`wanda@32`. Every row prunes the model again. Seconds are those of the processor, which other programs of the machine
lengthen less. Finished rows are read from the output file.

    python benchmarks/reconstruction.py MODEL --calibration TEXT --texts TEXT1,TEXT2 --patterns 0.5,2:4
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from kept_rows import open_record, texts_of
from torch import Tensor

from optimum_fista import FistaPruner
from optimum_fista.run.checkpoints.loading import load_model
from optimum_fista.run.comparison.settings import parse_config
from optimum_fista.run.evaluation.perplexity import evaluate_perplexity
from optimum_fista.run.texts.text import load_text
from optimum_fista.run.texts.windows import calibration_windows


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True, help="text source, to prune and fine-tune on")
    parser.add_argument("--texts", required=True, help="text sources to measure on")
    parser.add_argument("--patterns", default="0.5")
    parser.add_argument(
        "--rows", default="default,default+32,default@32,wanda,wanda+32", help="method, method+steps, method@windows"
    )
    parser.add_argument("--include", default="*", help="name pattern of the operators to prune, such as *.layers.?.*")
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--num-samples", type=int, default=16)
    parser.add_argument("--held-out", type=int, default=8, help="windows of the calibration text to measure on besides")
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--max-windows", type=int, default=12)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("runs/reconstruction.json"))
    return parser.parse_args()


class Way(NamedTuple):
    """How a row prunes, from its name.

    Attributes:
        method: A method as `optimum-fista compare` takes it.
        steps: Steps a decoder layer; 0: no fine-tuning.
        num_samples: Windows to calibrate on; 0: as many as `--num-samples`.
    """

    method: str
    steps: int
    num_samples: int

    @classmethod
    def of(cls, name: str) -> Way:
        """From `method`, `method+steps` or `method@windows`."""
        rest, _, samples = name.partition("@")
        method, _, steps = rest.partition("+")
        return cls(method, int(steps or 0), int(samples or 0))


def measure(
    arguments: argparse.Namespace, pattern: str, name: str, windows: Tensor, texts: dict[str, Tensor]
) -> dict[str, Any]:
    """Prune on `windows` in one way and measure."""
    row: dict[str, Any] = {"pattern": pattern, "row": name}
    model, _ = load_model(arguments.model, dtype="float32", device="cpu")
    if name != "dense":
        way = Way.of(name)
        options = f":finetune=layer:finetune_steps={way.steps}:finetune_learning_rate={arguments.learning_rate}"
        config = parse_config(way.method + (options if way.steps else ""), pattern, arguments.seed)
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
    texts = list(rows[0]["perplexity"])
    lines = ["| zeros | row | " + " | ".join(texts) + " | processor seconds |", "|---" * (3 + len(texts)) + "|"]
    for row in rows:
        cells = " | ".join(f"{row['perplexity'][text]:.2f}" for text in texts)
        seconds = f"{row['processor_seconds']:.0f}" if "processor_seconds" in row else ""
        lines.append(f"| {row['pattern']} | `{row['row']}` | {cells} | {seconds} |")
    return lines


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    _, tokenizer = load_model(arguments.model, dtype="float32", device="cpu")
    wanted = [("", "dense")]
    wanted += [(pattern, row) for pattern in arguments.patterns.split(",") for row in arguments.rows.split(",")]
    text, number, held_out = load_text(arguments.calibration, "calibration"), arguments.num_samples, arguments.held_out
    most = max(number, *(Way.of(name).num_samples for _, name in wanted))
    windows = calibration_windows(tokenizer, text, most + held_out, arguments.sequence_length, arguments.seed)
    texts = texts_of(arguments, tokenizer, arguments.sequence_length)
    texts["held out"] = windows[number : number + held_out]
    windows = torch.cat([windows[:number], windows[number + held_out :]])
    record = open_record(arguments, ("rows", "patterns"))
    for pattern, name in wanted:
        if (pattern, name) not in {(row["pattern"], row["row"]) for row in record["rows"]}:
            calibration = windows[: Way.of(name).num_samples or number]
            record["rows"].append(measure(arguments, pattern, name, calibration, texts))
            arguments.output.write_text(json.dumps(record, indent=1, default=vars))
    print("\n".join(table(record["rows"])))


if __name__ == "__main__":
    main()
