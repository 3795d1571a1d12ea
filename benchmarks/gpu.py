"""The first day on a GPU: time by stage and memory of pruning a random 8B model, beside what arithmetic expects.

    python benchmarks/gpu.py                                # the random model, for an hour or so
    python benchmarks/gpu.py --trained HuggingFaceTB/SmolLM2-135M --calibration c4 --texts wikitext2
    python benchmarks/gpu.py --arithmetic                   # only what is expected; needs no GPU
    python benchmarks/gpu.py --show runs/gpu.json           # the tables of an earlier call

The random model is a Llama in bfloat16 with the sizes of Llama-3-8B. It is pruned from files to files and in memory, to
50% zeros and to 2:4, by the default method and by SparseGPT, on random tokens. Each run has a process of its own. It is
done twice: once as it is, for its time and memory, and once by stage. There the host waits for the device whenever a
stage begins or ends, so the stages together take longer than the run. `gpu_arithmetic.py` says what is expected.

With `--trained`, a small model is pruned on the GPU and on the CPU instead, on the same text. The rows have the share
of equal zeros, and perplexities of both results, measured on the GPU.

Each row is written when it is measured, and the same command goes on after the last one. Runs that failed are repeated.
"""

from __future__ import annotations

import itertools
import json
import math
import multiprocessing
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from gpu_arithmetic import METHODS, Run, arithmetic_table, expected_seconds
from shared import (
    calibration_of,
    open_record,
    parse_arguments,
    parse_config,
    save,
    save_llama,
    texts_of,
)
from stages import REST, STAGES, Stopwatch
from transformers import AutoModelForCausalLM, PreTrainedModel

from optimum_fista import FistaPruner
from optimum_fista.evaluate.perplexity import evaluate_perplexity
from optimum_fista.folder.card import markdown_lines
from optimum_fista.memory import MemoryPeak, module_that_counts, size_text, watched_memory
from optimum_fista.source.loading import require_tokenizer
from optimum_fista.verdict import LEAST_TOKENS
from optimum_fista.versions import device_name

WAYS = ("files", "memory")
HELPS = {
    "device": "where to prune",
    "ways": "files (from files to files), memory (a model that is loaded whole)",
    "methods": "methods, as in compare.py",
    "patterns": "fractions of zeros or patterns",
    "trained": "a small model to prune on the device and on the CPU; without it, the random model is pruned",
    "trained_methods": "methods for it; with float32 products, only the device differs",
    "trained_samples": "calibration sequences for it",
    "texts": "texts to measure the perplexity of its results on",
    "folder": "folder for models; the random one stays there, for the next call",
    "arithmetic": "only print what is expected",
    "show": "JSON file of an earlier call, to show it again",
    "ffn": "inputs of the down projection",
}
# Arguments that may differ between calls that write rows into one file: they choose rows, or are in the rows.
CHOICES = ("ways", "methods", "patterns", "folder", "arithmetic", "show", "max_windows")
CHOICES += ("trained", "trained_methods", "trained_samples", "calibration", "texts")


def planned_run(arguments: Namespace, way: str, method: str, pattern: str) -> Run:
    """Describe a run on the random model for the arithmetic; `method` is one of `METHODS`."""
    return Run(
        hidden=arguments.hidden,
        ffn=arguments.ffn,
        layers=arguments.layers,
        heads=arguments.heads,
        key_value_heads=arguments.key_value_heads,
        vocabulary=arguments.vocabulary,
        num_samples=arguments.num_samples,
        num_held_out=_num_held_out(arguments),
        sequence_length=arguments.sequence_length,
        batch_size=arguments.batch_size,
        method=method,
        pattern=pattern,
        way=way,
    )


def _num_held_out(arguments: Namespace) -> int:
    """Count the held-out sequences: as many as `optimum-fista prune` takes."""
    return math.ceil(LEAST_TOKENS / arguments.sequence_length)


def save_random_model(arguments: Namespace) -> Path:
    """Write the random Llama to `arguments.folder`, unless an earlier call did; returns its folder."""
    sizes = [arguments.hidden, arguments.ffn, arguments.layers, arguments.heads]
    sizes += [arguments.key_value_heads, arguments.vocabulary]
    folder = Path(arguments.folder) / f"llama-{'-'.join(map(str, sizes))}"
    if not folder.exists():
        # It gets its name when it is whole.
        unfinished = folder.with_suffix(".unfinished")
        save_llama(
            unfinished,
            arguments.hidden,
            arguments.ffn,
            arguments.layers,
            num_attention_heads=arguments.heads,
            num_key_value_heads=arguments.key_value_heads,
            vocab_size=arguments.vocabulary,
            max_position_embeddings=131072,
        )
        unfinished.rename(folder)
    return folder


def measure(
    arguments: Namespace,
    source: Path,
    *,
    way: str,
    method: str,
    pattern: str,
    by_stage: bool,
    folder: Path,
) -> dict[str, Any]:
    """Prune the model of the folder `source` once, in this process; returns what was measured.

    The result is written into the empty `folder`. Loading and saving count. The tokens are random. With `by_stage`,
    functions of the package are replaced while it runs (`Stopwatch.installed`).
    """
    device = torch.device(arguments.device)
    num_held_out = _num_held_out(arguments)
    shape = (arguments.num_samples + num_held_out, arguments.sequence_length)
    generator = torch.Generator().manual_seed(arguments.seed)
    tokens = torch.randint(arguments.vocabulary, shape, generator=generator)
    batches: list[Any] = list(tokens[: arguments.num_samples].split(arguments.batch_size))
    batches.append({"input_ids": tokens[arguments.num_samples :], "held_out": True})

    pruner = FistaPruner(parse_config(method, pattern, arguments.seed), progress=False)
    stopwatch = Stopwatch(partial(seconds_when_done, device))
    output = folder / "out"
    with (
        stopwatch.installed() if by_stage else nullcontext(),
        peak_of_run(device) as peak,
    ):
        processor_started = time.process_time()
        stopwatch.restart()
        if way == "files":
            pruner.prune(source, batches, output_dir=output, device=arguments.device)
        else:
            model: Any = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
            model.to(device)
            pruner.prune(model, batches)
            pruner.save_pretrained(model, output)
        stopwatch.lap()
        processor_seconds = time.process_time() - processor_started

    module = module_that_counts(device)
    return {
        "seconds": sum(stopwatch.seconds.values()),
        "processor_seconds": processor_seconds,
        "stages": dict(stopwatch.seconds) if by_stage else None,
        "peak_host_bytes": peak.anonymous_bytes,
        "peak_device_bytes": peak.device_bytes,
        # with what the allocator keeps between tensors
        "reserved_device_bytes": None if module is None else module.max_memory_reserved(device),
    }


def seconds_when_done(device: torch.device) -> float:
    """Return the time at which the device has done what it was asked to do."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


@contextmanager
def peak_of_run(device: torch.device) -> Iterator[MemoryPeak]:
    """Watch the memory of this process and of a device inside; the peak that is yielded is final at the end.

    A run sets the device's count back for each decoder layer. Here that does nothing, so the peak is of the whole run.
    """
    module = module_that_counts(device)
    with watched_memory(device) as peak, ExitStack() as until_the_end:
        if module is not None:
            until_the_end.enter_context(mock.patch.object(module, "reset_peak_memory_stats"))
        yield peak


def measure_random(arguments: Namespace) -> None:
    """Measure the runs on the random model that `arguments.output` does not have, and write a row for each."""
    unknown = set(arguments.ways) - set(WAYS)
    if unknown:
        raise SystemExit(
            f"--ways has {', '.join(sorted(unknown))}: pass some of {', '.join(WAYS)}."
        )
    record = open_record(arguments, *CHOICES)
    source = save_random_model(arguments)
    runs = itertools.product(arguments.ways, arguments.patterns, arguments.methods, (False, True))
    for way, pattern, method, by_stage in runs:
        name = {"way": way, "pattern": pattern, "method": method, "by_stage": by_stage}
        expected = {}
        if method in METHODS:
            expected = expected_seconds(planned_run(arguments, way, method, pattern))
        question = partial(measure, arguments, source, **name)
        answer_once(arguments, record, name, question, {"expected": expected})


def answer_once(
    arguments: Namespace,
    record: dict[str, Any],
    name: dict[str, Any],
    question: partial[Any],
    known: dict[str, Any] | None = None,
) -> None:
    """Call `question` in a process of its own, and write a row of `arguments.output`.

    The question gets an empty folder, which is deleted afterwards. The row has `name`, the device's own name, the
    answer, and what is `known` besides. Changes `record["rows"]`. If there is a row with this name, of the same device,
    nothing is measured, unless the row has an error. An error is written as a row, too, so that other rows are
    measured.
    """
    name = {"card": device_name(torch.device(arguments.device)), **name}
    same_rows = [
        row for row in record["rows"] if all(row.get(key) == value for key, value in name.items())
    ]
    if same_rows and "error" not in same_rows[0]:
        return
    context = multiprocessing.get_context("spawn")
    with (
        # Made here, so that it is deleted also if the process is killed.
        tempfile.TemporaryDirectory(dir=arguments.folder) as folder,
        ProcessPoolExecutor(1, mp_context=context) as process,
    ):
        try:
            answer = process.submit(question, folder=Path(folder)).result()
        except Exception as error:  # also that the process was killed, because memory was short
            answer = {"error": f"{type(error).__name__}: {error}"[:500]}
    record["rows"] = [row for row in record["rows"] if row not in same_rows]
    record["rows"].append({**name, **(known or {}), **answer})
    save(arguments, record)
    print(f"{len(record['rows'])} rows: {name} {answer.get('error', '')}", flush=True)


def measure_trained(arguments: Namespace) -> None:
    """Compare the device with the CPU on `arguments.trained`, and write a row for each pattern and method.

    Rows that `arguments.output` has are not measured again.
    """
    record = open_record(arguments, *CHOICES)
    text = {
        "calibration": Path(arguments.calibration).name,
        "num_samples": arguments.trained_samples,
        "texts": [Path(source).name for source in arguments.texts],
        "max_windows": arguments.max_windows,
    }
    for pattern in arguments.patterns:
        for method in arguments.trained_methods:
            name = {"trained": Path(arguments.trained).name, "pattern": pattern, "method": method}
            question = partial(compare_devices, arguments, method=method, pattern=pattern)
            answer_once(arguments, record, name | text, question)


def compare_devices(
    arguments: Namespace, *, method: str, pattern: str, folder: Path
) -> dict[str, Any]:
    """Prune the trained model on the CPU and on the device, in float32; returns how far the results agree.

    The results are written into the empty `folder`. "equal_zeros" is the share of the CPU's zeros that the device has,
    too. Perplexities of both results are measured on the device.
    """
    tokenizer = require_tokenizer(arguments.trained)
    num_samples = arguments.trained_samples
    tokens = calibration_of(arguments, tokenizer, num_samples + _num_held_out(arguments))
    batches: list[Any] = list(tokens[:num_samples].split(1))
    batches.append({"input_ids": tokens[num_samples:], "held_out": True})
    texts = texts_of(arguments, tokenizer, arguments.sequence_length)

    results: list[dict[str, Any]] = []
    models: list[PreTrainedModel] = []
    names: list[str] = []  # of the pruned weights
    for output, device in ((folder / "cpu", "cpu"), (folder / "device", arguments.device)):
        pruner = FistaPruner(parse_config(method, pattern, arguments.seed), progress=False)
        started = time.perf_counter()
        report = pruner.prune(
            arguments.trained, batches, output_dir=output, device=device, dtype="float32"
        )
        seconds = time.perf_counter() - started
        model: Any = AutoModelForCausalLM.from_pretrained(output)
        names = [operator.name for operator in report.operators]
        model.to(arguments.device)
        perplexity = {
            text: evaluate_perplexity(model, windows).perplexity for text, windows in texts.items()
        }
        models.append(model)
        results.append({"device": device, "seconds": seconds, "perplexity": perplexity})
    return {"equal_zeros": share_of_equal_zeros(models[0], models[1], names), "results": results}


def share_of_equal_zeros(
    first: PreTrainedModel, second: PreTrainedModel, names: list[str]
) -> float:
    """Return the share of the zeros of `first` that `second` has, too, in the weights of these names."""
    num_zeros = 0
    num_equal = 0
    for name in names:
        is_zero = first.get_parameter(name) == 0
        is_zero_in_both = is_zero & (second.get_parameter(name) == 0)
        num_zeros += int(is_zero.sum())
        num_equal += int(is_zero_in_both.sum())
    return num_equal / max(1, num_zeros)


def tables(record: dict[str, Any]) -> list[str]:
    """Make the tables of a record: whole runs, then stages for each way and pattern, then trained models."""
    whole_runs = []
    runs_by_stage: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    trained = []
    for row in record["rows"]:
        if "trained" in row:
            trained.append(row)
        elif not row["by_stage"]:
            whole_runs.append(row)
        elif "error" not in row:
            together = (row["card"], row["way"], row["pattern"])
            runs_by_stage.setdefault(together, []).append(row)

    lines = [f"torch {record['versions']['torch']}"]
    if whole_runs:
        lines += ["", *table_of_runs(whole_runs)]
    for rows in runs_by_stage.values():
        lines += ["", *table_of_stages(rows)]
    if trained:
        lines += ["", *table_of_trained(trained)]
    return lines


def table_of_runs(rows: list[dict[str, Any]]) -> list[str]:
    """Make a line for each whole run: its time beside what is expected, and its memory."""
    headings = ["device", "way", "pattern", "method", "seconds", "expected", "processor seconds"]
    headings += ["device, peak", "host, peak"]
    lines = []
    for row in rows:
        cells = [row["card"], row["way"], row["pattern"], row["method"]]
        if "error" in row:
            cells += [row["error"], "", "", "", ""]
        else:
            cells.append(f"{row['seconds']:.1f}")
            cells.append(_sum_text(row["expected"]))
            cells.append(f"{row['processor_seconds']:.1f}")
            for key in ("peak_device_bytes", "peak_host_bytes"):
                cells.append("" if row[key] is None else size_text(row[key]))
        lines.append(cells)
    return markdown_lines(headings, lines)


def table_of_stages(rows: list[dict[str, Any]]) -> list[str]:
    """Make a line for each stage: seconds of `rows`, all of one device, way and pattern, beside what is expected."""
    headings = [f"stage ({rows[0]['card']}, {rows[0]['way']}, {rows[0]['pattern']})"]
    columns: list[dict[str, float]] = []
    for row in rows:
        headings += [f"{row['method']}, seconds", "expected"]
        columns += [row["stages"], row["expected"]]
    lines = []
    for stage in [*STAGES, REST]:
        cells = [f"{seconds.get(stage, 0.0):.1f}" if seconds else "" for seconds in columns]
        lines.append([stage, *cells])
    lines.append(["all", *(_sum_text(seconds) for seconds in columns)])
    return markdown_lines(headings, lines)


def _sum_text(seconds: dict[str, float]) -> str:
    """Write the sum of seconds by stage; nothing if there are none, because the arithmetic does not know a method."""
    return f"{sum(seconds.values()):.1f}" if seconds else ""


def table_of_trained(rows: list[dict[str, Any]]) -> list[str]:
    """Make a line for each comparison of a device with the CPU."""
    headings = ["model", "device", "pattern", "method", "equal zeros"]
    headings += ["perplexity, pruned on the CPU", "perplexity, pruned on the device"]
    lines = []
    for row in rows:
        cells = [row["trained"], row["card"], row["pattern"], row["method"]]
        if "error" in row:
            cells += [row["error"], "", ""]
        else:
            cells.append(f"{row['equal_zeros']:.4f}")
            for result in row["results"]:  # the CPU's first
                texts = result["perplexity"].items()
                cells.append(", ".join(f"{text} {value:.3f}" for text, value in texts))
        lines.append(cells)
    return markdown_lines(headings, lines)


def main() -> None:
    """Measure what is missing, and print the tables; or only print what is expected, or was measured before."""
    arguments = parse_arguments(
        __doc__,
        helps=HELPS,
        device="cuda",
        ways=list(WAYS),
        methods=["default", "sparsegpt"],
        patterns=["0.5", "2:4"],
        hidden=4096,
        ffn=14336,
        layers=32,
        heads=32,
        key_value_heads=8,
        vocabulary=128256,
        num_samples=128,
        sequence_length=2048,
        batch_size=4,
        seed=0,
        trained=str,
        trained_methods=["default:compute_dtype=float32", "default"],
        trained_samples=32,
        calibration="c4",
        texts=["wikitext2"],
        max_windows=16,
        folder=Path("runs/gpu"),
        output=Path("runs/gpu.json"),
        arithmetic=False,
        show=Path,
    )
    if arguments.arithmetic:
        runs = [
            planned_run(arguments, way, method, pattern)
            for way in arguments.ways
            for pattern in arguments.patterns
            for method in arguments.methods
        ]
        print("\n".join(arithmetic_table(runs)))
        return

    file = arguments.show
    if file is None:
        file = arguments.output
        arguments.folder.mkdir(parents=True, exist_ok=True)
        if arguments.trained:
            measure_trained(arguments)
        else:
            measure_random(arguments)
    print("\n".join(tables(json.loads(file.read_text()))))


if __name__ == "__main__":
    main()
