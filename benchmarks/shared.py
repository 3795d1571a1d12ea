"""What the benchmarks share: arguments, texts, records, tables, random models, processes, what the machine can do."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from argparse import (
    ArgumentDefaultsHelpFormatter,
    ArgumentParser,
    Namespace,
    RawDescriptionHelpFormatter,
)
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from optimum_fista.config import RECIPES, FistaPruningConfig
from optimum_fista.solve.pattern import Scope, SparsityPattern
from optimum_fista.solve.patterns import parse_pattern
from optimum_fista.text.sources import load_text
from optimum_fista.text.windows import calibration_windows, evaluation_windows
from optimum_fista.versions import library_versions

_HELP = {
    "model": "a Hub id, a model folder, or a folder with one GGUF file",
    "calibration": "text source to calibrate on",
    "texts": "text sources to measure on",
    "num_samples": "calibration sequences",
    "sequence_length": "tokens a sequence",
    "max_windows": "windows of every text to measure on",
    "layers": "decoder layers",
    "rounds": "runs of each way, in turn",
    "output": "JSON file to write",
    "plot": "picture to write",
}


class _Formatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Defaults are shown, and the script's docstring is shown as it is."""


def parse_arguments(
    description: str | None, *required: str, helps: dict[str, str] | None = None, **defaults: Any
) -> Namespace:
    """The arguments of a script.

    Args:
        description: The script's docstring.
        required: Arguments without a default: `model` is given by its place, others as `--name`.
        helps: Help of arguments for which that of `_HELP` is not enough.
        defaults: Defaults of the others, given as `--name`. Their types are those of the arguments; a list takes
            values between commas. A type stands for an argument that is `None` unless it is given.
    """
    parser = ArgumentParser(description=description, formatter_class=_Formatter)
    told = _HELP | (helps or {})
    for name in required:
        if name == "model":
            parser.add_argument(name, help=told[name])
        else:
            parser.add_argument(
                f"--{name}", required=True, type=_words if name == "texts" else str, help=told[name]
            )
    for name, default in defaults.items():
        options: dict[str, Any] = {"default": default, "help": told.get(name, " ")}
        if isinstance(default, bool):
            options["action"] = "store_true"
        elif isinstance(default, list):
            options["type"] = _numbers if default and isinstance(default[0], int) else _words
        elif isinstance(default, type):
            options |= {"type": default, "default": None}
        else:
            options["type"] = type(default)
        parser.add_argument(f"--{name.replace('_', '-')}", **options)
    return parser.parse_args()


def _words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def _numbers(text: str) -> list[int]:
    return [int(word) for word in _words(text)]


def calibration_of(arguments: Namespace, tokenizer: PreTrainedTokenizerBase, count: int) -> Tensor:
    """Token ids [count, arguments.sequence_length] of `arguments.calibration`."""
    text = load_text(arguments.calibration, "calibration")
    return calibration_windows(tokenizer, text, count, arguments.sequence_length, arguments.seed)


def texts_of(
    arguments: Namespace, tokenizer: PreTrainedTokenizerBase, length: int
) -> dict[str, Tensor]:
    """Token ids [windows, length] of `arguments.texts` by name; at most `arguments.max_windows`."""
    return {
        Path(source).stem: evaluation_windows(
            tokenizer, load_text(source, "test"), length, arguments.max_windows
        )
        for source in arguments.texts
    }


def sparsity_of(pattern: str) -> float | None:
    """The fraction of zeros, if the text of a pattern is one."""
    try:
        return float(pattern)
    except ValueError:
        return None


def parse_config(method: str, pattern: str, seed: int = 0, held_out: int = 0) -> FistaPruningConfig:
    """A configuration from `name:option=value:...` and a fraction of zeros or a pattern; values are JSON or text."""
    name, *pairs = method.split(":")
    options: dict[str, Any] = {"seed": seed, "held_out": held_out}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"method={method!r}: {pair!r} is no option; pass name:option=value.")
        try:
            options[key] = json.loads(value)
        except json.JSONDecodeError:
            options[key] = value
    sparsity = sparsity_of(pattern)
    options |= {"pattern": pattern} if sparsity is None else {"sparsity": sparsity}
    # What is no option of the configuration is one of the method.
    names_of_options = {field.name for field in fields(FistaPruningConfig)}
    of_method = {key: options.pop(key) for key in options.keys() - names_of_options}
    if name not in RECIPES:
        return FistaPruningConfig(method=name, method_options=of_method, **options)
    config = FistaPruningConfig.recipe(name, **options)
    return replace(config, method_options={**config.method_options, **of_method})


def pattern_of(text: str, scope: Scope = "matrix") -> SparsityPattern:
    """The pattern of a fraction of zeros, such as `0.5`, or of a pattern's text, such as `2:4`."""
    sparsity = sparsity_of(text)
    if sparsity is None:
        return parse_pattern(text, scope=scope)
    return parse_pattern(sparsity=sparsity, scope=scope)


def settings_of(arguments: Namespace, *without: str) -> dict[str, str]:
    """Arguments as text, paths by their names alone; without those on which no result depends."""
    settings = {}
    for name, value in vars(arguments).items():
        if name in (*without, "output", "plot"):
            continue
        if name in ("model", "calibration", "other") and value:
            # Some scripts take several texts, divided by commas.
            settings[name] = ",".join(Path(source).name for source in value.split(","))
        elif name == "texts":
            settings[name] = ",".join(Path(source).name for source in value)
        elif isinstance(value, list):
            settings[name] = ",".join(str(item) for item in value)
        else:
            settings[name] = str(value)
    return settings


def save(arguments: Namespace, record: dict[str, Any]) -> None:
    """Write a record with settings and versions, unless it has its own, to `arguments.output`."""
    record = {"settings": settings_of(arguments), "versions": library_versions()} | record
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(record, indent=1, default=vars) + "\n")


def open_record(arguments: Namespace, *without: str) -> dict[str, Any]:
    """Settings, versions and the rows that `arguments.output` already has, so that a later call resumes.

    Raises:
        SystemExit: If the file holds rows of other settings.
    """
    settings = settings_of(arguments, *without)
    record: dict[str, Any] = {"settings": settings, "versions": library_versions(), "rows": []}
    if arguments.output.exists():
        previous = json.loads(arguments.output.read_text())
        if previous["settings"] != settings:
            raise SystemExit(
                f"{arguments.output} holds rows with other settings: pass another --output."
            )
        record |= {key: previous[key] for key in ("recipe", "rows") if key in previous}
    return record


def save_llama(
    folder: Path, hidden: int, ffn: int, layers: int, dtype: str = "bfloat16", **config: Any
) -> None:
    """Write a random Llama; heads have 64 channels and the vocabulary 256 tokens, unless `config` says otherwise."""
    sizes = {"hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers}
    config = {"num_attention_heads": hidden // 64, "vocab_size": 256} | config
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**sizes, **config))
    model.to(getattr(torch, dtype)).save_pretrained(folder)


def prune_apart(*, ranks: int = 1, threads: int = 1, **options: Any) -> subprocess.Popen[str]:
    """A process, or several ranks, about to prune: it has imported everything and waits for a line, if it is alone.

    Args:
        ranks: Processes that share the decoder layers.
        threads: Threads of each.
        options: Those of `run_once.py`.
    """
    launcher = []
    errors = None  # where standard error goes: to that of this process
    if ranks > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        errors = subprocess.DEVNULL  # torchrun says much of a killed rank
    script = str(Path(__file__).with_name("run_once.py"))
    waits = ranks == 1
    settings = json.dumps(options | {"waits": waits}, default=str)
    command = [sys.executable, *launcher, script, settings]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        env=environment,
        text=True,
    )
    assert process.stdout is not None
    for _ in range(ranks):
        if process.stdout.readline() != "ready\n":
            raise SystemExit("a run failed before it began; what it said stands above.")
    return process


def finish(
    process: subprocess.Popen[str], watch: Callable[[], None] = lambda: None
) -> list[dict[str, float]]:
    """Let a process prune, watched 50 times a second; returns the seconds that each rank tells.

    Raises:
        SystemExit: If it fails.
    """
    assert process.stdin is not None
    process.stdin.write("go\n")
    process.stdin.flush()
    while process.poll() is None:
        watch()
        time.sleep(0.02)
    if process.returncode:
        raise SystemExit(f"a run failed: {' '.join(map(str, process.args))}")  # type: ignore[arg-type]
    assert process.stdout is not None
    return [json.loads(line) for line in process.stdout.read().splitlines()]


def anonymous(process: int) -> int:
    """Anonymous memory of a process in bytes (Linux); 0 when it has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


def watched(**options: Any) -> tuple[int, list[tuple[float, int]], dict[str, float]]:
    """Prune in a process of its own (`options` as for `prune_apart`) and watch its anonymous memory.

    Returns:
        Bytes after the imports; (seconds, bytes) 50 times a second; the seconds that the process tells.
    """
    process = prune_apart(**options)
    imports = anonymous(process.pid)
    started = time.monotonic()
    curve = []

    def look() -> None:
        """Add a point to the curve."""
        curve.append((round(time.monotonic() - started, 3), anonymous(process.pid)))

    (seconds,) = finish(process, look)
    return imports, curve, seconds


def thinned(curve: list[tuple[float, int]]) -> list[tuple[float, int]]:
    """Keep the largest value of every 500th of the time, as (seconds, bytes)."""
    end, _ = curve[-1]
    step = end / 500
    if step == 0:  # all values are of one moment
        step = 1.0
    largest: dict[int, tuple[float, int]] = {}
    for moment, held in curve:
        place = int(moment / step)
        if place not in largest or held > largest[place][1]:
            largest[place] = (moment, held)
    return list(largest.values())


def matrix_rate() -> float:
    """Measured rate of float32 matrix products, FLOP/s."""
    left = torch.randn(2048, 2048)
    right = torch.randn(2048, 2048)
    times = []
    for _ in range(9):
        started = time.perf_counter()
        left @ right
        times.append(time.perf_counter() - started)
    return 2 * 2048**3 / statistics.median(times)


def counted_products() -> FlopCounterMode:
    """A context that counts the FLOP of matrix products, products in place included (`get_total_flops`)."""
    in_place = {
        torch.ops.aten.addmm_: lambda _, left, right, **__: 2 * left[0] * left[1] * right[1],
        # of stacks [matrices, rows, columns]
        torch.ops.aten.baddbmm_: lambda _, left, right, **__: (
            2 * left[0] * left[1] * left[2] * right[2]
        ),
    }
    return FlopCounterMode(display=False, custom_mapping=in_place)
