"""The model card of a pruned model, and its picture of the fit errors."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from huggingface_hub import ModelCard, ModelCardData, try_to_load_from_cache
from jinja2 import Environment, StrictUndefined
from yaml import YAMLError

from optimum_fista.installing import install_command
from optimum_fista.report import HUB_DATASETS, OperatorGrid, PruningReport
from optimum_fista.solve.patterns import parse_pattern

PACKED_NOTE = f"""
## Packed

The pruned weights of this folder are stored without their zeros. `import optimum_fista.packed` before `from_pretrained`
loads it as a dense model, bit for bit; `optimum-fista unpack` writes that as a plain folder. To install the package run
{install_command()}.
"""

PICTURE_FILE = "fista/relative_error.png"
_INHERITED = ("license", "license_name", "license_link", "language")


def model_card(report: PruningReport, picture: str | None = None, dense: str = "") -> str:
    """Markdown of the model card, card.md filled in, with the metadata the Hub reads.

    `picture` is the path of the picture of the fit errors, relative to the card. `dense` is the folder or Hub id of the
    dense model, whose license and languages the pruned one keeps.
    """
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    formats = {"thousands": "{:,}", "percent": "{:.2%}", "error": "{:.4f}"}
    environment.filters |= {"escaped": _escaped, **{name: form.format for name, form in formats.items()}}
    pattern = parse_pattern(report.config["pattern"], report.config["sparsity"])
    sparsities = [o.sparsity for o in report.operators]
    zeros = "the same share in every operator"
    if report.removed:
        zeros = "none: what is removed is no longer there"
    elif report.config["allocation"] == "fisher" and not pattern.fixed:
        zeros = f"shared over the operators by gradients of the loss, {min(sparsities):.1%} to {max(sparsities):.1%}"
    return (
        environment.from_string(Path(__file__).with_name("card.md").read_text()).render(
            report=report,
            totals=report.totals,
            tokens=report.calibration,
            metadata=_metadata(report, dense).to_yaml(),
            title=model_title(report),
            pattern=_shown(report),
            zeros=zeros,
            picture=picture,
            rows="\n".join(_rows(report)),
            config=json.dumps(report.config, indent=2),
        )
        + "\n"
    )


def _metadata(report: PruningReport, dense: str) -> ModelCardData:
    """What the Hub reads at the top of the card; some of it is on top of the dense model's card."""
    name, base, file = report.model["name"], {}, Path(dense, "README.md")
    try:
        found = file if file.is_file() else try_to_load_from_cache(dense, "README.md")
        if isinstance(found, str | Path):
            base = ModelCard.load(found, ignore_metadata_errors=True).data.to_dict()
    except (OSError, ValueError, YAMLError):  # no name of a repository, or a card that can't be read
        pass
    of_hub = name if re.fullmatch(r"[\w.-]+/[\w.-]+", name) else None
    dataset = HUB_DATASETS.get(report.calibration.get("source") or "")
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["optimum-fista", "pruned"] + ["sparse"] * (not report.removed),
        base_model=of_hub,
        # The Hub knows adapter, merge, quantized and finetune. A pruned model is the base model's kind of model with
        # weights of its own, in the same number format: a packed folder too holds the same numbers.
        base_model_relation=of_hub and "finetune",
        datasets=dataset and [dataset],
        **{key: base[key] for key in _INHERITED if key in base},
    )


def model_title(report: PruningReport) -> str:
    """The name of the dense model and the sparsity pattern."""
    return f"{(report.model['name'].split('/')[-1] or report.model['class'])}, {_shown(report)}"


def _shown(report: PruningReport) -> str:
    pattern = parse_pattern(report.config["pattern"], report.config["sparsity"])
    return str(pattern) if pattern.fixed else f"{100 * pattern.sparsity:g}% {pattern}"


def _escaped(text: str) -> str:
    """Text that Markdown shows as it is, in one line."""
    return re.sub(r"([\\`*{}\[\]<>|~$&]|\b_|_\b)", r"\\\1", " ".join(text.split()))


def _rows(report: PruningReport) -> list[str]:
    """One row for the operators of the same kind in every decoder layer, below a header."""
    measured = any(o.held_out_fit_error is not None for o in report.operators)
    gone, share = ("columns removed", "target_sparsity") if report.removed else ("sparsity", "sparsity")
    header = ["operator", "shape", gone, "mean fit error", "largest fit error", "mean output error"]
    rows = []
    for kind, group in OperatorGrid(report.operators).kinds.items():
        outputs = [o.output_error for o in group if o.output_error is not None]
        unseen = [o.held_out_fit_error for o in group if o.held_out_fit_error is not None]
        cells = [kind, " x ".join(map(str, group[0].shape)), f"{fmean(getattr(o, share) for o in group):.2%}"]
        cells += [f"{fmean(o.fit_error for o in group):.4f}", f"{max(o.fit_error for o in group):.4f}"]
        cells.append(f"{fmean(outputs):.4f}" if outputs else "not known")
        rows.append([*cells, *([f"{fmean(unseen):.4f}" if unseen else ""] if measured else [])])
    return markdown_lines([*header, *(["mean held-out fit error"] if measured else [])], rows)


def markdown_lines(headings: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """Lines of a table; cells are written by `str`."""
    first, *others = (f"| {' | '.join(map(str, cells))} |" for cells in (headings, *rows))
    return [first, "|---" * len(headings) + "|", *others]


def error_picture(report: PruningReport) -> bytes | None:
    """Draw the mean fit error by decoder layer and kind of operator as a heat map: the bytes of a PNG file.

    `None` if Matplotlib (extra `plots`) is not installed, or no operator was pruned. Equal reports give equal bytes
    under one version of Matplotlib.
    """
    if not report.operators:
        return None
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        return None
    grid = OperatorGrid(report.operators)
    errors = {place: fmean(o.fit_error for o in found) for place, found in grid.cells.items()}
    values = [[errors.get((layer, kind), math.nan) for kind in grid.kinds] for layer in grid.layers]
    size = (2.2 + 0.75 * len(grid.kinds), 2.0 + 0.16 * len(grid.layers))
    with rc_context({"font.family": "DejaVu Sans", "font.size": 8}):  # comes with Matplotlib
        figure = Figure(figsize=size, layout="constrained", facecolor="white")
        axes = figure.subplots()
        image = axes.imshow(values, aspect="auto", cmap="cividis_r", vmin=0)
        axes.set_xticks(range(len(grid.kinds)), grid.kinds, rotation=40, ha="right", rotation_mode="anchor")
        every = math.ceil(len(grid.layers) / 16)
        axes.set_yticks(range(0, len(grid.layers), every), [name.rpartition(".")[2] for name in grid.layers[::every]])
        axes.set(ylabel="decoder layer", title="fit error")
        axes.spines[:].set_visible(False)
        figure.colorbar(image, ax=axes, shrink=0.8)
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=110, metadata={"Software": None})
    return file.getvalue()
