"""Compare pruning methods on the layer problems of a real model: errors, seconds, products.

Every method prunes the same operators from the same Gram matrices (same-input targets); its weights are then
measured on the calibration tokens, on fresh tokens of the same text and on another text. Prints one table of
geometric means of the squared relative error, and writes every row as JSON; `--plot` draws them.

    python benchmarks/solvers.py MODEL --calibration TEXT --other TEXT --layers 3,15,26 --patterns 0.5,0.7,2:4
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import torch
from machine import matrix_rate
from products import counted_products
from tqdm.auto import tqdm

from optimum_fista.model.architecture import find_decoder_layers, find_operators
from optimum_fista.model.calibration import read_batches
from optimum_fista.model.hidden_states import record_inputs
from optimum_fista.model.sharing import trace_groups
from optimum_fista.model.statistics import LayerActivations, problems_same_input, record_dense
from optimum_fista.run.checkpoints.loading import load_model
from optimum_fista.run.config import method_defaults
from optimum_fista.run.reports.report import library_versions
from optimum_fista.run.texts.text import load_text
from optimum_fista.run.texts.windows import calibration_windows, evaluation_windows
from optimum_fista.solve.methods import METHODS, create_method
from optimum_fista.solve.patterns import parse_pattern
from optimum_fista.solve.problem import LayerProblem

TEXTS = ("calibration", "fresh", "other")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True, help="text source; its windows are split into two sets")
    parser.add_argument("--other", required=True, help="text source from another domain")
    parser.add_argument("--num-samples", type=int, default=24)
    parser.add_argument("--num-fresh", type=int, default=8)
    parser.add_argument("--sequence-length", type=int, default=1024)
    parser.add_argument("--layers", default="all", help="decoder layers, such as 3,15,26, or all")
    parser.add_argument("--patterns", default="0.5,0.6,0.7,2:4,4:8")
    parser.add_argument(
        "--methods", default=",".join(METHODS), help="names, or name:option=value:option=value (values as JSON)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("runs/solvers.json"))
    parser.add_argument("--plot", type=Path)
    return parser.parse_args()


def layer_problems(
    model, token_sets: list[torch.Tensor], layers: set[int] | None
) -> Iterator[list[list[LayerProblem]]]:
    """Groups of operators, decoder layer by decoder layer: `[text][operator]` problems that share their inputs."""
    decoder = find_decoder_layers(model)
    records = [
        record_inputs(model, decoder, read_batches(tokens.split(1), model.config.vocab_size)) for tokens in token_sets
    ]
    hidden = [record.hidden_states for record in records]
    last = len(decoder) - 1 if layers is None else max(layers)
    for index, (name, layer) in enumerate(decoder):
        if index > last:
            return
        groups, _ = trace_groups(layer, find_operators(name, layer), records[0].calls[index][0], hidden[0][0])
        by_text = []
        for text, record in enumerate(records):
            activations = LayerActivations(layer, record.calls[index], record.token_masks, hidden[text][0].device)
            chosen = groups if layers is None or index in layers else []
            hidden[text], _, grams = record_dense(activations, chosen, hidden[text], [True] * len(chosen))
            by_text.append([problems_same_input(g, gram) for g, gram in zip(chosen, grams, strict=True) if gram])
        yield from map(list, zip(*by_text, strict=True))


def parse_method(text: str):
    name, *options = text.split(":")
    return create_method(name, **{key: json.loads(value) for key, value in (o.split("=") for o in options)})


def measure(text: str, problems: list[list[LayerProblem]], pattern: str) -> list[dict]:
    """One row an operator."""
    method = parse_method(text)
    sparsity, shape = (None, pattern) if ":" in pattern else (float(pattern), "unstructured")
    wanted = parse_pattern(shape, sparsity, method_defaults(method.name).scope)
    calibration, *fresh = problems
    with counted_products() as counter:
        started, busy = time.perf_counter(), time.process_time()
        pruned = method.prune_sharing(calibration, [wanted] * len(calibration))
        seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - busy
    rows = []
    for index, operator in enumerate(pruned):
        row = {
            "method": text,
            "pattern": pattern,
            "operator": calibration[index].name,
            "iterations": operator.iterations,
        }
        row["seconds"] = seconds / len(pruned)
        row["cpu_seconds"] = cpu_seconds / len(pruned)
        row["flops"] = counter.get_total_flops() / len(pruned)
        row["calibration"] = operator.relative_error**2
        for name, text_problems in zip(TEXTS[1:], fresh, strict=True):
            row[name] = text_problems[index].relative_error(operator.weight) ** 2
        rows.append(row)
    return rows


def geometric_mean(values: list[float]) -> float:
    return math.exp(statistics.fmean(math.log(max(v, 1e-30)) for v in values))


def summarise(rows: list[dict], rate: float) -> list[str]:
    groups: dict[tuple[str, str], list[dict]] = defaultdict(list)
    for row in rows:
        groups[row["pattern"], row["method"]].append(row)
    lines = ["| pattern | method | " + " | ".join(TEXTS) + " | seconds | GFLOP | share of peak |", "|---" * 8 + "|"]
    for (pattern, method), group in groups.items():
        errors = " | ".join(f"{geometric_mean([row[text] for row in group]):.5f}" for text in TEXTS)
        seconds, flops = (sum(row[key] for row in group) for key in ("seconds", "flops"))
        lines.append(
            f"| {pattern} | {method} | {errors} | {seconds:.1f} | {flops / 1e9:.0f} | {flops / seconds / rate:.0%} |"
        )
    return lines


def plot(rows: list[dict], path: Path) -> None:
    import matplotlib.pyplot as plt

    patterns, methods = (list(dict.fromkeys(row[key] for row in rows)) for key in ("pattern", "method"))
    figure, axes = plt.subplots(1, len(patterns), figsize=(3.2 * len(patterns), 4), squeeze=False)
    for axis, pattern in zip(axes[0], patterns, strict=True):
        for offset, text in enumerate(TEXTS):
            values = [
                geometric_mean([r[text] for r in rows if (r["pattern"], r["method"]) == (pattern, m)]) for m in methods
            ]
            axis.barh([i + 0.27 * (1 - offset) for i in range(len(methods))], values, 0.25, label=text)
        axis.set(title=pattern, yticks=range(len(methods)), yticklabels=methods if axis is axes[0][0] else [])
    axes[0][0].legend(fontsize=8)
    figure.supxlabel("squared relative error, geometric mean over operators")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


@torch.no_grad()
def main() -> None:
    arguments = parse_arguments()
    model, tokenizer = load_model(arguments.model, dtype="float32")
    text = load_text(arguments.calibration, "calibration")
    count = arguments.num_samples + arguments.num_fresh
    windows = calibration_windows(tokenizer, text, count, arguments.sequence_length, arguments.seed)
    other = evaluation_windows(
        tokenizer, load_text(arguments.other, "test"), arguments.sequence_length, arguments.num_fresh
    )
    token_sets = [windows[: arguments.num_samples], windows[arguments.num_samples :], other]
    layers = None if arguments.layers == "all" else {int(i) for i in arguments.layers.split(",")}
    rate = matrix_rate()
    rows: list[dict] = []
    for problems in tqdm(layer_problems(model, token_sets, layers), desc="Groups of operators"):
        for pattern in arguments.patterns.split(","):
            for method in arguments.methods.split(","):
                rows.extend(measure(method, problems, pattern))
    rows.sort(key=lambda row: row["pattern"])
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    settings = {k: str(v) for k, v in vars(arguments).items() if k not in ("output", "plot")}
    record = {"settings": settings, "versions": library_versions()}
    record |= {"matrix_rate_flops": rate, "threads": torch.get_num_threads(), "rows": rows}
    arguments.output.write_text(json.dumps(record, indent=1))
    print("\n".join(summarise(rows, rate)))
    if arguments.plot:
        plot(rows, arguments.plot)


if __name__ == "__main__":
    main()
