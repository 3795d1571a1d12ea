"""Packed tensors in files: read and checked, and made dense while Transformers loads a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps, _IdentityOp

from optimum_fista.folder.checkpoint import CONFIG_FILE, PACKED_KEY, checkpoint_files, read_json
from optimum_fista.folder.packed_loading import QUANT_METHOD
from optimum_fista.folder.stored_names import split_index
from optimum_fista.packed.format import PackedTensor, check, packed_names, unpack, unpack_mask
from optimum_fista.packed.validation import SUFFIXES, PackedFormatError
from optimum_fista.report import OperatorReport, PruningReport
from optimum_fista.solve.pattern import pack_mask


@dataclass
class Packing:
    """What a packed folder saves.

    Attributes:
        num_tensors: Weights that are stored packed.
        dense_bytes: Their bytes as dense tensors.
        packed_bytes: Their bytes packed.
    """

    num_tensors: int
    dense_bytes: int
    packed_bytes: int

    def __str__(self) -> str:
        """A line for people."""
        ratio = self.packed_bytes / max(1, self.dense_bytes)
        return (
            f"{self.num_tensors} weights: {self.dense_bytes / 2**20:,.1f} MiB dense, "
            f"{self.packed_bytes / 2**20:,.1f} MiB packed ({ratio:.3f})"
        )


class Unpack(ConversionOps):
    """Makes dense tensors of the three parts of packed ones."""

    def __init__(self, hf_quantizer: Any = None) -> None:
        self.hf_quantizer = hf_quantizer

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: Sequence[str],  # noqa: ARG002, the protocol of conversions
        target_patterns: Sequence[str],
        model: PreTrainedModel | None = None,
        full_layer_name: str = "",
        **_: Any,
    ) -> dict[str, list[Tensor]]:
        """Lists of values, masks and layouts by their patterns -> lists of dense tensors, in the model's dtype.

        Tensors that are dense already keep their names. The others are named by the target, or, if other operations
        follow that merge several sources, as the values were.
        """
        dtype = None if model is None else model.get_parameter_or_buffer(full_layer_name).dtype
        stems = [pattern.removesuffix(SUFFIXES[0]) for pattern in input_dict if pattern.endswith(SUFFIXES[0])]
        found = {
            pattern: [tensor.to(dtype or tensor.dtype) for tensor in tensors]
            for pattern, tensors in input_dict.items()
            if not pattern.endswith(SUFFIXES)
        }
        for stem in stems:
            parts = [input_dict[stem + suffix] for suffix in SUFFIXES]
            parts = [part if isinstance(part, list) else [part] for part in parts]
            dense = []
            for values, mask, layout in zip(*parts, strict=True):
                packed = PackedTensor(values, mask, layout).without_checksum()  # compared when the files were checked
                dense.append(unpack(packed, full_layer_name or stem).to(dtype or values.dtype))
            found[stem if stem in target_patterns else stem + SUFFIXES[0]] = dense
        return found

    @property
    def reverse_op(self) -> ConversionOps:
        """A dense model is saved dense."""
        return _IdentityOp()


class PackedFiles:
    """The packed tensors of a checkpoint's files.

    Args:
        files: The file of every tensor of the checkpoint.

    Attributes:
        files: The same.
        names: Dense names of the packed tensors.
    """

    def __init__(self, files: Mapping[str, Path]) -> None:
        self.files = files
        self.names = packed_names(files)
        self._checked: set[str] = set()

    @classmethod
    def in_files(cls, paths: Sequence[str]) -> PackedFiles:
        """Those in safetensors files."""
        files: dict[str, Path] = {}
        for path in paths:
            with safe_open(path, "pt") as file:
                files |= dict.fromkeys(file.keys(), Path(path))
        return cls(files)

    @classmethod
    def of_folder(cls, folder: Path) -> PackedFiles:
        """Those of a packed folder."""
        weights = read_json(folder / CONFIG_FILE)[PACKED_KEY].get("weights")
        if not isinstance(weights, str):
            raise PackedFormatError(f"{str(folder / CONFIG_FILE)!r} is damaged: {PACKED_KEY} names no file of weights.")
        return cls(checkpoint_files(folder, weights.partition(".")[0]))

    def outline(self, name: str) -> PackedTensor:
        """A packed tensor, checked, as it is stored, with values and mask on the meta device."""
        packed = self._read(name)
        return PackedTensor(packed.values.to("meta"), packed.mask.to("meta"), packed.layout)

    def read(self, name: str) -> PackedTensor:
        """A packed tensor, checked, without its checksum."""
        return self._read(name).without_checksum()

    @property
    def packing(self) -> Packing:
        """The sizes of the packed weights; only headers and layouts are read."""
        found = []
        for name in self.names:
            with safe_open(self.files[name + SUFFIXES[0]], "pt") as file:
                parts = (file.get_slice(name + suffix) for suffix in SUFFIXES[:2])
                values, mask = (part[:0].new_empty(part.get_shape(), device="meta") for part in parts)
                found.append(PackedTensor(values, mask, file.get_tensor(name + SUFFIXES[2])))
        return Packing(len(found), sum(p.dense_bytes for p in found), sum(p.num_bytes for p in found))

    def _read(self, name: str) -> PackedTensor:
        """Each tensor is checked when it is read for the first time: checksums take a while."""
        parts = []
        for suffix in SUFFIXES:
            with safe_open(self.files[name + suffix], "pt") as file:
                parts.append(file.get_tensor(name + suffix))
        packed = PackedTensor(*parts)
        if name not in self._checked:
            check(packed, name)
            self._checked.add(name)
        return packed


def packed_operators(folder: Path, report: PruningReport) -> Iterator[tuple[OperatorReport, Tensor, Tensor]]:
    """Every operator of a packed folder with its weight, dense, and its mask, packed to bits as in the masks' file."""
    reader = PackedFiles.of_folder(folder)
    name, dense, mask = "", torch.empty(0), torch.empty(0)
    for operator in report.operators:
        tensor, index = split_index(operator.name)
        if tensor not in reader.names:
            raise PackedFormatError(f"{tensor} is in the report but not packed in the checkpoint.")
        if tensor != name:
            packed = reader.read(tensor)
            name, dense, mask = tensor, unpack(packed), unpack_mask(packed)
        yield operator, dense[index], pack_mask(mask[index])


def is_packed(folder: Path) -> bool:
    """Whether a model folder is packed."""
    file = folder / CONFIG_FILE
    settings = read_json(file).get(PACKED_KEY) if file.exists() else None
    return isinstance(settings, dict) and settings.get("quant_method") == QUANT_METHOD
