"""Count the products of the calibration side and the share of the machine's matrix rate that it reaches.

Prunes by magnitude, which solves nothing, so that what is left is calibration: forward passes, Gram and cross-Gram
matrices, layer problems. Every variant runs twice: counted, then timed. Prints one table and writes JSON.

    python benchmarks/calibration.py MODEL --calibration TEXT --num-samples 24 --layers 6
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import torch
from shared import calibration_of, counted_products, matrix_rate, parse_arguments, save

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


def plain_flops(model, tokens: torch.Tensor) -> float:
    """Products of the textbook way to correct errors, on one decoder layer.

    The dense and the pruned network run once for every group of operators, each from the start of the layer, and
    `X* X*^T` and `X X*^T` are formed whole, for every operator by itself.
    """
    decoder = find_decoder_layers(model)
    name, layer = next(iter(decoder))
    operators = find_operators(name, layer)
    with counted_products() as counter:
        recorded = record_inputs(
            decoder, read_batches(tokens[:1].split(1), model.config.vocab_size)
        )
        before = counter.get_total_flops()
        output = recorded.calls[0][0].run(layer, recorded.hidden_states[0])
        one_pass = (counter.get_total_flops() - before) / output.shape[:2].numel()
    trace = trace_groups(layer, operators, recorded.calls[0][0], recorded.hidden_states[0])
    grams = sum(4 * operator.shape[1] ** 2 for operator in operators.values())
    return (2 * len(trace.groups) * one_pass + grams) * tokens.numel()


@torch.no_grad()
def main() -> None:
    sizes = {"num_samples": 24, "sequence_length": 1024, "batch_size": 4, "layers": 6, "seed": 0}
    output = Path("runs/calibration.json")
    arguments = parse_arguments(
        __doc__,
        "model",
        "calibration",
        helps={"layers": "decoder layers that are run"},
        **sizes,
        output=output,
    )
    model, tokenizer = load_model(arguments.model, dtype="float32", device="cpu")
    del model.get_submodule(find_decoder_layers(model).name)[arguments.layers :]
    layers = model.config.num_hidden_layers = len(find_decoder_layers(model))
    tokens = calibration_of(arguments, tokenizer, arguments.num_samples)
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
        rows.append(
            {"error_correction": name, "flops": flops, "seconds": seconds, "matrix_rate": rate}
        )
        rows[-1]["share"] = reached / rate
        print(f"{name}: {flops / 1e12:.2f} TFLOP, {reached / rate:.0%}", flush=True)
    shown = [("textbook, corrected", f"{plain / 1e12:.2f}", "", "", "")]
    for row in rows:
        seconds = statistics.median(row["seconds"])
        cells = (
            f"{row['flops'] / 1e12:.2f}",
            f"{seconds:.1f}",
            f"{row['flops'] / seconds / 1e9:.0f}",
        )
        shown.append((row["error_correction"], *cells, f"{row['share']:.0%}"))
    headings = (
        "error correction",
        f"TFLOP, {layers} layers",
        "seconds",
        "GFLOP/s",
        "share of the matrix rate",
    )
    print("\n".join(markdown_lines(headings, shown)))
    save(arguments, {"threads": torch.get_num_threads(), "textbook_flops": plain, "rows": rows})


if __name__ == "__main__":
    main()
