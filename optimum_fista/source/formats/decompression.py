"""Weights in the formats of compressed-tensors, decompressed by that package before Transformers converts them.

Transformers can do this, too, but not for all formats of experts, and before 5.22 only for a whole model in memory.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from transformers.core_model_loading import _IdentityOp

_PARTS = (
    "weight",
    "weight_packed",
    "weight_scale",
    "weight_zero_point",
    "weight_global_scale",
    "weight_shape",
)
_OTHER = ("transform_config", "sparsity_config")  # further changes of the weights


class Decompression:
    """Decompresses the weights of linear modules by the schemes of a `config.json`, one for each group of modules."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        from compressed_tensors.quantization import QuantizationConfig

        for word in _OTHER:
            if settings.get(word) and settings[word].get("format") != "dense":
                raise ValueError(
                    f"quantization_config has a {word}: compressed-tensors has to load the whole model."
                )
        self._config = QuantizationConfig.model_validate(
            {k: v for k, v in settings.items() if k not in _OTHER}
        )

    def sources(self, patterns: Sequence[str]) -> list[str]:
        """Patterns of all stored tensors of weights with these patterns."""
        if not all(pattern.endswith("weight") for pattern in patterns):
            return [*patterns]
        return [
            f"{pattern.removesuffix('weight')}{part}$" for pattern in patterns for part in _PARTS
        ]

    def dense(
        self, collected: Mapping[str, list[Tensor]], names: Mapping[str, str]
    ) -> dict[str, list[Tensor]]:
        """Lists of stored tensors by pattern -> lists of weights [out, in]; `names` has the patterns by stored name."""
        modules: dict[
            str, dict[str, dict[str, Tensor]]
        ] = {}  # stored parts by the weight's pattern, and by module
        for pattern, tensors in collected.items():
            group = modules.setdefault(re.sub(r"weight_\w+\$$", "weight$", pattern), {})
            for name, tensor in zip(
                (name for name in names if names[name] == pattern), tensors, strict=True
            ):
                module, _, part = name.rpartition(".")
                group.setdefault(module, {})[part] = tensor
        return {
            p: [self.weight(name, parts) for name, parts in group.items()]
            for p, group in modules.items()
        }

    def weight(self, module: str, parts: dict[str, Tensor]) -> Tensor:
        """Make the weight [out, in] of a module of what is stored for it."""
        if len(parts) == 1:
            return next(iter(parts.values()))  # it was not quantized
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.utils.match import is_match

        linear = nn.Linear(
            1, 1, device="meta"
        )  # experts, too, were linear modules when they were compressed
        for scheme in self._config.config_groups.values():
            if scheme.weights is not None and is_match(
                module, linear, scheme.targets, self._config.ignore or ()
            ):
                compressor: Any = BaseCompressor.get_value_from_registry(
                    scheme.format or self._config.format
                )
                weight: Tensor = compressor.decompress(parts, scheme)["weight"]
                return weight
        raise ValueError(
            f"{module} is stored as {', '.join(parts)}, and no group in config.json has its name."
        )


class Decompressed(_IdentityOp):
    """Takes decompressed weights, as the first operation of a conversion."""

    hf_quantizer = True  # Transformers then reads the stored tensors in the dtypes that they have

    def convert(self, input_dict: dict[str, Any], *_: Any, **options: Any) -> dict[str, Any]:
        """Weights by pattern; the only one of a module gets the module's name for it."""
        return {
            options["target_patterns"][0] if key == "weight$" else key: value
            for key, value in input_dict.items()
        }
