"""What is measured of the speed of a model, and what was found: a record, a table and a picture."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from optimum_fista.run.records import as_record
from optimum_fista.run.reports.markdown import markdown_lines

VARIANTS = ("dense bfloat16", "dense float32", "packed bfloat16", "packed float32", "dense float16", "packed float16")
ORIGINALS = ("original bfloat16", "original float32", "original float16")
"""The model before it was pruned, from a folder of its own."""


@dataclass(frozen=True)
class SpeedSettings:
    """What to measure.

    Attributes:
        variants: Names out of `VARIANTS` and `ORIGINALS`.
        batch_sizes: Sequences that are decoded together.
        new_tokens: Tokens that `generate` writes in each.
        prompt_tokens: Tokens of the prompt.
        prefill_tokens: Tokens of the forward pass that stands for reading a prompt.
        rounds: Times that each is measured, in turn.
        threads: Threads of PyTorch on the CPU.
        device: `"cpu"` or a CUDA device.
    """

    variants: Sequence[str] = VARIANTS[:3]
    batch_sizes: Sequence[int] = (1, 4, 16)
    new_tokens: int = 32
    prompt_tokens: int = 16
    prefill_tokens: int = 512
    rounds: int = 5
    threads: int = dataclasses.field(default_factory=torch.get_num_threads)
    device: str = "cpu"

    def __post_init__(self) -> None:
        """Refuse what can't be measured.

        Raises:
            ValueError: If a variant is not known, or a number is smaller than one.
        """
        known = VARIANTS + ORIGINALS
        unknown = [name for name in self.variants if name not in known]
        if unknown or not self.variants:
            raise ValueError(f"variants={', '.join(unknown)!r}: pass some of {', '.join(known)}.")
        if len(set(self.variants)) < len(self.variants):
            raise ValueError(f"variants={', '.join(self.variants)!r}: name each once.")
        numbers = {name: value for name, value in vars(self).items() if isinstance(value, int)}
        for name, value in {**numbers, "batch_sizes": min(self.batch_sizes, default=0)}.items():
            if value < 1:
                raise ValueError(f"{name}={value}: pass at least 1.")


@dataclass
class VariantSpeed:
    """What one variant reached.

    Attributes:
        tokens_per_second: Medians by batch size, of all sequences together, the prompt's forward pass included.
        prefill_tokens_per_second: Median.
        memory_bytes: What loading and running it has added to its process, or its peak on a CUDA device.
        weight_bytes: Bytes of its weights, which are those of the files in this dtype.
        same_tokens: Share of the greedy tokens that are those of the dense variant of the same dtype; `None` without.
        logits_difference: Largest difference of the logits after the prompt from that variant's, by its largest logit.
        seconds: All times, by what was measured.
    """

    tokens_per_second: dict[int, float]
    prefill_tokens_per_second: float
    memory_bytes: int
    weight_bytes: int
    same_tokens: float | None
    logits_difference: float | None
    seconds: dict[str, list[float]]


@dataclass
class SpeedReport:
    """Speed of a model.

    Attributes:
        model: Its name.
        settings: What was measured.
        variants: What each variant reached.
        machine: Processor, threads, path of the kernels.
        versions: Versions of the libraries.
    """

    model: str
    settings: SpeedSettings
    variants: dict[str, VariantSpeed]
    machine: dict[str, Any]
    versions: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SpeedReport:
        """Inverse of `to_dict`, after JSON too."""
        return as_record(cls, {field.name: values[field.name] for field in dataclasses.fields(cls)})


def speed_table(report: SpeedReport) -> str:
    """Markdown: tokens a second, memory and weights of each variant, and how many times those of the first."""
    sizes = list(report.settings.batch_sizes)
    head = [f"batch {size}, tokens/s" for size in sizes]
    head += [f"prefill {report.settings.prefill_tokens}, tokens/s", "memory, MiB", "weights, MiB", "same text"]
    rows = []
    first = next(iter(report.variants.values()))
    for name, found in report.variants.items():
        speeds = [(found.tokens_per_second[size], first.tokens_per_second[size]) for size in sizes]
        speeds.append((found.prefill_tokens_per_second, first.prefill_tokens_per_second))
        cells = [f"{value:.1f} ({value / base:.2f}x)" for value, base in speeds]
        for value, base in ((found.memory_bytes, first.memory_bytes), (found.weight_bytes, first.weight_bytes)):
            cells.append(f"{value / 2**20:,.0f} ({value / max(1, base):.2f}x)")
        cells.append("" if found.same_tokens is None else f"{found.same_tokens:.0%}")
        rows.append([name, *cells])
    machine = report.machine
    where = machine["device"] if machine["device"] != "cpu" else f"{machine['processor']}, {machine['threads']} threads"
    origin = f"{where}; kernels: {machine['kernels']}; torch {report.versions['torch']}; medians of rounds in turn"
    return "\n".join([*markdown_lines([report.model, *head], rows), "", origin])


def draw_speed(report: SpeedReport, path: Path) -> None:
    """Bars of tokens a second by batch size, of prefill, and of memory.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    import matplotlib.pyplot as plt

    sizes, names = list(report.settings.batch_sizes), list(report.variants)
    panels = [
        (f"decoding, batch {size}", "tokens/s", [v.tokens_per_second[size] for v in report.variants.values()])
        for size in sizes
    ]
    prefill = [v.prefill_tokens_per_second for v in report.variants.values()]
    panels.append((f"prefill, {report.settings.prefill_tokens} tokens", "tokens/s", prefill))
    panels.append(("memory", "MiB", [v.memory_bytes / 2**20 for v in report.variants.values()]))
    figure, axes = plt.subplots(
        1, len(panels), figsize=(2.6 * len(panels) + 1, 0.5 * len(names) + 1.4), sharey=True, layout="constrained"
    )
    colors = ["#2166ac" if name.startswith("packed") else "#b0b0b0" for name in names]
    for axis, (title, unit, values) in zip(axes, panels, strict=True):
        bars = axis.barh(range(len(names)), values, color=colors)
        axis.bar_label(bars, [f"{value:,.4g}" for value in values], fontsize=8, padding=2)
        axis.set(title=title, xlabel=unit, yticks=range(len(names)), yticklabels=names, xlim=(0, 1.3 * max(values)))
        axis.title.set_fontsize(10)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].invert_yaxis()
    figure.savefig(path, dpi=110)
    plt.close(figure)
