"""What every family of Transformers comes to: `python tests/architectures.py` tries them all anew.

The outcomes are kept in tests/architectures.jsonl, one a line, and the lists of docs/architectures.md are made from
them.
"""

from __future__ import annotations

import importlib.metadata
import json
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path

import torch
from families import (
    EXPERTS_WORK,
    FAMILIES,
    MIXTURE_OPTIONS,
    MULTIMODAL,
    Outcome,
    try_experts,
    try_family,
    what_can_go,
)
from tqdm.auto import tqdm
from transformers.utils import logging

KEPT = Path(__file__).with_suffix(".jsonl")
PAGE = Path(__file__).resolve().parents[1] / "docs" / "architectures.md"
COMMAND = "python tests/architectures.py"
MARKER = "<!-- The rest of this page is made by `python tests/architectures.py`. -->"


def read_outcomes(file: Path = KEPT, *, multimodal: bool = False) -> dict[str, Outcome]:
    """The outcomes that the page promises of causal language models, or of multimodal models, by family."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows = [row for row in rows if row.get("multimodal", False) == multimodal]
    tuples = [
        {name: tuple(row.get(name, ())) for name in ("dense", "smaller", "seen")} for row in rows
    ]
    return {row["family"]: Outcome(**row | found) for row, found in zip(rows, tuples, strict=True)}


def format_page(outcomes: Iterable[Outcome], multimodal: Iterable[Outcome]) -> str:
    """The generated part of the page."""
    found, others = list(outcomes), list(multimodal)
    works = [o for o in found if o.status == "works"]
    lines = [
        f"transformers {importlib.metadata.version('transformers')}: of {len(found)} families "
        f"{len(works)} work ({len({o.model_class for o in works})} model classes).",
        *("", "## What can become smaller", ""),
        *_smaller(works),
        *("", "## Experts", ""),
        *_experts([*works, *(o for o in others if o.status == "works")]),
        *("", "## What does not work", ""),
        *_grouped("what happens", ((_failure(o), o.family) for o in found if o.status != "works")),
        *("", "## Multimodal models", ""),
    ]
    works = [o for o in others if o.status == "works"]
    image, sound = (
        sum(not kinds.isdisjoint(o.seen) for o in works)
        for kinds in ({"image", "video"}, {"audio"})
    )
    lines += [
        f"Of {len(others)} families with a class for images or sounds, {len(works)} work. The saved model was also "
        f"compared on an image or video in {image} of them, and on a sound in {sound}.",
        "",
        *_smaller(works),
        "",
        *_grouped("what happens", ((_failure(o), o.family) for o in others if o.status != "works")),
    ]
    return "\n".join(lines) + "\n"


def _smaller(works: list[Outcome]) -> list[str]:
    """How many families can lose parts, and which."""
    channels, heads, experts = (
        sum(kind in o.smaller for o in works) for kind in ("channels", "heads", "experts")
    )
    return [
        f"[Whole parts](smaller.md) can go: channels in {channels}, heads in {heads}, and experts in {experts} "
        "families.",
        "",
        *_grouped("what can go", ((", ".join(o.smaller) or "nothing", o.family) for o in works)),
    ]


def _experts(works: Iterable[Outcome]) -> list[str]:
    """Of all families with a mixture: whether experts can be removed, or why not; each family and reason once."""
    pairs = {(o.experts, o.family) for o in works if o.experts}
    removable = {family for text, family in pairs if text == EXPERTS_WORK}
    families = {family for _, family in pairs}
    optional = ", ".join(f"`{family}`" for family in sorted(MIXTURE_OPTIONS))
    return [
        f"`experts:SHARE` removes experts from {len(removable)} of the {len(families)} families that have a mixture. "
        "In memory and from files, the result is the same, and `verify` accepts it. Families that have a mixture only "
        f"if their configuration says so are tried with one: {optional}.",
        "",
        *_grouped("`experts:SHARE`", pairs),
    ]


def _failure(outcome: Outcome) -> str:
    """Status and, if this package refuses it, the reason without the name of the class: families that fail alike."""
    reason = outcome.reason.removeprefix(f"{outcome.model_class} can't be pruned: ").partition(
        ". "
    )[0]
    return f"{outcome.status}: {reason}" if outcome.status == "refused" else outcome.status


def _grouped(title: str, pairs: Iterable[tuple[str, str]]) -> list[str]:
    """A table with one row a text and all the families that it holds for."""
    families: dict[str, list[str]] = {}
    for text, family in sorted(pairs):
        families.setdefault(text.replace("|", "\\|"), []).append(f"`{family}`")
    return [
        f"| {title} | families |",
        "|---|---|",
        *(f"| {text} | {', '.join(n)} |" for text, n in families.items()),
    ]


def main() -> None:
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    outcomes = []
    for multimodal, family in tqdm(
        [(False, f) for f in FAMILIES] + [(True, f) for f in MULTIMODAL], unit="family"
    ):
        with tempfile.TemporaryDirectory() as folder:
            outcome = try_family(family, Path(folder) / "model", multimodal=multimodal)
            if outcome.status == "works":
                outcome = replace(
                    outcome,
                    smaller=what_can_go(family, multimodal=multimodal),
                    experts=try_experts(family, Path(folder), multimodal=multimodal),
                )
        outcomes.append(outcome)
    keep(outcomes)


def keep(outcomes: Iterable[Outcome]) -> None:
    """Write the outcomes, and the page that is made from them."""
    rows = [
        {"model_class": ""} | {key: value for key, value in asdict(o).items() if value}
        for o in outcomes
    ]
    KEPT.write_text("".join(f"{json.dumps(row)}\n" for row in rows))  # empty fields are left out
    text, tables = (
        PAGE.read_text().partition(MARKER)[0],
        (read_outcomes(), read_outcomes(multimodal=True)),
    )
    PAGE.write_text(f"{text}{MARKER}\n\n{format_page(*(table.values() for table in tables))}")


if __name__ == "__main__":
    main()
