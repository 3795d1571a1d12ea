"""Pack a model folder, unpack it, and read a packed one, with one weight file in memory at a time.

`Packer.pack` makes packed tensors from dense ones; the rest copies files. A streamed run packs each decoder layer by
the same `Packer`, so it writes the same bytes as `pack_folder`. A packed folder has no file of masks: they are in its
weights.
"""

import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from optimum_fista.folder.checkpoint import (
    CARD_FILE,
    CONFIG_FILE,
    MASKS_FILE,
    PACKED_KEY,
    REPORT_FILE,
    checkpoint_files,
    read_json,
    read_report,
    require_files,
    write_index,
)
from optimum_fista.folder.output import (
    FILES_FILE,
    all_names,
    new_output,
    require_output,
    write_file,
)
from optimum_fista.folder.writing import write_form
from optimum_fista.installing import NAME
from optimum_fista.packed.format import (
    SUFFIXES,
    PackedFormatError,
    PackedTensor,
    pack,
    packed_names,
    unpack,
)
from optimum_fista.packed.format import unpack_mask as packed_mask
from optimum_fista.packed.quantizer import QUANT_METHOD, read_packed
from optimum_fista.report import OperatorReport, PruningReport
from optimum_fista.solve.pattern import pack_mask, unpack_mask
from optimum_fista.source.names import split_index

_REWRITTEN = {CONFIG_FILE, CARD_FILE, MASKS_FILE}  # by `write_form`
_EXPERT = re.compile(r"\.experts\.\d+\.(?=[^.]+\.[^.]+$)")  # in `layers.1.mlp.experts.3.w1.weight`


@dataclass
class Packing:
    """Sizes of the weights that a packed folder stores packed."""

    num_tensors: int
    dense_bytes: int
    packed_bytes: int

    def __str__(self) -> str:
        sizes = f"{self.dense_bytes / 2**20:,.1f} MiB dense, {self.packed_bytes / 2**20:,.1f} MiB packed"
        return f"{self.num_tensors} weights: {sizes} ({self.packed_bytes / max(1, self.dense_bytes):.3f})"


def is_packed(folder: Path) -> bool:
    """True if a model folder is packed."""
    file = folder / CONFIG_FILE
    settings = read_json(file).get(PACKED_KEY) if file.exists() else None
    return isinstance(settings, dict) and settings.get("quant_method") == QUANT_METHOD


def packed_files(folder: Path) -> dict[str, Path]:
    """The file of every tensor of a packed folder."""
    weights = read_json(folder / CONFIG_FILE)[PACKED_KEY].get("weights")
    if not isinstance(weights, str):
        raise PackedFormatError(
            f"{str(folder / CONFIG_FILE)!r} is damaged: {PACKED_KEY} names no file of weights."
        )
    return checkpoint_files(folder, weights.partition(".")[0])


def packing_of(folder: Path) -> Packing:
    """The sizes of the packed weights of a folder; only headers and layouts are read."""
    found, files = [], packed_files(folder)
    for name in packed_names(files):
        with safe_open(files[name + SUFFIXES[0]], "pt") as file:
            parts = (file.get_slice(name + suffix) for suffix in SUFFIXES[:2])
            values, mask = (part[:0].new_empty(part.get_shape(), device="meta") for part in parts)
            found.append(PackedTensor(values, mask, file.get_tensor(name + SUFFIXES[2])))
    return Packing(len(found), sum(p.dense_bytes for p in found), sum(p.num_bytes for p in found))


def packed_operators(
    folder: Path, report: PruningReport
) -> Iterator[tuple[OperatorReport, Tensor, Tensor]]:
    """Every operator of a packed folder with its weight, dense, and its mask, packed to bits as in the masks' file."""
    files = packed_files(folder)
    names = {*packed_names(files)}
    read, dense, mask = "", torch.empty(0), torch.empty(0)
    for operator in report.operators:
        name, index = split_index(operator.name)
        if name not in names:
            raise PackedFormatError(f"{name} is in the report but not packed in the checkpoint.")
        if name != read:  # the experts of one tensor follow each other
            packed = read_packed(files, name)
            read, dense, mask = name, unpack(packed), packed_mask(packed)
        yield operator, dense[index], pack_mask(mask[index])


def require_packable(names: Iterable[str]) -> None:
    """Refuse to pack a matrix of several operators: Transformers divides it on loading, and can't then."""
    if shared := next((name for name in names if len(split_index(name)[1]) == 2), None):
        raise ValueError(
            f"{shared} is a part of a matrix with other operators, which can't be packed: leave it dense."
        )


def pack_folder(
    folder: Path,
    output: Path,
    *,
    overwrite: bool = False,
    progress: Callable[[str], None] = lambda _: None,
) -> Packing:
    """Pack a folder saved by optimum-fista, and copy its other files.

    `overwrite` replaces a model that `output` already holds. `progress` is called with the name of each weight file.
    """
    if is_packed(folder):
        raise ValueError(
            f"folder {str(folder)!r} is packed already: pass a folder with dense weights."
        )
    require_files(folder, CONFIG_FILE, MASKS_FILE, REPORT_FILE)
    report, files = read_report(folder), checkpoint_files(folder)
    if report.removed:
        why = "whole parts of the model were removed, and what is left is dense. Use it as it is"
        raise ValueError(f"folder {str(folder)!r} has no zeros to pack: {why}.")
    require_packable(operator.name for operator in report.operators)
    if missing := sorted(_operators_by_tensor(report.operators).keys() - files.keys()):
        raise ValueError(
            f"folder {str(folder)!r} is damaged: no weight file has {missing[0]}, which its report names."
        )
    with safe_open(folder / MASKS_FILE, "pt") as masks:
        packer = Packer(report.operators, files, masks.get_tensor)

        def convert(file: Any, names: Iterable[str]) -> dict[str, Tensor]:
            return packer.pack({name: file.get_tensor(name) for name in names})

        _convert_folder(folder, output, files, convert, {}, packer.names, overwrite, progress)
    return packing_of(output)


def unpack_folder(
    folder: Path,
    output: Path,
    *,
    overwrite: bool = False,
    progress: Callable[[str], None] = lambda _: None,
) -> Packing:
    """Make a packed folder dense again, with its masks; the inverse of `pack_folder`."""
    if not is_packed(folder):
        raise ValueError(
            f"folder {str(folder)!r} is not packed: pass a folder made by `optimum-fista pack`."
        )
    files, operators = packed_files(folder), _operators_by_tensor(read_report(folder).operators)
    parts = {name + suffix: name for name in packed_names(files) for suffix in SUFFIXES}
    masks: dict[str, Tensor] = {}

    def convert(file: Any, names: Iterable[str]) -> dict[str, Tensor]:
        dense: dict[str, Tensor] = {}
        for stored in names:
            if stored not in parts:
                dense[stored] = file.get_tensor(stored)
            elif stored.endswith(SUFFIXES[0]):  # once for three parts
                name = parts[stored]
                packed = read_packed(files, name)
                dense[name], mask = unpack(packed), packed_mask(packed)
                masks.update(
                    {
                        o.name: pack_mask(mask[split_index(o.name)[1]])
                        for o in operators.get(name, [])
                    }
                )
        return dense

    _convert_folder(folder, output, files, convert, masks, None, overwrite, progress)
    return packing_of(folder)


def _convert_folder(
    folder: Path,
    output: Path,
    files: Mapping[str, Path],
    convert: Callable[[Any, Iterable[str]], dict[str, Tensor]],
    masks: Mapping[str, Tensor],
    packed: Iterable[str] | None,
    overwrite: bool,
    progress: Callable[[str], None],
) -> None:
    """Copy a folder with its other files, and convert its weight files one after another.

    `convert` makes the tensors of an open weight file, from the names that it must hold; it may add to `masks`.
    `packed` names the weights that are packed then; `None`: they are dense.
    """
    old, new = ("model", "packed") if packed is not None else ("packed", "model")
    index = folder / f"{old}.safetensors.index.json"
    weights = sorted(set(files.values()))
    targets = {source: source.name.replace(old, new, 1) for source in weights}
    left = {index.name, FILES_FILE, *targets.values(), *(source.name for source in weights)}
    copied = [name for name in all_names(folder) if (folder / name).is_file() and name not in left]
    require_output(output, overwrite, source=folder)
    with new_output(output, overwrite, folder) as partial:
        (partial / MASKS_FILE).parent.mkdir(exist_ok=True)
        for name in (name for name in copied if name not in _REWRITTEN):
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(
                folder / name, partial / name
            )  # with its time: `files.json` notes that of weights
        weight_map: dict[str, str] = {}
        for source, target in targets.items():
            with safe_open(source, "pt") as file:
                tensors = convert(file, [name for name in files if files[name] == source])
                write_file(partial / target, tensors, file.metadata() or {})
            weight_map |= dict.fromkeys(tensors, target)
            progress(target)
        weights_name = f"{new}.safetensors"
        if index.exists():
            weights_name = write_index(
                partial, new, weight_map, read_json(index).get("metadata", {})
            )
        card = (folder / CARD_FILE).read_text("utf-8") if CARD_FILE in copied else None
        settings = None if packed is None else packed_settings(weights_name, packed)
        write_form(partial, read_json(folder / CONFIG_FILE), card, masks, settings)


class Packer:
    """Packs the pruned weights among the tensors of a checkpoint.

    `names` are those that hold an operator, and other experts of their mixtures.
    """

    def __init__(
        self,
        operators: Iterable[OperatorReport],
        names: Iterable[str],
        read_mask: Callable[[str], Tensor],
    ) -> None:
        self._read_mask = (
            read_mask  # of an operator by its name, packed by `solve.pattern.pack_mask`
        )
        self._operators = _operators_by_tensor(operators)
        # Loading merges the experts of a mixture, so all are packed if some are.
        kinds = {
            kind for name in self._operators if (kind := _EXPERT.sub(".experts.*.", name)) != name
        }
        self.names = {
            *self._operators,
            *(name for name in names if _EXPERT.sub(".experts.*.", name) in kinds),
        }

    def pack(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors as a packed folder stores them."""
        stored: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            if name not in self.names:
                stored[name] = tensor
                continue
            mask = torch.ones(tensor.shape, dtype=torch.bool)  # what belongs to no operator is kept
            for operator in self._operators.get(name, []):
                part = mask[split_index(operator.name)[1]]  # a view, which is written to
                part.copy_(unpack_mask(self._read_mask(operator.name), tuple(part.shape)))
            try:
                stored |= pack(tensor, mask).named(name)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
        return stored


def _operators_by_tensor(operators: Iterable[OperatorReport]) -> dict[str, list[OperatorReport]]:
    """The operators that each tensor of a checkpoint holds; several experts may share one."""
    found: dict[str, list[OperatorReport]] = {}
    for operator in operators:
        found.setdefault(split_index(operator.name)[0], []).append(operator)
    return found


def packed_settings(weights: str, names: Iterable[str]) -> dict[str, Any]:
    """The value of `quantization_config` in `config.json`: file name of the weights or their index, packed names."""
    return {
        "quant_method": QUANT_METHOD,
        "runtime": "dense",
        "weights": weights,
        "parameters": sorted({name.rpartition(".")[2] for name in names}),
        # for users whose Transformers reported an unknown quantization method
        "note": f"packed by {NAME}: import optimum_fista.packed before from_pretrained, or run `optimum-fista unpack`",
    }
