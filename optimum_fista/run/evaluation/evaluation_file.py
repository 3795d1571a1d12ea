"""Perplexities in a JSON file, one record a measurement."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from optimum_fista.run.checkpoints.atomic import write_text
from optimum_fista.run.evaluation.perplexity import PerplexityResult

EVALUATION_FILE = "fista/evaluation.json"
"""Where a report of a model folder looks for them."""


@dataclass(frozen=True)
class Evaluation:
    """A perplexity and the model that has it, by the name it was given to `optimum-fista evaluate`."""

    model: str
    result: PerplexityResult

    @property
    def protocol(self) -> tuple[str | None, str | None, int, int]:
        """What must be equal in two measurements for a comparison."""
        result = self.result
        return result.text_name, result.text_sha256, result.num_windows, result.sequence_length


def add_evaluation(file: Path, evaluation: Evaluation) -> None:
    """Add a measurement to a file, in the place of an earlier one of the same model on the same windows.

    Raises:
        ValueError: If the file holds something else.
    """
    known = read_evaluations(file) if file.exists() else []
    kept = [e for e in known if (e.model, e.protocol) != (evaluation.model, evaluation.protocol)]
    records = [{"model": e.model} | dataclasses.asdict(e.result) for e in [*kept, evaluation]]
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(records, indent=1) + "\n")


def read_evaluations(file: Path) -> list[Evaluation]:
    """The measurements in a file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it holds something else.
    """
    try:
        records = json.loads(file.read_text())
        names = [field.name for field in dataclasses.fields(PerplexityResult)]
        return [Evaluation(str(r["model"]), PerplexityResult(**{name: r[name] for name in names})) for r in records]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{str(file)!r} holds no measurements ({type(error).__name__}: {error}): pass a file written by "
            "`optimum-fista evaluate --output FILE`."
        ) from error
