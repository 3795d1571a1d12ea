"""Perplexities in a JSON file, one record a measurement."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard
from yaml import YAMLError

from optimum_fista.run.checkpoints.atomic import errors_of_writing, flush, write_text
from optimum_fista.run.checkpoints.checkpoint import CARD_FILE, REPORT_FILE
from optimum_fista.run.checkpoints.output_lock import is_at, lock_file
from optimum_fista.run.evaluation.perplexity import PerplexityResult
from optimum_fista.run.reports.report import HUB_DATASETS, public_name

logger = logging.getLogger(__name__)

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

    In the folder of the pruned model that was measured, it joins the metadata of the model card as well.
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
    folder = file.parents[1]
    measured = file == folder / EVALUATION_FILE and evaluation.place == place_of(folder)
    if measured and (folder / CARD_FILE).exists() and (folder / REPORT_FILE).exists():
        _add_to_card(folder / CARD_FILE, evaluation.result)


def _add_to_card(file: Path, result: PerplexityResult) -> None:
    """Add a perplexity to the metadata of a model card, in the place of an earlier one; all else in the card stays."""
    try:
        card = ModelCard.load(file)
    except (ValueError, YAMLError) as error:
        logger.warning("The perplexity is not in the metadata of %s, which can't be read: %s", file, error)
        return
    text = result.text_name or "a text"
    dataset = HUB_DATASETS.get(text)
    found = EvalResult(
        task_type="text-generation",
        dataset_type=dataset or text,
        dataset_name=text,
        dataset_split="test",
        metric_type="perplexity",
        metric_name=f"perplexity, {result.num_windows} windows of {result.sequence_length} tokens",
        metric_value=round(result.perplexity, 4),
    )
    known = [r for r in card.data.eval_results or [] if (r.dataset_name, r.metric_name) != (text, found.metric_name)]
    title = re.search(r"^# (.+)", card.text, re.M)
    card.data.model_name = card.data.model_name or (title[1] if title else file.parent.name)
    card.data.eval_results = [*known, found]
    card.data.datasets = list(dict.fromkeys([*_listed(card.data.datasets), *_listed(dataset)])) or None
    write_text(file, str(card))


def _listed(names: str | list[str] | None) -> list[str]:
    return [names] if isinstance(names, str) else names or []


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
