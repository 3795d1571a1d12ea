"""Pruning methods side by side: every method, pattern and seed pruned and measured in one run, one table.

    python benchmarks/compare.py MODEL --methods wanda,default --patterns 0.5,2:4 --texts wikitext2 --calibration c4
    python benchmarks/compare.py benchmarks/results/perplexity.json

The second command shows rows that were measured before. A method is name:option=value:..., with options of
`FistaPruningConfig` or of the method; the name may be a recipe too: default, fast, paper. The dense model is always a
row. The same command resumes: a row in --output is not measured again, unless it failed. Perplexity is that of
SparseGPT and Wanda: the text is cut into windows without overlap, and every window is scored on its own.
"""

from __future__ import annotations

import copy
import json
import statistics
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

from shared import open_record, parse_arguments, parse_config, save
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from optimum_fista import FistaPruner
from optimum_fista.evaluate.perplexity import evaluate_perplexity
from optimum_fista.folder.card import markdown_lines
from optimum_fista.memory import release_memory
from optimum_fista.source.loading import load_model, read_config, require_tokenizer
from optimum_fista.text.calibration_tokens import calibration_tokens_by_name, usual_length
from optimum_fista.text.sources import load_text
from optimum_fista.text.windows import calibration_windows, evaluation_windows
from optimum_fista.versions import library_versions

DENSE = ("dense", "-")
HELPS = {
    "model": "Hub id, model folder, or folder with one GGUF file; or the JSON file of an earlier call",
    "patterns": "fractions of zeros, or what prune --pattern takes",
    "held_out": "also measure on as many windows left out of calibration, and on as many in it",
    "bos": "auto, every (window), start (of a text only, as in the scripts of SparseGPT and Wanda) or none",
}
CALIBRATED, HELD_OUT = "calibrated", "held-out"
BOS = ("auto", "every", "start", "none")
Row = dict[str, Any]


def draw(
    arguments: Namespace, tokenizer: PreTrainedTokenizerBase, seed: int
) -> tuple[Tensor, dict[str, Tensor], list[str]]:
    """Windows to calibrate on, those to measure on by name of the text, and how both were made, a line each."""
    length = arguments.sequence_length or usual_length(read_config(arguments.model))
    texts, recipe, start = {}, [], ""
    if arguments.bos != "auto":
        if arguments.bos == "every" and tokenizer.bos_token_id is None:
            raise SystemExit(f"--bos every: {arguments.model} has no BOS token.")
        if arguments.bos == "start" and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]:
            start = tokenizer.bos_token
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.add_bos_token = arguments.bos == "every"
        tokenizer.bos_token = tokenizer.bos_token if arguments.bos == "every" else None
    for source in arguments.texts:
        text, name = load_text(source, "test"), Path(source).stem
        started = replace(text, documents=(start + text.documents[0], *text.documents[1:]))
        whole = evaluation_windows(tokenizer, started, length)
        texts[name] = whole[: arguments.max_windows]
        recipe.append(
            f"Perplexity on {name}: {text.name} (sha256 {text.sha256[:16]}), the first {len(texts[name])} of "
            f"{len(whole)} windows of {length} tokens, BOS: {arguments.bos}."
        )
    count, longest = (
        arguments.num_samples + arguments.held_out,
        arguments.calibration_length or length,
    )
    if arguments.calibration == "self":
        options = {
            "device": arguments.device,
            "dtype": arguments.dtype,
            "keep_in": arguments.output.with_suffix(""),
        }
        windows = calibration_tokens_by_name(
            arguments.model, "self", count, longest, seed, **options
        )
        origin = "text that the model samples itself"
    else:
        text = load_text(arguments.calibration, "calibration")
        windows = calibration_windows(tokenizer, text, count, longest, seed)
        origin = f"{text.name} (sha256 {text.sha256[:16]})"
    calibration, held_out = windows[: arguments.num_samples], windows[arguments.num_samples :]
    recipe.append(
        f"Calibration, seed {seed}: {len(calibration)} random windows of {longest} tokens of {origin}."
    )
    if arguments.held_out:
        texts |= {CALIBRATED: calibration[: arguments.held_out], HELD_OUT: held_out}
        recipe.append(
            f"Perplexity on {HELD_OUT}: {len(held_out)} further windows of that text, not calibrated on."
        )
    return calibration, texts, recipe


def wanted(arguments: Namespace) -> Iterator[tuple[str, str, int]]:
    """Method, pattern and seed of all rows; the dense model differs by seed only on windows that a seed drew."""
    for seed in arguments.seeds if arguments.held_out else arguments.seeds[:1]:
        yield *DENSE, seed
    for seed, pattern, method in product(arguments.seeds, arguments.patterns, arguments.methods):
        yield method, pattern, seed


def measure(arguments: Namespace, method: str, pattern: str, seed: int) -> tuple[Row, list[str]]:
    """Prune and measure one row; returns the recipe too. A pruned row that fails says why."""
    tokenizer = require_tokenizer(arguments.model)
    calibration, texts, recipe = draw(arguments, tokenizer, seed)
    row: Row = {"method": method, "pattern": pattern, "seed": seed, "perplexity": {}}
    row |= {
        "totals": {},
        "seconds": {},
        "config": {},
        "versions": library_versions(),
        "error": None,
    }
    if (method, pattern) == DENSE and seed != arguments.seeds[0]:
        texts = {name: texts[name] for name in (CALIBRATED, HELD_OUT)}
    places = {name: getattr(arguments, name) for name in ("device", "dtype", "device_map")}
    try:
        model, _ = load_model(arguments.model, **places)
        if (method, pattern) != DENSE:
            config = parse_config(method, pattern, seed, arguments.held_out)
            batches = [*calibration.split(arguments.batch_size)]
            batches += texts[HELD_OUT].split(arguments.batch_size) if arguments.held_out else []
            report = FistaPruner(config, storage_device=arguments.storage_device).prune(
                model, batches
            )
            row |= {name: getattr(report, name) for name in ("totals", "seconds", "config")}
        for name, windows in texts.items():
            row["perplexity"][name] = evaluate_perplexity(
                model, windows, batch_size=arguments.batch_size
            ).perplexity
    except Exception as error:
        if (method, pattern) == DENSE:
            raise
        row["error"] = " ".join(f"{type(error).__name__}: {error}".split())
    model = None
    release_memory(collect=True)
    return row, recipe


def compare(arguments: Namespace) -> dict[str, Any]:
    """Measure the rows that `arguments.output` lacks, and write each; returns the record."""
    record = open_record(
        arguments, "methods", "patterns", "seeds", "device", "device_map", "storage_device"
    )
    rows, recipe = [row for row in record["rows"] if row["error"] is None], record.get("recipe", [])
    done = {(row["method"], row["pattern"], row["seed"]) for row in rows}
    for key in wanted(arguments):
        if key not in done:
            print(*key, flush=True)
            row, how = measure(arguments, *key)
            rows.append(row)
            recipe += [line for line in how if line not in recipe]
            save(arguments, record | {"recipe": recipe, "rows": rows})
    return record | {"recipe": recipe, "rows": rows}


Value = tuple[float, float | None] | None
"""A mean over the seeds and its standard deviation; of one seed the standard error if it is known."""


def spread(values: Iterable[float | None]) -> Value:
    """Mean and, of several values, standard deviation; those that are `None` do not count."""
    known = [value for value in values if value is not None]
    return (
        (statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None)
        if known
        else None
    )


def accuracy(rows: Sequence[Row], tasks: Sequence[str]) -> Value:
    """Mean over tasks of the first metric of each, of the rows that have them all."""
    complete = [found for row in rows if {*tasks} <= (found := row.get("accuracy", {})).keys()]
    found = [[next(iter(scores[task].values())) for task in tasks] for scores in complete]
    if len(found) == len(tasks) == 1:
        return found[0][0]["value"], found[0][0]["stderr"]
    return spread(statistics.fmean(score["value"] for score in scores) for scores in found)


def total(rows: Sequence[Row], name: str) -> Value:
    """One of `PruningReport.totals`; none for the errors of operators if no operator was pruned."""
    some = [
        row["totals"]
        for row in rows
        if row["totals"].get("num_operators", 1) or not name.endswith("_error")
    ]
    return spread(totals.get(name) for totals in some)


def columns(rows: Sequence[Row]) -> Iterator[tuple[str, Callable[[list[Row]], Value], str, Any]]:
    """Header, value, format, and what makes a value the best of its pattern."""
    for text in dict.fromkeys(text for row in rows for text in row["perplexity"]):
        yield (
            text,
            lambda those, text=text: spread(row["perplexity"].get(text) for row in those),
            "{:.2f}",
            min,
        )
    tasks = list(dict.fromkeys(task for row in rows for task in row.get("accuracy", ())))
    for task in tasks:
        yield f"{task}, %", lambda those, task=task: accuracy(those, [task]), "{:.1%}", max
    if len(tasks) > 1:
        yield "mean of tasks, %", lambda those: accuracy(those, tasks), "{:.1%}", max
    errors = ("fit error", "output error", "held-out fit error", "held-out output error")
    totals = {name: f"mean_{name.replace(' ', '_').replace('-', '_')}" for name in errors}
    for name, key in (totals | {"zeros, %": "sparsity", "removed, %": "share_removed"}).items():
        if name in ("fit error", "zeros, %") or any(row["totals"].get(key) for row in rows):
            yield (
                name,
                lambda those, key=key: total(those, key),
                "{:.2%}" if "%" in name else "{:.4f}",
                None,
            )
    yield (
        "time, s",
        lambda those: spread(row["seconds"].get("total") for row in those),
        "{:.0f}",
        None,
    )
    yield (
        "time to solve for weights, s",
        lambda those: total(those, "solve_seconds"),
        "{:.0f}",
        None,
    )


def table(rows: Sequence[Row]) -> list[str]:
    """A line for each method and pattern, means over the seeds, the best of every pattern in bold."""
    shown, lines = list(columns(rows)), []
    for pattern in dict.fromkeys(row["pattern"] for row in rows):
        methods = dict.fromkeys(row["method"] for row in rows if row["pattern"] == pattern)
        groups = [
            [r for r in rows if (r["method"], r["pattern"], r["error"]) == (m, pattern, None)]
            for m in methods
        ]
        cells = []
        for _, value, form, best in shown:
            values = [value(group) for group in groups]
            means = [found[0] for found in values if found is not None]
            bold = form.format(best(means)) if best and len(means) > 1 else None
            cells.append([in_cell(found, form, bold).replace("%", "") for found in values])
        for index, (method, group) in enumerate(zip(methods, groups, strict=True)):
            own = (
                [column[index] for column in cells]
                if group
                else ["failed", *[""] * (len(shown) - 1)]
            )
            lines.append(["" if pattern == DENSE[1] else pattern, f"`{method}`", *own])
    return markdown_lines(["pattern", "method", *(header for header, *_ in shown)], lines)


def in_cell(found: Value, form: str, bold: str | None) -> str:
    if found is None:
        return ""
    mean = form.format(found[0])
    return (f"**{mean}**" if mean == bold else mean) + (
        f" ± {form.format(found[1])}" if found[1] is not None else ""
    )


def main() -> None:
    choices: dict[str, Any] = {
        "methods": ["magnitude", "wanda", "sparsegpt", "fista", "default"],
        "seeds": [0],
    }
    choices |= {"patterns": ["0.5", "2:4"], "texts": ["wikitext2"]}
    sizes = {
        "num_samples": 128,
        "held_out": 0,
        "calibration_length": int,
        "sequence_length": int,
        "max_windows": int,
    }
    machine = {
        "batch_size": 1,
        "device": str,
        "device_map": str,
        "dtype": "auto",
        "storage_device": str,
    }
    options = (
        choices
        | sizes
        | machine
        | {"calibration": "self", "bos": "auto", "output": Path("runs/compare.json")}
    )
    arguments = parse_arguments(__doc__, "model", helps=HELPS, **options)
    file = Path(arguments.model)
    record = json.loads(file.read_text()) if file.is_file() else compare(arguments)
    failures = [
        f"- {r['method']}, {r['pattern']}, seed {r['seed']}: {r['error']}"
        for r in record["rows"]
        if r["error"]
    ]
    print("\n".join([*table(record["rows"]), "", *(f"- {line}" for line in record["recipe"])]))
    print("".join(["\nFailed:\n", *(f"\n{line}" for line in failures)]) if failures else "", end="")


if __name__ == "__main__":
    main()
