"""Speed of a model for people: a table, and a picture."""

from __future__ import annotations

from pathlib import Path

from optimum_fista.run.reports.markdown import markdown_lines
from optimum_fista.run.speed.measure import SpeedReport


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
        for value, base in (
            (found.memory_bytes, first.memory_bytes),
            (found.weight_bytes, first.weight_bytes),
        ):
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
