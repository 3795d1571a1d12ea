"""The files of a model's folder as any program reads them: configuration, weight files and their index.

Nothing here needs Transformers or a model, so that a command reads a folder quickly, even if the model is too large to
load. A damaged file gives a ValueError that names it. A model is named by a Hub id, such as "owner/name", or
by the path of its folder. Only `write_index` writes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from optimum_fista.atomic import write_file

CONFIG_FILE = "config.json"

PACKED_KEY = "quantization_config"
"""Of `config.json`: under which quantized weights and packed folders are described."""


def read_json(file: Path) -> dict[str, Any]:
    """Return the object that a JSON file holds.

    Raises:
        ValueError: If the file holds something else; it names the file.
    """
    try:
        values = json.loads(file.read_bytes())
    except ValueError as error:  # of JSON, or of UTF-8
        raise ValueError(
            f"{str(file)!r} is damaged: it is not JSON ({error}). Download or copy it again."
        ) from error
    if not isinstance(values, dict):
        raise ValueError(
            f"{str(file)!r} is damaged: it holds a JSON {type(values).__name__}, not an object. Download or copy it "
            "again."
        )
    return values


def question_of_folder(name: str) -> str:
    """Return a question for an error message, with the folder whose name is closest to `name`; "" if none is close.

    `name` is a path that the user gave. The question begins with a space: " Did you mean 'models/qwen'?".
    """
    path = Path(name)
    if not path.parent.is_dir():
        return ""
    folders = [other.name for other in path.parent.iterdir() if other.is_dir()]
    closest = get_close_matches(path.name, folders, n=1)  # a list of one name, or of none
    if not closest:
        return ""
    return f" Did you mean {str(path.with_name(closest[0]))!r}?"


def require_name(name: str) -> None:
    """Raise ValueError if `name` is neither the path of a folder or file nor, by its form, a Hub id.

    The Hub is not asked.
    """
    if Path(name).exists():
        return
    # Its import is slow, and not needed to read a folder.
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(
            f"model={name!r} is neither a folder that exists nor a Hub id: pass a model folder, or 'owner/name'."
            f"{question_of_folder(name)}"
        ) from error


def require_weights(name: str) -> None:
    """Raise ValueError if `name` is the path of a `config.json`, or of a folder with one but without weights.

    Only an estimate can be made of these. A Hub id, or another folder, passes.
    """
    require_no_configuration_file(name, missing="weights")
    folder = Path(name)
    has_weights = any(folder.glob("*.safetensors")) or any(folder.glob("*.bin"))
    if (folder / CONFIG_FILE).is_file() and not has_weights:
        raise ValueError(
            f"model={name!r} has a config.json but no weights (model.safetensors or pytorch_model.bin): download them. "
            "Only an estimate can be made of a configuration: optimum-fista prune MODEL --dry-run."
        )


def require_no_configuration_file(name: str, missing: str) -> None:
    """Raise ValueError if `name` is the path of a `config.json`.

    `missing` says what can't be read from it, such as "weights" or "tokenizer".
    """
    if Path(name).is_file() and Path(name).suffix == ".json":
        raise ValueError(
            f"model={name!r} is a configuration, which has no {missing}: pass the folder of the model. Only an "
            "estimate can be made of a configuration: optimum-fista prune MODEL --dry-run."
        )


def checkpoint_files(folder: Path, stem: str = "model") -> dict[str, Path]:
    """Return the safetensors file of every tensor of a model folder, by the tensor's name.

    `stem` is the first part of the files' names: "model", or "packed" in a packed folder. Only the header of a single
    file, or the index of several files, is read.

    Raises:
        FileNotFoundError: If the folder holds no such weights.
        ValueError: If the single file, or the index of several files, is damaged.
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
            f"{str(index)!r} is damaged: it has no weight_map that names a file for each tensor. Download or "
            "copy it again."
        )
    if not isinstance(metadata, dict):
        raise ValueError(
            f"{str(index)!r} is damaged: its metadata is a JSON {type(metadata).__name__}. Download or copy it again."
        )
    return {name: folder / file for name, file in weight_map.items()}


def names_in(file: Path) -> list[str]:
    """Return the names of the tensors in a safetensors file, whose header is read; ValueError if it is damaged."""
    try:
        with safe_open(file, "pt") as opened:
            return list(opened.keys())
    except SafetensorError as error:
        raise ValueError(
            f"{str(file)!r} is damaged, or a pointer of Git LFS ({error}): download it again (git lfs pull)."
        ) from error


def write_index(
    folder: Path, stem: str, weight_map: Mapping[str, str], metadata: Mapping[str, Any]
) -> str:
    """Write the index of a folder's weight files, and return its name.

    The index says which file holds which tensor and how many bytes all tensors have. Only sizes are read from the
    weight files. An index that is there already is replaced.

    Args:
        folder: The folder, with all its weight files.
        stem: The first part of the files' names: "model", or "packed" in a packed folder.
        weight_map: The name of the file of each tensor, by the tensor's name.
        metadata: Further entries of the index's metadata.
    """
    total_size = 0  # bytes of the values of all tensors
    for name in set(weight_map.values()):
        file = folder / name
        # A safetensors file begins with the length of its header, 8 bytes, and the header.
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

    `files` has the file of every tensor, as `checkpoint_files` returns it. Each tensor is on the CPU.
    """
    for name in names:
        with safe_open(files[name], "pt") as file:
            yield name, file.get_tensor(name)


def bytes_of_weight_files(source: Path) -> int:
    """Add up the sizes of the weight files in a model folder (`weight_files`)."""
    return sum(file.stat().st_size for file in weight_files(source))


def weight_files(source: Path) -> set[Path]:
    """Return the paths of the weight files in a model folder that Transformers loads; empty if there are none.

    Safetensors come before `pytorch_model.bin`. In a packed folder, the files are called "packed...".
    """
    for stem in ("model", "packed"):
        # If there are no files of this name, others are looked for.
        with suppress(FileNotFoundError):
            return set(checkpoint_files(source, stem).values())

    binary = source / "pytorch_model.bin"
    if binary.exists():
        return {binary}
    index = source / "pytorch_model.bin.index.json"
    if index.exists():
        return {source / name for name in read_json(index)["weight_map"].values()}
    return set()
