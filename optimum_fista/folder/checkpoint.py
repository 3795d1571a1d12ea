"""A pruned model's folder: which files it has, and how they are read.

Nothing here needs Transformers or a model: `report` and `verify` read a folder quickly, even if the model is too large
to load. A damaged file gives a ValueError that names the file.

A run that removes tokens from the vocabulary gives the others new ids, so that the embedding has fewer rows. The file
`fista/vocabulary.json` has their *old* ids: those in the model before the first token was removed.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from optimum_fista.atomic import write_file
from optimum_fista.options import as_record
from optimum_fista.plain_text import spell_out_controls_in_json
from optimum_fista.recovery_report import RecoveryReport
from optimum_fista.report import PruningReport
from optimum_fista.source.model_folder import question_of_folder, read_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CARD_FILE = "README.md"
MASKS_FILE = "fista/masks.safetensors"
REPORT_FILE = "fista/report.json"
VOCABULARY_FILE = "fista/vocabulary.json"
"""Ids of the tokens that are left, if tokens were removed, by the latest run or an earlier one."""

RECOVERY_FILE = "fista/recovery.json"
"""What `recover` did with a model that was not pruned and has no report: its trainings, the first one first."""

CONFIG_KEY = "fista_pruning"
"""Of `config.json`: the summary of the latest run."""

MASKS_FORMAT = "bitmask-1"
MASKS_METADATA = {"format": MASKS_FORMAT}  # one key only: safetensors writes several in any order

# What a report must have to be one.
_CONFIG_KEYS = {"method", "pattern", "error_correction"}
_CALIBRATION_KEYS = {"num_sequences", "num_tokens"}
_MODEL_KEYS = {"name", "class"}


def require_files(folder: Path, *names: str) -> None:
    """Refuse a folder that is missing or lacks one of the files `names`, such as "config.json" (FileNotFoundError)."""
    if not folder.exists():
        question = question_of_folder(str(folder))  # begins with a space, or is empty
        raise FileNotFoundError(f"{str(folder)!r}: there is no such folder.{question}")
    for name in names:
        if not (folder / name).exists():
            raise FileNotFoundError(
                f"{str(folder)!r} holds no {name}: pass a folder saved by optimum-fista."
            )


def read_report(folder: Path) -> PruningReport:
    """Return the report in the folder of a pruned model.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If the file is no report, or lacks what every report has.
    """
    file = folder / REPORT_FILE
    require_files(folder, REPORT_FILE)
    try:
        report = PruningReport.from_dict(read_json(file))
        # keys that every report has
        missing = [
            *(_CONFIG_KEYS - report.config.keys()),
            *(_CALIBRATION_KEYS - report.calibration.keys()),
            *(_MODEL_KEYS - report.model.keys()),
        ]
        if missing:
            raise KeyError(*sorted(missing))
        return report
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{str(file)!r} is no report of optimum-fista ({error}): pass a folder that it wrote."
        ) from error


def read_recoveries(folder: Path) -> list[RecoveryReport]:
    """Return the trainings of a model that was never pruned, in their order; none if its folder has no record of them.

    Such a model is trained to compare a pruned one with; those of a pruned model are in its report. ValueError if the
    record is damaged. The file is only read.
    """
    file = folder / RECOVERY_FILE
    if not file.exists():
        return []
    try:
        # The file may come from other people: control characters in its texts would reach a terminal.
        content = spell_out_controls_in_json(read_json(file))
        return [as_record(RecoveryReport, values) for values in content["recoveries"]]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{str(file)!r} is no record of trainings ({error}): remove the file to train the model without it."
        ) from error


def write_recoveries(folder: Path, recoveries: Sequence[RecoveryReport]) -> None:
    """Write the trainings of a model that was never pruned, the first one first, into its folder.

    They are in the file `RECOVERY_FILE`, which replaces an older one; its folder is made if need be.
    """
    (folder / RECOVERY_FILE).parent.mkdir(exist_ok=True)
    record = {"recoveries": [dataclasses.asdict(recovery) for recovery in recoveries]}
    write_file(folder / RECOVERY_FILE, json.dumps(record, indent=2) + "\n")


def kept_tokens(folder: Path, before: Path | None = None) -> Tensor | None:
    """Return the old ids of the tokens of a smaller vocabulary, int64 [tokens]; `None` if no token was removed.

    Row `i` of the embedding in `folder` is row `kept_tokens(folder)[i]` of the embedding before the first token was
    removed. If the folder `before` is given, it is the row of the embedding there instead, which may have lost some of
    the tokens already. A token that is not in `before` gets a number that is no row. If `before` is of another model,
    it is not used. The files are only read.

    Raises:
        ValueError: If the list of tokens in `folder` is damaged.
    """
    file = folder / VOCABULARY_FILE
    if not file.exists():
        return None
    record = read_json(file)
    kept: Any = record.get("kept")  # old ids, in the order of the new ones
    num_tokens: Any = record.get("num_tokens")  # before the first token was removed
    _require_token_ids(file, kept, num_tokens)

    if before is None or not (before / VOCABULARY_FILE).exists():
        return torch.tensor(kept)
    is_of_same_model = read_json(before / VOCABULARY_FILE).get("num_tokens") == num_tokens
    if not is_of_same_model:
        return torch.tensor(kept)

    earlier = kept_tokens(before)
    assert earlier is not None  # the file exists
    # the row of each old id in the embedding of `before`
    rows = {old_id: row for row, old_id in enumerate(earlier.tolist())}
    no_row = num_tokens  # of a token that `before` has lost, although `folder` has it
    return torch.tensor([rows.get(old_id, no_row) for old_id in kept])


def _require_token_ids(file: Path, kept: Any, num_tokens: Any) -> None:
    """Refuse a damaged list of tokens (ValueError): `kept` must be different ids below `num_tokens`, and one at least.

    Both are values of the JSON file `file`, so they may have any type.
    """
    is_list = isinstance(kept, list) and len(kept) > 0
    # `type(...)`, because True counts as an int for `isinstance`.
    are_numbers = is_list and all(type(number) is int for number in [*kept, num_tokens])
    are_ids = are_numbers and min(kept) >= 0 and max(kept) < num_tokens
    if not are_ids or len(set(kept)) != len(kept):
        raise ValueError(
            f"{str(file)!r} is damaged: it does not list different ids below num_tokens. Copy the folder again."
        )


def summary_of_latest_run(config: Any) -> dict[str, Any]:
    """Return what the latest run has noted of itself in a model's configuration (`writing.summary`).

    The dictionary is empty if no run has pruned the model. `config` is only read.
    """
    summary: dict[str, Any] | None = getattr(config, CONFIG_KEY, None)
    return {} if summary is None else summary


def mark_retrained(model: PreTrainedModel) -> None:
    """Note in the configuration of a pruned model that its weights were trained after pruning.

    Changes `model.config.fista_pruning`. A model that no run has pruned is left alone.
    """
    summary = getattr(model.config, CONFIG_KEY, None)
    if summary is not None and not summary.get("retrained"):
        setattr(model.config, CONFIG_KEY, summary | {"retrained": True})
