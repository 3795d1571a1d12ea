"""Compare pruning methods on the layer problems of a real model: errors, seconds, products.

Every method prunes the same operators from the same Gram matrices (same-input targets); its weights are then
measured on the calibration tokens, on fresh tokens of the same text and on another text. Prints one table of
geometric means of the squared relative error, and writes every row as JSON; `--plot` draws them.

    python benchmarks/solvers.py MODEL --calibration TEXT --other TEXT --layers 3,15,26 --patterns 0.5,0.7,2:4
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from shared import calibration_of, counted_products, matrix_rate, parse_arguments, pattern_of, save
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from optimum_fista.folder.card import markdown_lines
from optimum_fista.model.calibration import read_batches
from optimum_fista.model.choice import find_operators
from optimum_fista.model.correction import Correction, LayerTargets
from optimum_fista.model.groups import trace_groups
from optimum_fista.model.inputs import HiddenStates, LayerActivations, record_inputs
from optimum_fista.model.layers import find_decoder_layers
from optimum_fista.solve.linalg import products_rounded_to
from optimum_fista.solve.method import PruningMethod
from optimum_fista.solve.methods import METHODS, create_method, method_class
from optimum_fista.solve.problem import LayerProblem
from optimum_fista.source.loading import load_model
from optimum_fista.text.sources import load_text
from optimum_fista.text.windows import evaluation_windows

TEXTS = ("calibration", "fresh", "other")


def layer_problems(
    model: PreTrainedModel, token_sets: list[Tensor], layers: set[int] | None
) -> Iterator[list[list[LayerProblem]]]:
    """Yield the layer problems of each group of operators that share their inputs, decoder layer by decoder layer.

    What is yielded is `[text][operator]`. The model stays dense.

    Args:
        model: The dense model.
        token_sets: Token ids [sequences, length] of each text.
        layers: Numbers of the decoder layers; `None`: all.
    """
    decoder = find_decoder_layers(model)
    vocabulary = model.config.vocab_size
    records = [record_inputs(decoder, read_batches(ids.split(1), vocabulary)) for ids in token_sets]
    # Of each text: the hidden states that enter the next decoder layer, by batch.
    hidden: list[Sequence[Tensor]] = [record.hidden_states for record in records]
    last = len(decoder) - 1 if layers is None else max(layers)
    for index, (name, layer) in enumerate(decoder):
        if index > last:
            return
        operators = find_operators(name, layer)
        trace = trace_groups(layer, operators, records[0].calls[index][0], hidden[0][0])
        is_chosen = layers is None or index in layers
        groups = trace.groups if is_chosen else []
        by_text = []
        for text, record in enumerate(records):
            device = hidden[text][0].device
            activations = LayerActivations(layer, record.calls[index], record.token_masks, device)
            entering = HiddenStates(hidden[text])
            targets = LayerTargets(
                activations, groups, Correction("none"), entering, ends=trace.ends
            )
            by_text.append([targets.problems(group).fitted for group in range(len(groups))])
            hidden[text] = targets.leave().to_prune_on
        for group in range(len(groups)):
            yield [problems_of_text[group] for problems_of_text in by_text]


def parse_method(text: str) -> PruningMethod:
    """Make a method from `name:option=value:...`; values are JSON."""
    name, *pairs = text.split(":")
    options = {}
    for pair in pairs:
        key, value = pair.split("=")
        options[key] = json.loads(value)
    return create_method(name, **options)


def measure(text: str, problems: list[list[LayerProblem]], pattern: str) -> list[dict[str, Any]]:
    """Prune a group of operators by a method, such as "fista:trials=2"; returns a row for each operator.

    `problems` are those of each text in `TEXTS`; the operators are pruned on the first one.
    """
    method = parse_method(text)
    sparsity_pattern = pattern_of(pattern, method_class(method.name).defaults.scope)
    calibration, *other_texts = problems
    with counted_products() as counter:
        started = time.perf_counter()
        processor_started = time.process_time()
        pruned = method.prune_sharing(calibration, [sparsity_pattern] * len(calibration))
        seconds = time.perf_counter() - started
        cpu_seconds = time.process_time() - processor_started
    rows = []
    for index, operator in enumerate(pruned):
        row = {
            "method": text,
            "pattern": pattern,
            "operator": calibration[index].name,
            "iterations": operator.iterations,
            "flops": counter.get_total_flops() / len(pruned),
            "seconds": seconds / len(pruned),
            "cpu_seconds": cpu_seconds / len(pruned),
            "calibration": operator.fit_error**2,
        }
        for name, problems_of_text in zip(TEXTS[1:], other_texts, strict=True):
            row[name] = problems_of_text[index].fit_error(operator.weight) ** 2
        rows.append(row)
    return rows


def geometric_mean(values: list[float]) -> float:
    """Compute the exponential of the mean logarithm; an error of zero counts as 1e-30."""
    return math.exp(statistics.fmean(math.log(max(value, 1e-30)) for value in values))


def summarise(rows: list[dict[str, Any]], rate: float) -> list[str]:
    """Make a table with a line for each method and pattern; `rate` is that of matrix products, FLOP/s."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["pattern"], row["method"]].append(row)
    lines = []
    for (pattern, method), group in groups.items():
        errors = [f"{geometric_mean([row[text] for row in group]):.5f}" for text in TEXTS]
        seconds = sum(row["seconds"] for row in group)
        flops = sum(row["flops"] for row in group)
        cells = (f"{seconds:.1f}", f"{flops / 1e9:.0f}", f"{flops / seconds / rate:.0%}")
        lines.append((pattern, method, *errors, *cells))
    return markdown_lines(("pattern", "method", *TEXTS, "seconds", "GFLOP", "share of peak"), lines)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw the errors as bars, a panel for each pattern and a colour for each text."""
    import matplotlib.pyplot as plt

    patterns = list(dict.fromkeys(row["pattern"] for row in rows))
    methods = list(dict.fromkeys(row["method"] for row in rows))
    figure, axes = plt.subplots(1, len(patterns), figsize=(3.2 * len(patterns), 4), squeeze=False)
    first_axis = axes[0][0]
    for axis, pattern in zip(axes[0], patterns, strict=True):
        rows_of_pattern = [row for row in rows if row["pattern"] == pattern]
        for number, text in enumerate(TEXTS):
            values = []
            for method in methods:
                errors = [row[text] for row in rows_of_pattern if row["method"] == method]
                values.append(geometric_mean(errors))
            heights = [place + 0.27 * (1 - number) for place in range(len(methods))]
            axis.barh(heights, values, 0.25, label=text)
        labels = methods if axis is first_axis else []
        axis.set(title=pattern, yticks=range(len(methods)), yticklabels=labels)
    first_axis.legend(fontsize=8)
    figure.supxlabel("squared relative error, geometric mean over operators")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


_HELP = {
    "calibration": "text source; its windows are split into two sets",
    "other": "text source from another domain",
    "layers": "decoder layers, such as 3,15,26, or all",
    "methods": "names, or name:option=value:option=value (values as JSON)",
    "products": "bfloat16: methods may round products, as in a run that multiplies in bfloat16; or float32",
}


@torch.no_grad()
def main() -> None:
    """Measure all methods on all operators, and print the table."""
    arguments = parse_arguments(
        __doc__,
        "model",
        "calibration",
        "other",
        helps=_HELP,
        layers=["all"],
        patterns=["0.5", "0.6", "0.7", "2:4", "4:8"],
        methods=[*METHODS],
        num_samples=24,
        num_fresh=8,
        sequence_length=1024,
        seed=0,
        products="float32",
        output=Path("runs/solvers.json"),
        plot=Path,
    )
    model, tokenizer = load_model(arguments.model, dtype="float32")
    windows = calibration_of(arguments, tokenizer, arguments.num_samples + arguments.num_fresh)
    text = load_text(arguments.other, "test")
    other = evaluation_windows(tokenizer, text, arguments.sequence_length, arguments.num_fresh)
    token_sets = [windows[: arguments.num_samples], windows[arguments.num_samples :], other]
    layers = None if arguments.layers == ["all"] else {int(i) for i in arguments.layers}
    rate = matrix_rate()
    rows: list[dict[str, Any]] = []
    dtypes = {"float32": None, "bfloat16": torch.bfloat16}
    if arguments.products not in dtypes:
        raise SystemExit(f"--products {arguments.products}: pass one of {', '.join(dtypes)}.")
    rounded_dtype = dtypes[arguments.products]
    for problems in tqdm(layer_problems(model, token_sets, layers), desc="Groups of operators"):
        for pattern in arguments.patterns:
            for method in arguments.methods:
                with products_rounded_to(rounded_dtype):
                    rows.extend(measure(method, problems, pattern))
    rows.sort(key=lambda row: row["pattern"])
    save(arguments, {"matrix_rate_flops": rate, "threads": torch.get_num_threads(), "rows": rows})
    print("\n".join(summarise(rows, rate)))
    if arguments.plot:
        plot(rows, arguments.plot)


if __name__ == "__main__":
    main()
