"""A pruned model's folder: which files it has, and how they are read.

Nothing here needs Transformers or a model: `report` and `verify` read a folder quickly, even if the model is too large
to load. A damaged file gives a ValueError that names the file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor

from optimum_fista.folder.atomic import write_file
from optimum_fista.report import PruningReport

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONFIG_FILE = "config.json"
CARD_FILE = "README.md"
MASKS_FILE = "fista/masks.safetensors"
REPORT_FILE = "fista/report.json"
VOCABULARY_FILE = "fista/vocabulary.json"
"""Ids of the tokens that are left, if tokens were removed, by the latest run or an earlier one."""

CONFIG_KEY = "fista_pruning"
"""Of `config.json`: the summary of the latest run."""

PACKED_KEY = "quantization_config"
"""Of `config.json`: under which a packed folder is described."""

MASKS_FORMAT = "bitmask-1"
MASKS_METADATA = {"format": MASKS_FORMAT}  # one key only: safetensors writes several in any order

# What a report must have to be one.
_CONFIG_KEYS = {"method", "pattern", "error_correction"}
_CALIBRATION_KEYS = {"num_sequences", "num_tokens"}
_MODEL_KEYS = {"name", "class"}


def read_json(file: Path) -> dict[str, Any]:
    """Return the object that a JSON file holds.

    Raises:
        ValueError: If the file holds something else; it names the file.
    """
    try:
        values = json.loads(file.read_bytes())
    except ValueError as error:  # of JSON, or of UTF-8
        raise ValueError(f"{str(file)!r} is damaged: it is not JSON ({error}).") from error
    if not isinstance(values, dict):
        raise ValueError(
            f"{str(file)!r} is damaged: it holds a JSON {type(values).__name__}, not an object."
        )
    return values


def closest_folder(name: str) -> str:
    """Return a question for an error message, with the folder whose name is closest to `name`; "" if none is close.

    `name` is a path that the user gave. The question begins with a space.
    """
    path = Path(name)
    if not path.parent.is_dir():
        return ""
    folders = [other.name for other in path.parent.iterdir() if other.is_dir()]
    close = get_close_matches(path.name, folders, n=1)
    if not close:
        return ""
    return f" Did you mean {str(path.with_name(close[0]))!r}?"


def require_name(name: str) -> None:
    """Refuse a model that is neither a folder or file nor, by its form, a Hub id."""
    if Path(name).exists():
        return
    # Its import is slow, and not needed to read a folder.
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(
            f"model={name!r} is neither a folder that exists nor a Hub id: pass a model folder, or 'owner/name'."
            f"{closest_folder(name)}"
        ) from error


def require_files(folder: Path, *names: str) -> None:
    """Refuse a folder in which one of these files is missing (FileNotFoundError)."""
    if not folder.exists():
        raise FileNotFoundError(
            f"{str(folder)!r}: there is no such folder.{closest_folder(str(folder))}"
        )
    for name in names:
        if not (folder / name).exists():
            raise FileNotFoundError(
                f"{str(folder)!r} holds no {name}: pass a folder saved by optimum-fista."
            )


def read_report(folder: Path) -> PruningReport:
    """Return the report in a pruned model's folder.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If the file is no report, or lacks what every report has.
    """
    file = folder / REPORT_FILE
    require_files(folder, REPORT_FILE)
    try:
        report = PruningReport.from_dict(read_json(file))
        missing = [
            *(_CONFIG_KEYS - report.config.keys()),
            *(_CALIBRATION_KEYS - report.calibration.keys()),
            *(_MODEL_KEYS - report.model.keys()),
        ]
        if missing:
            raise KeyError(*sorted(missing))
        return report
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{str(file)!r} is no report of optimum-fista ({error}).") from error


def kept_tokens(folder: Path, before: Path | None = None) -> Tensor | None:
    """Return the old ids of the tokens of a smaller vocabulary, int64 [tokens]; `None` if no token was removed.

    Row `i` of the embedding in `folder` is row `kept_tokens(folder)[i]` of the embedding before the first token was
    removed. If the folder `before` is given, it is the row of the embedding there, which may have lost some of the
    tokens already. (If that folder is of another model, ids are those of the first model.)

    Raises:
        ValueError: If the list of tokens in `folder` is damaged.
    """
    file = folder / VOCABULARY_FILE
    if not file.exists():
        return None
    record = read_json(file)
    kept: Any = record.get("kept")
    num_tokens: Any = record.get("num_tokens")
    _require_token_ids(file, kept, num_tokens)

    is_same_model = False
    if before is not None and (before / VOCABULARY_FILE).exists():
        is_same_model = read_json(before / VOCABULARY_FILE).get("num_tokens") == num_tokens
    earlier = kept_tokens(before) if before is not None and is_same_model else None
    if earlier is None:
        return torch.tensor(kept)
    rows = {old_id: row for row, old_id in enumerate(earlier.tolist())}
    no_row = num_tokens  # of a token that `before` has lost, although `folder` has it
    return torch.tensor([rows.get(old_id, no_row) for old_id in kept])


def _require_token_ids(file: Path, kept: Any, num_tokens: Any) -> None:
    """Refuse a damaged list of tokens, read from `file`: `kept` must be different ids below `num_tokens`."""
    is_list = isinstance(kept, list) and len(kept) > 0
    are_numbers = is_list and all(type(number) is int for number in [*kept, num_tokens])
    are_ids = are_numbers and min(kept) >= 0 and max(kept) < num_tokens
    if not are_ids or len(set(kept)) != len(kept):
        raise ValueError(
            f"{str(file)!r} is damaged: it does not list different ids below num_tokens."
        )


def mark_retrained(model: PreTrainedModel) -> None:
    """Note in the configuration of a pruned model, which is changed, that its weights were trained after pruning."""
    summary = getattr(model.config, CONFIG_KEY, None)
    if summary is not None and not summary.get("retrained"):
        setattr(model.config, CONFIG_KEY, summary | {"retrained": True})


def checkpoint_files(folder: Path, stem: str = "model") -> dict[str, Path]:
    """Return the safetensors file of every tensor of a model folder, by the tensor's name.

    `stem` is the first part of the files' names: "model", or "packed" in a packed folder.

    Raises:
        FileNotFoundError: If the folder holds no such weights.
        ValueError: If the index of the files is damaged.
    """
    single = folder / f"{stem}.safetensors"
    index = folder / f"{stem}.safetensors.index.json"
    if single.exists():  # Transformers prefers the single file as well
        return dict.fromkeys(names_in(single), single)
    if not index.exists():
        raise FileNotFoundError(
            f"{str(folder)!r} holds no {stem}.safetensors: pass a pruned model folder."
        )

    content = read_json(index)
    weight_map: Any = content.get("weight_map")
    metadata = content.get("metadata", {})
    has_names = isinstance(weight_map, dict) and all(
        isinstance(file, str) for file in weight_map.values()
    )
    if not has_names:
        raise ValueError(
            f"{str(index)!r} is damaged: it has no weight_map that names a file for each tensor."
        )
    if not isinstance(metadata, dict):
        raise ValueError(
            f"{str(index)!r} is damaged: its metadata is a JSON {type(metadata).__name__}."
        )
    return {name: folder / file for name, file in weight_map.items()}


def names_in(file: Path) -> list[str]:
    """Return the names of the tensors in a safetensors file."""
    with safe_open(file, "pt") as opened:
        return list(opened.keys())


def write_index(
    folder: Path, stem: str, weight_map: Mapping[str, str], metadata: Mapping[str, Any]
) -> str:
    """Write the index of a folder's weight files, and return its name.

    The index says which file holds which tensor (`weight_map`, file names by tensor names) and how many bytes all
    tensors have. `metadata` is added to it. `stem`: see `checkpoint_files`.
    """
    total_size = 0
    for name in set(weight_map.values()):
        file = folder / name
        with file.open("rb") as opened:
            header_bytes = int.from_bytes(opened.read(8), "little")
        total_size += file.stat().st_size - 8 - header_bytes

    index = {
        "metadata": {**metadata, "total_size": total_size},
        "weight_map": dict(sorted(weight_map.items())),
    }
    index_name = f"{stem}.safetensors.index.json"
    write_file(folder / index_name, json.dumps(index, indent=2) + "\n")
    return index_name


def read_tensors(files: dict[str, Path], names: list[str]) -> Iterator[tuple[str, Tensor]]:
    """Read tensors one at a time, in the order of `names`, and yield each with its name.

    `files` has the file of every tensor, as `checkpoint_files` returns it.
    """
    for name in names:
        with safe_open(files[name], "pt") as file:
            yield name, file.get_tensor(name)
