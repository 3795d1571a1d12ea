"""Count the products of the calibration side and the share of the machine's matrix rate that it reaches.

Prunes by magnitude, which solves nothing, so that what is left is calibration: forward passes, Gram and cross-Gram
matrices, layer problems. Every variant runs twice: counted, then timed. Prints one table and writes JSON.

    python benchmarks/calibration.py MODEL --calibration TEXT --num-samples 24 --layers 6
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from shared import calibration_of, counted_products, matrix_rate, parse_arguments, save
from transformers import PreTrainedModel

from optimum_fista import FistaPruner, FistaPruningConfig
from optimum_fista.folder.card import markdown_lines
from optimum_fista.model.calibration import read_batches
from optimum_fista.model.choice import find_operators
from optimum_fista.model.groups import trace_groups
from optimum_fista.model.inputs import record_inputs
from optimum_fista.model.layers import find_decoder_layers
from optimum_fista.source.loading import load_model

VARIANTS: dict[str, dict[str, Any]] = {
    "none": {"error_correction": "none"},
    "intra": {"error_correction": "intra"},
    "0.0 (SparseGPT, Wanda)": {"error_correction": 0.0},
    "0.5": {"error_correction": 0.5},
    "0.5 and residual (obs_admm)": {"error_correction": 0.5, "residual_correction": 1.0},
}


def plain_flops(model: PreTrainedModel, tokens: torch.Tensor) -> float:
    """Count the products of the textbook way to correct errors, on one decoder layer.

    The dense and the pruned network run once for every group of operators, each from the start of the layer, and
    `X* X*^T` and `X X*^T` are formed whole, for every operator by itself.
    """
    decoder = find_decoder_layers(model)
    name, layer = next(iter(decoder))
    operators = find_operators(name, layer)
    with counted_products() as counter:
        batches = read_batches(tokens[:1].split(1), model.config.vocab_size)
        recorded = record_inputs(decoder, batches)
        call = recorded.calls[0][0]  # of the first decoder layer, on the first batch
        hidden_states = recorded.hidden_states[0]
        before = counter.get_total_flops()
        output = call.run(layer, hidden_states)
        num_tokens = output.shape[:2].numel()
        one_pass = (counter.get_total_flops() - before) / num_tokens  # of a token
    trace = trace_groups(layer, operators, call, hidden_states)
    grams = sum(4 * operator.shape[1] ** 2 for operator in operators.values())
    return (2 * len(trace.groups) * one_pass + grams) * tokens.numel()


@torch.no_grad()
def main() -> None:
    """Count, time, print the table, and write the record."""
    arguments = parse_arguments(
        __doc__,
        "model",
        "calibration",
        helps={"layers": "decoder layers that are run"},
        num_samples=24,
        sequence_length=1024,
        batch_size=4,
        layers=6,
        seed=0,
        output=Path("runs/calibration.json"),
    )
    model, tokenizer = load_model(arguments.model, dtype="float32", device="cpu")
    del model.get_submodule(find_decoder_layers(model).name)[arguments.layers :]
    num_layers = len(find_decoder_layers(model))
    model.config.num_hidden_layers = num_layers
    tokens = calibration_of(arguments, tokenizer, arguments.num_samples)

    rows = measure(model, tokens.split(arguments.batch_size))
    textbook_flops = plain_flops(model, tokens) * num_layers
    print("\n".join(table(rows, textbook_flops, num_layers)))
    record = {"threads": torch.get_num_threads(), "textbook_flops": textbook_flops, "rows": rows}
    save(arguments, record)


def measure(model: PreTrainedModel, batches: Sequence[torch.Tensor]) -> list[dict[str, Any]]:
    """Return a row for each of `VARIANTS`, with its products and seconds; prints a line when one is done.

    The model is pruned on `batches`, int64 [sequences, length], and gets its weights back before each run.
    """
    weights = {key: value.clone() for key, value in model.state_dict().items()}

    def prune(options: dict[str, Any]) -> float:
        """Prune the dense model; returns the seconds."""
        model.load_state_dict(weights)
        started = time.perf_counter()
        config = FistaPruningConfig(method="magnitude", **options)
        FistaPruner(config, progress=False).prune(model, batches)
        return time.perf_counter() - started

    rows = []
    for name, options in VARIANTS.items():
        with counted_products() as counter:
            prune(options)
        flops = counter.get_total_flops()
        rates = []
        seconds = []
        for _ in range(3):  # in turn, because the rate of a machine changes
            rates.append(matrix_rate())
            seconds.append(prune(options))
        rate = statistics.median(rates)
        share = flops / statistics.median(seconds) / rate
        rows.append(
            {
                "error_correction": name,
                "flops": flops,
                "seconds": seconds,
                "matrix_rate": rate,
                "share": share,
            }
        )
        print(f"{name}: {flops / 1e12:.2f} TFLOP, {share:.0%}", flush=True)
    model.load_state_dict(weights)
    return rows


def table(rows: list[dict[str, Any]], textbook_flops: float, num_layers: int) -> list[str]:
    """Return the rows in Markdown, with the products of the textbook way (`plain_flops`) before them."""
    headings = (
        "error correction",
        f"TFLOP, {num_layers} layers",
        "seconds",
        "GFLOP/s",
        "share of the matrix rate",
    )
    lines = [("textbook, corrected", f"{textbook_flops / 1e12:.2f}", "", "", "")]
    for row in rows:
        seconds = statistics.median(row["seconds"])
        lines.append(
            (
                row["error_correction"],
                f"{row['flops'] / 1e12:.2f}",
                f"{seconds:.1f}",
                f"{row['flops'] / seconds / 1e9:.0f}",
                f"{row['share']:.0%}",
            )
        )
    return markdown_lines(headings, lines)


if __name__ == "__main__":
    main()
