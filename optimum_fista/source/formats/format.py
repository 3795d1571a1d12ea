"""What a quantized format is to this package: which stored tensors make a weight, and how.

Transformers loads a model by *conversions* (`WeightConverter`): each has patterns of the names of stored tensors
(its sources), patterns of the names of parameters (its targets), and operations that make the parameters of the
tensors. The `Dequantizer` takes these conversions, lets the format change them, and runs them. In this order it calls
`require_package`, `conversions`, then for every conversion `source_patterns` and `first_operations`, and for every
parameter `prepared`. `weight` is for matrices that no conversion reads. No method changes its arguments, except where
it says so.

The *quantization settings* are the dictionary `quantization_config` of a model's `config.json`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers.core_model_loading import ConversionOps, WeightConverter


class QuantizedFormat:
    """A format that Transformers can dequantize by its own conversions; subclasses say what is different.

    Attributes:
        method: `quant_method` of the quantization settings, such as "fp8".
        settings: The quantization settings of the source's `config.json`.
        prepares_model: Whether Transformers' quantizer of the format changes the modules before weights are loaded.
    """

    method = ""
    prepares_model = True

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.settings = settings

    @classmethod
    def require_package(cls, model_name: str) -> None:
        """Raise ImportError if a package that reads the format is not installed; `model_name` is for the message."""

    def conversions(self, dense: list[Any], load_conversions: Callable[[], list[Any]]) -> list[Any]:
        """Return the conversions by which a quantized model is loaded.

        Args:
            dense: The conversions of the dense model of this class.
            load_conversions: Makes Transformers' conversions for the quantized model of `dense`. Some versions change
                the list `dense`.
        """
        return load_conversions()

    def source_patterns(self, patterns: Sequence[str]) -> list[str]:
        """Return the patterns of all stored tensors that a conversion with the sources `patterns` needs."""
        return list(patterns)

    def first_operations(self, operations: Sequence[ConversionOps]) -> list[ConversionOps]:
        """Return operations that a conversion must run before its own `operations`."""
        return []

    def prepared(
        self, tensors: Mapping[str, list[Tensor]], patterns: Mapping[str, str]
    ) -> dict[str, list[Tensor]]:
        """Return what the first operation of a conversion gets: `tensors`, unless a format changes them before.

        Args:
            tensors: The stored tensors by source pattern, in the order of their names in `patterns`.
            patterns: The source pattern of each stored tensor, by its name in the files.
        """
        return dict(tensors)

    def weight(
        self, module: str, parts: Mapping[str, Tensor], conversions: Sequence[WeightConverter]
    ) -> Tensor:
        """Return the dequantized weight [out, in] of a linear module that the model's class does not load.

        The operations of the first conversion that only dequantizes are run on it. Changes nothing.

        Args:
            module: Name of the module in the files, such as "model.layers.61.eh_proj".
            parts: What is stored for it, by the last word of the name, such as "weight" and "weight_scale_inv".
            conversions: Those by which the model was loaded.
        """
        dequantizing_conversions = [
            conversion
            for conversion in conversions
            if all(reads_scales(operation) for operation in conversion.operations)
        ]
        operations = dequantizing_conversions[0].operations
        # An operation takes and returns tensors, or lists of them, by pattern. Here the parts are the patterns.
        values: dict[str, Any] = {part: [tensor] for part, tensor in parts.items()}
        for operation in operations:
            values = operation.convert(
                values, source_patterns=list(values), target_patterns=["weight"]
            )
        weight: Tensor | list[Tensor] = values["weight"]
        return weight[0] if isinstance(weight, list) else weight


def reads_scales(operation: ConversionOps) -> bool:
    """Tell whether an operation belongs to a quantized format; others merge, split or transpose tensors."""
    return getattr(operation, "hf_quantizer", None) is not None


class Unchanged(ConversionOps):
    """An operation that returns what it gets."""

    def convert(self, input_dict: dict[str, Any], *_: Any, **__: Any) -> dict[str, Any]:
        """Return `input_dict`, tensors by pattern."""
        return input_dict

    @property
    def reverse_op(self) -> ConversionOps:
        """What undoes it."""
        return self
