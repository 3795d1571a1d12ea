"""The model card of a pruned model.

The template card.md has the text; this file computes its values. A card does not depend on the time of writing, so
equal runs write equal folders.
"""

import json
import re
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
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

_SPECIAL = re.compile(r"([\\`*{}\[\]<>|~$&]|\b_|_\b)")
_INHERITED = ("license", "license_name", "license_link", "language")


def model_card(report: PruningReport, dense: str = "") -> str:
    """Markdown of the model card, card.md filled in, with the metadata the Hub reads.

    `dense` is the folder or Hub id of the dense model, whose license and languages the pruned one keeps.
    """
    inherited, file = {}, Path(dense, "README.md")
    try:
        found = file if file.is_file() else try_to_load_from_cache(dense, "README.md")
        if isinstance(found, str | Path):
            inherited = ModelCard.load(found, ignore_metadata_errors=True).data.to_dict()
    except (
        OSError,
        ValueError,
        YAMLError,
    ):  # no name of a repository, or a card that can't be read
        pass
    of_hub = name if re.fullmatch(r"[\w.-]+/[\w.-]+", name := report.model["name"]) else None
    dataset = HUB_DATASETS.get(report.calibration.get("source") or "")
    metadata = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["optimum-fista", "pruned"] + ["sparse"] * (not report.removed),
        base_model=of_hub,
        # The Hub knows adapter, merge, quantized and finetune. A pruned model is of the base model's kind, with its
        # own weights in the same number format (in a packed folder, too).
        base_model_relation=of_hub and "finetune",
        datasets=dataset and [dataset],
        **{key: inherited[key] for key in _INHERITED if key in inherited},
    )
    pattern = parse_pattern(report.config["pattern"], report.config["sparsity"])
    sparsities = [o.sparsity for o in report.operators]
    zeros = "the same share in every operator"
    if report.removed:
        zeros = "none: what is removed is no longer there"
    elif report.config["allocation"] == "fisher" and not pattern.fixed:
        zeros = f"shared over the operators by gradients of the loss, {min(sparsities):.1%} to {max(sparsities):.1%}"
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    formats = {"thousands": "{:,}", "percent": "{:.2%}", "error": "{:.4f}"}
    environment.filters |= {name: form.format for name, form in formats.items()}
    environment.filters["escaped"] = partial(
        _SPECIAL.sub, r"\\\1"
    )  # names from other people must not act as Markdown
    template = environment.from_string(Path(__file__).with_name("card.md").read_text("utf-8"))
    return (
        template.render(
            report=report,
            totals=report.totals,
            tokens=report.calibration,
            metadata=metadata.to_yaml(),
            pattern=pattern if pattern.fixed else f"{100 * pattern.sparsity:g}% {pattern}",
            zeros=zeros,
            before=", before retraining" if report.retrained else "",
            kinds=OperatorGrid(
                report.operators
            ).kinds,  # one row for the operators of a kind in all decoder layers
            config=json.dumps(report.config, indent=2),
        )
        + "\n"
    )


def markdown_lines(headings: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """Lines of a table; cells are written by `str`."""
    first, *others = (f"| {' | '.join(map(str, cells))} |" for cells in (headings, *rows))
    return [first, "|---" * len(headings) + "|", *others]
