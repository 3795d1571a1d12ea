"""Pruned model folders packed, and packed ones made dense again, one weight file in memory at a time."""

from __future__ import annotations

import filecmp
import json
import os
import shutil
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from optimum_fista.packed.format import PackedTensor, check, packed_names, unpack, unpack_mask
from optimum_fista.packed.validation import SUFFIXES, shape_of
from optimum_fista.run.checkpoints.atomic import write_tensors, write_text
from optimum_fista.run.checkpoints.checkpoint import (
    MASKS_FILE,
    MASKS_METADATA,
    REPORT_FILE,
    checkpoint_files,
    read_json,
    read_report,
)
from optimum_fista.run.checkpoints.installation import discard, install
from optimum_fista.run.checkpoints.output_folder import (
    FILES_FILE,
    FOLDER,
    all_names,
    is_model_file,
    model_files,
    require_output,
)
from optimum_fista.run.checkpoints.output_lock import locked_output
from optimum_fista.run.checkpoints.stored_names import split_index
from optimum_fista.run.packed_folders.packing import QUANT_METHOD, Packer, Packing, packed_settings
from optimum_fista.run.reports.card import PACKED_NOTE
from optimum_fista.solve.bitmask import pack_mask


def is_packed(folder: Path) -> bool:
    """Whether a model folder is packed."""
    file = folder / "config.json"
    settings = read_json(file).get("quantization_config") if file.exists() else None
    return isinstance(settings, dict) and settings.get("quant_method") == QUANT_METHOD


def pack_folder(
    folder: Path, output: Path, *, overwrite: bool = False, progress: Callable[[str], None] = lambda _: None
) -> Packing:
    """Pack a folder saved by optimum-fista, and copy its other files.

    Args:
        folder: The pruned model folder.
        output: The packed folder.
        overwrite: Replace a model that `output` already holds.
        progress: Called with the name of each weight file that is written.

    Raises:
        FileNotFoundError: If `folder` holds no pruned model.
        FileExistsError: If `output` holds a model and `overwrite` is False, or other files that would be replaced.
        BlockingIOError: If another run writes to `output`.
        ValueError: If `folder` is packed already or has `output` in it, or a weight is not zero outside its mask.
    """
    if is_packed(folder):
        raise ValueError(f"folder {str(folder)!r} is packed already: pass a folder with dense weights.")
    for file in ("config.json", MASKS_FILE, REPORT_FILE):
        if not (folder / file).exists():
            raise FileNotFoundError(f"{str(folder)!r} holds no {file}: pass a folder saved by optimum-fista.")
    files = checkpoint_files(folder)
    with safe_open(folder / MASKS_FILE, "pt") as masks:
        packer = Packer(read_report(folder).operators, files, masks.get_tensor)

        def finish(partial: Path, weights: str, config: dict[str, Any]) -> None:
            (partial / MASKS_FILE).unlink()
            config["quantization_config"] = packed_settings(weights, packer.names)
            card = partial / "README.md"
            if card.exists():
                card.write_text(card.read_text() + PACKED_NOTE)

        _convert_folder(folder, output, files, ("model", "packed"), packer.pack, finish, overwrite, progress)
    return packer.packing


def unpack_folder(
    folder: Path, output: Path, *, overwrite: bool = False, progress: Callable[[str], None] = lambda _: None
) -> Packing:
    """Make a packed folder dense again, masks and all; the inverse of `pack_folder`.

    Raises:
        FileExistsError: As `pack_folder`.
        BlockingIOError: If another run writes to `output`.
        ValueError: If `folder` is not packed, or malformed (a PackedFormatError).
    """
    if not is_packed(folder):
        raise ValueError(f"folder {str(folder)!r} is not packed: pass a folder made by `optimum-fista pack`.")
    reader = PackedFolder(folder)
    sizes: list[tuple[int, int]] = []
    masks: dict[str, Tensor] = {}
    operators: dict[str, list[str]] = {}
    for operator in read_report(folder).operators:
        operators.setdefault(split_index(operator.name)[0], []).append(operator.name)

    def convert(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        written: dict[str, Tensor] = {}
        parts = {name + suffix: name for name in reader.names for suffix in SUFFIXES}
        for key, tensor in tensors.items():
            if key not in parts:
                written[key] = tensor
            elif key.endswith(SUFFIXES[0]):
                name = parts[key]
                packed = reader.packed(name)
                written[name] = unpack(packed)
                mask = unpack_mask(packed)
                masks.update({o: pack_mask(mask[split_index(o)[1]]) for o in operators.get(name, [])})
                sizes.append((packed.dense_bytes, packed.num_bytes))
        return written

    def finish(partial: Path, _: str, config: dict[str, Any]) -> None:
        del config["quantization_config"]
        write_tensors(partial / MASKS_FILE, masks, MASKS_METADATA)
        card = partial / "README.md"
        if card.exists():
            card.write_text(card.read_text().replace(PACKED_NOTE, ""))

    _convert_folder(folder, output, reader.files, ("packed", "model"), convert, finish, overwrite, progress)
    return Packing(len(sizes), sum(dense for dense, _ in sizes), sum(packed for _, packed in sizes))


class PackedFolder:
    """The weights of a packed folder.

    Attributes:
        files: File of every stored tensor.
        names: Dense names of the packed weights.
    """

    def __init__(self, folder: Path) -> None:
        settings = read_json(folder / "config.json")["quantization_config"]
        self.files = checkpoint_files(folder, settings["weights"].partition(".")[0])
        self.names = packed_names(self.files)

    @property
    def packing(self) -> Packing:
        """The sizes of the packed weights; only headers and layouts are read."""
        dense = packed = 0
        for name in self.names:
            with safe_open(self.files[name + SUFFIXES[0]], "pt") as file:
                values, mask = (file.get_slice(name + suffix) for suffix in SUFFIXES[:2])
                layout = file.get_tensor(name + SUFFIXES[2])
            size = values[:0].element_size()
            dense += prod(shape_of(layout)) * size
            packed += prod(values.get_shape()) * size + prod(mask.get_shape()) + layout.numel() * layout.element_size()
        return Packing(len(self.names), dense, packed)

    def packed(self, name: str) -> PackedTensor:
        """A packed weight, checked.

        Raises:
            PackedFormatError: If its parts are not those of a packed tensor.
        """
        parts = []
        for suffix in SUFFIXES:
            with safe_open(self.files[name + suffix], "pt") as file:
                parts.append(file.get_tensor(name + suffix))
        packed = PackedTensor(*parts)
        check(packed, name)
        return packed.without_checksum()


def _convert_folder(
    folder: Path,
    output: Path,
    files: Mapping[str, Path],
    rename: tuple[str, str],
    convert: Callable[[Mapping[str, Tensor]], dict[str, Tensor]],
    finish: Callable[[Path, str, dict[str, Any]], None],
    overwrite: bool,
    progress: Callable[[str], None],
) -> None:
    """Copy a folder with its weight files converted one after another, and files that are no model's."""
    old, new = rename
    index_name = f"{old}.safetensors.index.json"
    weights = sorted(set(files.values()))
    targets = {source: source.name.replace(old, new, 1) for source in weights}
    others = _others(folder, {index_name, FILES_FILE, *targets.values(), *(source.name for source in weights)})
    foreign = {*others} - model_files(folder)
    require_output(output, overwrite, source=folder, names=[*others, *targets.values()])
    replaced = model_files(output)
    copied = [name for name in others if name in replaced or not _is_kept(folder / name, output, name)]
    with locked_output(output) as partial:
        discard(partial, overwrite)
        for name in copied:
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(folder / name, partial / name)
        weight_map: dict[str, str] = {}
        total, weights_name = 0, f"{new}.safetensors"
        for source, target in targets.items():
            with safe_open(source, "pt") as file:
                names = [name for name in files if files[name] == source]
                tensors = convert({name: file.get_tensor(name) for name in names})
                metadata = file.metadata() or {}
            write_tensors(partial / target, tensors, metadata)
            weight_map |= dict.fromkeys(tensors, target)
            total += sum(t.numel() * t.element_size() for t in tensors.values())
            progress(target)
        if (folder / index_name).exists():
            index = read_json(folder / index_name)
            weights_name = f"{new}.safetensors.index.json"
            index["metadata"]["total_size"] = total
            index["weight_map"] = dict(sorted(weight_map.items()))
            write_text(partial / weights_name, json.dumps(index, indent=2) + "\n")
        config = read_json(folder / "config.json")
        finish(partial, weights_name, config)
        write_text(partial / "config.json", json.dumps(config, indent=2) + "\n")
        install(partial, output, overwrite, foreign)


def _others(folder: Path, but: set[str]) -> list[str]:
    """Names of a folder's files, those in its folders included, without `but`."""
    found = [name for name in all_names(folder) if (folder / name).is_file()]
    return [name for name in found if name not in but and not name.startswith(f"{FOLDER}/")]


def _is_kept(file: Path, output: Path, name: str) -> bool:
    """Whether the output has a file that is no model's already.

    Raises:
        FileExistsError: If it has another one of the same name.
    """
    if is_model_file(name) or not os.path.lexists(output / name):
        return False
    if (output / name).is_file() and filecmp.cmp(file, output / name, shallow=False):
        return True
    raise FileExistsError(
        f"output {str(output)!r} holds another {name} than {str(file.parent)!r}: move it away, or pass another folder."
    )
