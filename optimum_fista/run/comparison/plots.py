"""Pictures of a comparison."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from optimum_fista.run.comparison.rows import Average, Row, averages
from optimum_fista.run.comparison.settings import DENSE, NO_PATTERN, sparsity_of

# Perplexities beyond this many times the dense model's are cut off: the others could not be told apart.
_CUT = 4.0

# Matplotlib's colours before they repeat.
_COLOURS = 10


def plot_bars(rows: Sequence[Row], texts: Sequence[str], folder: Path) -> Path | None:
    """Perplexity by method, one panel a pattern; long bars are cut and labelled.

    Returns:
        `perplexity.png` in `folder`; `None` if nothing was pruned.
    """
    import matplotlib.pyplot as plt

    lines = [line for line in averages(rows) if line.rows]
    patterns = list(dict.fromkeys(line.pattern for line in lines if line.pattern != NO_PATTERN))
    if not patterns:
        return None
    limit = _limit(lines, texts)
    tallest = max(sum(line.pattern in (pattern, NO_PATTERN) for line in lines) for pattern in patterns)
    size = (4 + 5 * len(patterns), 1.6 + 0.5 * tallest)
    figure, axes = plt.subplots(1, len(patterns), figsize=size, squeeze=False, layout="constrained")
    for axis, pattern in zip(axes[0], patterns, strict=True):
        chosen = [line for line in lines if line.pattern in (pattern, NO_PATTERN)]
        for offset, text in enumerate(texts):
            places = [i + 0.8 / len(texts) * (offset - (len(texts) - 1) / 2) for i in range(len(chosen))]
            spreads = [line.perplexity(text) for line in chosen]
            values = [0.0 if spread is None else spread.mean for spread in spreads]
            errors = [0.0 if s is None or s.deviation is None or s.mean > limit else s.deviation for s in spreads]
            lengths = [min(value, limit) for value in values]
            bars = axis.barh(places, lengths, 0.75 / len(texts), xerr=errors if any(errors) else None, label=text)
            axis.bar_label(bars, [f"{value:.1f}" if value else "" for value in values], fontsize=7, padding=2)
        axis.set(title=f"sparsity {pattern}", yticks=range(len(chosen)), yticklabels=[line.method for line in chosen])
        axis.set(xlabel="perplexity, lower is better", xlim=(0, 1.08 * limit))
        axis.invert_yaxis()
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=len(texts), fontsize=8)
    path = folder / "perplexity.png"
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def plot_lines(rows: Sequence[Row], texts: Sequence[str], folder: Path) -> Path | None:
    """Perplexity against sparsity, one panel a text, for the methods with several unstructured sparsities.

    Returns:
        `sparsity.png` in `folder`; `None` if there is no such method.
    """
    import matplotlib.pyplot as plt

    lines = [line for line in averages(rows) if line.rows]
    unstructured = [line for line in lines if sparsity_of(line.pattern) is not None]
    counts = Counter(line.method for line in unstructured)
    methods = [method for method, count in counts.items() if count > 1]
    if not methods:
        return None
    limit = _limit(lines, texts)
    figure, axes = plt.subplots(1, len(texts), figsize=(4.5 * len(texts), 4), squeeze=False, layout="constrained")
    for axis, text in zip(axes[0], texts, strict=True):
        for number, method in enumerate(methods):
            found = [(float(line.pattern), line.perplexity(text)) for line in unstructured if line.method == method]
            points = sorted((x, spread.mean, spread.deviation or 0.0) for x, spread in found if spread is not None)
            if points:
                sparsities, means, deviations = zip(*points, strict=True)
                style = {"linestyle": "-" if number < _COLOURS else ":", "color": f"C{number % _COLOURS}"}
                axis.errorbar(sparsities, means, deviations, marker="o", markersize=4, label=method, **style)
        dense = [spread for line in lines if line.method == DENSE and (spread := line.perplexity(text)) is not None]
        if dense:
            axis.axhline(dense[0].mean, color="gray", linestyle="--", linewidth=1, label=DENSE)
            axis.set_ylim(0.95 * dense[0].mean, limit)
        axis.set(title=text, xlabel="sparsity", ylabel="perplexity, lower is better", yscale="log")
        axis.set_xticks(sorted({float(line.pattern) for line in unstructured if line.method in methods}))
        for formatted in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
            formatted("{x:g}")
        axis.spines[["top", "right"]].set_visible(False)
    shown = {label: handle for axis in axes[0] for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=3, fontsize=8)
    path = folder / "sparsity.png"
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _limit(lines: Sequence[Average], texts: Sequence[str]) -> float:
    """The largest perplexity drawn."""
    found = [(line, spread.mean) for line in lines for text in texts if (spread := line.perplexity(text)) is not None]
    dense = [mean for line, mean in found if line.method == DENSE]
    return _CUT * max(dense or [mean for _, mean in found])
