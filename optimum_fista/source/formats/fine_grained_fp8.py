"""FP8: a value has 8 bits (F8_E4M3), and a block of rows and columns, or a whole weight, has a scale.

Three layouts have `quant_method` "fp8". Each stores `X.weight` [out, in] and, for a weight w = values * scale:

- `X.weight_scale_inv` [blocks of rows, blocks of columns], as DeepSeek-V3 has it. Despite its name it is a factor.
- `X.weight_scale_inv` [], one scale for the weight.
- `X.weight_scale` [], as AutoFP8 writes it, beside `X.input_scale` of activations, which is not needed here.

Transformers reads the first two. It takes the values of the third for weights, up to 448, so the scale is renamed.
A weight may also be stored dense, without a scale.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming

from optimum_fista.source.formats.format import QuantizedFormat, Unchanged, reads_scales

_SCALE = "_scale_inv"  # what Transformers appends to the name or pattern of a weight


class FineGrainedFP8(QuantizedFormat):
    """Weights in FP8 with scales for blocks, or one scale each."""

    method = "fp8"

    def conversions(self, dense: list[Any], load_conversions: Callable[[], list[Any]]) -> list[Any]:
        """Return Transformers' conversions, after a renaming of AutoFP8's scales."""
        renaming = WeightRenaming(r"\.weight_scale$", f".weight{_SCALE}")
        return [renaming, *load_conversions()]

    def first_operations(self, operations: Sequence[ConversionOps]) -> list[ConversionOps]:
        """Return an operation that lets Transformers divide any weight into blocks."""
        if not any(reads_scales(operation) for operation in operations):
            return []
        # What Transformers takes if the settings name no size.
        block_size = self.settings.get("weight_block_size", (128, 128))
        return [EqualBlocks(block_size)]

    def prepared(
        self, tensors: Mapping[str, list[Tensor]], patterns: Mapping[str, str]
    ) -> dict[str, list[Tensor]]:
        """Return the stored tensors with a scale of 1 for every weight that is stored without quantization.

        Transformers pairs weights and scales by their order, so one expert that has no scale would shift the others'.
        """
        result = dict(tensors)
        for pattern, weights in tensors.items():
            scale_pattern = _scale_pattern(pattern, tensors)
            if scale_pattern is None or len(tensors[scale_pattern]) == len(weights):
                continue
            modules = _modules_of(pattern, patterns)
            scales = dict(
                zip(_modules_of(scale_pattern, patterns), tensors[scale_pattern], strict=True)
            )
            for module, weight in zip(modules, weights, strict=True):
                if weight.itemsize > 1:
                    scales.setdefault(module, torch.ones(1, 1, device=weight.device))
            # A weight in 8 bits without a scale stays without one; `Dequantizer` refuses it by name.
            result[scale_pattern] = [scales[module] for module in modules if module in scales]
        return result

    def weight(
        self, module: str, parts: Mapping[str, Tensor], conversions: Sequence[WeightConverter]
    ) -> Tensor:
        """Return the dequantized matrix [out, in], as the base class does; AutoFP8's scale is renamed here, too."""
        names = {"weight_scale": f"weight{_SCALE}"}
        renamed = {names.get(part, part): tensor for part, tensor in parts.items()}
        return super().weight(module, renamed, conversions)


def _scale_pattern(pattern: str, patterns: Mapping[str, Any]) -> str | None:
    """Return the source pattern of the scales of the weights with `pattern`; `None` if there is none.

    For a single weight Transformers calls the patterns "weight$" and "weight_scale_inv".
    """
    if _SCALE in pattern:
        return None
    for candidate in (f"{pattern}{_SCALE}", f"{pattern.removesuffix('$')}{_SCALE}"):
        if candidate in patterns:
            return candidate
    return None


def _modules_of(pattern: str, patterns: Mapping[str, str]) -> list[str]:
    """Return the modules of the stored tensors that match a source pattern, in order; `patterns` has them by name."""
    return [name.rpartition(".")[0] for name, other in patterns.items() if other == pattern]


class EqualBlocks(ConversionOps):
    """Changes scales so that they divide a weight into equal blocks, which Transformers takes for granted.

    If the last block is smaller than the others, the scales are repeated, one for each row or column.
    """

    def __init__(self, block_size: Sequence[int] | None) -> None:
        # For Transformers, and for `reads_scales`: such an operation gets tensors in their stored dtype.
        self.hf_quantizer = True
        self.block_size = block_size

    def convert(self, input_dict: dict[str, Any], *_: Any, **__: Any) -> dict[str, Any]:
        """Return `input_dict`, weights [out, in] and scales by pattern, or lists of them, with other scales."""
        result = dict(input_dict)
        for pattern, value in input_dict.items():
            scale_pattern = _scale_pattern(pattern, input_dict)
            if scale_pattern is None:
                continue
            weights = value if isinstance(value, list) else [value]
            stored = input_dict[scale_pattern]
            scales = stored if isinstance(stored, list) else [stored]
            if len(weights) == len(scales):  # otherwise Transformers has an error that counts both
                result[scale_pattern] = [
                    self._repeated(scale, weight)
                    for scale, weight in zip(scales, weights, strict=True)
                ]
        return result

    def _repeated(self, scales: Tensor, weight: Tensor) -> Tensor:
        """Return `scales` [..., blocks of rows, blocks of columns], of a `weight` [..., out, in], for equal blocks."""
        if scales.numel() == 1 and scales.ndim < 2:
            return scales.reshape(1, 1)
        if scales.ndim < 2 or self.block_size is None:
            return scales

        for dim, block in zip((-2, -1), self.block_size, strict=True):
            size = weight.shape[dim]
            num_blocks = math.ceil(size / block)
            last_is_smaller = size % block != 0 and num_blocks > 1
            if last_is_smaller and scales.shape[dim] == num_blocks:
                scales = scales.repeat_interleave(block, dim).narrow(dim, 0, size)
        return scales

    @property
    def reverse_op(self) -> ConversionOps:
        """What is done to save a dequantized model: nothing, because it is saved dense."""
        return Unchanged()
