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
        """Return `EqualBlocks` if a conversion with these `operations` dequantizes; an empty list if not.

        `self.settings` are the quantization settings of the source.
        """
        dequantizes = any(reads_scales(operation) for operation in operations)
        if not dequantizes:
            return []
        # Rows and columns of a block. Transformers takes 128 of each if the settings name no size.
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
            if scale_pattern is None:  # these tensors are scales, or have none
                continue
            stored_scales = tensors[scale_pattern]
            each_has_a_scale = len(stored_scales) == len(weights)
            if each_has_a_scale:
                continue
            modules = _modules_of(pattern, patterns)
            modules_with_scale = _modules_of(scale_pattern, patterns)
            scale_of = dict(zip(modules_with_scale, stored_scales, strict=True))
            for module, weight in zip(modules, weights, strict=True):
                is_in_8_bits = weight.itemsize == 1
                if not is_in_8_bits and module not in scale_of:
                    # One block, which is the whole weight: Transformers counts the blocks by the scales.
                    scale_of[module] = torch.ones(1, 1, device=weight.device)
            # A weight in 8 bits without a scale stays without one; `Dequantizer` refuses it by name.
            result[scale_pattern] = [scale_of[module] for module in modules if module in scale_of]
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
        renamed = dict(parts)
        if "weight_scale" in renamed:
            renamed[f"weight{_SCALE}"] = renamed.pop("weight_scale")
        return super().weight(module, renamed, conversions)


def _scale_pattern(pattern: str, patterns: Mapping[str, Any]) -> str | None:
    """Return the pattern of the scales that belong to weights with `pattern`; `None` if `patterns` does not have it.

    Only the keys of `patterns` are read. `None` also if `pattern` is itself one of scales. For a single weight
    Transformers calls the patterns "weight$" and "weight_scale_inv".
    """
    is_of_scales = _SCALE in pattern
    if is_of_scales:
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

        `input_dict` has weights [out, in] and their scales by pattern, or lists of them. It does not change. What else
        Transformers passes is not needed.
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
        block of rows is smaller than the others, the result has one scale for each row; columns alike. A single scale
        becomes [1, 1]. `self.block_size` has the numbers of rows and columns in a block. Changes nothing.
        """
        is_single_scale = scales.numel() == 1 and scales.ndim < 2
        if is_single_scale:
            return scales.reshape(1, 1)
        if scales.ndim < 2 or self.block_size is None:
            return scales

        for dim, block in zip((-2, -1), self.block_size, strict=True):
            size = weight.shape[dim]
            num_blocks = math.ceil(size / block)
            last_is_smaller = size % block != 0 and num_blocks > 1
            has_scale_for_each_block = scales.shape[dim] == num_blocks
            if last_is_smaller and has_scale_for_each_block:
                one_for_each_row = scales.repeat_interleave(block, dim)  # or for each column
                scales = one_for_each_row.narrow(dim, 0, size)  # without those after the last row
        return scales

    @property
    def reverse_op(self) -> ConversionOps:
        """What is done to save a dequantized model: nothing, because it is saved dense."""
        return Unchanged()
