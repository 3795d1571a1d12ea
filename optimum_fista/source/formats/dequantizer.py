"""Load quantized models as models in 16 bits, of which each parameter is dequantized whenever it is asked for.

Transformers dequantizes while it loads, so the whole model would be in memory, or in the offload folder, in 16 bits.
The quantizer that is registered here, `Dequantizer`, stands before that of the source's format and takes over its
conversions (rename, dequantize, merge experts). If weights stay in their files (`device_map={"": "disk"}`), a
conversion does not run while the model loads but is kept. It runs when Accelerate asks for its parameter, on that
parameter's tensors in the files of the source.

Order: `read_dequantized` changes the configuration, `from_pretrained` then makes a `Dequantizer` and calls it: first
`_process_model_before_weight_loading`, then `update_weight_conversions`, then every `KeptConversion.convert`, and at
last `_process_model_after_weight_loading`.
"""

from __future__ import annotations

import inspect
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import PrefixedDataset
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import (
    SkipParameters,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from optimum_fista import internals
from optimum_fista.model.offload import offload_hook
from optimum_fista.source.formats.compressed_tensors import CompressedTensors
from optimum_fista.source.formats.fine_grained_fp8 import FineGrainedFP8
from optimum_fista.source.formats.format import QuantizedFormat, reads_scales
from optimum_fista.source.formats.mxfp4 import MXFP4
from optimum_fista.source.quantization import (
    forget_quantization,
    quantization,
    remember_quantized_source,
)
from optimum_fista.source.stored_tensor import ACTIVATION_SCALE, PLAIN_FLOATS

_METHOD = "fista_dequantized"
# By `quant_method`. Others that Transformers dequantizes by conversions are read as `QuantizedFormat` does.
FORMATS: dict[str, type[QuantizedFormat]] = {
    CompressedTensors.method: CompressedTensors,
    FineGrainedFP8.method: FineGrainedFP8,
    MXFP4.method: MXFP4,
}
# What dequantizes a model in a format that can't be read here.
_OTHER_READERS = {
    "gptq": "GPTQModel (gptqmodel.utils.model_dequant)",
    "awq": "GPTQModel (gptqmodel.utils.model_dequant)",
    "bitsandbytes": "Transformers' model.dequantize()",
}


def read_dequantized(config: PreTrainedConfig) -> PreTrainedConfig:
    """Change the configuration of a quantized model so that Transformers loads the model in 16 bits; return it.

    Changes `config`: its quantization settings name the `Dequantizer`, and its dtype is set if it has none. Raises
    ValueError or ImportError if the format can't be read a parameter at a time.
    """
    settings = quantization(config) or {}
    method = settings["quant_method"]
    name = internals.loaded_from(config)
    FORMATS.get(method, QuantizedFormat).require_package(name)
    kind = auto.AUTO_QUANTIZATION_CONFIG_MAPPING.get(method)
    if kind is None or "dequantize" not in inspect.signature(kind).parameters:
        reader = _OTHER_READERS.get(method, "the library that wrote it")
        raise ValueError(
            f"model={name!r} is quantized by {method!r}, which Transformers {version('transformers')} can't dequantize "
            f"a parameter at a time: dequantize it with {reader}, save it, and pass that folder."
        )

    forget_quantization(config)
    config.quantization_config = {"quant_method": _METHOD, "settings": settings}
    if getattr(config, "dtype", None) is None:
        config.dtype = torch.bfloat16  # Transformers would take that of a tensor in FP8
    return config


def dequantizer_of(folder: Path) -> Dequantizer | None:
    """Return what loads the quantized model in `folder`, so it knows which tensors are scales; `None`: it is dense."""
    if not (folder / "config.json").exists():
        return None
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if quantization(config) is None:
        return None
    settings = read_dequantized(config).quantization_config["settings"]
    return Dequantizer(DequantizingConfig(settings), pre_quantized=True)


@auto.register_quantization_config(_METHOD)
class DequantizingConfig(QuantizationConfigMixin):
    """Has Transformers use the `Dequantizer`; `settings` are the quantization settings of the source."""

    def __init__(self, settings: Mapping[str, Any], **_: Any) -> None:
        self.quant_method = _METHOD  # type: ignore[assignment]
        self.settings = settings
        self.dequantize = True  # Transformers then calls the loaded model dense


@auto.register_quantizer(_METHOD)
class Dequantizer(HfQuantizer):
    """Dequantizes by the conversions of the source's format: as it loads, or later if weights stay in files.

    Attributes:
        inner: Transformers' quantizer of the source's format, set to dequantize.
        format: What is special about that format.
        keeps: Whether weights stay in their files, so that conversions are kept.
        kept: Functions that make a parameter, by its name in the model.
        converted: Names of the stored tensors that a conversion takes.
        stored: File and dtype of all tensors of the source, by name; the dtype is that of safetensors, such as "BF16".
    """

    quantization_config: DequantizingConfig

    def __init__(self, quantization_config: Any, **keywords: Any) -> None:
        super().__init__(quantization_config, **keywords)
        source_settings = quantization_config.settings
        settings: Any = auto.AutoQuantizationConfig.from_dict(dict(source_settings))
        settings.dequantize = True  # also on a device that computes with the quantized weights
        self.inner = auto.AutoHfQuantizer.from_config(settings, pre_quantized=True)
        self.inner.validate_environment()
        self.format = FORMATS.get(source_settings["quant_method"], QuantizedFormat)(source_settings)
        self.keeps = False
        self.kept: dict[str, Callable[[], Tensor]] = {}
        self.converted: set[str] = set()
        self.stored: dict[str, tuple[str, str]] = {}
        self._dense_conversions: list[Any] = []  # those of the dense model
        self._conversions: list[Any] = []  # those in use

    def __deepcopy__(self, memo: Any) -> Dequantizer:
        """Return itself: Transformers copies a conversion, with all that it refers to, for every parameter."""
        return self

    def _process_model_before_weight_loading(
        self,
        model: PreTrainedModel,
        device_map: Any = None,
        checkpoint_files: Sequence[str] = (),
        **options: Any,
    ) -> None:
        """Note which tensors the files hold, and have the format's quantizer prepare the modules of `model`."""
        if self.format.prepares_model:
            internals.prepare_for_loading(self.inner, model, device_map=device_map, **options)
        for path in checkpoint_files:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118
                    self.stored[name] = (path, file.get_slice(name).get_dtype())
        self.keeps = device_map == {"": "disk"}

    def update_weight_conversions(self, weight_conversions: list[Any], *model: Any) -> list[Any]:
        """Return the conversions of the format, as `KeptConversion`; `weight_conversions` are the dense model's.

        Older versions of Transformers do not pass the model.
        """
        self._dense_conversions = list(weight_conversions)
        conversions = self.format.conversions(
            list(weight_conversions),
            lambda: self.inner.update_weight_conversions(weight_conversions, *model),
        )
        self._conversions = [
            KeptConversion(conversion, self)
            if isinstance(conversion, WeightConverter)
            else conversion
            for conversion in conversions
        ]
        return self._conversions

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **_: Any
    ) -> PreTrainedModel:
        """Check that all weights can be dequantized, and have Accelerate read kept ones through their conversions.

        Changes `model`: its conversions for saving, what `quantized_source` says of it, and the map from which
        Accelerate reads offloaded weights.
        """
        self._require_scales(model)
        self._save_by_dense_conversions(model)
        remember_quantized_source(model, self.quantization_config.settings)
        self._try_kept(model)

        for target, source in model.all_tied_weights_keys.items():
            if source in self.kept:
                self.kept.setdefault(target, self.kept[source])
        if self.kept:
            # The state dict comes before the index, which has the quantized tensors.
            _offloaded_weights(model).state_dict = KeptParameters(self.kept)
        return model

    def _require_scales(self, model: PreTrainedModel) -> None:
        """Refuse quantized tensors whose scales no conversion reads: Transformers would take them for values."""
        scales_of: defaultdict[str, list[str]] = defaultdict(list)  # by module
        for name in self.stored:
            module, _, part = name.rpartition(".")
            if "scale" in part and not ACTIVATION_SCALE.search(name):
                scales_of[module].append(name)

        renamings = [one for one in self._conversions if isinstance(one, WeightRenaming)]
        converters = [one for one in self._conversions if isinstance(one, WeightConverter)]
        state = model.state_dict()
        for name, (_, dtype) in self.stored.items():
            if dtype in PLAIN_FLOATS:
                continue
            scales = scales_of[name.rpartition(".")[0]]
            unread = [scale for scale in scales if scale not in self.converted]
            if name in self.converted and scales and not unread:
                continue
            target = rename_source_key(name, renamings, converters, model.base_model_prefix, state)[
                0
            ]
            if target not in state or not state[target].is_floating_point():
                continue
            if unread:
                raise ValueError(
                    f"{name} has dtype {dtype}, and its scale {unread[0]} is not read, so the weight would be wrong: "
                    "dequantize the model with the library that wrote it, save it, and pass that folder."
                )
            raise ValueError(
                f"{name} has dtype {dtype}, and Transformers finds no scales for it: if a file of the model is damaged "
                "or missing, download it again."
            )

    def _save_by_dense_conversions(self, model: PreTrainedModel) -> None:
        """Have `save_pretrained` give `model` the names of the source, without what dequantizes."""
        used_targets = [
            internals.original_targets(conversion)
            for conversion in self._conversions
            if isinstance(conversion, KeptConversion) and conversion.was_used()
        ]
        used = [
            conversion
            for conversion in self._dense_conversions
            if conversion.was_used() or internals.original_targets(conversion) in used_targets
        ]
        internals.set_weight_conversions(model, used)

    def _try_kept(self, model: PreTrainedModel) -> None:
        """Make one parameter of each kind, so that an error comes before the first decoder layer is pruned."""
        one_of_each = {re.sub(r"\d+", "*", name): name for name in self.kept}
        for name in one_of_each.values():
            try:
                shape = tuple(self.kept[name]().shape)
            except Exception as error:  # of the format's operations
                raise ValueError(f"{name} can't be dequantized: {error}") from error
            expected = tuple(model.get_parameter_or_buffer(name).shape)
            if shape != expected:
                raise ValueError(
                    f"{name} has shape {shape} once it is dequantized, and needs {expected}."
                )

    def read(self, name: str) -> Tensor:
        """Read a stored tensor of the source."""
        path, _ = self.stored[name]
        with safe_open(path, "pt") as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor

    def dense(
        self, module: str, parts: Mapping[str, Callable[[], Tensor]], dtype: torch.dtype
    ) -> Tensor:
        """Dequantize a matrix [out, in] that the model's class does not load; `parts` read what its module stores."""
        tensors = {part: read() for part, read in parts.items()}
        conversions = [one for one in self._conversions if isinstance(one, KeptConversion)]
        return self.format.weight(module, tensors, conversions).to(dtype)

    def is_serializable(self) -> bool:
        """Return True: `save_pretrained` can save the model."""
        return True

    @property
    def is_trainable(self) -> bool:
        """True: the loaded model can be trained."""
        return True


def _offloaded_weights(model: PreTrainedModel) -> Any:
    """Return the map from which Accelerate reads all offloaded weights of `model`."""
    hooks = [offload_hook(module) for module in model.modules()]
    weights: Any = next(hook.weights_map for hook in hooks if hook is not None)
    while isinstance(weights, PrefixedDataset):  # the view of one module
        weights = weights.dataset
    return weights


class KeptParameters(dict[str, Any]):
    """Parameters by name: tensors, or functions that make one each time it is asked for."""

    def __getitem__(self, name: str) -> Tensor:
        entry: Tensor | Callable[[], Tensor] = super().__getitem__(name)
        return entry if isinstance(entry, Tensor) else entry()


class KeptConversion(WeightConverter):
    """A conversion of stored tensors to parameters that can run again later.

    Transformers makes a copy for every parameter and gives it that parameter's tensors (`add_tensor`).

    Attributes:
        keeper: The quantizer that keeps it.
        patterns: The source pattern of each of its stored tensors, by name.
    """

    def __init__(self, conversion: WeightConverter, keeper: Dequantizer) -> None:
        sources = keeper.format.source_patterns(internals.original_sources(conversion))
        targets = list(internals.original_targets(conversion))
        first = keeper.format.first_operations(conversion.operations)
        super().__init__(sources, targets, [*first, *conversion.operations], conversion.force_cpu)
        self.scope_prefix = conversion.scope_prefix
        self.base_model_prefix = conversion.base_model_prefix
        self.keeper = keeper
        self.patterns: dict[str, str] = {}

    def add_tensor(
        self, target_key: str, source_key: str, source_pattern: str, future: Any
    ) -> None:
        """Take a stored tensor, whose name is `source_key`; its name is noted, too."""
        self.patterns[source_key] = source_pattern
        super().add_tensor(target_key, source_key, source_pattern, future)

    def materialize_tensors(self) -> Any:
        """Read the tensors that were added, and prepare them for the first operation."""
        return self.keeper.format.prepared(super().materialize_tensors(), self.patterns)

    def convert(
        self,
        layer_name: str,
        model: Any = None,
        config: Any = None,
        hf_quantizer: Any = None,
        loading_info: Any = None,
    ) -> Any:
        """Make the parameter `layer_name`, and those beside it, or keep the conversion for later.

        Changes `keeper.converted`, and if it is kept `keeper.kept` and the missing keys of `loading_info`; then
        SkipParameters tells Transformers to go on.
        """
        keeper = self.keeper
        keeper.converted.update(self.patterns)
        first_target = self.target_patterns[0]
        # If one stored tensor makes many parameters, Transformers copies these to files.
        makes_many = "*" in first_target
        if not keeper.keeps or makes_many:
            return super().convert(layer_name, model, config, hf_quantizer, loading_info)

        parameters = [
            layer_name,
            *(layer_name.replace(first_target, target) for target in self.target_patterns[1:]),
        ]
        # Without scales, the operations of a format change nothing: the parameter is read from its file.
        is_dense = (
            len(self.patterns) == 1
            and all(keeper.stored[name][1] in PLAIN_FLOATS for name in self.patterns)
            and all(reads_scales(operation) for operation in self.operations)
        )
        if not is_dense:
            for parameter in parameters:
                dtype = model.get_parameter_or_buffer(parameter).dtype
                keeper.kept[parameter] = partial(self.make, model, layer_name, parameter, dtype)
        loading_info.missing_keys.difference_update(parameters)
        raise SkipParameters

    def make(
        self, model: PreTrainedModel, layer_name: str, target: str, dtype: torch.dtype
    ) -> Tensor:
        """Make the parameter `target`, in the memory of the CPU, of the tensors in the files.

        `layer_name` is the first parameter that the conversion makes.
        """
        readers: Any = self.collected_tensors
        readers.clear()  # those of files that are closed
        for name, pattern in self.patterns.items():
            readers[pattern].append(partial(self.keeper.read, name))
        parameter = super().convert(layer_name, model, model.config)[target]
        tensor: Tensor = parameter[0] if isinstance(parameter, list) else parameter
        return tensor.detach().to("cpu", dtype)
