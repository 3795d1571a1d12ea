"""FP8: a value has 8 bits (F8_E4M3), and a block of rows and columns, or a whole weight, has a scale.

Three layouts have `quant_method` "fp8". Each stores `X.weight` [out, in] and, for a weight w = values * scale:

- `X.weight_scale_inv` [blocks of rows, blocks of columns], as DeepSeek-V3 has it. Despite its name it is a factor.
- `X.weight_scale_inv` [], one scale for the weight.
- `X.weight_scale` [], as AutoFP8 writes it, beside `X.input_scale` of activations, which is not needed here.

Transformers reads the first two. It takes the values of the third for weights, up to 448, so the scale is renamed.
A weight may also be stored in 16 bits, without a scale.

The methods of `FineGrainedFP8` are called in the order that `format` describes. A *pattern* is that of the names of
stored tensors that a conversion of Transformers reads, such as "mlp.experts.*.up_proj.weight"; that of the scales is
the same with "_scale_inv" at its end. `EqualBlocks` runs before Transformers' own operation, which dequantizes.
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
        """Return a renaming of AutoFP8's scales, and then the conversions of the quantized model.

        `load_conversions` makes the latter, as Transformers has them. Those of the `dense` model are not needed.
        """
        renaming = WeightRenaming(r"\.weight_scale$", f".weight{_SCALE}")
        return [renaming, *load_conversions()]

    def first_operations(self, operations: Sequence[ConversionOps]) -> list[ConversionOps]:
        """Return `EqualBlocks` if a conversion with these `operations` dequantizes; an empty list if not."""
        if not any(reads_scales(operation) for operation in operations):
            return []
        # What Transformers takes if the settings name no size.
        block_size = self.settings.get("weight_block_size", (128, 128))
        return [EqualBlocks(block_size)]

    def prepared(
        self, tensors: Mapping[str, list[Tensor]], patterns: Mapping[str, str]
    ) -> dict[str, list[Tensor]]:
        """Return `tensors` with a scale of 1 for every weight that is stored in 16 bits among quantized ones.

        Transformers pairs weights and scales by their order, so one expert that has no scale would shift the others'.
        Changes nothing.

        Args:
            tensors: Lists of weights, and of scales, by source pattern, in the order of their names in `patterns`.
            patterns: The source pattern of each stored tensor, by its name in the files.
        """
        result = dict(tensors)
        for pattern, weights in tensors.items():
            scale_pattern = _scale_pattern(pattern, tensors)
            if scale_pattern is None or len(tensors[scale_pattern]) == len(weights):
                continue
            modules = _modules_of(pattern, patterns)
            modules_with_scale = _modules_of(scale_pattern, patterns)
            scales = dict(zip(modules_with_scale, tensors[scale_pattern], strict=True))
            for module, weight in zip(modules, weights, strict=True):
                is_in_8_bits = weight.itemsize == 1
                if not is_in_8_bits:
                    scales.setdefault(module, torch.ones(1, 1, device=weight.device))
            # A weight in 8 bits without a scale stays without one; `Dequantizer` refuses it by name.
            result[scale_pattern] = [scales[module] for module in modules if module in scales]
        return result

    def weight(
        self, module: str, parts: Mapping[str, Tensor], conversions: Sequence[WeightConverter]
    ) -> Tensor:
        """Return the dequantized weight [out, in] of a linear module that the model's class does not load.

        Args:
            module: Name of the module in the files, such as "model.layers.61.eh_proj".
            parts: What is stored for it, by the last word of the name: "weight", and "weight_scale_inv" or AutoFP8's
                "weight_scale".
            conversions: Those by which the model was loaded.
        """
        names = {"weight_scale": f"weight{_SCALE}"}
        renamed = {names.get(part, part): tensor for part, tensor in parts.items()}
        return super().weight(module, renamed, conversions)


def _scale_pattern(pattern: str, patterns: Mapping[str, Any]) -> str | None:
    """Return the one of `patterns` that is that of the scales of the weights with `pattern`; `None` if there is none.

    Only the keys of `patterns` are read. For a single weight Transformers calls the patterns "weight$" and
    "weight_scale_inv".
    """
    if _SCALE in pattern:
        return None
    for candidate in (f"{pattern}{_SCALE}", f"{pattern.removesuffix('$')}{_SCALE}"):
        if candidate in patterns:
            return candidate
    return None


def _modules_of(pattern: str, patterns: Mapping[str, str]) -> list[str]:
    """Return the names of the modules of the stored tensors with a source pattern, such as "...experts.0.up_proj".

    `patterns` has the source pattern of each stored tensor, by its name in the files; the order stays.
    """
    names = [name for name, other in patterns.items() if other == pattern]
    return [name.rpartition(".")[0] for name in names]


class EqualBlocks(ConversionOps):
    """Changes scales so that they divide a weight into equal blocks, which Transformers takes for granted.

    If the last block is smaller than the others, the scales are repeated, one for each row or column.
    """

    def __init__(self, block_size: Sequence[int] | None) -> None:
        """Set the numbers of rows and columns in a block; `None`: scales are not of blocks."""
        # For Transformers, and for `reads_scales`: such an operation gets tensors in their stored dtype.
        self.hf_quantizer = True
        self.block_size = block_size

    def convert(self, input_dict: dict[str, Any], *_: Any, **__: Any) -> dict[str, Any]:
        """Return a copy of `input_dict` with scales as Transformers' operation needs them (`_for_equal_blocks`).

        `input_dict` has weights [out, in] and their scales by pattern, or lists of them. What else Transformers passes
        is not needed.
        """
        result = dict(input_dict)
        for pattern, value in input_dict.items():
            scale_pattern = _scale_pattern(pattern, input_dict)
            if scale_pattern is None:
                continue
            weights = value if isinstance(value, list) else [value]
            stored = input_dict[scale_pattern]
            scales = stored if isinstance(stored, list) else [stored]
            each_has_a_scale = len(weights) == len(scales)
            # Otherwise the scales stay: Transformers refuses them with an error that names both numbers.
            if each_has_a_scale:
                result[scale_pattern] = [
                    self._for_equal_blocks(scale, weight)
                    for scale, weight in zip(scales, weights, strict=True)
                ]
        return result

    def _for_equal_blocks(self, scales: Tensor, weight: Tensor) -> Tensor:
        """Return scales of blocks of equal size for a `weight` [..., out, in].

        `scales` [..., blocks of rows, blocks of columns] are returned as they are if the blocks are equal. If the last
        block of rows (`self.block_size`) is smaller than the others, there is one scale for each row; columns alike. A
        single scale becomes [1, 1].
        """
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
