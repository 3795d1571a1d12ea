"""What a configuration says of quantized weights.

The entry `quantization_config` of a `config.json` is called the quantization settings here: a dictionary with
`quant_method`, such as "fp8", and what that method needs to know. Nothing here reads weights; `formats` does.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

# Methods whose loaders make dense weights: GGUF files, and folders that this package has packed.
_READ_AS_DENSE = ("gguf", "fista_packed")
_SOURCE_SETTINGS = "_quantized_source"  # an attribute of models that `Dequantizer` has loaded


def quantization(config: PreTrainedConfig) -> dict[str, Any] | None:
    """Return the quantization settings of a model's configuration; `None` if its weights are dense.

    A multimodal model may have the settings in the configuration of its text decoder. The result is a new dictionary,
    in which `quant_method` is a string: "unknown" if the configuration names no method. GGUF files and packed folders
    count as dense. Changes nothing.
    """
    settings: dict[str, Any] | None = None
    for part in (config, config.get_text_config(decoder=True)):
        # A dictionary, or an object of Transformers.
        entry: Any = getattr(part, "quantization_config", None)
        if entry:
            settings = dict(entry) if isinstance(entry, dict) else entry.to_dict()
            break
    if settings is None:
        return None

    # Old settings of bitsandbytes do not name their method.
    default = "bitsandbytes" if "load_in_4bit" in settings else "unknown"
    method = settings.get("quant_method", default)
    if isinstance(method, Enum):  # in objects of Transformers
        method = method.value
    settings["quant_method"] = str(method)
    is_read_as_dense = settings["quant_method"] in _READ_AS_DENSE
    return None if is_read_as_dense else settings


def forget_quantization(config: PreTrainedConfig) -> None:
    """Remove the quantization settings from `config` and from its section for the text decoder. Changes both.

    The configuration then describes a dense model.
    """
    for part in (config, config.get_text_config(decoder=True)):
        vars(part).pop("quantization_config", None)


def quantized_source(model: PreTrainedModel) -> Mapping[str, Any] | None:
    """Return the quantization settings of the files from which `model` was dequantized; `None`: they were dense."""
    settings: Mapping[str, Any] | None = vars(model).get(_SOURCE_SETTINGS)
    return settings


def remember_quantized_source(model: PreTrainedModel, settings: Mapping[str, Any]) -> None:
    """Set on `model` what `quantized_source` returns."""
    vars(model)[_SOURCE_SETTINGS] = settings
