"""Pack a model folder, unpack it, and read a packed one, with one weight file in memory at a time.

A packed folder stores each pruned weight as three tensors (`packed.format`), in files called `packed*.safetensors`:
values, mask and layout, whose names are that of the weight and one of `SUFFIXES`. One file has all three. A packed
folder has no file of masks, because they are in its weights. `pack_folder` and `unpack_folder` copy all other files. A
streamed run packs each decoder layer by the same `Packer`, so it writes the same bytes as `pack_folder`.

A *mask* tells which weights are kept. It stands in two forms: packed masks of `solve.pattern.pack_mask`, one bit for
each weight of an operator, are in the file of masks; a packed tensor has a mask of its own, with padded rows
(`packed.format`). The name of an operator is that of its weight in the files, with an index if the weight is a part of
a tensor, such as "experts.gate_up_proj[3]". `split_index` divides it into the name of the tensor and the index.
"""

import logging
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from optimum_fista.atomic import write_file
from optimum_fista.folder.checkpoint import (
    CARD_FILE,
    MASKS_FILE,
    REPORT_FILE,
    read_report,
    require_files,
)
from optimum_fista.folder.output import FILES_FILE, all_names, new_output, require_output
from optimum_fista.folder.writing import write_masks_card_and_config
from optimum_fista.installing import NAME
from optimum_fista.packed.format import (
    SUFFIXES,
    VALUES_SUFFIX,
    PackedFormatError,
    PackedTensor,
    pack,
    packed_names,
    unpack,
)
from optimum_fista.packed.format import unpack_mask as boolean_mask
from optimum_fista.packed.quantizer import QUANT_METHOD, read_packed
from optimum_fista.records import OperatorReport
from optimum_fista.report import PruningReport
from optimum_fista.solve.pattern import pack_mask, unpack_mask
from optimum_fista.source.links import leads_out
from optimum_fista.source.model_folder import (
    CONFIG_FILE,
    PACKED_KEY,
    checkpoint_files,
    read_json,
    write_index,
)
from optimum_fista.source.names import split_index

_REWRITTEN = {CONFIG_FILE, CARD_FILE, MASKS_FILE}  # by `write_masks_card_and_config`
_EXPERT = re.compile(r"\.experts\.\d+\.(?=[^.]+\.[^.]+$)")
"""The number of an expert in a name such as `layers.1.mlp.experts.3.w1.weight`."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Packing:
    """Sizes of the weights that a packed folder stores packed."""

    num_tensors: int
    dense_bytes: int
    packed_bytes: int

    def __str__(self) -> str:
        """Say the sizes in one line."""
        ratio = self.packed_bytes / max(1, self.dense_bytes)  # 0 if there are no weights
        return (
            f"{self.num_tensors} weights: {self.dense_bytes / 2**20:,.1f} MiB dense, "
            f"{self.packed_bytes / 2**20:,.1f} MiB packed ({ratio:.3f})"
        )


def is_packed(folder: Path) -> bool:
    """Tell whether a model folder is packed, by the entry `quantization_config` of its `config.json`."""
    file = folder / CONFIG_FILE
    if not file.exists():
        return False
    settings = read_json(file).get(PACKED_KEY)
    return isinstance(settings, dict) and settings.get("quant_method") == QUANT_METHOD


def packed_files(folder: Path) -> dict[str, Path]:
    """Return the file of every stored tensor of a packed folder, by the tensor's name.

    Such a name is "model.layers.0.mlp.up_proj.weight_mask". `config.json` names the file of weights, or their index.
    """
    weights = read_json(folder / CONFIG_FILE)[PACKED_KEY].get("weights")
    if not isinstance(weights, str):
        raise PackedFormatError(
            f"{str(folder / CONFIG_FILE)!r} is damaged: {PACKED_KEY} names no file of weights."
        )
    # "packed", of "packed.safetensors" or "packed.safetensors.index.json"
    stem, _, _ = weights.partition(".")
    return checkpoint_files(folder, stem)


def packing_of(folder: Path) -> Packing:
    """Return the sizes of the packed weights of a packed folder; only headers and layouts are read."""
    packed = packed_outlines(folder).values()
    return Packing(
        num_tensors=len(packed),
        dense_bytes=sum(tensor.dense_bytes for tensor in packed),
        packed_bytes=sum(tensor.num_bytes for tensor in packed),
    )


def packed_outlines(folder: Path) -> dict[str, PackedTensor]:
    """Return the packed weights of a folder by the names of the dense ones, with values and masks on the meta device.

    Such a name is "model.layers.0.mlp.up_proj.weight". Only headers and layouts are read.
    """
    # the path of the file of each stored tensor, by the tensor's name
    file_of = packed_files(folder)
    packed = {}
    for name in packed_names(file_of):
        values_name, mask_name, layout_name = [name + suffix for suffix in SUFFIXES]
        # the file of the values has the mask and the layout, too
        with safe_open(file_of[values_name], "pt") as opened:
            values = _outline(opened.get_slice(values_name))
            mask = _outline(opened.get_slice(mask_name))
            packed[name] = PackedTensor(values, mask, opened.get_tensor(layout_name))
    return packed


def _outline(stored: Any) -> Tensor:
    """Return a tensor on the meta device, with the shape and dtype of a slice of safetensors, which is not read."""
    no_rows = stored[:0]  # a slice without rows, which has the dtype
    return no_rows.new_empty(stored.get_shape(), device="meta")


def packed_operators(
    folder: Path, report: PruningReport
) -> Iterator[tuple[OperatorReport, Tensor, Tensor]]:
    """Yield every operator of a packed folder: its report, its unpacked weight (zeros included), and its mask.

    First come those that the run pruned, then those whose masks it carried over; one may come twice. The mask is packed
    to one bit a weight, as in the file of masks of a folder that is not packed. An operator that only lost columns in
    this run has a mask that keeps all weights. Nothing is changed.

    Args:
        folder: A packed folder.
        report: The report in it.
    """
    files = packed_files(folder)  # by the names of all stored tensors
    names = set(packed_names(files))  # of the weights that are stored packed
    carried = {operator.name for operator in report.carried}
    # The operators that each tensor holds, by whether this run pruned them, and by the name of the tensor. Reports list
    # expert after expert; a tensor that holds a weight of every expert is read once for all of them.
    by_tensor = defaultdict[tuple[bool, str], list[OperatorReport]](list)
    for is_of_this_run, operators in ((True, report.operators), (False, report.carried)):
        for operator in operators:
            by_tensor[is_of_this_run, _tensor_of(operator.name)].append(operator)
    for (is_of_this_run, name), operators_of_tensor in by_tensor.items():
        if name in names:
            packed = read_packed(files, name)
            dense = unpack(packed)
            mask = boolean_mask(packed)
        elif report.removed and name in files:
            # A run that removes parts sets no zeros. So only weights with zeros of an earlier run are packed, and the
            # others are stored as usual.
            with safe_open(files[name], "pt") as file:
                dense = file.get_tensor(name)
            mask = torch.ones(dense.shape, dtype=torch.bool)
        else:
            raise PackedFormatError(f"{name} is in the report but not packed in the checkpoint.")

        for operator in operators_of_tensor:
            # Where the weight of the operator is in the tensor; () is the whole tensor.
            _, index = split_index(operator.name)
            mask_of_operator = mask[index]
            if is_of_this_run and operator.name in carried:
                # This run removed columns and set no zeros: all weights are kept. The operator comes once more at the
                # end, among `report.carried`, with the mask of an earlier run.
                mask_of_operator = torch.ones_like(mask_of_operator)
            yield operator, dense[index], pack_mask(mask_of_operator)


def packed_masks(folder: Path, operators: Iterable[str]) -> dict[str, Tensor]:
    """Read the masks of operators of a packed folder, by their names in its report, packed to one bit a weight.

    Operators that are not stored packed have no mask here. Only the tensors of these operators are read.
    """
    files = packed_files(folder)  # by the names of all stored tensors
    names = set(packed_names(files))  # of the weights that are stored packed
    masks = {}
    # A tensor may hold the operators of several experts. Sorted, they follow each other, and it is read once for all.
    by_tensor = sorted(operators, key=_tensor_of)
    for name, operators_of_tensor in groupby(by_tensor, key=_tensor_of):
        if name not in names:
            continue
        mask = boolean_mask(read_packed(files, name))
        for operator in operators_of_tensor:
            _, index = split_index(operator)
            masks[operator] = pack_mask(mask[index])
    return masks


def _tensor_of(operator: str) -> str:
    """Return the name of the tensor in the files that holds an operator: that of the operator without its index."""
    name, _ = split_index(operator)
    return name


def operators_to_pack(report: PruningReport) -> list[OperatorReport]:
    """Return the operators of a folder that are stored packed, by its report: those whose masks set weights to zero.

    These are all with a mask (`report.masked`). But a run that removed parts sets no zeros itself: then they are those
    whose masks of earlier runs it carried.
    """
    return report.carried if report.removed else report.masked


def require_packable(names: Iterable[str]) -> None:
    """Refuse to pack a matrix of several operators: Transformers divides it on loading, and can't divide a packed one.

    `names` are those of the operators' weights in the checkpoint (`source.names.split_index`).
    """
    for name in names:
        _, index = split_index(name)
        # Rows and columns. The index of an expert begins with its number: [3] or [3, rows, columns].
        is_part_of_matrix = len(index) == 2
        if is_part_of_matrix:
            raise ValueError(
                f"{name} is a part of a matrix with other operators, which can't be packed: leave it dense."
            )


def pack_folder(
    folder: Path,
    output: Path,
    *,
    overwrite: bool = False,
    progress: Callable[[str], None] = lambda _: None,
) -> Packing:
    """Pack a folder saved by optimum-fista into the folder `output`, and copy its other files.

    Args:
        folder: The pruned model. It is only read.
        output: The new folder.
        overwrite: Replace a model that `output` already holds.
        progress: Called with the name of each weight file, after it is written.

    Returns:
        The sizes of the packed weights.

    Raises:
        ValueError, OSError: If the folder can't be packed, or the output can't be written.
    """
    if is_packed(folder):
        raise ValueError(
            f"folder {str(folder)!r} is packed already: pass a folder with dense weights."
        )
    require_files(folder, CONFIG_FILE, MASKS_FILE, REPORT_FILE)
    report = read_report(folder)
    files = checkpoint_files(folder)  # the path of the file of each tensor, by its name
    operators = operators_to_pack(report)
    if not operators:
        raise ValueError(
            f"folder {str(folder)!r} has no zeros to pack: whole parts of the model were removed, and what is left is "
            "dense. Use it as it is."
        )
    require_packable(operator.name for operator in operators)
    missing = sorted(_operators_by_tensor(operators).keys() - files.keys())
    if missing:
        raise ValueError(
            f"folder {str(folder)!r} is damaged: no weight file has {missing[0]}, which its report names."
        )

    with safe_open(folder / MASKS_FILE, "pt") as masks:
        packer = Packer(operators, files, masks.get_tensor)
        _convert_folder(
            folder,
            output,
            files=files,
            convert=packer.pack_from,
            masks={},  # they are in the packed weights
            packed=packer.names,
            overwrite=overwrite,
            progress=progress,
        )
    return packing_of(output)


def unpack_folder(
    folder: Path,
    output: Path,
    *,
    overwrite: bool = False,
    progress: Callable[[str], None] = lambda _: None,
) -> Packing:
    """Make a packed folder dense again, with its file of masks, and copy its other files: undoes `pack_folder`.

    Args:
        folder: The packed folder. It is only read.
        output: The new folder.
        overwrite: Replace a model that `output` already holds.
        progress: Called with the name of each weight file, after it is written.

    Returns:
        The sizes of the weights that were packed.

    Raises:
        ValueError, OSError: If the folder is not packed or damaged, or the output can't be written.
    """
    if not is_packed(folder):
        raise ValueError(
            f"folder {str(folder)!r} is not packed: pass a folder made by `optimum-fista pack`."
        )
    files = packed_files(folder)
    unpacker = _Unpacker(files, read_report(folder).masked)
    _convert_folder(
        folder,
        output,
        files=files,
        convert=unpacker.unpack_from,
        masks=unpacker.masks,  # all are there after the last file
        packed=None,
        overwrite=overwrite,
        progress=progress,
    )
    return packing_of(folder)


def _convert_folder(
    folder: Path,
    output: Path,
    *,
    files: Mapping[str, Path],
    convert: Callable[[Any, Iterable[str]], dict[str, Tensor]],
    masks: Mapping[str, Tensor],
    packed: Iterable[str] | None,
    overwrite: bool,
    progress: Callable[[str], None],
) -> None:
    """Write a new folder with the converted weights of another one, and copies of its other files.

    Links that lead out of the folder are not followed; a warning names them. `folder` itself is only read.

    Args:
        folder: The folder that is read.
        output: The new folder, which has its place only after all is written.
        files: The weight file of every stored tensor of `folder`.
        convert: Makes the new tensors from an open weight file and the names of its tensors.
        masks: Masks for the new folder's file of masks, which is written at the end: `convert` may add to them.
        packed: Names of the weights that are packed in the new folder; `None`: they are dense there, and packed in
            `folder`.
        overwrite: Replace a model that `output` already holds.
        progress: Called with the name of each new weight file, after it is written.
    """
    # First parts of the names of weight files.
    old_stem = "packed" if packed is None else "model"
    new_stem = "model" if packed is None else "packed"
    index = folder / f"{old_stem}.safetensors.index.json"
    weights = sorted(set(files.values()))
    # of the new file, by the path of the old one
    new_names = {file: file.name.replace(old_stem, new_stem, 1) for file in weights}
    old_names = [file.name for file in weights]
    others = _other_files(folder, {index.name, FILES_FILE, *old_names, *new_names.values()})

    require_output(output, overwrite, source=folder)
    with new_output(output, overwrite, folder) as unfinished:
        (unfinished / MASKS_FILE).parent.mkdir(exist_ok=True)
        for name in others:
            if name not in _REWRITTEN:
                (unfinished / name).parent.mkdir(parents=True, exist_ok=True)
                # With its time of change, which `fista/files.json` notes of weights.
                shutil.copy2(folder / name, unfinished / name)

        weight_map = _convert_weights(
            unfinished, files=files, new_names=new_names, convert=convert, progress=progress
        )
        weights_name = f"{new_stem}.safetensors"
        if index.exists():
            metadata = read_json(index).get("metadata", {})
            weights_name = write_index(unfinished, new_stem, weight_map, metadata)

        config = read_json(folder / CONFIG_FILE)
        card = (folder / CARD_FILE).read_text("utf-8") if CARD_FILE in others else None
        settings = None if packed is None else packed_settings(weights_name, packed)
        write_masks_card_and_config(unfinished, config, card, masks, settings)


def _convert_weights(
    unfinished: Path,
    *,
    files: Mapping[str, Path],
    new_names: Mapping[Path, str],
    convert: Callable[[Any, Iterable[str]], dict[str, Tensor]],
    progress: Callable[[str], None],
) -> dict[str, str]:
    """Write the new weight files of `_convert_folder` into the new folder, `unfinished`, one after the other.

    `new_names` has the name of each new file, by the path of the old one. `files`, `convert` and `progress` are those
    of `_convert_folder`. Returns the name of the new file of each new tensor, by the tensor's name.
    """
    weight_map: dict[str, str] = {}
    for file, new_name in new_names.items():
        names_of_file = [name for name in files if files[name] == file]
        with safe_open(file, "pt") as opened:
            tensors = convert(opened, names_of_file)
            write_file(unfinished / new_name, tensors, opened.metadata() or {})
        weight_map |= dict.fromkeys(tensors, new_name)
        progress(new_name)
    return weight_map


def _other_files(folder: Path, excluded: set[str]) -> list[str]:
    """Return the names of the files in a folder, except those `excluded` and links that lead out of the folder.

    A logged warning names the links. Names are relative to the folder, such as "fista/report.json", also those in
    `excluded`.
    """
    names = [name for name in all_names(folder) if name not in excluded]
    outside = [name for name in names if leads_out(folder / name, folder)]
    if outside:
        logger.warning(
            "not copied, because the links lead out of the folder: %s", ", ".join(outside)
        )
    return [name for name in names if name not in outside]


class Packer:
    """Packs the pruned weights among the tensors of a checkpoint.

    Args:
        operators: Reports of the operators to pack (`operators_to_pack`), with their names in the checkpoint.
        names: Names of all tensors of the checkpoint.
        read_mask: Returns the mask of an operator by its name, packed by `solve.pattern.pack_mask`.

    Attributes:
        names: Names of the tensors that it packs: those that hold an operator, and other experts of their mixtures.
    """

    def __init__(
        self,
        operators: Iterable[OperatorReport],
        names: Iterable[str],
        read_mask: Callable[[str], Tensor],
    ) -> None:
        """Find the tensors to pack, and note their names in `self.names`; nothing is read yet.

        The docstring of the class explains the arguments. `operators` have names such as
        "model.layers.0.mlp.up_proj.weight".
        """
        self._read_mask = read_mask
        self._operators = _operators_by_tensor(operators)

        # Loading merges the experts of a mixture, so all are packed if some are. `merged_names` are names without the
        # number of an expert, such as "layers.1.mlp.experts.*.w1.weight".
        merged_names = set()
        for name in self._operators:
            merged_name = _EXPERT.sub(".experts.*.", name)
            is_of_expert = merged_name != name
            if is_of_expert:
                merged_names.add(merged_name)
        self.names = set(self._operators)
        for name in names:
            if _EXPERT.sub(".experts.*.", name) in merged_names:
                self.names.add(name)

    def pack_from(self, file: Any, names: Iterable[str]) -> dict[str, Tensor]:
        """Read the tensors `names` of an open weight file, and return them as a packed folder stores them (`pack`)."""
        return self.pack({name: file.get_tensor(name) for name in names})

    def pack(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return tensors of the checkpoint as a packed folder stores them: three for each that is packed.

        Tensors that are not packed (not in `self.names`) are returned as they are. `self._operators` are reports of the
        operators that each tensor holds, by its name. Their masks are read (`self._read_mask`); nothing is changed.

        Args:
            tensors: By their names in the checkpoint, such as "model.layers.0.mlp.up_proj.weight".

        Raises:
            ValueError: If a weight outside of its mask is not zero; the message names the tensor.
        """
        stored: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            if name not in self.names:
                stored[name] = tensor
                continue
            mask = torch.ones(tensor.shape, dtype=torch.bool)  # what belongs to no operator is kept
            for operator in self._operators.get(name, []):
                # The index is (), all of the tensor, if the name has none.
                _, index = split_index(operator.name)
                part = mask[index]  # a view: `mask` is written to
                part.copy_(unpack_mask(self._read_mask(operator.name), tuple(part.shape)))
            try:
                packed = pack(tensor, mask)  # the function of `packed.format`, not this method
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
            stored |= packed.named(name)
        return stored


class _Unpacker:
    """Unpacks the weights of a packed folder, the inverse of `Packer`.

    Attributes:
        masks: The masks of all operators that were in the tensors so far, packed to one bit a weight (`pack_mask`), by
            the operator's name.
    """

    def __init__(self, files: Mapping[str, Path], operators: Iterable[OperatorReport]) -> None:
        """Find the packed tensors among those of a folder; nothing is read yet.

        Args:
            files: The weight file of every stored tensor.
            operators: Reports of all operators with a mask.
        """
        self.masks: dict[str, Tensor] = {}
        self._files = files
        self._operators = _operators_by_tensor(operators)
        # Names of the dense tensors, by those of their three packed parts.
        self._dense_names: dict[str, str] = {}
        for name in packed_names(files):
            for suffix in SUFFIXES:
                self._dense_names[name + suffix] = name

    def unpack_from(self, file: Any, stored_names: Iterable[str]) -> dict[str, Tensor]:
        """Return the tensors `stored_names` of an open weight file in their dense form, by their dense names.

        Adds the mask of each operator in them to `self.masks`.
        """
        dense: dict[str, Tensor] = {}
        for stored_name in stored_names:
            if stored_name not in self._dense_names:  # it is not packed
                tensor = file.get_tensor(stored_name)
                dense[stored_name] = tensor
                # Most such tensors hold no operator with a mask. Operators that only lost columns are here, too: they
                # are not packed, and their masks keep all weights.
                if stored_name in self._operators:
                    self._add_masks(stored_name, torch.ones(tensor.shape, dtype=torch.bool))
            elif stored_name.endswith(VALUES_SUFFIX):
                # A packed tensor is read once, when its values are met. Its mask and its layout are skipped.
                name = self._dense_names[stored_name]
                packed = read_packed(self._files, name)  # opens the same file again
                dense[name] = unpack(packed)
                self._add_masks(name, boolean_mask(packed))
        return dense

    def _add_masks(self, name: str, mask: Tensor) -> None:
        """Add the masks of the operators in the dense tensor `name`, whose mask is `mask`, to `self.masks`."""
        for operator in self._operators.get(name, []):
            _, index = split_index(operator.name)  # an empty tuple for the whole tensor
            self.masks[operator.name] = pack_mask(mask[index])


def _operators_by_tensor(operators: Iterable[OperatorReport]) -> dict[str, list[OperatorReport]]:
    """Return the operators that each tensor of a checkpoint holds, by the tensor's name.

    A tensor may hold several experts. `operators` are reports whose names are those of the checkpoint, such as
    "experts.gate_up_proj[3]".
    """
    by_tensor: dict[str, list[OperatorReport]] = {}
    for operator in operators:
        by_tensor.setdefault(_tensor_of(operator.name), []).append(operator)
    return by_tensor


def packed_settings(weights: str, names: Iterable[str]) -> dict[str, Any]:
    """Return the value of `quantization_config` in the `config.json` of a packed folder.

    `weights` is the name of the weight file or of their index, and `names` are those of the packed tensors.
    """
    return {
        "quant_method": QUANT_METHOD,
        "runtime": "dense",
        "weights": weights,
        # Last parts of the names, such as "weight".
        "parameters": sorted({name.rpartition(".")[2] for name in names}),
        # for users whose Transformers reported an unknown quantization method
        "note": f"packed by {NAME}: import optimum_fista.packed before from_pretrained, or run `optimum-fista unpack`",
    }
