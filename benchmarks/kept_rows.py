"""What benchmarks of perplexity share: texts to measure on, and rows kept in a file that a later call continues."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from optimum_fista.run.reports.report import library_versions
from optimum_fista.run.texts.text import load_text
from optimum_fista.run.texts.windows import evaluation_windows


def texts_of(arguments: Namespace, tokenizer: PreTrainedTokenizerBase, length: int) -> dict[str, Tensor]:
    """Token ids [windows, length] of `arguments.texts`, joined by commas, by name; at most `arguments.max_windows`."""
    return {
        Path(source).stem: evaluation_windows(tokenizer, load_text(source, "test"), length, arguments.max_windows)
        for source in arguments.texts.split(",")
    }


def open_record(arguments: Namespace, unnamed: Sequence[str]) -> dict[str, Any]:
    """Settings, versions and rows of `arguments.output`, with the rows that it already has.

    Args:
        arguments: Of the command line; paths are kept by their names alone.
        unnamed: Those on which no row depends.

    Raises:
        SystemExit: If the file holds rows of other settings.
    """
    settings = {key: str(value) for key, value in vars(arguments).items() if key not in (*unnamed, "output")}
    for name in ("model", "calibration"):
        settings[name] = Path(settings[name]).name
    settings["texts"] = ",".join(Path(source).name for source in arguments.texts.split(","))
    record: dict[str, Any] = {"settings": settings, "versions": library_versions(), "rows": []}
    if arguments.output.exists():
        previous = json.loads(arguments.output.read_text())
        if previous["settings"] != settings:
            raise SystemExit(f"{arguments.output} holds rows with other settings: pass another --output.")
        record["rows"] = previous["rows"]
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    return record
