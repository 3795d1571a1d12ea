"""Load quantized models as models in 16 bits, of which each parameter is dequantized whenever it is asked for.

Transformers dequantizes while it loads, so the whole model would be in memory, or in the offload folder, in 16 bits.
The quantizer that is registered here, `Dequantizer`, stands before that of the source's format and takes over its
conversions (rename, dequantize, merge experts). If weights stay in their files (`device_map={"": "disk"}`), a
conversion does not run while the model loads but is deferred. It runs when Accelerate asks for its parameter, on that
parameter's tensors in the files of the source.

Order: `read_dequantized` changes the configuration, `from_pretrained` then makes a `Dequantizer` and calls it: first
`_process_model_before_weight_loading`, then `update_weight_conversions`, then for every parameter
`DeferredConversion.add_tensor` and `convert`, and at last `_process_model_after_weight_loading`.

- The *source* is the quantized model in its files; a *stored tensor* is one of its tensors, weight or scale, by its
  name there. Dtypes of stored tensors are named as in safetensors; those in `PLAIN_FLOATS` need no scales.
- The *quantization settings* are the dictionary `quantization_config` of `config.json`; `quant_method` is one entry.
- A *conversion* (`WeightConverter` of Transformers) has patterns of names of stored tensors (sources), patterns of
  names of parameters (targets), and operations that make the parameters of the tensors. A renaming (`WeightRenaming`)
  is one without operations.
- A *format* (`QuantizedFormat`) says what is special about one `quant_method`.
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

    `config` is one for which `quantization` returns settings. Changes `config`: its quantization settings then name the
    `Dequantizer` and hold the old settings, and the dtype is set if there is none. The section for the text decoder
    loses its own settings, if it has any.

    Raises:
        ValueError: If Transformers can't dequantize the format a parameter at a time.
        ImportError: If a package that reads the format is not installed.
    """
    settings = quantization(config)
    assert settings is not None, "the model is quantized"
    method = settings["quant_method"]
    name = internals.loaded_from(config)  # of the model: a Hub id, or a folder
    # Formats that are not in `FORMATS` need no package. Those that Transformers can't dequantize are refused below.
    FORMATS.get(method, QuantizedFormat).require_package(name)
    # Transformers dequantizes a format by conversions if the class of its settings has an option for it.
    class_of_settings = auto.AUTO_QUANTIZATION_CONFIG_MAPPING.get(method)
    can_be_dequantized = (
        class_of_settings is not None
        and "dequantize" in inspect.signature(class_of_settings).parameters
    )
    if not can_be_dequantized:
        reader = _OTHER_READERS.get(method, "the library that wrote it")
        raise ValueError(
            f"model={name!r} is quantized by {method!r}, which Transformers {version('transformers')} can't dequantize "
            f"a parameter at a time: dequantize it with {reader}, save it, and pass that folder."
        )

    forget_quantization(config)  # also in the section for the text decoder
    config.quantization_config = {"quant_method": _METHOD, "settings": settings}
    if getattr(config, "dtype", None) is None:
        config.dtype = torch.bfloat16  # Transformers would take that of a tensor in FP8
    return config


def dequantizer_of(folder: Path) -> Dequantizer | None:
    """Return a `Dequantizer` for the quantized model in `folder`, with which no model is loaded.

    `None` if the model is dense, or the folder has no configuration. Only `config.json` is read.
    """
    if not (folder / "config.json").exists():
        return None
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    is_dense = quantization(config) is None
    if is_dense:
        return None
    settings = read_dequantized(config).quantization_config["settings"]
    return Dequantizer(DequantizingConfig(settings), pre_quantized=True)


@auto.register_quantization_config(_METHOD)
class DequantizingConfig(QuantizationConfigMixin):
    """Quantization settings that have Transformers use the `Dequantizer`; `settings` are those of the source."""

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
        is_lazy: Whether weights stay in their files, so that conversions are deferred. It is known when the weights are
            about to be loaded (`_process_model_before_weight_loading`), and False until then.
        makers: For each deferred parameter, by its name in the model: a function that reads and dequantizes it.
            Conversions add them.
        converted: Names of the stored tensors that a conversion has taken.
        stored: The path of the file and the dtype of each stored tensor, by its name.
    """

    quantization_config: DequantizingConfig

    def __init__(self, quantization_config: Any, **keywords: Any) -> None:
        """Make the quantizer of the source's format; Transformers calls this with a `DequantizingConfig`.

        `keywords` are for the base class. Raises an error of Transformers if the format can't be dequantized here.
        """
        super().__init__(quantization_config, **keywords)
        # The quantization settings of the source: first the dictionary in its `config.json`, then the object that
        # Transformers makes of that.
        source_settings = quantization_config.settings
        source_config: Any = auto.AutoQuantizationConfig.from_dict(dict(source_settings))
        source_config.dequantize = True  # also on a device that computes with the quantized weights
        self.inner = auto.AutoHfQuantizer.from_config(source_config, pre_quantized=True)
        self.inner.validate_environment()
        # Formats that are not in `FORMATS` need nothing beyond what `QuantizedFormat` does.
        format_class = FORMATS.get(source_settings["quant_method"], QuantizedFormat)
        self.format = format_class(source_settings)
        # Filled while weights are loaded, as the docstring of the class says.
        self.is_lazy = False
        self.makers: dict[str, Callable[[], Tensor]] = {}
        self.converted: set[str] = set()
        self.stored: dict[str, tuple[str, str]] = {}
        # Both are filled by `update_weight_conversions`: the conversions that load the dense model, and those that load
        # this quantized one.
        self._dense_conversions: list[Any] = []
        self._conversions: list[Any] = []

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
        """Note which tensors the files hold, and have the format's quantizer prepare the modules of `model`.

        Changes `self.stored` and `self.is_lazy`. For most formats it also changes the modules of `model`, which has no
        weights yet, and what the format's quantizer (`self.inner`) notes of them. Transformers calls this with the
        paths of the weight files, and with the `device_map` that `from_pretrained` was asked for; `options` are only
        passed on.
        """
        if self.format.prepares_model:
            internals.prepare_for_loading(self.inner, model, device_map=device_map, **options)
        for path in checkpoint_files:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118
                    self.stored[name] = (path, file.get_slice(name).get_dtype())
        # Accelerate's way to say that all modules stay in their files.
        self.is_lazy = device_map == {"": "disk"}

    def update_weight_conversions(self, weight_conversions: list[Any], *model: Any) -> list[Any]:
        """Return the conversions and renamings by which the quantized model is loaded; Transformers calls this.

        Each conversion becomes a `DeferredConversion`; renamings stay. `self` keeps a copy of the given list, and the
        result. The conversions come from `self.format`, which may start from those of Transformers: `self.inner` makes
        these, and is the quantizer of Transformers for this format.

        Args:
            weight_conversions: Those of the dense model. Some formats of Transformers add theirs to this list.
            model: The model, which older versions of Transformers do not pass.
        """
        self._dense_conversions = list(weight_conversions)
        # The format calls the second argument only if it needs the conversions of Transformers.
        conversions = self.format.conversions(
            list(weight_conversions),
            lambda: self.inner.update_weight_conversions(weight_conversions, *model),
        )
        self._conversions = [
            DeferredConversion(conversion, self)
            if isinstance(conversion, WeightConverter)
            else conversion
            for conversion in conversions
        ]
        return self._conversions

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **_: Any
    ) -> PreTrainedModel:
        """Check that all weights can be dequantized, and have Accelerate read deferred ones through `self.makers`.

        Changes `model`, and returns it: its conversions for saving, what `quantized_source` says of it, and the map
        from which Accelerate reads offloaded weights. `self.makers` also gets the names of tied weights. Raises
        ValueError if a weight can't be dequantized.
        """
        self._require_scales(model)
        self._save_by_dense_conversions(model)
        remember_quantized_source(model, self.quantization_config.settings)
        self._try_makers(model)

        # A tied weight is a second name of a parameter, and is made in the same way.
        for tied_name, name in model.all_tied_weights_keys.items():
            if name in self.makers and tied_name not in self.makers:
                self.makers[tied_name] = self.makers[name]
        if self.makers:
            # Accelerate looks into the state dict before the index of files, which has the quantized tensors.
            _offloaded_weights(model).state_dict = ParametersMadeWhenRead(self.makers)
        return model

    def _require_scales(self, model: PreTrainedModel) -> None:
        """Raise ValueError for a quantized tensor whose scales no conversion reads: the weight would be wrong.

        Transformers would take the quantized numbers for the weights. `self.stored` has the file and the dtype of every
        stored tensor, and `self.converted` has the names of the tensors that conversions have taken.
        `rename_source_key` of Transformers marks the conversions whose patterns match (`was_used`); nothing else
        changes.
        """
        scales_of = self._scales_by_module()
        renamings = [one for one in self._conversions if isinstance(one, WeightRenaming)]
        converters = [one for one in self._conversions if isinstance(one, WeightConverter)]
        state = model.state_dict()
        for name, (_path, dtype) in self.stored.items():
            if dtype in PLAIN_FLOATS:
                continue
            module, _, _ = name.rpartition(".")
            scales = scales_of[module]
            unread = [scale for scale in scales if scale not in self.converted]
            is_dequantized = name in self.converted and bool(scales) and not unread
            if is_dequantized:
                continue
            parameter, *_ = rename_source_key(  # it also returns the pattern that matches
                name,
                renamings,
                converters,
                base_model_prefix=model.base_model_prefix,
                meta_state_dict=state,
            )
            # Only a tensor that is loaded as a floating-point parameter is a weight. Others may be integers: indices,
            # for instance.
            is_weight = parameter in state and state[parameter].is_floating_point()
            if is_weight and unread:
                raise ValueError(
                    f"{name} has dtype {dtype}, and its scale {unread[0]} is not read, so the weight would be wrong: "
                    "dequantize the model with the library that wrote it, save it, and pass that folder."
                )
            if is_weight:
                raise ValueError(
                    f"{name} has dtype {dtype}, and Transformers finds no scales for it: if a file of the model is "
                    "damaged or missing, download it again."
                )

    def _scales_by_module(self) -> defaultdict[str, list[str]]:
        """Return the names of all stored scales of weights, by module; an empty list for a module without one."""
        scales: defaultdict[str, list[str]] = defaultdict(list)
        for name in self.stored:
            module, _, part = name.rpartition(".")
            if "scale" in part and not ACTIVATION_SCALE.search(name):
                scales[module].append(name)
        return scales

    def _save_by_dense_conversions(self, model: PreTrainedModel) -> None:
        """Have `save_pretrained` save `model` under the names of the source, without what dequantizes.

        Changes the conversions that `model` notes for saving: those of the dense model (`self._dense_conversions`) that
        were used to load it. A `DeferredConversion` with the same targets may have been used in the place of one.
        """
        # The patterns of parameters that each used conversion makes, as they were before Transformers changed them.
        used_targets = [
            internals.original_targets(conversion)
            for conversion in self._conversions
            if isinstance(conversion, DeferredConversion) and conversion.was_used()
        ]
        used = [
            conversion
            for conversion in self._dense_conversions
            if conversion.was_used() or internals.original_targets(conversion) in used_targets
        ]
        internals.set_weight_conversions(model, used)

    def _try_makers(self, model: PreTrainedModel) -> None:
        """Dequantize one deferred parameter of each kind, so that an error comes before a decoder layer is pruned.

        Parameters are of one kind if their names differ only in numbers, such as that of the layer. The results are
        dropped. Raises ValueError if one can't be made, or has not the shape of the parameter of `model`.
        """
        # By the name without numbers: the last parameter of the kind.
        one_of_each_kind = {re.sub(r"\d+", "*", name): name for name in self.makers}
        for name in one_of_each_kind.values():
            make = self.makers[name]
            try:
                shape = tuple(make().shape)
            except Exception as error:  # the operations of formats raise many kinds of errors
                raise ValueError(f"{name} can't be dequantized: {error}") from error
            expected = tuple(model.get_parameter_or_buffer(name).shape)
            if shape != expected:
                raise ValueError(
                    f"{name} has shape {shape} once it is dequantized, and needs {expected}."
                )

    def read(self, name: str) -> Tensor:
        """Read the stored tensor `name` from its file, to the CPU, in the dtype that it has there."""
        path, _ = self.stored[name]
        with safe_open(path, "pt") as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor

    def dense(
        self, module: str, parts: Mapping[str, Callable[[], Tensor]], dtype: torch.dtype
    ) -> Tensor:
        """Dequantize the weight [out, in] of a linear module that the model's class does not load.

        `update_weight_conversions` must have been called; it sets `self._conversions`. Changes nothing.

        Args:
            module: Name of the module in the files, such as "model.layers.61.eh_proj".
            parts: Functions that read what is stored for it, by the last word of the name, such as "weight" and
                "weight_scale_inv".
            dtype: That of the result.
        """
        tensors = {part: read() for part, read in parts.items()}
        conversions = [one for one in self._conversions if isinstance(one, DeferredConversion)]
        return self.format.weight(module, tensors, conversions).to(dtype)

    def is_serializable(self) -> bool:
        """Return True: `save_pretrained` can save the model."""
        return True

    @property
    def is_trainable(self) -> bool:
        """True: the loaded model can be trained."""
        return True


def _offloaded_weights(model: PreTrainedModel) -> Any:
    """Return the map from which Accelerate reads all offloaded weights of `model`, by name; not a copy.

    All modules with offloaded weights have a hook of Accelerate that reads from this map, so the first will do.
    """
    hooks = [offload_hook(module) for module in model.modules()]
    first_hook = next(hook for hook in hooks if hook is not None)
    weights: Any = first_hook.weights_map
    while isinstance(weights, PrefixedDataset):  # the view of one module
        weights = weights.dataset
    return weights


class ParametersMadeWhenRead(dict[str, Any]):
    """Parameters by name; it holds tensors, or functions that make a tensor each time it is asked for."""

    def __getitem__(self, name: str) -> Tensor:
        entry: Tensor | Callable[[], Tensor] = super().__getitem__(name)
        return entry if isinstance(entry, Tensor) else entry()


class DeferredConversion(WeightConverter):
    """A conversion of stored tensors to parameters that can run again later.

    Transformers makes a copy for every parameter and gives it that parameter's tensors (`add_tensor`).

    Attributes:
        quantizer: The quantizer of the model, the same for all copies.
        patterns: The source pattern of each of its stored tensors, by name.
    """

    def __init__(self, conversion: WeightConverter, quantizer: Dequantizer) -> None:
        """Make a deferred conversion from one of Transformers, with the further sources and operations of the format.

        `conversion` is not changed. `quantizer` is kept; `convert` adds to its `makers` and `converted`.
        """
        # The original patterns are those before Transformers makes regular expressions of them.
        sources = quantizer.format.source_patterns(internals.original_sources(conversion))
        targets = list(internals.original_targets(conversion))
        first_operations = quantizer.format.first_operations(conversion.operations)
        operations = [*first_operations, *conversion.operations]
        super().__init__(sources, targets, operations, conversion.force_cpu)
        # Where in the model the conversion holds; `super().__init__` does not take these.
        self.scope_prefix = conversion.scope_prefix
        self.base_model_prefix = conversion.base_model_prefix
        self.quantizer = quantizer
        self.patterns: dict[str, str] = {}  # filled by `add_tensor`

    def add_tensor(
        self, target_key: str, source_key: str, source_pattern: str, future: Any
    ) -> None:
        """Take a stored tensor for the parameter `target_key`, and note its name in `self.patterns`.

        Transformers calls this.

        Args:
            target_key: The name of the parameter.
            source_key: The name of the stored tensor.
            source_pattern: The pattern of this conversion that the name matches.
            future: A function, or a future, that gives the tensor.
        """
        self.patterns[source_key] = source_pattern
        super().add_tensor(target_key, source_key, source_pattern, future)

    def materialize_tensors(self) -> Any:
        """Read the tensors that `add_tensor` took, and return them as the first operation needs them.

        They are lists by source pattern. The base class drops what it has read; Transformers calls this in `convert`.
        """
        tensors = super().materialize_tensors()
        return self.quantizer.format.prepared(tensors, self.patterns)

    def convert(
        self,
        layer_name: str,
        model: Any = None,
        config: Any = None,
        hf_quantizer: Any = None,
        loading_info: Any = None,
    ) -> Any:
        """Make the parameter `layer_name` and those of the other targets, or defer the conversion.

        Transformers calls this. A conversion is deferred if weights stay in their files (`quantizer.is_lazy`): then
        `quantizer.makers` gets a function for each parameter that has to be made (`make`), the parameters are taken out
        of the missing keys of `loading_info`, and SkipParameters is raised, which tells Transformers to go on. In any
        case, the names of the stored tensors (the keys of `self.patterns`) are added to `quantizer.converted`.

        Args:
            layer_name: The name of the parameter that the first target pattern stands for.
            model: The model that is loaded; only the dtypes of its parameters are read here.
            config: Only passed on, as `hf_quantizer` is.
            hf_quantizer: Transformers' argument of that name.
            loading_info: What Transformers notes while it loads.

        Returns:
            The parameters by name, if the conversion is not deferred.
        """
        quantizer = self.quantizer
        quantizer.converted.update(self.patterns)
        first_target = self.target_patterns[0]
        # If one stored tensor makes many parameters, Transformers copies these to files.
        makes_many = "*" in first_target
        if not quantizer.is_lazy or makes_many:
            return super().convert(layer_name, model, config, hf_quantizer, loading_info)

        parameters = [layer_name]  # names
        for target in self.target_patterns[1:]:
            parameters.append(layer_name.replace(first_target, target))

        # Without scales, the operations of a format change nothing: Accelerate reads the parameter from its file.
        dtypes = []
        for name in self.patterns:
            _path, dtype_in_file = quantizer.stored[name]
            dtypes.append(dtype_in_file)
        is_one_plain_tensor = len(dtypes) == 1 and dtypes[0] in PLAIN_FLOATS
        only_dequantizes = all(reads_scales(operation) for operation in self.operations)
        is_stored_as_it_is = is_one_plain_tensor and only_dequantizes
        if not is_stored_as_it_is:
            for parameter in parameters:
                dtype = model.get_parameter_or_buffer(parameter).dtype
                quantizer.makers[parameter] = partial(
                    self.make, model, layer_name, parameter, dtype
                )
        loading_info.missing_keys.difference_update(parameters)
        raise SkipParameters

    def make(
        self, model: PreTrainedModel, layer_name: str, target: str, dtype: torch.dtype
    ) -> Tensor:
        """Read the stored tensors of this conversion, run it, and return the parameter `target`, on the CPU.

        Changes only `self.collected_tensors`, from which Transformers reads: it gets functions that read the tensors.
        `self.patterns` has the source pattern of each of these tensors, by name.

        Args:
            model: The model, of which the operations read the configuration.
            layer_name: The name of the first parameter that the conversion makes.
            target: The name of the parameter to return, `layer_name` or one that is made with it.
            dtype: The dtype of the result.
        """
        # Lists by source pattern; a new pattern gets an empty list.
        readers: Any = self.collected_tensors
        readers.clear()  # drops readers of files that are closed
        for name, pattern in self.patterns.items():
            readers[pattern].append(partial(self.quantizer.read, name))
        # The method of Transformers, not that of this class: the conversion runs now.
        parameters = super().convert(layer_name, model, model.config)
        parameter = parameters[target]
        tensor: Tensor = parameter[0] if isinstance(parameter, list) else parameter
        return tensor.detach().to("cpu", dtype)
