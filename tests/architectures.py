"""The table of docs/architectures.md: `python tests/architectures.py` makes it anew from runs of every family."""

from __future__ import annotations

import importlib.metadata
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
from families import FAMILIES, Outcome, try_family
from tqdm.auto import tqdm
from transformers.utils import logging

PAGE = Path(__file__).resolve().parents[1] / "docs" / "architectures.md"
COMMAND = "python tests/architectures.py"
MARKER = "<!-- The rest of this page is made by `python tests/architectures.py`. -->"
_HEADER = "| family | class | status | what stays dense, or the reason |\n|---|---|---|---|"
_KINDS = {
    "decoder-only": "Decoder-only language models",
    "multimodal": "Multimodal models: their text decoder",
    "encoder-decoder": "Encoder-decoder models: their decoder alone, as `AutoModelForCausalLM` loads it",
    "encoder": "Encoders that run as decoders (`is_decoder=True`); as encoders they are refused",
    "unknown": "Without a default configuration",
}


def read_table(page: Path = PAGE) -> dict[str, Outcome]:
    """The outcomes that the page promises, by family."""
    outcomes, kind = {}, ""
    titles = {title: kind for kind, title in _KINDS.items()}
    for line in page.read_text().splitlines():
        if line.startswith("## "):
            kind = titles.get(line.removeprefix("## "), "")
        cells = [cell.strip().replace("\\|", "|") for cell in line.strip("|").split(" | ")]
        if kind and line.startswith("| `"):
            family, name, status, text = cells
            works = status == "works"
            dense = tuple(text.split("; ")) if works and text else ()
            family = family.strip("`")
            outcomes[family] = Outcome(family, kind, name, status, dense, "" if works else text)
    return outcomes


def format_table(outcomes: Iterable[Outcome]) -> str:
    """The generated part of the page."""
    found = list(outcomes)
    works = [o for o in found if o.status == "works"]
    lines = [
        f"transformers {importlib.metadata.version('transformers')}: of {len(found)} families "
        f"{len(works)} work ({len({o.model_class for o in works})} model classes)."
    ]
    for kind, title in _KINDS.items():
        rows = [o for o in found if o.kind == kind]
        if rows:
            count = sum(o.status == "works" for o in rows)
            lines += ["", f"## {title}", "", f"{count} of {len(rows)} work.", "", _HEADER]
            lines += [
                f"| `{o.family}` | {o.model_class} | {o.status} | "
                f"{('; '.join(o.dense) or o.reason).replace('|', chr(92) + '|')} |"
                for o in sorted(rows, key=lambda o: (o.status != "works", o.family))
            ]
    return "\n".join(lines) + "\n"


def main() -> None:
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    outcomes = []
    for family in tqdm(FAMILIES, unit="family"):
        with tempfile.TemporaryDirectory() as folder:
            outcomes.append(try_family(family, Path(folder) / "model"))
    text = PAGE.read_text().partition(MARKER)[0]
    PAGE.write_text(f"{text}{MARKER}\n\n{format_table(outcomes)}")


if __name__ == "__main__":
    main()
