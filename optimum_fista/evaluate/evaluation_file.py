"""Perplexities in a JSON file, one record a measurement.

The file of a pruned folder may hold measurements of other models too, such as the dense one. The report page shows
those on the same windows side by side.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from optimum_fista.folder.output import require_writable, write_about
from optimum_fista.options import as_record
from optimum_fista.report import public_name

EVALUATION_FILE = "fista/evaluation.json"  # where the report page of a model folder looks for measurements


@dataclass(frozen=True)
class PerplexityResult:
    """Perplexity and what it was measured on."""

    perplexity: float  # exp(mean negative log-likelihood of a predicted token)
    num_windows: int  # N
    num_tokens: int  # N (T - 1): the first token of a window is not predicted
    sequence_length: int  # T
    seconds: float
    text_name: str | None = None
    text_sha256: str | None = None


@dataclass(frozen=True)
class Evaluation:
    """A measurement of a model."""

    model: str  # a Hub id, or the last part of a path
    result: PerplexityResult
    place: str = ""  # digest of the path, to tell models of one name apart without showing it; empty for a Hub id

    @classmethod
    def of(cls, model: str, result: PerplexityResult) -> Evaluation:
        """Make the record of a measurement of a model given by name."""
        return cls(public_name(model), result, place_of(model))

    @property
    def protocol(self) -> tuple[Any, ...]:
        """The text and its windows: two measurements are compared only if these are equal."""
        result = self.result
        return result.text_name, result.text_sha256, result.num_windows, result.sequence_length


def place_of(model: str | Path) -> str:
    """Digest of a folder's path; empty if there is no such folder."""
    path = Path(model)
    return hashlib.sha256(str(path.resolve()).encode()).hexdigest() if path.exists() else ""


def require_addable(file: Path) -> None:
    """Refuse a file that measurements can't be added to, before anything is measured."""
    if file.exists():
        read_evaluations(file)
    require_writable(file)


def add_evaluation(file: Path, evaluation: Evaluation) -> None:
    """Add a measurement to a file; it replaces an earlier one of the same model and protocol."""
    file = Path(os.path.realpath(file))  # several links to one file share its lock
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = file.with_name(f".{file.name}.lock")
    with FileLock(lock):  # several processes may measure at the same time
        try:
            known = read_evaluations(file) if file.exists() else []
            key = (evaluation.model, evaluation.place, evaluation.protocol)
            kept = [e for e in known if (e.model, e.place, e.protocol) != key]
            write_about(file, json.dumps([dataclasses.asdict(e) for e in [*kept, evaluation]], indent=1) + "\n")
        finally:
            lock.unlink()  # processes that wait for it make a new one


def read_evaluations(file: Path) -> list[Evaluation]:
    """The measurements in a file."""
    try:
        records = json.loads(file.read_text())
        if not records or not isinstance(records, list):
            raise TypeError("not a list of records")
        return [as_record(Evaluation, record) for record in records]
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{str(file)!r} holds no measurements ({type(error).__name__}: {error}): pass a file written by "
            "`optimum-fista evaluate --output FILE`."
        ) from error
