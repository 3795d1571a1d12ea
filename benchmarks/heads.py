"""What the gradients of the loss predict for every query head, and what losing its queries really costs.

Weights of a pruned model are shared out by the diagonal of the Fisher information. If a softmax is saturated it
sees nothing: the cost that it predicts for setting the queries of a head to zero is compared here with the loss
measured without them.

    python benchmarks/heads.py MODEL --calibration TEXT --texts TEXT --plot docs/heads.png
"""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
from shared import calibration_of, open_record, parse_arguments, save, texts_of
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from optimum_fista.evaluate.perplexity import evaluate_perplexity
from optimum_fista.folder.card import markdown_lines
from optimum_fista.model.calibration import CalibrationBatch
from optimum_fista.model.choice import find_operators
from optimum_fista.model.hooks import watching
from optimum_fista.model.layers import DecoderLayers, find_decoder_layers
from optimum_fista.model.operators import LinearOperator
from optimum_fista.model.sensitivity import DenseLoss, measure_sensitivities
from optimum_fista.source.loading import load_model


def queries(layers: DecoderLayers) -> dict[str, LinearOperator]:
    """Return the operators that make the queries, by name; SystemExit if there are none."""
    operators: dict[str, LinearOperator] = {}
    for layer_name, layer in layers:
        operators |= find_operators(layer_name, layer)
    chosen = {name: operator for name, operator in operators.items() if name.endswith("q_proj")}
    if not chosen:
        raise SystemExit(f"no operator is called q_proj: {', '.join(operators)}.")
    return chosen


def predicted(model: PreTrainedModel, windows: Tensor, head_size: int) -> dict[str, list[float]]:
    """Predict how the loss rises when the queries of a head are zero, in nats a token, to second order.

    `windows` are token ids [windows, length]. Returns a number for each head, by the name of the operator.
    """
    layers = find_decoder_layers(model)
    operators = queries(layers)
    batches = [CalibrationBatch(window[None], None) for window in windows]
    loss = DenseLoss(layers, batches, windows.numel())
    sensitivities, _ = measure_sensitivities(loss, operators)
    # Mean squares of the outputs, by operator.
    energies = {name: torch.zeros(operator.shape[0]) for name, operator in operators.items()}

    def add(name: str, _: nn.Module, __: object, output: Tensor) -> None:
        """Add the outputs of an operator, as its forward hook."""
        energies[name] += output.reshape(-1, output.shape[-1]).square().sum(0) / windows.numel()

    hooks = {operator.module: partial(add, name) for name, operator in operators.items()}
    with torch.no_grad(), watching({}, hooks):
        for window in windows:
            model(window[None], use_cache=False)
    costs = {}
    for name in operators:
        costs_of_outputs = sensitivities[name].outputs * energies[name]
        costs[name] = costs_of_outputs.view(-1, head_size).sum(1).tolist()
    return costs


def attention_on_first(model: PreTrainedModel, ids: Tensor) -> list[list[float]]:
    """Mean attention that tokens of the second half of a window pay its first one, by decoder layer and head."""
    implementation = model.config._attn_implementation
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = model(ids, use_cache=False, output_attentions=True).attentions
    model.set_attn_implementation(implementation)
    return [a[:, :, ids.shape[1] // 2 :, 0].mean((0, 2)).tolist() for a in attentions]


def measure(model: PreTrainedModel, windows: Tensor, ids: Tensor) -> list[dict[str, Any]]:
    """Measure every query head, and return a row for each; the weights are as before at the end.

    `windows` are those to predict on, and `ids` those to measure the loss on, both [windows, length].
    """
    head_size = getattr(model.config, "head_dim", None)
    if not head_size:
        head_size = model.config.hidden_size // model.config.num_attention_heads
    expected = predicted(model, windows, head_size)
    attention = attention_on_first(model, ids)

    def loss() -> float:
        """Measure the loss with the weights as they are, in nats a token."""
        return math.log(evaluate_perplexity(model, ids, progress=False).perplexity)

    dense_loss = loss()
    rows = []
    operators = queries(find_decoder_layers(model))
    bar = tqdm(total=sum(len(heads) for heads in expected.values()), desc="Heads", unit="head")
    for layer, (name, operator) in enumerate(operators.items()):
        for head, prediction in enumerate(expected[name]):
            weight = operator.read()
            without = weight.clone()
            without[head * head_size : (head + 1) * head_size] = 0
            operator.write(without)
            rise = loss() - dense_loss
            operator.write(weight)
            rows.append(
                {
                    "layer": layer,
                    "head": head,
                    "attention": attention[layer][head],
                    "predicted": prediction,
                    "measured": rise,
                }
            )
            bar.update()
    bar.close()
    return rows


def table(rows: list[dict[str, Any]], number: int = 5) -> list[str]:
    """The heads that cost most."""
    headings = (
        "decoder layer",
        "head",
        "attention on the first token",
        "predicted, nats",
        "measured, nats",
    )
    lines = []
    for row in sorted(rows, key=lambda row: -row["measured"])[:number]:
        lines.append(
            (
                row["layer"],
                row["head"],
                f"{row['attention']:.3f}",
                f"{row['predicted']:.2g}",
                f"{row['measured']:.2g}",
            )
        )
    return markdown_lines(headings, lines)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Predicted and measured rise of the loss, coloured by the attention on the first token."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6.5, 4.5), layout="constrained")
    expected = [row["predicted"] for row in rows]
    measured = [max(row["measured"], 1e-4) for row in rows]  # on a logarithmic scale
    attention = [row["attention"] for row in rows]
    points = axis.scatter(expected, measured, c=attention, s=16, cmap="viridis")
    ends = (min(expected), max(expected))
    axis.plot(ends, ends, color="gray", linewidth=1)  # where the prediction is right
    axis.set(
        xscale="log",
        yscale="log",
        xlabel="predicted by gradients, nats a token",
        ylabel="measured (1e-4: or less)",
    )
    axis.set_title("Rise of the loss when the queries of one head are zero")
    figure.colorbar(points, label="attention on the first token")
    figure.savefig(path, dpi=110)


def main() -> None:
    """Measure all heads unless the output has them, print the table, and draw if asked to."""
    arguments = parse_arguments(
        __doc__,
        "model",
        "calibration",
        "texts",
        num_samples=4,
        sequence_length=512,
        max_windows=1,
        threads=1,
        seed=0,
        output=Path("runs/heads.json"),
        plot=Path,
    )
    torch.set_num_threads(arguments.threads)
    record = open_record(arguments)
    if not record["rows"]:
        model, tokenizer = load_model(arguments.model, dtype="float32", device="cpu")
        (ids,) = texts_of(arguments, tokenizer, arguments.sequence_length).values()
        windows = calibration_of(arguments, tokenizer, arguments.num_samples)
        record["rows"] = measure(model, windows, ids)
        save(arguments, record)
    print("\n".join(table(record["rows"])))
    if arguments.plot:
        plot(record["rows"], arguments.plot)


if __name__ == "__main__":
    main()
