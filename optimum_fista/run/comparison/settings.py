"""What a comparison compares, as users write it, and how it measures."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from optimum_fista.run.config import RECIPES, FistaPruningConfig

DENSE = "dense"
NO_PATTERN = "-"


@dataclass(frozen=True)
class Candidate:
    """What one row of a comparison measures.

    Attributes:
        method: The method as the user wrote it, or `DENSE`.
        pattern: The pattern as the user wrote it, or `NO_PATTERN`.
        seed: Seed of the calibration tokens and of the configuration.
        config: The configuration; `None` for the dense model, and if there is none.
        error: Why there is no configuration.
    """

    method: str
    pattern: str
    seed: int
    config: FistaPruningConfig | None = None
    error: str | None = None


def parse_config(method: str, pattern: str, seed: int = 0, held_out: int = 0) -> FistaPruningConfig:
    """A configuration from `name:option=value:...` and a fraction of zeros or a pattern: `0.5`, `2:4`.

    Options are those of `FistaPruningConfig` or of the method, their values JSON or text. The name may be that of a
    recipe, such as `default` or `paper`.

    Raises:
        ValueError: If the method, an option or the pattern is not known, or they don't go together.
    """
    name, *pairs = method.split(":")
    options: dict[str, Any] = {"seed": seed, "held_out": held_out}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise ValueError(f"method={method!r}: {pair!r} is no option; pass name:option=value:option=value.")
        if key == "held_out":
            raise ValueError(f"method={method!r}: held_out is the same for all methods; pass --held-out N instead.")
        try:
            options[key] = json.loads(value)
        except json.JSONDecodeError:
            options[key] = value
    sparsity = sparsity_of(pattern)
    options |= {"pattern": pattern} if sparsity is None else {"sparsity": sparsity}
    fields = {field.name for field in dataclasses.fields(FistaPruningConfig)}
    own = {key: options.pop(key) for key in options.keys() - fields}
    if name in RECIPES:
        config = FistaPruningConfig.recipe(name, **options)
        return dataclasses.replace(config, method_options={**config.method_options, **own})
    return FistaPruningConfig(method=name, method_options=own, **options)


def candidates(
    methods: Sequence[str], patterns: Sequence[str], seeds: Sequence[int], held_out: int = 0
) -> list[Candidate]:
    """Every method in every pattern and seed, seeds outermost, so that one seed is complete early.

    `held_out` is an option of all their configurations.

    Raises:
        ValueError: If a method works with none of the patterns, or a pattern with none of the methods.
    """
    found = []
    for seed, pattern, method in itertools.product(seeds, patterns, methods):
        try:
            found.append(Candidate(method, pattern, seed, parse_config(method, pattern, seed, held_out)))
        except ValueError as error:
            found.append(Candidate(method, pattern, seed, error=str(error)))
    for name, values in (("method", methods), ("pattern", patterns)):
        for value in values:
            those = [candidate for candidate in found if getattr(candidate, name) == value]
            if all(candidate.config is None for candidate in those):
                raise ValueError(f"{name} {value!r}: {those[0].error}")
    return found


def sparsity_of(pattern: str) -> float | None:
    """The fraction of zeros, if the text of a pattern is one."""
    try:
        return float(pattern)
    except ValueError:
        return None


Bos = Literal["auto", "every", "start", "none"]

CALIBRATED, HELD_OUT = "calibrated", "held-out"
_SEQUENCES = ("methods", "patterns", "texts", "tasks", "seeds")


@dataclass(frozen=True)
class ComparisonSettings:
    """Options of a comparison, validated when constructed.

    Attributes:
        model: Hub id, model folder, or a folder with one GGUF file.
        methods: `name:option=value:...`, methods or recipes: see `parse_config`.
        patterns: Fractions of zeros such as `"0.5"`, or `"n:m"`.
        texts: Sources of `run.texts.text.load_text` to measure perplexity on.
        tasks: Tasks as lm-eval names them, to measure zero-shot accuracy on.
        seeds: Each draws calibration tokens of its own; the table shows mean and standard deviation.
        calibration: Source of the calibration text, or `"self"`.
        num_samples: Calibration sequences.
        calibration_length: Tokens a calibration sequence; `None`: those of a window.
        sequence_length: Tokens a window of perplexity; `None`: 2048, or the model's context if that is shorter.
        max_windows: Only the first windows of every text; `None`: all.
        held_out: Windows drawn with the calibration sequences, of their length, and not calibrated on. Perplexity is
            measured on them (`"held-out"`) and on as many of those calibrated on (`"calibrated"`), and the relative
            error of the operators on both.
        bos: Where BOS stands: `"auto"` in every window if the tokenizer starts texts with it or the model is a Gemma;
            `"every"` window; at the `"start"` of a text only and not in calibration, as in the scripts of SparseGPT
            and Wanda; `"none"`.
        include_path: Folder of further lm-eval tasks (YAML files).
        limit: Only the first documents of every task; `None`: all.
        batch_size: Sequences, windows and answers a forward pass.
        device: Device to compute on; `None`: the accelerator if there is one, otherwise the CPU.
        device_map: Accelerate's `device_map` for models that don't fit the device, such as `"auto"`.
        dtype: Floating dtype, `"auto"` takes the checkpoint's.
        storage_device: Where activations wait while pruning: see `FistaPruner`.
    """

    model: str
    methods: Sequence[str] = ("magnitude", "wanda", "sparsegpt", "fista", "default")
    patterns: Sequence[str] = ("0.5", "2:4")
    texts: Sequence[str] = ("wikitext2",)
    tasks: Sequence[str] = ()
    seeds: Sequence[int] = (0,)
    calibration: str = "self"
    num_samples: int = 128
    calibration_length: int | None = None
    sequence_length: int | None = None
    max_windows: int | None = None
    held_out: int = 0
    bos: Bos = "auto"
    include_path: str | Path | None = None
    limit: int | None = None
    batch_size: int = 1
    device: str | None = None
    device_map: str | None = None
    dtype: str = "auto"
    storage_device: str | None = None

    def __post_init__(self) -> None:
        for name in _SEQUENCES:
            values = getattr(self, name)
            if isinstance(values, str):
                raise ValueError(f"{name}={values!r} is one text: pass a list.")
            object.__setattr__(self, name, tuple(values))
            if len(set(values)) < len(values):
                raise ValueError(f"{name}={list(values)!r} names something twice: pass it once.")
        for name in ("methods", "patterns", "seeds"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty: pass at least one.")
        if not self.texts and not self.tasks and not self.held_out:
            raise ValueError("texts, tasks and held_out are empty: pass something to measure.")
        for name, least in (("num_samples", 1), ("held_out", 0), ("batch_size", 1), ("max_windows", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}={value}: pass {least} or more.")
        if self.bos not in get_args(Bos):
            raise ValueError(f"bos={self.bos!r}: pass one of {', '.join(map(repr, get_args(Bos)))}.")
        candidates(self.methods, self.patterns, self.seeds, self.held_out)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        values = dataclasses.asdict(self) | {name: list(getattr(self, name)) for name in _SEQUENCES}
        return values | {"include_path": None if self.include_path is None else str(self.include_path)}
