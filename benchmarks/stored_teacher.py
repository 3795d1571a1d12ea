"""What a recovery costs and gains with stored predictions of the teacher, in pairs with the teacher in memory.

`--folder` is a model that was pruned from MODEL. Each round recovers it with the teacher in memory (`live`), and then
from the predictions of each number of tokens in `--top-k`: their first run computes them (`first-32`), the second one
finds them (`stored-32`). Both give the same weights, so that only the second one is measured on `--texts`. A row has
processor seconds of the whole call (`call_seconds`), and of the training without its evaluations (`train_seconds`). The
last lines are the ratios to the `live` row of the same round. Rounds have the seeds 0, 1, ...; finished rounds are read
from the output file.

    python benchmarks/stored_teacher.py MODEL --folder runs/s50 --calibration openwebtext.txt --texts wikitext2-test.txt
"""

from __future__ import annotations

import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from ablations import geometric_mean
from shared import open_record, parse_arguments, save, texts_of
from torch import Tensor

from optimum_fista import recover
from optimum_fista.evaluate.perplexity import evaluate_perplexity
from optimum_fista.folder.card import markdown_lines
from optimum_fista.source.loading import load_model, require_tokenizer
from optimum_fista.train.distillation import DistillationTrainer


class Watch:
    """Counts the processor seconds of trainings, without the evaluations in them."""

    def __init__(self) -> None:
        self.train_seconds = 0.0
        self._evaluate_seconds = 0.0  # since the latest training began

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Count the seconds of all trainers inside; two of their methods are replaced until the end of the block."""
        train = DistillationTrainer.train
        evaluate = DistillationTrainer.evaluate

        def timed_train(*given: Any, **named: Any) -> Any:
            """Train, and add the seconds to `self.train_seconds`."""
            self._evaluate_seconds = 0.0
            started = time.process_time()
            result = train(*given, **named)
            seconds = time.process_time() - started
            self.train_seconds += seconds - self._evaluate_seconds
            return result

        def timed_evaluate(*given: Any, **named: Any) -> Any:
            """Evaluate, and add the seconds to `self._evaluate_seconds`."""
            started = time.process_time()
            result = evaluate(*given, **named)
            self._evaluate_seconds += time.process_time() - started
            return result

        with (
            patch.object(DistillationTrainer, "train", timed_train),
            patch.object(DistillationTrainer, "evaluate", timed_evaluate),
        ):
            yield


def measure(
    arguments: Namespace, way: str, seed: int, folder: Path, texts: dict[str, Tensor]
) -> dict[str, Any]:
    """Recover once, and measure a row.

    Args:
        arguments: Those of the command.
        way: "live", "first-32" or "stored-32".
        seed: Of the text.
        folder: The work folder of the round: the recovered models and the predictions lie there.
        texts: Windows to measure on, int64 [windows, length], by name.
    """
    kind, _, top_k = way.partition("-")
    options: dict[str, Any] = {}
    if top_k:
        options = {"top_k": int(top_k), "teacher_logits": folder / f"teacher-{top_k}"}
    watch = Watch()
    started = time.process_time()
    with watch.watched():
        report = recover(
            arguments.folder,
            arguments.model,
            folder / way,
            calibration=arguments.calibration,
            seed=seed,
            device="cpu",
            tokens=arguments.tokens,
            sequence_length=arguments.sequence_length,
            batch_size=arguments.batch_size,
            held_out=arguments.held_out,
            accumulate=1,
            train="all",
            **options,
        )
    call_seconds = time.process_time() - started

    row: dict[str, Any] = {
        "way": way,
        "seed": seed,
        "call_seconds": round(call_seconds, 1),
        "train_seconds": round(watch.train_seconds, 1),
        "held_out_loss": report.held_out_loss,
        "compute_dtype": report.options["compute_dtype"],
    }
    if top_k:
        stored = folder / f"teacher-{top_k}"
        row["bytes"] = sum(file.stat().st_size for file in stored.glob("predictions-*"))
    if kind != "first":
        model, _ = load_model(str(folder / way), dtype="float32", device="cpu")
        row["perplexity"] = {
            name: evaluate_perplexity(model, windows, progress=False).perplexity
            for name, windows in texts.items()
        }
    return row


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Ratios of each stored row to the live row of its seed: perplexity (geometric mean) and seconds, in Markdown."""
    live_rows = {row["seed"]: row for row in rows if row["way"] == "live"}
    lines = []
    for row in rows:
        if row["way"] == "live":
            continue
        live = live_rows[row["seed"]]
        perplexity = ""
        if "perplexity" in row:
            mean = geometric_mean(row["perplexity"].values())
            perplexity = f"{mean / geometric_mean(live['perplexity'].values()):.4f}"
        train = f"{row['train_seconds'] / live['train_seconds']:.2f}"
        call = f"{row['call_seconds'] / live['call_seconds']:.2f}"
        lines.append((row["way"], str(row["seed"]), perplexity, train, call, f"{row['bytes']:,}"))
    return markdown_lines(("way", "seed", "perplexity", "training", "call", "bytes"), lines)


_HELP = {
    "folder": "the pruned model",
    "top_k": "tokens of a stored prediction",
    "test_length": "tokens a window to measure on",
    "tokens": "tokens to train on",
    "held_out": "sequences that the training measures its loss on",
}


def main() -> None:
    """Measure the rows that the output file lacks, and print the table."""
    arguments = parse_arguments(
        __doc__,
        "model",
        "folder",
        "calibration",
        "texts",
        helps=_HELP,
        top_k=[32],
        rounds=1,
        tokens=16_384,
        sequence_length=512,
        batch_size=2,
        held_out=2,
        max_windows=16,
        test_length=1024,
        threads=1,
        output=Path("runs/stored_teacher.json"),
    )
    torch.set_num_threads(arguments.threads)
    tokenizer = require_tokenizer(arguments.model)
    texts = texts_of(arguments, tokenizer, arguments.test_length)
    ways = ["live"]
    for top_k in arguments.top_k:
        ways += [f"first-{top_k}", f"stored-{top_k}"]

    record = open_record(arguments, "folder", "rounds", "threads")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    for seed in range(arguments.rounds):
        is_measured = any(row["seed"] == seed for row in record["rows"])
        if is_measured:
            continue
        with tempfile.TemporaryDirectory(dir=arguments.output.parent) as folder:
            rows = [measure(arguments, way, seed, Path(folder), texts) for way in ways]
        record["rows"] += rows
        save(arguments, record)
    print("\n".join(table(record["rows"])))


if __name__ == "__main__":
    main()
