"""What a comparison compares, and how it measures."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from optimum_fista.run.comparison.candidates import candidates

Bos = Literal["auto", "every", "start", "none"]

CALIBRATED, HELD_OUT = "calibrated", "held-out"
_SEQUENCES = ("methods", "patterns", "texts", "tasks", "seeds")


@dataclass(frozen=True)
class ComparisonSettings:
    """Options of a comparison, validated when constructed.

    Attributes:
        model: Hub id, model folder, or a folder with one GGUF file.
        methods: `name:option=value:...`, `default` or `paper`: see `candidates.parse_config`.
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
        for name, least in (("num_samples", 1), ("held_out", 0), ("batch_size", 1), ("limit", 1), ("max_windows", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}={value}: pass {least} or more.")
        if self.bos not in get_args(Bos):
            raise ValueError(f"bos={self.bos!r}: pass one of {', '.join(map(repr, get_args(Bos)))}.")
        if self.include_path is not None and not Path(self.include_path).is_dir():
            raise ValueError(f"include_path={str(self.include_path)!r}: no such folder; pass one with task files.")
        candidates(self.methods, self.patterns, self.seeds)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        values = dataclasses.asdict(self) | {name: list(getattr(self, name)) for name in _SEQUENCES}
        return values | {"include_path": None if self.include_path is None else str(self.include_path)}
