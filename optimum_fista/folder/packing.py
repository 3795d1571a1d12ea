"""The tensors of a pruned checkpoint with its pruned weights packed, and what a packed folder says of itself."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from optimum_fista.folder.packed_loading import QUANT_METHOD
from optimum_fista.folder.stored_names import split_index
from optimum_fista.installing import NAME
from optimum_fista.packed.format import PackedTensor, pack
from optimum_fista.report import OperatorReport
from optimum_fista.solve.pattern import unpack_mask
from optimum_fista.solve.patterns import parse_pattern


class Packer:
    """Packs the pruned weights among the tensors of a checkpoint.

    Args:
        operators: Reports of the pruned operators, under the names of the checkpoint.
        names: Names of the checkpoint's tensors.
        read_mask: Mask of an operator by its name, packed by `solve.pattern.pack_mask`.

    Attributes:
        names: The tensors that are packed: those that hold an operator, and other experts of their mixtures.
    """

    def __init__(
        self, operators: Iterable[OperatorReport], names: Iterable[str], read_mask: Callable[[str], Tensor]
    ) -> None:
        self._read_mask = read_mask
        self._operators = operators_by_tensor(operators)
        self.names = {*self._operators, *_siblings(self._operators, names)}

    def pack(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors as a packed folder stores them."""
        stored: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            if name not in self.names:
                stored[name] = tensor
                continue
            try:
                packed = self._pack(tensor, self._operators.get(name, []))
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
            stored |= packed.named(name)
        return stored

    def _pack(self, tensor: Tensor, operators: Iterable[OperatorReport]) -> PackedTensor:
        """What belongs to no operator is kept; groups along the inputs are those of rows only if these are stored."""
        mask, n_of_m = torch.ones(tensor.shape, dtype=torch.bool), None
        for operator in operators:
            index = split_index(operator.name)[1]
            part = mask[index]
            part.copy_(unpack_mask(self._read_mask(operator.name), tuple(part.shape)))
            if not operator.stored_transposed and not index:
                n_of_m = parse_pattern(operator.pattern).n_of_m
        return pack(tensor, mask, n_of_m)


def operators_by_tensor(operators: Iterable[OperatorReport]) -> dict[str, list[OperatorReport]]:
    """The operators that each tensor of a checkpoint holds; several experts may share one."""
    found: dict[str, list[OperatorReport]] = {}
    for operator in operators:
        found.setdefault(split_index(operator.name)[0], []).append(operator)
    return found


def packed_settings(weights: str, names: Iterable[str]) -> dict[str, Any]:
    """What `config.json` says under `quantization_config`.

    `weights` is the file name of the weights, or of their index, and `names` are those of the packed ones.
    """
    parameters = sorted({name.rpartition(".")[2] for name in names})
    return {
        "quant_method": QUANT_METHOD,
        "runtime": "dense",
        "weights": weights,
        "parameters": parameters,
        # for who looks here because Transformers said that it does not know the method
        "note": f"packed by {NAME}: import optimum_fista.packed before from_pretrained, or run `optimum-fista unpack`",
    }


def _siblings(packed: Iterable[str], names: Iterable[str]) -> list[str]:
    """Weights of other experts of a mixture that has packed ones: loading merges them, so all are packed."""

    def mixture(name: str) -> str:
        return re.sub(r"\.\d+\.(?=[^.]+\.[^.]+$)", ".*.", name) if ".experts." in name else name

    kinds = {mixture(name) for name in packed if ".experts." in name}
    return [name for name in names if mixture(name) in kinds]
