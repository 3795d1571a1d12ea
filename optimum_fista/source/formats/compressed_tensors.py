"""The formats of compressed-tensors, decompressed by that package before Transformers converts the weights.

llm-compressor and others write them. For every module of a group the files hold the same parts, for instance
`X.weight_packed` and `X.weight_scale`; the settings say how each group is stored. Transformers can decompress, too, but
not all formats of experts, and before 5.22 only a whole model in memory.

A *part* is one stored tensor of a module, called by the last word of its name, such as "weight_scale". A *pattern* is
that of the names of stored tensors which a conversion of Transformers reads. `CompressedTensors.prepared` decompresses
the tensors of a conversion before its operations run; the methods are called in the order that `format` describes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps, WeightConverter

from optimum_fista.installing import install_command
from optimum_fista.source.formats.format import QuantizedFormat, Unchanged

# What a module may store for its weight.
_PARTS = (
    "weight",
    "weight_packed",
    "weight_scale",
    "weight_zero_point",
    "weight_global_scale",
    "weight_shape",
)
# Entries of the quantization settings. If a model has the first, its weights are rotated, too; the second one says how
# they are sparse.
_TRANSFORM = "transform_config"
_SPARSITY = "sparsity_config"


class CompressedTensors(QuantizedFormat):
    """Weights in any format of compressed-tensors, one scheme for each group of modules."""

    method = "compressed-tensors"
    prepares_model = False  # Transformers would make modules that hold compressed weights

    def __init__(self, settings: Mapping[str, Any]) -> None:
        """Read the schemes of all groups in the quantization settings, `quantization_config` of `config.json`.

        `self._config` then has these schemes. Raises ValueError if weights are also rotated (a transform) or stored as
        sparse ones. `settings` stays as it is.
        """
        super().__init__(settings)
        from compressed_tensors.quantization import QuantizationConfig

        refused = None  # the entry of the settings that can't be followed here
        sparsity = settings.get(_SPARSITY)
        if settings.get(_TRANSFORM):
            refused = _TRANSFORM
        elif sparsity and sparsity.get("format") != "dense":
            refused = _SPARSITY
        if refused is not None:
            raise ValueError(
                f"quantization_config has a {refused}, which only compressed-tensors can undo, on a whole model: "
                "load the model with Transformers and this package, save it in 16 bits, and pass that folder."
            )
        schemes = {
            key: value for key, value in settings.items() if key not in (_TRANSFORM, _SPARSITY)
        }
        self._config = QuantizationConfig.model_validate(schemes)

    @classmethod
    def require_package(cls, model_name: str) -> None:
        """Raise ImportError if compressed-tensors is not installed; `model_name` is for the message."""
        if find_spec("compressed_tensors") is None:
            raise ImportError(
                f"model={model_name!r} is quantized by {cls.method!r}, which needs this package: "
                f"run {install_command('compressed-tensors')}."
            )

    def conversions(self, dense: list[Any], load_conversions: Callable[[], list[Any]]) -> list[Any]:
        """Return the conversions of the dense model, and one for the weights that these do not read."""
        return [*dense, WeightConverter("weight", "weight", [Decompressed()])]

    def source_patterns(self, patterns: Sequence[str]) -> list[str]:
        """Return patterns of all parts that may be stored for the weights that a conversion needs.

        `patterns` are those of the conversion, such as "mlp.experts.*.up_proj.weight". Patterns of something else, such
        as biases, are returned as they are.
        """
        are_weights = all(pattern.endswith("weight") for pattern in patterns)
        if not are_weights:
            return list(patterns)
        patterns_of_parts = []
        for pattern in patterns:
            module_pattern = pattern.removesuffix("weight")
            # "$" ends the name: "weight" alone would also match the beginning of "weight_packed".
            patterns_of_parts += [f"{module_pattern}{part}$" for part in _PARTS]
        return patterns_of_parts

    def first_operations(self, operations: Sequence[ConversionOps]) -> list[ConversionOps]:
        """Return the operation that takes what `prepared` has decompressed, whatever the conversion does then."""
        return [Decompressed()]

    def prepared(
        self, tensors: Mapping[str, list[Tensor]], patterns: Mapping[str, str]
    ) -> dict[str, list[Tensor]]:
        """Return decompressed weights [out, in] for a conversion: lists by pattern of `X.weight`. Changes nothing.

        Args:
            tensors: Lists of stored tensors by the pattern of their part, such as "up_proj.weight_packed$", in the
                order of their names in `patterns`.
            patterns: The pattern of each stored tensor, by its name in the files.
        """
        # For each pattern of weights, and each module that has such a weight: what is stored for the module, by part.
        modules: dict[str, dict[str, dict[str, Tensor]]] = {}
        for pattern, stored in tensors.items():
            # "up_proj.weight_packed$" becomes "up_proj.weight$".
            weight_pattern = re.sub(r"weight_\w+\$$", "weight$", pattern)
            parts_by_module = modules.setdefault(weight_pattern, {})
            names = [name for name, other in patterns.items() if other == pattern]
            for name, tensor in zip(names, stored, strict=True):
                module, _, part = name.rpartition(".")
                parts_by_module.setdefault(module, {})[part] = tensor

        weights: dict[str, list[Tensor]] = {}
        for pattern, parts_by_module in modules.items():
            weights[pattern] = [
                self._decompressed(module, parts) for module, parts in parts_by_module.items()
            ]
        return weights

    def weight(
        self, module: str, parts: Mapping[str, Tensor], conversions: Sequence[WeightConverter]
    ) -> Tensor:
        """Return the decompressed weight [out, in] of a linear module that the model's class does not load.

        `module` is its name in the files, and `parts` are its stored tensors by part. `conversions` are not needed.
        """
        return self._decompressed(module, parts)

    def _decompressed(self, module: str, parts: Mapping[str, Tensor]) -> Tensor:
        """Return the weight [out, in] of a module, which is made of its stored tensors (by part). Changes nothing.

        `module` is its name in the files, by which the groups of the settings (`self._config`) name it. Raises
        ValueError if no group does.
        """
        is_uncompressed = len(parts) == 1  # a single tensor has no scales
        if is_uncompressed:
            (weight,) = parts.values()
            return weight

        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.utils.match import is_match

        # A group names modules by name or class. Experts, too, were linear modules when they were compressed.
        linear = nn.Linear(1, 1, device="meta")
        ignored = self._config.ignore or ()
        for scheme in self._config.config_groups.values():
            if scheme.weights is None:  # only activations are quantized
                continue
            if is_match(module, linear, scheme.targets, ignored):
                name_of_format = scheme.format or self._config.format
                compressor: Any = BaseCompressor.get_value_from_registry(name_of_format)
                decompressed: dict[str, Tensor] = compressor.decompress(dict(parts), scheme)
                return decompressed["weight"]
        raise ValueError(
            f"{module} is stored as {', '.join(parts)}, and no group in config.json has its name."
        )


class Decompressed(Unchanged):
    """Takes decompressed weights, as the first operation of a conversion."""

    hf_quantizer = True  # Transformers then reads the stored tensors in the dtypes that they have

    def convert(self, input_dict: dict[str, Any], *_: Any, **options: Any) -> dict[str, Any]:
        """Return the weights of `input_dict` by pattern; the pattern "weight$" becomes the conversion's target.

        `prepared` has made `input_dict`, weights [out, in] or lists of them by pattern. Of the options that
        Transformers passes, `target_patterns` are the patterns of the parameters that the conversion makes. "weight$"
        is the pattern of the one conversion for weights that no other reads. Changes nothing.
        """
        result: dict[str, Any] = {}
        for pattern, value in input_dict.items():
            is_single_weight = pattern == "weight$"
            new_pattern = options["target_patterns"][0] if is_single_weight else pattern
            result[new_pattern] = value
        return result
