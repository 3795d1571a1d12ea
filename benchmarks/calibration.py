"""Count the products of the calibration side and the share of the machine's matrix rate that it reaches.

Prunes by magnitude, which solves nothing, so that what is left is calibration: forward passes, Gram and cross-Gram
matrices, layer problems. Every variant runs twice: counted, then timed. Prints one table and writes JSON.

    python benchmarks/calibration.py MODEL --calibration TEXT --num-samples 24 --layers 6
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from machine import matrix_rate
from products import counted_products

from optimum_fista import FistaPruner, FistaPruningConfig
from optimum_fista.model.architecture import find_decoder_layers, find_operators
from optimum_fista.model.calibration import read_batches
from optimum_fista.model.hidden_states import record_inputs
from optimum_fista.model.sharing import trace_groups
from optimum_fista.run.checkpoints.loading import load_model
from optimum_fista.run.reports.report import library_versions
from optimum_fista.run.texts.text import load_text
from optimum_fista.run.texts.windows import calibration_windows

VARIANTS: dict[str, dict[str, Any]] = {
    "none": {"error_correction": "none"},
    "intra": {"error_correction": "intra"},
    "0.0 (SparseGPT, Wanda)": {"error_correction": 0.0},
    "0.5": {"error_correction": 0.5},
    "0.5 and residual (obs_admm)": {"error_correction": 0.5, "residual_correction": 1.0},
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True, help="text source")
    parser.add_argument("--num-samples", type=int, default=24)
    parser.add_argument("--sequence-length", type=int, default=1024)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--layers", type=int, default=6, help="decoder layers that are run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("runs/calibration.json"))
    return parser.parse_args()


def plain_flops(model, tokens: torch.Tensor) -> float:
    """Products of the textbook way to correct errors, on one decoder layer.

    The dense and the pruned network run once for every group of operators, each from the start of the layer, and
    `X* X*^T` and `X X*^T` are formed whole, for every operator by itself.
    """
    decoder = find_decoder_layers(model)
    name, layer = next(iter(decoder))
    operators = find_operators(name, layer)
    with counted_products() as counter:
        recorded = record_inputs(model, decoder, read_batches(tokens[:1].split(1), model.config.vocab_size))
        before = counter.get_total_flops()
        output = recorded.calls[0][0].run(layer, recorded.hidden_states[0])
        one_pass = (counter.get_total_flops() - before) / output.shape[:2].numel()
    groups, _ = trace_groups(layer, operators, recorded.calls[0][0], recorded.hidden_states[0])
    grams = sum(4 * operator.shape[1] ** 2 for operator in operators.values())
    return (2 * len(groups) * one_pass + grams) * tokens.numel()


@torch.no_grad()
def main() -> None:
    arguments = parse_arguments()
    model, tokenizer = load_model(arguments.model, dtype="float32", device="cpu")
    del model.get_submodule(find_decoder_layers(model).name)[arguments.layers :]
    layers = model.config.num_hidden_layers = len(find_decoder_layers(model))
    text = load_text(arguments.calibration, "calibration")
    tokens = calibration_windows(tokenizer, text, arguments.num_samples, arguments.sequence_length, arguments.seed)
    weights = {key: value.clone() for key, value in model.state_dict().items()}

    def prune(options: dict[str, Any]) -> float:
        model.load_state_dict(weights)
        started = time.perf_counter()
        config = FistaPruningConfig(method="magnitude", **options)
        FistaPruner(config, progress=False).prune(model, tokens.split(arguments.batch_size))
        return time.perf_counter() - started

    plain = plain_flops(model, tokens) * layers
    rows = []
    for name, options in VARIANTS.items():
        with counted_products() as counter:
            prune(options)
        flops = counter.get_total_flops()
        rates, seconds = [], []
        for _ in range(3):
            rates.append(matrix_rate())
            seconds.append(prune(options))
        rate = statistics.median(rates)
        reached = flops / statistics.median(seconds)
        rows.append({"error_correction": name, "flops": flops, "seconds": seconds, "matrix_rate": rate})
        rows[-1]["share"] = reached / rate
        print(f"{name}: {flops / 1e12:.2f} TFLOP, {reached / rate:.0%}", flush=True)
    lines = [
        f"| error correction | TFLOP, {layers} layers | seconds | GFLOP/s | share of the matrix rate |",
        "|---" * 5 + "|",
    ]
    lines.append(f"| textbook, corrected | {plain / 1e12:.2f} | | | |")
    for row in rows:
        seconds = statistics.median(row["seconds"])
        lines.append(
            f"| {row['error_correction']} | {row['flops'] / 1e12:.2f} | {seconds:.1f} | "
            f"{row['flops'] / seconds / 1e9:.0f} | {row['share']:.0%} |"
        )
    print("\n".join(lines))
    settings = {k: str(v) for k, v in vars(arguments).items() if k != "output"}
    result = {"settings": settings, "versions": library_versions(), "threads": torch.get_num_threads()}
    result |= {"textbook_flops": plain, "rows": rows}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
