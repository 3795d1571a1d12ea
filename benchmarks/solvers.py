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

import torch
from shared import calibration_of, counted_products, matrix_rate, parse_arguments, pattern_of, save
from tqdm.auto import tqdm

from optimum_fista.folder.card import markdown_lines
from optimum_fista.model.calibration import read_batches
from optimum_fista.model.choice import find_operators
from optimum_fista.model.correction import Correction, LayerTargets
from optimum_fista.model.groups import trace_groups
from optimum_fista.model.inputs import HiddenStates, LayerActivations, record_inputs
from optimum_fista.model.layers import find_decoder_layers
from optimum_fista.solve.methods import METHODS, create_method, method_class
from optimum_fista.solve.problem import LayerProblem
from optimum_fista.source.loading import load_model
from optimum_fista.text.sources import load_text
from optimum_fista.text.windows import evaluation_windows

TEXTS = ("calibration", "fresh", "other")


def layer_problems(
    model, token_sets: list[torch.Tensor], layers: set[int] | None
) -> Iterator[list[list[LayerProblem]]]:
    """Groups of operators, decoder layer by decoder layer: `[text][operator]` problems that share their inputs."""
    decoder = find_decoder_layers(model)
    records = [
        record_inputs(decoder, read_batches(tokens.split(1), model.config.vocab_size))
        for tokens in token_sets
    ]
    hidden: list[Sequence[torch.Tensor]] = [record.hidden_states for record in records]
    last = len(decoder) - 1 if layers is None else max(layers)
    for index, (name, layer) in enumerate(decoder):
        if index > last:
            return
        trace = trace_groups(
            layer, find_operators(name, layer), records[0].calls[index][0], hidden[0][0]
        )
        by_text = []
        for text, record in enumerate(records):
            activations = LayerActivations(
                layer, record.calls[index], record.token_masks, hidden[text][0].device
            )
            chosen = trace.groups if layers is None or index in layers else []
            targets = LayerTargets(
                activations, chosen, Correction("none"), HiddenStates(hidden[text]), ends=trace.ends
            )
            by_text.append([targets.problems(group).fitted for group in range(len(chosen))])
            hidden[text] = targets.leave().to_prune_on
        yield from map(list, zip(*by_text, strict=True))


def parse_method(text: str):
    name, *options = text.split(":")
    return create_method(
        name, **{key: json.loads(value) for key, value in (o.split("=") for o in options)}
    )


def measure(text: str, problems: list[list[LayerProblem]], pattern: str) -> list[dict]:
    """One row an operator."""
    method = parse_method(text)
    wanted = pattern_of(pattern, method_class(method.name).defaults.scope)
    calibration, *fresh = problems
    with counted_products() as counter:
        started, busy = time.perf_counter(), time.process_time()
        pruned = method.prune_sharing(calibration, [wanted] * len(calibration))
        seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - busy
    rows = []
    for index, operator in enumerate(pruned):
        row = {"method": text, "pattern": pattern, "operator": calibration[index].name}
        row |= {"iterations": operator.iterations, "flops": counter.get_total_flops() / len(pruned)}
        row |= {"seconds": seconds / len(pruned), "cpu_seconds": cpu_seconds / len(pruned)}
        row["calibration"] = operator.fit_error**2
        for name, text_problems in zip(TEXTS[1:], fresh, strict=True):
            row[name] = text_problems[index].fit_error(operator.weight) ** 2
        rows.append(row)
    return rows


def geometric_mean(values: list[float]) -> float:
    return math.exp(statistics.fmean(math.log(max(v, 1e-30)) for v in values))


def summarise(rows: list[dict], rate: float) -> list[str]:
    groups: dict[tuple[str, str], list[dict]] = defaultdict(list)
    for row in rows:
        groups[row["pattern"], row["method"]].append(row)
    lines = []
    for (pattern, method), group in groups.items():
        errors = [f"{geometric_mean([row[text] for row in group]):.5f}" for text in TEXTS]
        seconds, flops = (sum(row[key] for row in group) for key in ("seconds", "flops"))
        cells = (f"{seconds:.1f}", f"{flops / 1e9:.0f}", f"{flops / seconds / rate:.0%}")
        lines.append((pattern, method, *errors, *cells))
    return markdown_lines(("pattern", "method", *TEXTS, "seconds", "GFLOP", "share of peak"), lines)


def plot(rows: list[dict], path: Path) -> None:
    import matplotlib.pyplot as plt

    patterns, methods = (
        list(dict.fromkeys(row[key] for row in rows)) for key in ("pattern", "method")
    )
    figure, axes = plt.subplots(1, len(patterns), figsize=(3.2 * len(patterns), 4), squeeze=False)
    for axis, pattern in zip(axes[0], patterns, strict=True):
        for offset, text in enumerate(TEXTS):
            values = [
                geometric_mean(
                    [r[text] for r in rows if (r["pattern"], r["method"]) == (pattern, m)]
                )
                for m in methods
            ]
            axis.barh(
                [i + 0.27 * (1 - offset) for i in range(len(methods))], values, 0.25, label=text
            )
        axis.set(
            title=pattern,
            yticks=range(len(methods)),
            yticklabels=methods if axis is axes[0][0] else [],
        )
    axes[0][0].legend(fontsize=8)
    figure.supxlabel("squared relative error, geometric mean over operators")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


_HELP = {
    "calibration": "text source; its windows are split into two sets",
    "other": "text source from another domain",
    "layers": "decoder layers, such as 3,15,26, or all",
    "methods": "names, or name:option=value:option=value (values as JSON)",
}


@torch.no_grad()
def main() -> None:
    choices = {
        "layers": ["all"],
        "patterns": ["0.5", "0.6", "0.7", "2:4", "4:8"],
        "methods": [*METHODS],
    }
    sizes = {"num_samples": 24, "num_fresh": 8, "sequence_length": 1024, "seed": 0}
    files = {"output": Path("runs/solvers.json"), "plot": Path}
    arguments = parse_arguments(
        __doc__, "model", "calibration", "other", helps=_HELP, **choices, **sizes, **files
    )
    model, tokenizer = load_model(arguments.model, dtype="float32")
    windows = calibration_of(arguments, tokenizer, arguments.num_samples + arguments.num_fresh)
    text = load_text(arguments.other, "test")
    other = evaluation_windows(tokenizer, text, arguments.sequence_length, arguments.num_fresh)
    token_sets = [windows[: arguments.num_samples], windows[arguments.num_samples :], other]
    layers = None if arguments.layers == ["all"] else {int(i) for i in arguments.layers}
    rate = matrix_rate()
    rows: list[dict] = []
    for problems in tqdm(layer_problems(model, token_sets, layers), desc="Groups of operators"):
        for pattern in arguments.patterns:
            for method in arguments.methods:
                rows.extend(measure(method, problems, pattern))
    rows.sort(key=lambda row: row["pattern"])
    save(arguments, {"matrix_rate_flops": rate, "threads": torch.get_num_threads(), "rows": rows})
    print("\n".join(summarise(rows, rate)))
    if arguments.plot:
        plot(rows, arguments.plot)


if __name__ == "__main__":
    main()
