"""Packed tensors becoming weights of a model while Transformers loads it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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

        Tensors that are dense already keep their names. The others are named by the target, or, if other operations
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
                packed = PackedTensor(values, mask, layout).without_checksum()  # compared when the files were checked
                dense.append(unpack(packed, full_layer_name or stem).to(dtype or values.dtype))
            found[stem if stem in target_patterns else stem + SUFFIXES[0]] = dense
        return found

    @property
    def reverse_op(self) -> ConversionOps:
        """A dense model is saved dense."""
        return _IdentityOp()


class PackedFiles:
    """The packed tensors of a checkpoint's files, each read once and checked.

    Attributes:
        names: Their names.
        outlines: By these, their layouts, with values and masks on the meta device.

    Raises:
        PackedFormatError: If one of the parts of a tensor is missing, or they are not those of a packed tensor.
    """

    def __init__(self, files: Sequence[str]) -> None:
        self._file_of: dict[str, str] = {}
        for file in files:
            with safe_open(file, "pt") as tensors:
                self._file_of |= dict.fromkeys(tensors.keys(), str(file))
        self.names = packed_names(self._file_of)
        self.outlines: dict[str, PackedTensor] = {}
        for name in self.names:
            packed = self._stored(name)
            check(packed, name)
            self.outlines[name] = PackedTensor(packed.values.to("meta"), packed.mask.to("meta"), packed.layout)

    def read(self, name: str) -> PackedTensor:
        """A packed tensor, without its checksum."""
        return self._stored(name).without_checksum()

    def _stored(self, name: str) -> PackedTensor:
        parts = []
        for suffix in SUFFIXES:
            with safe_open(self._file_of[name + suffix], "pt") as tensors:
                parts.append(tensors.get_tensor(name + suffix))
        return PackedTensor(*parts)
