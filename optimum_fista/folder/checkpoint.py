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

CONFIG_FILE, CARD_FILE = "config.json", "README.md"
CONFIG_KEY, PACKED_KEY = "fista_pruning", "quantization_config"
MASKS_FILE = "fista/masks.safetensors"
REPORT_FILE = "fista/report.json"
VOCABULARY_FILE = "fista/vocabulary.json"  # if tokens were removed, by this run or an earlier one
_CONFIG_KEYS = {"method", "pattern", "error_correction"}
_CALIBRATION_KEYS = {"num_sequences", "num_tokens"}
_MODEL_KEYS = {"name", "class"}
MASKS_FORMAT = "bitmask-1"
MASKS_METADATA = {"format": MASKS_FORMAT}  # one key only: safetensors writes several in any order


def read_json(file: Path) -> dict[str, Any]:
    """The object that a JSON file holds."""
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
    """Ask if the folder with the closest name is meant, if one is close."""
    path = Path(name)
    others = (
        [other.name for other in path.parent.iterdir() if other.is_dir()]
        if path.parent.is_dir()
        else []
    )
    close = get_close_matches(path.name, others, n=1)
    return f" Did you mean {str(path.with_name(close[0]))!r}?" if close else ""


def require_name(name: str) -> None:
    """Refuse a model that is neither a folder or file nor, by its form, a Hub id."""
    from huggingface_hub.utils import (
        HFValidationError,
        validate_repo_id,
    )  # slow, and not needed to read a folder

    if not Path(name).exists():
        try:
            validate_repo_id(name)
        except HFValidationError as error:
            why = (
                "is neither a folder that exists nor a Hub id: pass a model folder, or 'owner/name'"
            )
            raise ValueError(f"model={name!r} {why}.{closest_folder(name)}") from error


def require_files(folder: Path, *names: str) -> None:
    """Refuse a folder if one of these files is missing."""
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
    """The report in a pruned model's folder."""
    file = folder / REPORT_FILE
    require_files(folder, REPORT_FILE)
    try:
        report = PruningReport.from_dict(read_json(file))
        parts = (
            (report.config, _CONFIG_KEYS),
            (report.calibration, _CALIBRATION_KEYS),
            (report.model, _MODEL_KEYS),
        )
        if missing := sorted(key for record, keys in parts for key in keys - record.keys()):
            raise KeyError(*missing)
        return report
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{str(file)!r} is no report of optimum-fista ({error}).") from error


def kept_tokens(folder: Path, before: Path | None = None) -> Tensor | None:
    """Old ids of the tokens of a smaller vocabulary, int64; `None` if no token was removed.

    Row `i` of the embedding is row `kept_tokens(folder)[i]` of the embedding before the first token was removed, or of
    that in the folder `before`, which may have lost some of the tokens already.
    """
    file = folder / VOCABULARY_FILE
    if not file.exists():
        return None
    found = read_json(file)
    kept, total = found.get("kept"), found.get("num_tokens")
    ids: list[Any] = kept if isinstance(kept, list) and kept else [total]
    if not all(type(n) is int and n >= 0 for n in [*ids, total]) or sorted({*ids, total}) != [
        *sorted(ids),
        total,
    ]:
        raise ValueError(
            f"{str(file)!r} is damaged: it does not list different ids below num_tokens."
        )
    first = (
        {} if before is None or not (file := before / VOCABULARY_FILE).exists() else read_json(file)
    )
    earlier = (
        kept_tokens(before) if before and first.get("num_tokens") == total else None
    )  # else of another model
    rows = {} if earlier is None else {old: row for row, old in enumerate(earlier.tolist())}
    return torch.tensor(ids if earlier is None else [rows.get(old, total) for old in ids])


def mark_retrained(model: PreTrainedModel) -> None:
    """Note in the configuration of a pruned model that its weights were trained after pruning."""
    entry = getattr(model.config, CONFIG_KEY, None)
    if entry is not None and not entry.get("retrained"):
        setattr(model.config, CONFIG_KEY, entry | {"retrained": True})


def checkpoint_files(folder: Path, stem: str = "model") -> dict[str, Path]:
    """The safetensors file of every tensor of a model folder; `stem` is the first part of the files' names."""
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if index.exists() and not single.exists():  # Transformers prefers the single file as well
        found = read_json(index)
        weight_map, metadata = found.get("weight_map"), found.get("metadata", {})
        if not isinstance(weight_map, dict) or not all(
            isinstance(file, str) for file in weight_map.values()
        ):
            raise ValueError(
                f"{str(index)!r} is damaged: it has no weight_map that names a file for each tensor."
            )
        if not isinstance(metadata, dict):
            raise ValueError(
                f"{str(index)!r} is damaged: its metadata is a JSON {type(metadata).__name__}."
            )
        return {name: folder / file for name, file in weight_map.items()}
    if not single.exists():
        raise FileNotFoundError(
            f"{str(folder)!r} holds no {stem}.safetensors: pass a pruned model folder."
        )
    return dict.fromkeys(names_in(single), single)


def names_in(file: Path) -> list[str]:
    """Names of the tensors in a safetensors file."""
    with safe_open(file, "pt") as opened:
        return list(opened.keys())


def write_index(
    folder: Path, stem: str, weight_map: Mapping[str, str], metadata: Mapping[str, Any]
) -> str:
    """Write which of a folder's weight files holds which tensor, and the bytes of all tensors; returns its name."""
    total = 0
    for name in {*weight_map.values()}:
        with (folder / name).open(
            "rb"
        ) as file:  # it begins with the length of its header, in 8 bytes
            total += (folder / name).stat().st_size - 8 - int.from_bytes(file.read(8), "little")
    index = {
        "metadata": {**metadata, "total_size": total},
        "weight_map": dict(sorted(weight_map.items())),
    }
    name = f"{stem}.safetensors.index.json"
    write_file(folder / name, json.dumps(index, indent=2) + "\n")
    return name


def read_tensors(files: dict[str, Path], names: list[str]) -> Iterator[tuple[str, Tensor]]:
    """Read tensors one at a time, in the order of `names`."""
    for name in names:
        with safe_open(files[name], "pt") as file:
            yield name, file.get_tensor(name)
