"""Block-wise SGD (EBFT, arXiv 2402.12419): kept weights of a decoder layer, trained to return what the dense one does.

One row a method, `wanda`; with 32 steps a decoder layer, `wanda+32`; or on 32 instead of `--num-samples` windows,
`wanda@32`. Every row prunes the model again. Seconds are those of the processor, which other programs of the machine
lengthen less. Finished rows are read from the output file. `results/reconstruction.json` is of commit 4565bfc, which
trained each decoder layer before it pruned the next one; rows without steps are equal.

    python benchmarks/reconstruction.py MODEL --calibration TEXT --texts TEXT1,TEXT2 --patterns 2:4 --max-windows 6 \\
        --held-out 6 --rows default,default+32,default@32,wanda,wanda+32 --include "*.layers.?.*"
"""

from __future__ import annotations

import copy
import dataclasses
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from shared import calibration_of, open_record, parse_arguments, parse_config, save, texts_of
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR
from transformers import PreTrainedModel

from optimum_fista import FistaPruner
from optimum_fista.evaluate.perplexity import evaluate_perplexity
from optimum_fista.folder.card import markdown_lines
from optimum_fista.folder.loading import load_model
from optimum_fista.model.architecture import find_decoder_layers
from optimum_fista.model.calibration import CalibrationBatch
from optimum_fista.model.layer_inputs import LayerCall, record_inputs


@torch.no_grad()
def train_layers(
    model: PreTrainedModel, dense: PreTrainedModel, windows: Tensor, steps: int, learning_rate: float, seed: int
) -> list[tuple[float, float]]:
    """Train the decoder layers of a pruned model, one after another; returns each one's error before and after.

    Inputs are the hidden states of the model as trained so far, targets those of the dense model.
    """
    layers, others = find_decoder_layers(model), find_decoder_layers(dense).modules
    last = max(index for index, layer in enumerate(layers.modules) if pruned_weights(layer))
    recorded = record_inputs(model, layers, [CalibrationBatch(window[None]) for window in windows])
    entering = wanted = list(recorded.hidden_states)
    errors = []
    for layer, other, calls in list(zip(layers.modules, others, recorded.calls, strict=True))[: last + 1]:
        wanted = [call.run(other, hidden) for call, hidden in zip(calls, wanted, strict=True)]
        batches = list(zip(calls, entering, wanted, strict=True))
        errors.append(train_layer(layer, batches, steps, learning_rate, seed))
        entering = [call.run(layer, hidden) for call, hidden in zip(calls, entering, strict=True)]
    return errors


def pruned_weights(layer: nn.Module) -> dict[nn.Parameter, Tensor]:
    """Weights of linear operators that have zeros, with their masks."""
    weights = [module.weight for module in layer.modules() if isinstance(module, nn.Linear)]
    return {weight: weight != 0 for weight in weights if not bool(weight.all())}


def train_layer(
    layer: nn.Module, batches: list[tuple[LayerCall, Tensor, Tensor]], steps: int, learning_rate: float, seed: int
) -> tuple[float, float]:
    """Minimize the error `|| h* - h ||^2 / || h ||^2`, summed over tokens, by Adam, a batch a step."""

    def squares(call: LayerCall, entering: Tensor, wanted: Tensor) -> Tensor:
        return (call.run(layer, entering) - wanted).square().sum(-1) / wanted.square().sum(-1)

    def error() -> float:
        return float(torch.cat([squares(*batch) for batch in batches]).mean().sqrt())

    before, kept, old = error(), pruned_weights(layer), copy.deepcopy(layer.state_dict())
    if not kept:
        return before, before
    optimizer = torch.optim.Adam([*kept], lr=learning_rate)
    schedule = OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1, cycle_momentum=False)
    generator, order = torch.Generator().manual_seed(seed), list[int]()
    for _ in range(steps):
        order = order or torch.randperm(len(batches), generator=generator).tolist()
        with torch.enable_grad():
            loss = squares(*batches[order.pop()]).sum()
        for (weight, mask), gradient in zip(kept.items(), torch.autograd.grad(loss, [*kept]), strict=True):
            weight.grad = gradient * mask  # Adam never moves a weight whose gradient is always zero
        optimizer.step()
        schedule.step()
    after = error()
    if after < before:
        return before, after
    layer.load_state_dict(old)  # also if it is NaN
    return before, before


def way_of(name: str) -> tuple[str, int, int]:
    """Method, steps a decoder layer and calibration windows of a row; 0 stands for none, and for `--num-samples`."""
    rest, _, windows = name.partition("@")
    method, _, steps = rest.partition("+")
    return method, int(steps or 0), int(windows or 0)


def measure(arguments: Namespace, pattern: str, name: str, windows: Tensor, texts: dict[str, Tensor]) -> dict[str, Any]:
    """Prune on `windows` in one way, train, and measure."""
    row: dict[str, Any] = {"pattern": pattern, "row": name}
    model, _ = load_model(arguments.model, dtype="float32", device="cpu")
    if name != "dense":
        dense, (method, steps, _) = copy.deepcopy(model), way_of(name)
        config = dataclasses.replace(parse_config(method, pattern, arguments.seed), include=(arguments.include,))
        started = time.process_time()
        report = FistaPruner(config).prune(model, windows.split(1))
        if steps:
            row["errors"] = train_layers(model, dense, windows, steps, arguments.learning_rate, arguments.seed)
        row |= {"processor_seconds": time.process_time() - started, "totals": report.totals}
    row["perplexity"] = {
        text: evaluate_perplexity(model, ids, batch_size=4, progress=False).perplexity for text, ids in texts.items()
    }
    return row


def main() -> None:
    ways = {"patterns": ["2:4"], "rows": ["default", "default+32", "default@32", "wanda", "wanda+32"]}
    sizes = {"num_samples": 16, "held_out": 8, "sequence_length": 512, "max_windows": 12, "threads": 1, "seed": 0}
    others = {"include": "*", "learning_rate": 3e-4, "output": Path("runs/reconstruction.json")}
    helps = {"held_out": "windows of the calibration text to measure on besides"}
    arguments = parse_arguments(__doc__, "model", "calibration", "texts", helps=helps, **ways, **sizes, **others)
    torch.set_num_threads(arguments.threads)
    _, tokenizer = load_model(arguments.model, dtype="float32", device="cpu")
    wanted = [("", "dense"), *((pattern, row) for pattern in arguments.patterns for row in arguments.rows)]
    number, held_out = arguments.num_samples, arguments.held_out
    windows = calibration_of(arguments, tokenizer, max(number, *(way_of(row)[2] for _, row in wanted)) + held_out)
    texts = texts_of(arguments, tokenizer, arguments.sequence_length)
    texts["held out"] = windows[number : number + held_out]
    windows = torch.cat([windows[:number], windows[number + held_out :]])
    record = open_record(arguments, "rows", "patterns")
    for pattern, name in wanted:
        if (pattern, name) not in {(row["pattern"], row["row"]) for row in record["rows"]}:
            record["rows"].append(measure(arguments, pattern, name, windows[: way_of(name)[2] or number], texts))
            save(arguments, record)
    columns = (*texts, "processor seconds")
    cells = [[f"{p:.2f}" for p in row["perplexity"].values()] for row in record["rows"]]
    seconds = [f"{row['processor_seconds']:.0f}" if "processor_seconds" in row else "" for row in record["rows"]]
    names = [(row["pattern"], f"`{row['row']}`") for row in record["rows"]]
    lines = [(*name, *cell, second) for name, cell, second in zip(names, cells, seconds, strict=True)]
    print("\n".join(markdown_lines(("zeros", "row", *columns), lines)))


if __name__ == "__main__":
    main()
