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
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

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
    "calibration": "text source, or several divided by commas, each with an equal share of the windows",
    "held_out": "also measure on as many windows left out of calibration, and on as many in it",
    "bos": "auto, every (window), start (of a text only, as in the scripts of SparseGPT and Wanda) or none",
}
# Names of texts that windows of the calibration text are measured as.
CALIBRATED = "calibrated"
HELD_OUT = "held-out"
BOS = ("auto", "every", "start", "none")
Row = dict[str, Any]


def draw(
    arguments: Namespace, tokenizer: PreTrainedTokenizerBase, seed: int
) -> tuple[dict[str, Tensor], dict[str, Tensor], list[str]]:
    """Draw windows of token ids, [windows, length]; `tokenizer` stays as it is.

    Returns:
        Windows to calibrate on, by text as `--calibration` names it.
        Windows to measure on, by the name of the text.
        How both were made, a line each.
    """
    length = arguments.sequence_length or usual_length(read_config(arguments.model))
    tokenizer, start = with_bos(arguments, tokenizer)
    measured = {}  # windows by the name of the text
    recipe = []
    for source in arguments.texts:
        name = Path(source).stem
        text = load_text(source, "test")
        first_document, *other_documents = text.documents
        text = replace(text, documents=(start + first_document, *other_documents))
        all_windows = evaluation_windows(tokenizer, text, length)
        measured[name] = all_windows[: arguments.max_windows]
        recipe.append(
            f"Perplexity on {name}: {text.name} (sha256 {text.sha256[:16]}), the first {len(measured[name])} of "
            f"{len(all_windows)} windows of {length} tokens, BOS: {arguments.bos}."
        )

    calibration_length = arguments.calibration_length or length
    sources = [source.strip() for source in arguments.calibration.split(",")]
    if len(set(sources)) < len(sources):
        raise SystemExit(f"--calibration {arguments.calibration}: pass each text once.")
    if len(sources) > 1 and arguments.held_out:
        raise SystemExit("--held-out: pass one --calibration, or --held-out 0.")
    num_of_text, rest = divmod(arguments.num_samples, len(sources))
    if rest:
        raise SystemExit(
            f"--num-samples {arguments.num_samples}: pass a multiple of the {len(sources)} texts in --calibration."
        )
    calibration = {}  # windows by text
    for source in sources:
        if source == "self":
            drawn = calibration_tokens_by_name(
                arguments.model,
                "self",
                num_of_text + arguments.held_out,
                calibration_length,
                seed,
                device=arguments.device,
                dtype=arguments.dtype,
                keep_in=arguments.output.with_suffix(""),
            )
            origin = "text that the model samples itself"
        else:
            text = load_text(source, "calibration")
            count = num_of_text + arguments.held_out
            drawn = calibration_windows(tokenizer, text, count, calibration_length, seed)
            origin = f"{text.name} (sha256 {text.sha256[:16]})"
        calibration[source] = drawn[:num_of_text]
        recipe.append(
            f"Calibration, seed {seed}: {num_of_text} random windows of {calibration_length} tokens of {origin}."
        )
    if arguments.held_out:
        measured[CALIBRATED] = drawn[: arguments.held_out]
        measured[HELD_OUT] = drawn[num_of_text:]
        recipe.append(
            f"Perplexity on {HELD_OUT}: {len(measured[HELD_OUT])} further windows of that text, not calibrated on."
        )
    return calibration, measured, recipe


def with_bos(
    arguments: Namespace, tokenizer: PreTrainedTokenizerBase
) -> tuple[PreTrainedTokenizerBase, str]:
    """Return a tokenizer that writes BOS where `--bos` says, and what each text has to begin with for that."""
    if arguments.bos == "auto":
        return tokenizer, ""
    puts_in_every_window = arguments.bos == "every"
    if puts_in_every_window and tokenizer.bos_token_id is None:
        raise SystemExit(f"--bos every: {arguments.model} has no BOS token.")
    start = ""
    writes_bos = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    if arguments.bos == "start" and writes_bos:
        start = tokenizer.bos_token
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_bos_token = puts_in_every_window
    if not puts_in_every_window:
        tokenizer.bos_token = None
    return tokenizer, start


def wanted(arguments: Namespace) -> Iterator[tuple[str, str, int]]:
    """Yield method, pattern and seed of all rows."""
    # The dense model differs by seed only on windows that a seed drew.
    dense_seeds = arguments.seeds if arguments.held_out else arguments.seeds[:1]
    method, pattern = DENSE
    for seed in dense_seeds:
        yield method, pattern, seed
    for seed, pattern, method in product(arguments.seeds, arguments.patterns, arguments.methods):
        yield method, pattern, seed


def measure(arguments: Namespace, method: str, pattern: str, seed: int) -> tuple[Row, list[str]]:
    """Prune and measure one row; returns the row and its recipe. A pruned row that fails says why."""
    tokenizer = require_tokenizer(arguments.model)
    calibration, texts, recipe = draw(arguments, tokenizer, seed)
    is_dense = (method, pattern) == DENSE
    if is_dense and seed != arguments.seeds[0]:  # on the other texts it is the same for all seeds
        texts = {name: texts[name] for name in (CALIBRATED, HELD_OUT)}
    row: Row = {
        "method": method,
        "pattern": pattern,
        "seed": seed,
        "perplexity": {},
        "totals": {},
        "seconds": {},
        "config": {},
        "versions": library_versions(),
        "error": None,
    }
    try:
        model, _ = load_model(
            arguments.model,
            device=arguments.device,
            dtype=arguments.dtype,
            device_map=arguments.device_map,
        )
        if not is_dense:
            config = parse_config(method, pattern, seed, arguments.held_out)
            batches: list[Any] = []
            for source, windows in calibration.items():
                parts = windows.split(arguments.batch_size)
                # With several texts each batch says which it is of, because the refit of experts is tested by text.
                is_of_several = len(calibration) > 1
                batches += [
                    {"input_ids": part, "source": source} if is_of_several else part
                    for part in parts
                ]
            if arguments.held_out:
                batches += texts[HELD_OUT].split(arguments.batch_size)
            pruner = FistaPruner(config, storage_device=arguments.storage_device)
            report = pruner.prune(model, batches)
            row["totals"] = report.totals
            row["seconds"] = report.seconds
            row["config"] = report.config
        for name, windows in texts.items():
            measured = evaluate_perplexity(model, windows, batch_size=arguments.batch_size)
            row["perplexity"][name] = measured.perplexity
    except Exception as error:
        if is_dense:
            raise
        row["error"] = " ".join(f"{type(error).__name__}: {error}".split())
    model = None  # its memory goes before the next one is loaded
    release_memory(collect=True)
    return row, recipe


def compare(arguments: Namespace) -> dict[str, Any]:
    """Measure the rows that `arguments.output` lacks, and write each; returns the record."""
    record = open_record(
        arguments, "methods", "patterns", "seeds", "device", "device_map", "storage_device"
    )
    rows = [row for row in record["rows"] if row["error"] is None]
    recipe = record.get("recipe", [])
    done = {(row["method"], row["pattern"], row["seed"]) for row in rows}
    for key in wanted(arguments):
        if key not in done:
            print(*key, flush=True)
            row, recipe_of_row = measure(arguments, *key)
            rows.append(row)
            recipe += [line for line in recipe_of_row if line not in recipe]
            save(arguments, record | {"recipe": recipe, "rows": rows})
    return record | {"recipe": recipe, "rows": rows}


Value = tuple[float, float | None] | None
"""A mean over the seeds and its standard deviation; of one seed the standard error if it is known."""


def spread(values: Iterable[float | None]) -> Value:
    """Compute the mean and, of several values, the standard deviation; those that are `None` do not count."""
    numbers = [value for value in values if value is not None]
    if not numbers:
        return None
    deviation = statistics.stdev(numbers) if len(numbers) > 1 else None
    return statistics.fmean(numbers), deviation


def accuracy(rows: Sequence[Row], tasks: Sequence[str]) -> Value:
    """Compute the mean over tasks of the first metric of each, of the rows that have all tasks."""
    scores_of_rows = []
    for row in rows:
        measured = row.get("accuracy", {})
        if all(task in measured for task in tasks):
            # A metric has a value and a standard error.
            scores_of_rows.append([next(iter(measured[task].values())) for task in tasks])
    if len(scores_of_rows) == 1 and len(tasks) == 1:
        ((score,),) = scores_of_rows
        return score["value"], score["stderr"]
    return spread(statistics.fmean(s["value"] for s in scores) for scores in scores_of_rows)


def total(rows: Sequence[Row], name: str) -> Value:
    """Compute the mean of one of `PruningReport.totals`, of the rows that have it.

    If no operator was pruned, operators have no errors.
    """
    values = []
    for row in rows:
        has_operators = row["totals"].get("num_operators", 1) > 0
        if has_operators or not name.endswith("_error"):
            values.append(row["totals"].get(name))
    return spread(values)


class Column(NamedTuple):
    """A column of the table."""

    header: str
    value: Callable[[list[Row]], Value]  # of the rows of a method and a pattern
    form: str  # such as "{:.2f}"
    best: Callable[[list[float]], float] | None = None  # of a pattern: min or max


def columns(rows: Sequence[Row]) -> Iterator[Column]:
    """Yield the columns for which `rows` have values."""
    for text in dict.fromkeys(text for row in rows for text in row["perplexity"]):
        yield Column(text, partial(perplexity, text), "{:.2f}", min)
    tasks = list(dict.fromkeys(task for row in rows for task in row.get("accuracy", ())))
    for task in tasks:
        yield Column(f"{task}, %", partial(accuracy, tasks=[task]), "{:.1%}", max)
    if len(tasks) > 1:
        yield Column("mean of tasks, %", partial(accuracy, tasks=tasks), "{:.1%}", max)
    keys_of_totals = {
        "fit error": "mean_fit_error",
        "output error": "mean_output_error",
        "held-out fit error": "mean_held_out_fit_error",
        "held-out output error": "mean_held_out_output_error",
        "zeros, %": "sparsity",
        "removed, %": "share_removed",
    }
    for header, key in keys_of_totals.items():
        is_always_shown = header in ("fit error", "zeros, %")
        if is_always_shown or any(row["totals"].get(key) for row in rows):
            form = "{:.2%}" if header.endswith("%") else "{:.4f}"
            yield Column(header, partial(total, name=key), form)
    yield Column("time, s", seconds, "{:.0f}")
    yield Column("time to solve for weights, s", partial(total, name="solve_seconds"), "{:.0f}")


def perplexity(text: str, rows: Sequence[Row]) -> Value:
    """Compute the mean perplexity on a text."""
    return spread(row["perplexity"].get(text) for row in rows)


def seconds(rows: Sequence[Row]) -> Value:
    """Compute the mean time of a run."""
    return spread(row["seconds"].get("total") for row in rows)


def table(rows: Sequence[Row]) -> list[str]:
    """Make a line for each method and pattern: means over the seeds, the best of every pattern in bold."""
    shown = list(columns(rows))
    lines = []
    for pattern in dict.fromkeys(row["pattern"] for row in rows):
        rows_of_methods: dict[str, list[Row]] = {}
        for row in rows:
            if row["pattern"] == pattern:
                rows_of_method = rows_of_methods.setdefault(row["method"], [])
                if row["error"] is None:
                    rows_of_method.append(row)

        cells: dict[str, list[str]] = {method: [] for method in rows_of_methods}
        for column in shown:
            values = {method: column.value(group) for method, group in rows_of_methods.items()}
            means = [value[0] for value in values.values() if value is not None]
            bold = None
            if column.best is not None and len(means) > 1:
                bold = column.form.format(column.best(means))
            for method, value in values.items():
                cells[method].append(in_cell(value, column.form, bold).replace("%", ""))
        for method, group in rows_of_methods.items():
            if not group:
                cells[method] = ["failed", *[""] * (len(shown) - 1)]
            shown_pattern = "" if pattern == DENSE[1] else pattern
            lines.append([shown_pattern, f"`{method}`", *cells[method]])
    headers = [column.header for column in shown]
    return markdown_lines(["pattern", "method", *headers], lines)


def in_cell(value: Value, form: str, bold: str | None) -> str:
    """Write a mean and its deviation; the mean is bold if it is written as `bold`."""
    if value is None:
        return ""
    mean, deviation = value
    text = form.format(mean)
    if text == bold:
        text = f"**{text}**"
    if deviation is not None:
        text += f" ± {form.format(deviation)}"
    return text


def main() -> None:
    """Measure the rows that the output lacks, or read those of an earlier call, and print the table."""
    arguments = parse_arguments(
        __doc__,
        "model",
        helps=HELPS,
        methods=["magnitude", "wanda", "sparsegpt", "fista", "default"],
        seeds=[0],
        patterns=["0.5", "2:4"],
        texts=["wikitext2"],
        num_samples=128,
        held_out=0,
        calibration_length=int,
        sequence_length=int,
        max_windows=int,
        batch_size=1,
        device=str,
        device_map=str,
        dtype="auto",
        storage_device=str,
        calibration="self",
        bos="auto",
        output=Path("runs/compare.json"),
    )
    file = Path(arguments.model)
    record = json.loads(file.read_text()) if file.is_file() else compare(arguments)
    print("\n".join(table(record["rows"])), end="\n\n")
    for line in record["recipe"]:
        print(f"- {line}")
    failures = [row for row in record["rows"] if row["error"]]
    if failures:
        print("\nFailed:\n")
    for row in failures:
        print(f"- {row['method']}, {row['pattern']}, seed {row['seed']}: {row['error']}")


if __name__ == "__main__":
    main()
