"""Pictures of a comparison."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import product
from pathlib import Path

from optimum_fista.run.comparison.rows import Average, Row, averages
from optimum_fista.run.comparison.settings import DENSE, NO_PATTERN, sparsity_of
from optimum_fista.solve.patterns import WholeParts

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
    """Perplexity against sparsity, or the share of parts removed, for the methods with several of a kind.

    There is a panel for each text, and a row of panels for each kind: unstructured sparsities, channels, and so on.

    Returns:
        `sparsity.png` in `folder`; `None` if there is no such method.
    """
    import matplotlib.pyplot as plt

    lines = [line for line in averages(rows) if line.rows]
    by_kind: dict[str, list[tuple[float, Average]]] = {}
    for line in lines:
        if (place := _place(line.pattern)) is not None:
            by_kind.setdefault(place[0], []).append((place[1], line))
    counts = {kind: Counter(line.method for _, line in found) for kind, found in by_kind.items()}
    kinds = [kind for kind, count in counts.items() if max(count.values()) > 1]
    if not kinds:
        return None
    methods = list(dict.fromkeys(m for kind in kinds for m, count in counts[kind].items() if count > 1))
    limit = _limit(lines, texts)
    size = (4.5 * len(texts), 4 * len(kinds))
    figure, axes = plt.subplots(len(kinds), len(texts), figsize=size, squeeze=False, layout="constrained")
    for (kind, text), axis in zip(product(kinds, texts), axes.flat, strict=True):
        shares: set[float] = set()
        for number, method in enumerate(methods):
            if counts[kind][method] < 2:
                continue
            found = [(share, line.perplexity(text)) for share, line in by_kind[kind] if line.method == method]
            points = sorted((x, spread.mean, spread.deviation or 0.0) for x, spread in found if spread is not None)
            if points:
                places, means, deviations = zip(*points, strict=True)
                style = {"linestyle": "-" if number < _COLOURS else ":", "color": f"C{number % _COLOURS}"}
                axis.errorbar(places, means, deviations, marker="o", markersize=4, label=method, **style)
                shares.update(places)
        dense = [spread for line in lines if line.method == DENSE and (spread := line.perplexity(text)) is not None]
        if dense:
            axis.axhline(dense[0].mean, color="gray", linestyle="--", linewidth=1, label=DENSE)
            axis.set_ylim(0.95 * dense[0].mean, limit)
        axis.set(title=text, xlabel=kind, ylabel="perplexity, lower is better", yscale="log")
        axis.set_xticks(sorted(shares))
        for formatted in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
            formatted("{x:g}")
        axis.spines[["top", "right"]].set_visible(False)
    handles = (zip(*axis.get_legend_handles_labels(), strict=True) for axis in axes.flat)
    shown = {label: handle for found in handles for handle, label in found}
    width = 0.6 + 0.075 * max(map(len, shown))  # inches: a line, and letters of 8 points
    columns = max(1, min(3, int(size[0] / width)))
    figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=columns, fontsize=8)
    path = folder / "sparsity.png"
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _place(pattern: str) -> tuple[str, float] | None:
    """What a pattern has more or less of, and how much; `None` if that is not one number."""
    sparsity = sparsity_of(pattern)
    if sparsity is not None:
        return "sparsity", sparsity
    parts = WholeParts.read(pattern, None, "matrix")
    if parts is None or len(parts.shares) != 1:
        return None
    return f"share of {parts.shares[0].kind} removed", parts.sparsity


def _limit(lines: Sequence[Average], texts: Sequence[str]) -> float:
    """The largest perplexity drawn."""
    found = [(line, spread.mean) for line in lines for text in texts if (spread := line.perplexity(text)) is not None]
    dense = [mean for line, mean in found if line.method == DENSE]
    return _CUT * max(dense or [mean for _, mean in found])
