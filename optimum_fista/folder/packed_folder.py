"""Pruned model folders packed, and packed ones made dense again, one weight file in memory at a time."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from safetensors import safe_open
from torch import Tensor

from optimum_fista.folder.checkpoint import (
    CARD_FILE,
    CONFIG_FILE,
    MASKS_FILE,
    REPORT_FILE,
    checkpoint_files,
    read_json,
    read_report,
    require_files,
    write_index,
)
from optimum_fista.folder.output import FILES_FILE, all_names, new_output, require_output, write_file
from optimum_fista.folder.packing import Packer, operators_by_tensor, packed_settings
from optimum_fista.folder.stored_names import split_index
from optimum_fista.folder.unpacking import PackedFiles, Packing, is_packed
from optimum_fista.folder.writing import write_form
from optimum_fista.packed.format import unpack, unpack_mask
from optimum_fista.packed.validation import SUFFIXES
from optimum_fista.solve.pattern import pack_mask

_Convert: TypeAlias = Callable[[Iterable[str], Callable[[str], Tensor]], dict[str, Tensor]]
_REWRITTEN = {CONFIG_FILE, CARD_FILE, MASKS_FILE}  # by `write_form`


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
        ValueError: If `folder` is packed already, has no zeros to pack, lacks a weight, or has `output` in it, or if a
            weight is not zero outside its mask.
    """
    if is_packed(folder):
        raise ValueError(f"folder {str(folder)!r} is packed already: pass a folder with dense weights.")
    require_files(folder, CONFIG_FILE, MASKS_FILE, REPORT_FILE)
    report, files = read_report(folder), checkpoint_files(folder)
    if report.removed:
        raise ValueError(
            f"folder {str(folder)!r} has no zeros to pack: whole parts of the model were removed, and what is left is "
            "dense. Use it as it is."
        )
    if missing := sorted(operators_by_tensor(report.operators).keys() - files.keys()):
        raise ValueError(f"folder {str(folder)!r} is damaged: no weight file has {missing[0]}, which its report names.")
    with safe_open(folder / MASKS_FILE, "pt") as masks:
        packer = Packer(report.operators, files, masks.get_tensor)

        def convert(names: Iterable[str], read: Callable[[str], Tensor]) -> dict[str, Tensor]:
            return packer.pack({name: read(name) for name in names})

        def settings(weights: str) -> dict[str, Any]:
            return packed_settings(weights, packer.names)

        _convert_folder(folder, output, files, ("model", "packed"), convert, {}, settings, overwrite, progress)
    return PackedFiles.of_folder(output).packing


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
    packed_files = PackedFiles.of_folder(folder)
    operators = operators_by_tensor(read_report(folder).operators)
    parts = {name + suffix: name for name in packed_files.names for suffix in SUFFIXES}
    masks: dict[str, Tensor] = {}

    def convert(names: Iterable[str], read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        written: dict[str, Tensor] = {}
        for stored in names:
            if stored not in parts:
                written[stored] = read(stored)
            elif stored.endswith(SUFFIXES[0]):
                name = parts[stored]
                packed = packed_files.read(name)
                written[name], mask = unpack(packed), unpack_mask(packed)
                masks.update({o.name: pack_mask(mask[split_index(o.name)[1]]) for o in operators.get(name, [])})
        return written

    _convert_folder(
        folder, output, packed_files.files, ("packed", "model"), convert, masks, lambda _: None, overwrite, progress
    )
    return packed_files.packing


def _convert_folder(
    folder: Path,
    output: Path,
    files: Mapping[str, Path],
    rename: tuple[str, str],
    convert: _Convert,
    masks: Mapping[str, Tensor],
    settings: Callable[[str], dict[str, Any] | None],
    overwrite: bool,
    progress: Callable[[str], None],
) -> None:
    """Copy a folder with its weight files converted one after another, and files that are no model's.

    `rename` says how the names of weight files begin, before and after. `convert` makes the tensors of a file, from
    their names before and a function that reads one; it may add to `masks`. `settings` makes what the new configuration
    says of packed weights, from the name of the weight file or index.
    """
    old, new = rename
    index = folder / f"{old}.safetensors.index.json"
    weights = sorted(set(files.values()))
    targets = {source: source.name.replace(old, new, 1) for source in weights}
    left = {index.name, FILES_FILE, *targets.values(), *(source.name for source in weights)}
    copied = [name for name in all_names(folder) if (folder / name).is_file() and name not in left]
    require_output(output, overwrite, source=folder)
    with new_output(output, overwrite, folder) as partial:
        (partial / MASKS_FILE).parent.mkdir(exist_ok=True)
        for name in [name for name in copied if name not in _REWRITTEN]:
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(folder / name, partial / name)
        weight_map: dict[str, str] = {}
        for source, target in targets.items():
            with safe_open(source, "pt") as file:
                tensors = convert([name for name in files if files[name] == source], file.get_tensor)
                write_file(partial / target, tensors, file.metadata() or {})
            weight_map |= dict.fromkeys(tensors, target)
            progress(target)
        weights_name = f"{new}.safetensors"
        if index.exists():
            weights_name = write_index(partial, new, weight_map, read_json(index).get("metadata", {}))
        card = (folder / CARD_FILE).read_text() if CARD_FILE in copied else None
        write_form(partial, read_json(folder / CONFIG_FILE), card, masks, settings(weights_name))
