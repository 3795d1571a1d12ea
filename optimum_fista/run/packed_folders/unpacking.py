"""Packed tensors becoming weights of a model while Transformers loads it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps, _IdentityOp

from optimum_fista.packed.format import PackedTensor, check, packed_names, unpack
from optimum_fista.packed.validation import SUFFIXES


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

        Tensors that are dense already keep their names. The others are named by the target, or, where other operations
        follow that merge several sources, as the values were.

        Raises:
            PackedFormatError: If the parts are not those of a packed tensor.
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
                dense.append(unpack(PackedTensor(values, mask, layout)).to(dtype or values.dtype))
            found[stem if stem in target_patterns else stem + SUFFIXES[0]] = dense
        return found

    @property
    def reverse_op(self) -> ConversionOps:
        """A dense model is saved dense."""
        return _IdentityOp()


class PackedFiles:
    """The packed tensors of a checkpoint's files, checked: masks and layouts are read, values are not.

    Raises:
        PackedFormatError: If one of the parts of a tensor is missing, or they are not those of a packed tensor.
    """

    def __init__(self, files: Sequence[str]) -> None:
        self._file_of: dict[str, str] = {}
        for file in files:
            with safe_open(file, "pt") as tensors:
                self._file_of |= dict.fromkeys(tensors.keys(), str(file))
        self.names = packed_names(self._file_of)
        for name in self.names:
            values, mask, layout = (name + suffix for suffix in SUFFIXES)
            check(PackedTensor(self._empty(values), self._read(mask), self._read(layout)), name)

    def read(self, name: str) -> PackedTensor:
        """A packed tensor."""
        return PackedTensor(*(self._read(name + suffix) for suffix in SUFFIXES))

    def num_kept(self, name: str) -> int:
        """Number of weights that a packed tensor keeps."""
        return self._empty(name + SUFFIXES[0]).numel()

    def layout(self, name: str) -> list[int]:
        """The layout of a packed tensor: version, n, m and the shape."""
        numbers: list[int] = self._read(name + SUFFIXES[2]).tolist()
        return numbers

    def _read(self, name: str) -> Tensor:
        with safe_open(self._file_of[name], "pt") as tensors:
            return tensors.get_tensor(name)

    def _empty(self, name: str) -> Tensor:
        with safe_open(self._file_of[name], "pt") as tensors:
            part = tensors.get_slice(name)
            return torch.empty(part.get_shape(), dtype=part[:0].dtype, device="meta")
