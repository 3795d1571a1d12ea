"""The tensors of a pruned checkpoint with its pruned weights packed, and what a packed folder says of itself."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from optimum_fista.packed.format import pack
from optimum_fista.run.checkpoints.stored_names import split_index
from optimum_fista.run.reports.report import OperatorReport
from optimum_fista.solve.bitmask import unpack_mask
from optimum_fista.solve.patterns import parse_pattern

QUANT_METHOD = "fista_packed"


@dataclass(frozen=True)
class Packing:
    """What packing or unpacking did.

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


class Packer:
    """Packs the pruned weights among the tensors of a checkpoint.

    Args:
        operators: Reports of the pruned operators, under the names of the checkpoint.
        names: Names of the checkpoint's tensors.
        read_mask: Mask of an operator by its name, packed by `solve.bitmask.pack_mask`.

    Attributes:
        names: The tensors that are packed: those that hold an operator, and other experts of their mixtures.
    """

    def __init__(
        self, operators: Iterable[OperatorReport], names: Iterable[str], read_mask: Callable[[str], Tensor]
    ) -> None:
        self._read_mask = read_mask
        self._operators: dict[str, list[str]] = {}
        self._patterns: dict[str, tuple[int, int] | None] = {}
        for operator in operators:
            name, index = split_index(operator.name)
            self._operators.setdefault(name, []).append(operator.name)
            if not operator.stored_transposed and not index:
                self._patterns[name] = parse_pattern(operator.pattern).n_of_m
        self.names = {*self._operators, *_siblings(self._operators, names)}
        self._sizes: list[tuple[int, int]] = []

    @property
    def packing(self) -> Packing:
        """What has been packed so far."""
        return Packing(len(self._sizes), sum(dense for dense, _ in self._sizes), sum(size for _, size in self._sizes))

    def pack(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors as a packed folder stores them.

        Raises:
            ValueError: If a weight is not zero outside its mask.
        """
        stored: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            if name not in self.names:
                stored[name] = tensor
                continue
            try:
                packed = pack(tensor, self._mask(name, tensor), self._patterns.get(name))
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
            self._sizes.append((packed.dense_bytes, packed.num_bytes))
            stored |= packed.named(name)
        return stored

    def _mask(self, name: str, tensor: Tensor) -> Tensor:
        """The mask of a tensor of the checkpoint; what belongs to no operator is kept."""
        mask = torch.ones(tensor.shape, dtype=torch.bool)
        for operator in self._operators.get(name, []):
            part = mask[split_index(operator)[1]]
            part.copy_(unpack_mask(self._read_mask(operator), tuple(part.shape)))
        return mask


def packed_settings(weights: str, names: Iterable[str]) -> dict[str, Any]:
    """What `config.json` says under `quantization_config`.

    Args:
        weights: File name of the weights, or of their index.
        names: Names of the packed weights.
    """
    parameters = sorted({name.rpartition(".")[2] for name in names})
    return {"quant_method": QUANT_METHOD, "runtime": "dense", "weights": weights, "parameters": parameters}


def _siblings(packed: Iterable[str], names: Iterable[str]) -> list[str]:
    """Weights of other experts of a mixture that has packed ones: loading merges them, so all are packed."""

    def mixture(name: str) -> str:
        return re.sub(r"\.\d+\.(?=[^.]+\.[^.]+$)", ".*.", name) if ".experts." in name else name

    kinds = {mixture(name) for name in packed if ".experts." in name}
    return [name for name in names if mixture(name) in kinds]
