"""Perplexities in a JSON file, one record a measurement."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

from optimum_fista.run.checkpoints.atomic import errors_of_writing, flush
from optimum_fista.run.checkpoints.output_lock import is_at, lock_file
from optimum_fista.run.evaluation.perplexity import PerplexityResult
from optimum_fista.run.reports.report import public_name

EVALUATION_FILE = "fista/evaluation.json"
"""Where a report of a model folder looks for them."""


@dataclass(frozen=True)
class Evaluation:
    """A perplexity and the model that has it.

    Attributes:
        model: A Hub id, or the last part of a path.
        result: The perplexity.
        place: Digest of the path, which tells models of one name apart; empty for a Hub id.
    """

    model: str
    result: PerplexityResult
    place: str = ""

    @classmethod
    def of(cls, model: str, result: PerplexityResult) -> Evaluation:
        """A perplexity of a Hub id or a folder."""
        return cls(public_name(model), result, place_of(model))

    @property
    def protocol(self) -> tuple[str | None, str | None, int, int]:
        """What must be equal in two measurements for a comparison."""
        result = self.result
        return result.text_name, result.text_sha256, result.num_windows, result.sequence_length


def place_of(model: str | Path) -> str:
    """Digest of a folder's path; empty if there is no such folder."""
    path = Path(model)
    return hashlib.sha256(str(path.resolve()).encode()).hexdigest() if path.exists() else ""


def add_evaluation(file: Path, evaluation: Evaluation) -> None:
    """Add a measurement to a file, in the place of an earlier one of the same model on the same windows.

    Processes that add to one file at the same time wait for each other. The lock is the new file: once it has the name
    of the old one, those that waited for it begin anew.

    Raises:
        ValueError: If the file holds something else.
    """
    file = Path(os.path.realpath(file))  # several links to one file share its lock
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.partial")
    while (lock := lock_file(partial, f"output {str(file)!r}", wait=True)) is None:
        pass
    try:
        known = read_evaluations(file) if file.exists() else []
        key = (evaluation.model, evaluation.place, evaluation.protocol)
        kept = [e for e in known if (e.model, e.place, e.protocol) != key]
        records = [{"model": e.model, "place": e.place} | dataclasses.asdict(e.result) for e in [*kept, evaluation]]
        with errors_of_writing(file):
            partial.write_text(json.dumps(records, indent=1) + "\n")
            flush(partial)
            partial.replace(file)
            flush(file.parent)
    finally:
        if is_at(partial, lock):
            partial.unlink()
        os.close(lock)


def read_evaluations(file: Path) -> list[Evaluation]:
    """The measurements in a file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it holds something else.
    """
    try:
        records = json.loads(file.read_text())
        if not records or not isinstance(records, list):
            raise TypeError("not a list of records")
        names = [field.name for field in dataclasses.fields(PerplexityResult)]
        results = [PerplexityResult(**{name: record[name] for name in names}) for record in records]
        return [
            Evaluation(str(r["model"]), result, str(r.get("place", "")))
            for r, result in zip(records, results, strict=True)
        ]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{str(file)!r} holds no measurements ({type(error).__name__}: {error}): pass a file written by "
            "`optimum-fista evaluate --output FILE`."
        ) from error
