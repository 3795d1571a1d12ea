"""Quantized sources as models in 16 bits: Transformers dequantizes a parameter whenever it is asked for.

Transformers dequantizes while it loads, so the whole model would be in memory, or in the offload folder, in 16 bits.
The quantizer that is registered here stands before that of the source's format, and takes over its conversions (rename,
dequantize, merge experts). If weights stay in their files, a conversion does not run but is kept. It runs when
Accelerate asks for its parameter, on that parameter's tensors in the files of the source.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import PrefixedDataset
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import (
    ConversionOps,
    SkipParameters,
    WeightConverter,
    WeightRenaming,
    _IdentityOp,
    rename_source_key,
)
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from optimum_fista.installing import install_command
from optimum_fista.model.offload import offload_hook
from optimum_fista.source.formats.decompression import Decompressed, Decompression

_METHOD = "fista_dequantized"
DENSE = {"F64", "F32", "F16", "BF16"}  # dtypes of safetensors that need no scales
_READERS = dict.fromkeys(("gptq", "awq"), "GPTQModel (gptqmodel.utils.model_dequant)")
_READERS |= {"bitsandbytes": "Transformers' model.dequantize()"}


def quantization(config: PreTrainedConfig) -> dict[str, Any] | None:
    """What `config.json` says of quantized weights, as `quant_method` and block sizes; `None` if they are dense.

    GGUF files and packed folders do not count: their loaders make dense weights.
    """
    parts = (config, config.get_text_config(decoder=True))
    found: Any = next(
        filter(None, (getattr(part, "quantization_config", None) for part in parts)), {}
    )
    settings: dict[str, Any] = (
        {**found} if isinstance(found, dict) else getattr(found, "to_dict", dict)()
    )
    method = settings.get(
        "quant_method", "bitsandbytes" if "load_in_4bit" in settings else "unknown"
    )
    settings["quant_method"] = str(getattr(method, "value", method))
    return settings if found and settings["quant_method"] not in ("gguf", "fista_packed") else None


def forget_quantization(config: PreTrainedConfig) -> None:
    """Call a model dense."""
    for part in (config, config.get_text_config(decoder=True)):
        vars(part).pop("quantization_config", None)


def read_dequantized(config: PreTrainedConfig) -> PreTrainedConfig:
    """Have a model with this configuration read in 16 bits; refuse formats that can't be read by parameters."""
    settings, name = quantization(config) or {}, config.name_or_path
    method, here = settings["quant_method"], f"Transformers {version('transformers')}"
    kind = auto.AUTO_QUANTIZATION_CONFIG_MAPPING.get(method)
    if method == "compressed-tensors" and find_spec("compressed_tensors") is None:
        command = install_command("compressed-tensors")
        raise ImportError(
            f"model={name!r} is quantized by {method!r}, which needs this package: run {command}."
        )
    if kind is None or "dequantize" not in inspect.signature(kind).parameters:
        reader = _READERS.get(method, "the library that wrote it")
        why = f"is quantized by {method!r}, which {here} can't dequantize a parameter at a time"
        raise ValueError(
            f"model={name!r} {why}: dequantize it with {reader}, save it, and pass that folder."
        )
    forget_quantization(config)
    config.quantization_config = {"quant_method": _METHOD, "settings": settings}
    config.dtype = (
        getattr(config, "dtype", None) or torch.bfloat16
    )  # Transformers would take that of an FP8 tensor
    return config


def quantized_source(model: PreTrainedModel) -> Mapping[str, Any] | None:
    """What `quantization` says of the source of a model that was read in 16 bits; `None`: it was dense."""
    found: Mapping[str, Any] | None = vars(model).get("_quantized_source")
    return found


def dequantizer_of(folder: Path) -> Dequantizer | None:
    """What loads the quantized model of a folder, so it knows which tensors are scales; `None`: it is not quantized."""
    config = (
        AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if (folder / "config.json").exists()
        else None
    )
    if config is None or quantization(config) is None:
        return None
    settings = read_dequantized(config).quantization_config[
        "settings"
    ]  # refuses formats that can't be read
    return Dequantizer(DequantizingConfig(settings), pre_quantized=True)


@auto.register_quantization_config(_METHOD)
class DequantizingConfig(QuantizationConfigMixin):
    """Has Transformers use the `Dequantizer`; `settings` are the source's."""

    def __init__(self, settings: Mapping[str, Any], **_: Any) -> None:
        self.quant_method = _METHOD  # type: ignore[assignment]
        self.settings = settings
        self.dequantize = True  # Transformers then calls the loaded model dense


@auto.register_quantizer(_METHOD)
class Dequantizer(HfQuantizer):
    """Dequantizes by the conversions of the source's format: as it loads, or later if weights stay in files."""

    quantization_config: DequantizingConfig

    def __init__(self, quantization_config: Any, **keywords: Any) -> None:
        super().__init__(quantization_config, **keywords)
        settings: Any = auto.AutoQuantizationConfig.from_dict(dict(quantization_config.settings))
        settings.dequantize = True  # also on a device that computes with the quantized weights
        self.inner = auto.AutoHfQuantizer.from_config(settings, pre_quantized=True)
        self.inner.validate_environment()
        compressed = quantization_config.settings["quant_method"] == "compressed-tensors"
        self.decompression = Decompression(quantization_config.settings) if compressed else None
        self.block = getattr(settings, "weight_block_size", None)
        self.keeps = False
        self.kept: dict[str, Callable[[], Tensor]] = {}  # makes a parameter
        self.converted: set[str] = set()  # names of stored tensors that a conversion takes
        self.stored: dict[str, tuple[str, str]] = {}  # file and dtype of all tensors of the source
        self._transforms: tuple[list[Any], list[Any]] = (
            [],
            [],
        )  # of the dense model, and those in use

    def __deepcopy__(self, memo: Any) -> Dequantizer:
        """Transformers copies a conversion, with all that it refers to, for every parameter."""
        return self

    def _process_model_before_weight_loading(
        self,
        model: PreTrainedModel,
        device_map: Any = None,
        checkpoint_files: Sequence[str] = (),
        **options: Any,
    ) -> None:
        if not self.decompression:
            self.inner._process_model_before_weight_loading(model, device_map=device_map, **options)
        for path in checkpoint_files:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118
                    self.stored[name] = (path, file.get_slice(name).get_dtype())
        self.keeps = device_map == {"": "disk"}

    def update_weight_conversions(self, weight_conversions: list[Any], *model: Any) -> list[Any]:
        """Take over the conversions of the format; older versions of Transformers do not pass the model."""
        plain = list(weight_conversions)
        if self.decompression:
            found = [*plain, WeightConverter("weight", "weight", [Decompressed()])]
        else:
            found = self.inner.update_weight_conversions(weight_conversions, *model)
        used = [
            KeptConversion(one, self) if isinstance(one, WeightConverter) else one for one in found
        ]
        self._transforms = plain, used
        return used

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **_: Any
    ) -> PreTrainedModel:
        self._require_scales(model)
        plain, used = (
            self._transforms
        )  # the model is saved by the names of the source, without what dequantizes
        targets = [
            one._original_target_patterns
            for one in used
            if isinstance(one, KeptConversion) and one.was_used()
        ]
        plain = [t for t in plain if t.was_used() or t._original_target_patterns in targets]
        vars(model).update(
            _weight_conversions=plain, _quantized_source=self.quantization_config.settings
        )
        kinds = {re.sub(r"\d+", "*", name): name for name in self.kept}
        for name in (
            kinds.values()
        ):  # one of each is tried, so that an error comes before the first decoder layer
            try:
                shape = tuple(self.kept[name]().shape)
            except Exception as error:  # of the format's operations
                raise ValueError(f"{name} can't be dequantized: {error}") from error
            if shape != (wanted := tuple(model.get_parameter_or_buffer(name).shape)):
                raise ValueError(
                    f"{name} has shape {shape} once it is dequantized, and needs {wanted}."
                )
        for target, source in model.all_tied_weights_keys.items():
            if source in self.kept:
                self.kept.setdefault(target, self.kept[source])
        data: Any = next(
            (hook.weights_map for hook in map(offload_hook, model.modules()) if hook), None
        )
        while isinstance(data, PrefixedDataset):
            data = data.dataset
        if self.kept:
            data.state_dict = KeptParameters(
                self.kept
            )  # comes before the index, which has the quantized tensors
        return model

    def _require_scales(self, model: PreTrainedModel) -> None:
        """Refuse quantized tensors that Transformers would take for values."""
        scaled = {
            name.rpartition(".")[0] for name in self.stored if "scale" in name.rpartition(".")[2]
        }
        renamings = [
            transform for transform in self._transforms[1] if isinstance(transform, WeightRenaming)
        ]
        converters = [
            transform for transform in self._transforms[1] if isinstance(transform, WeightConverter)
        ]
        prefix, state = model.base_model_prefix, model.state_dict()
        for name, (_, dtype) in self.stored.items():
            if dtype not in DENSE and not (
                name in self.converted and name.rpartition(".")[0] in scaled
            ):
                target = rename_source_key(name, renamings, converters, prefix, state)[0]
                if target in state and state[target].is_floating_point():
                    raise ValueError(
                        f"{name} has dtype {dtype}, and Transformers finds no scales for it."
                    )

    def read(self, name: str) -> Tensor:
        """Read a tensor of the source."""
        with safe_open(self.stored[name][0], "pt") as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor

    def dense(
        self, module: str, parts: Mapping[str, Callable[[], Tensor]], dtype: torch.dtype
    ) -> Tensor:
        """Dequantize a matrix [out, in] that the model's class does not load; `parts` read what its module stores."""
        tensors = {part: read() for part, read in parts.items()}
        if self.decompression:
            return self.decompression.weight(module, tensors).to(dtype)
        conversions = [
            one.operations for one in self._transforms[1] if isinstance(one, KeptConversion)
        ]
        found: dict[str, Any] = {part: [tensor] for part, tensor in tensors.items()}
        for operation in next(one for one in conversions if all(map(_reads_scales, one))):
            found = operation.convert(found, source_patterns=[*found], target_patterns=["weight"])
        weight: Tensor | list[Tensor] = found["weight"]  # Transformers 5.17 gives a list of one
        return (weight[0] if isinstance(weight, list) else weight).to(dtype)

    def is_serializable(self) -> bool:
        """True if `save_pretrained` can save the model."""
        return True

    @property
    def is_trainable(self) -> bool:
        """True if the loaded model can be trained."""
        return True


class KeptParameters(dict[str, Any]):
    """Parameters by name: tensors, or functions that make one each time it is asked for."""

    def __getitem__(self, name: str) -> Tensor:
        found: Tensor | Callable[[], Tensor] = super().__getitem__(name)
        return found if isinstance(found, Tensor) else found()


class KeptConversion(WeightConverter):
    """A conversion of stored tensors to parameters that can run again later."""

    def __init__(self, conversion: WeightConverter, keeper: Dequantizer) -> None:
        operations, targets = list(conversion.operations), conversion._original_target_patterns
        sources = conversion._original_source_patterns
        if keeper.decompression:
            sources = keeper.decompression.sources(sources)
            operations.insert(0, Decompressed())
        elif keeper.block and any(map(_reads_scales, operations)):
            operations.insert(0, WholeBlocks(keeper.block))
        super().__init__([*sources], [*targets], operations, conversion.force_cpu)
        self.scope_prefix, self.base_model_prefix = (
            conversion.scope_prefix,
            conversion.base_model_prefix,
        )
        self.keeper, self.names = keeper, dict[str, str]()  # patterns of stored tensors by name

    def add_tensor(
        self, target_key: str, source_key: str, source_pattern: str, future: Any
    ) -> None:
        """Note the name of a stored tensor, too."""
        self.names[source_key] = source_pattern
        super().add_tensor(target_key, source_key, source_pattern, future)

    def materialize_tensors(self) -> Any:
        """Read the tensors, and decompress them if no operation does so."""
        found, decompression = super().materialize_tensors(), self.keeper.decompression
        return decompression.dense(found, self.names) if decompression else found

    def convert(
        self,
        layer_name: str,
        model: Any = None,
        config: Any = None,
        hf_quantizer: Any = None,
        loading_info: Any = None,
    ) -> Any:
        """Convert, or keep the conversion for later."""
        keeper, first = self.keeper, self.target_patterns[0]
        targets = [
            layer_name,
            *(layer_name.replace(first, pattern) for pattern in self.target_patterns[1:]),
        ]
        is_dense = len(self.names) == 1 and all(
            keeper.stored[name][1] in DENSE for name in self.names
        )
        is_dense = is_dense and all(
            map(_reads_scales, self.operations)
        )  # without scales, these change nothing
        keeper.converted.update(self.names)
        if (
            not keeper.keeps or "*" in first
        ):  # one stored tensor makes many: Transformers copies them to files
            return super().convert(layer_name, model, config, hf_quantizer, loading_info)
        for target in () if is_dense else targets:  # a dense parameter is read from its file
            dtype = model.get_parameter_or_buffer(target).dtype
            keeper.kept[target] = partial(self.make, model, layer_name, target, dtype)
        loading_info.missing_keys.difference_update(targets)
        raise SkipParameters

    def make(
        self, model: PreTrainedModel, layer_name: str, target: str, dtype: torch.dtype
    ) -> Tensor:
        """Make a parameter of the tensors in the files."""
        readers: Any = self.collected_tensors
        readers.clear()  # those of files that are closed
        for name, pattern in self.names.items():
            readers[pattern].append(partial(self.keeper.read, name))
        found = super().convert(layer_name, model, model.config)[target]
        tensor: Tensor = found[0] if isinstance(found, list) else found
        return tensor.detach().to("cpu", dtype)


def _reads_scales(operation: ConversionOps) -> bool:
    """Tell whether an operation is one of a quantization format."""
    return getattr(operation, "hf_quantizer", None) is not None


class WholeBlocks(ConversionOps):
    """Repeats the scales of FP8 weights whose last block is not whole: Transformers takes all blocks to be equal."""

    def __init__(self, block: Sequence[int]) -> None:
        self.hf_quantizer, self.block = (
            True,
            block,
        )  # for Transformers: it is given tensors in their stored dtype

    def convert(self, input_dict: dict[str, Any], *_: Any, **__: Any) -> dict[str, Any]:
        """Scales [blocks of rows, blocks of columns] of lists of weights [rows, columns], by their patterns."""
        found = dict(input_dict)
        for key in (key for key in input_dict if "_scale_inv" in key):
            weights = input_dict.get(key.replace("_scale_inv", ""), input_dict.get("weight$", []))
            scales = input_dict[key] if isinstance(input_dict[key], list) else [input_dict[key]]
            weights = weights if isinstance(weights, list) else [weights]
            found[key] = (
                [self._repeated(*pair) for pair in zip(scales, weights, strict=True)]
                if weights
                else scales
            )
        return found

    def _repeated(self, scales: Tensor, weight: Tensor) -> Tensor:
        for dim, block in zip((-2, -1), self.block, strict=True):
            size = weight.shape[dim]
            if (
                scales.ndim > 1
                and size % block
                and scales.shape[dim] == math.ceil(size / block) > 1
            ):
                scales = scales.repeat_interleave(block, dim).narrow(
                    dim, 0, size
                )  # one for each row
        return scales

    @property
    def reverse_op(self) -> ConversionOps:
        """A dequantized model is saved dense."""
        return _IdentityOp()
