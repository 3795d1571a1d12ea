"""Packed checkpoints in plain `from_pretrained`: as a dense model, or with linear layers that stay packed.

Importing this module registers a quantizer with Transformers, because this is its only interface for weights in another
form; nothing is rounded. Transformers then streams the files as for any model: a conversion makes dense tensors of the
three parts, or `PackedLinear` modules on the meta device get the parts unchanged. Packed weights of other modules, such
as fused experts, always become dense.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.core_model_loading import (
    ConversionOps,
    WeightConverter,
    WeightRenaming,
    _IdentityOp,
)
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from optimum_fista.packed.format import (
    SUFFIXES,
    PackedFormatError,
    PackedTensor,
    check,
    packed_names,
    unpack,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

QUANT_METHOD = "fista_packed"


@auto.register_quantization_config(QUANT_METHOD)
class FistaPackedConfig(QuantizationConfigMixin):
    """Form of a packed checkpoint and of the loaded model, for `from_pretrained(quantization_config=)`.

    Args:
        runtime: `"dense"`: the model that was packed, bit for bit. `"packed"`: `nn.Linear` and `Conv1D` modules stay
            packed and compute from there; other packed weights, such as fused experts, become dense.
        weights: The weight file, or the index of the weight files, in the model folder.
        parameters: Last parts of the names of the parameters that are packed, such as `"weight"`: names, not patterns.
    """

    def __init__(
        self,
        runtime: str = "dense",
        weights: str = "packed.safetensors",
        parameters: Sequence[str] = ("weight",),
        **_: Any,
    ) -> None:
        if runtime not in ("dense", "packed"):
            raise ValueError(f"runtime={runtime!r}: pass 'dense' or 'packed'.")
        if not isinstance(weights, str) or not re.fullmatch(
            r"[^/\\]+\.safetensors(\.index\.json)?", weights
        ):
            raise ValueError(
                f"weights={weights!r}: pass the name of a safetensors file in the folder, or its index."
            )
        # Transformers makes regular expressions of them: a name, which has none of their signs, matches itself alone.
        if isinstance(parameters, str) or not all(
            isinstance(p, str) and p.isidentifier() for p in parameters
        ):
            raise ValueError(f"parameters={parameters!r}: pass a list of names such as 'weight'.")
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]
        self.runtime = runtime
        self.weights = weights
        self.parameters = list(parameters)  # JSON has no tuples

    @property
    def dequantize(self) -> bool:
        """True if the loaded model is dense."""
        return self.runtime == "dense"

    def get_loading_attributes(self) -> dict[str, Any]:
        """The options that a caller may choose for a checkpoint."""
        return {"runtime": self.runtime}


def read_packed(files: Mapping[str, Path], name: str) -> PackedTensor:
    """A packed tensor, checked, from the files of a checkpoint's tensors."""
    parts = []
    for suffix in SUFFIXES:
        with safe_open(files[name + suffix], "pt") as file:
            parts.append(file.get_tensor(name + suffix))
    packed = PackedTensor(*parts)
    check(packed, name)
    return packed


class Unpack(ConversionOps):
    """Makes dense tensors of the three parts of packed ones."""

    def __init__(self, hf_quantizer: Any = None) -> None:
        self.hf_quantizer = hf_quantizer

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: Sequence[str],
        target_patterns: Sequence[str],
        model: PreTrainedModel | None = None,
        full_layer_name: str = "",
        **_: Any,
    ) -> dict[str, list[Tensor]]:
        """Lists of values, masks and layouts by their patterns -> lists of dense tensors, in the model's dtype.

        Dense tensors keep their names. The others are named by the target, or, if other operations follow that merge
        several sources, such as a mixture's experts, as the values were.
        """
        dtype = (
            None if model is None else model.get_parameter_or_buffer(full_layer_name).dtype
        )  # the caller's choice
        found = {}
        for pattern, tensors in input_dict.items():
            stem = pattern.removesuffix(SUFFIXES[0])
            if not pattern.endswith(SUFFIXES):
                found[pattern] = [tensor.to(dtype or tensor.dtype) for tensor in tensors]
            elif stem != pattern:  # once for three parts
                parts = [input_dict[stem + suffix] for suffix in SUFFIXES]
                packed = map(
                    PackedTensor, *(part if isinstance(part, list) else [part] for part in parts)
                )
                dense = [
                    unpack(one, full_layer_name or stem).to(dtype or one.values.dtype)
                    for one in packed
                ]
                found[stem if stem in target_patterns else pattern] = dense
        return found

    @property
    def reverse_op(self) -> ConversionOps:
        """A dense model is saved dense."""
        return _IdentityOp()


@auto.register_quantizer(QUANT_METHOD)
class FistaPackedQuantizer(HfQuantizer):
    """Loads packed checkpoints; Transformers calls it a quantizer, but nothing is rounded."""

    quantization_config: FistaPackedConfig

    def __init__(self, quantization_config: FistaPackedConfig, **keywords: Any) -> None:
        super().__init__(quantization_config, **keywords)
        if not self.pre_quantized:
            advice = "pack the folder of a pruned model with `optimum-fista pack`"
            raise ValueError(
                f"quantization_config is a FistaPackedConfig, but the model is not packed: {advice}."
            )
        self._becoming_dense = (
            quantization_config.parameters
        )  # names, or in a packed model the weights' full names
        self._staying_packed: dict[
            str, bool
        ] = {}  # modules; True for `Conv1D`, whose weights are stored as [in, out]

    def update_attn_implementation(self, config: Any) -> Any:
        """Point the configuration to the packed files, because no loader finds them (this call gets it first)."""
        config.transformers_weights = self.quantization_config.weights
        return config

    update_tp_plan = update_attn_implementation  # the first call of Transformers 5.17

    def update_weight_conversions(self, weight_conversions: list[Any], *_: Any) -> list[Any]:
        """Make the model's renamings rename packed parts, too, and its merges unpack them first."""
        updated = []
        for conversion in weight_conversions:
            sources, targets = (
                conversion._original_source_patterns,
                conversion._original_target_patterns,
            )
            new = [conversion]
            if all(
                source.rpartition(".")[2] in self.quantization_config.parameters
                for source in sources
            ):
                if isinstance(conversion, WeightConverter):
                    parts = [source + suffix for source in sources for suffix in (*SUFFIXES, "")]
                    operations = [Unpack(self), *conversion.operations]
                    new = [WeightConverter(parts, targets, operations, conversion.force_cpu)]
                elif len(sources) == 1:
                    new = [
                        *(
                            WeightRenaming(sources[0] + suffix, targets[0] + suffix)
                            for suffix in SUFFIXES
                        ),
                        *new,
                    ]
            for each in new:  # they apply to the same part of the model
                each.scope_prefix, each.base_model_prefix = (
                    conversion.scope_prefix,
                    conversion.base_model_prefix,
                )
            updated += new
        return updated + self.get_weight_conversions()

    def get_weight_conversions(self) -> list[Any]:
        """Conversions of packed parameters that no conversion of the model handles."""
        return [
            WeightConverter([name + s for s in SUFFIXES], name, [Unpack(self)])
            for name in self._becoming_dense
        ]

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Sequence[str] | None = None, **_: Any
    ) -> None:
        """Refuse incomplete files, and make placeholders for weights that stay packed."""
        files: dict[str, Path] = {}
        for path in checkpoint_files or []:
            with safe_open(path, "pt") as file:
                files |= dict.fromkeys(file.keys(), Path(path))
        parameters = dict(model.named_parameters())
        self._dtypes = {name: parameter.dtype for name, parameter in parameters.items()}
        # All weights are checked before the first is used. Only their sizes are kept, on the meta device.
        read = ((name, read_packed(files, name)) for name in packed_names(files))
        outlines = {
            name: PackedTensor(p.values.to("meta"), p.mask.to("meta"), p.layout) for name, p in read
        }
        for name, outline in outlines.items():
            shape = tuple(parameters[name].shape) if name in parameters else ()
            if len(shape) == 2 and outline.shape != shape:  # fused experts may be stored transposed
                raise PackedFormatError(
                    f"{name}_layout says shape {outline.shape}: the model's is {shape}."
                )
        # Only the last names of packed parameters are known, so any matrix with this name may be packed.
        kept = {
            name.rpartition(".")[2] for name, parameter in parameters.items() if parameter.ndim > 1
        }
        self.quantization_config.parameters = sorted(
            kept.union(self.quantization_config.parameters)
        )
        self._becoming_dense = self.quantization_config.parameters
        if self.quantization_config.runtime == "packed":
            self._becoming_dense = [
                name for name in outlines if not self._replace(model, name, outlines[name])
            ]

    def _replace(self, model: PreTrainedModel, name: str, outline: PackedTensor) -> bool:
        """Make the `nn.Linear` or `Conv1D` of a packed weight a `PackedLinear`; False if it is neither."""
        owner, _, leaf = name.rpartition(".")
        try:
            module = model.get_submodule(owner)
        except AttributeError:
            return False
        if leaf != "weight" or type(module) not in (
            nn.Linear,
            Conv1D,
        ):  # a subclass may compute something else
            return False
        dense = cast(Tensor, module.weight)
        from optimum_fista.packed.linear import (
            PackedLinear,
        )  # brings `torch._dynamo`, which takes more than a second

        values = outline.values.to(dense.dtype)  # Transformers casts to the dtype of what is there
        packed = PackedLinear(PackedTensor(values, outline.mask, outline.layout), module.bias)  # type: ignore[arg-type]
        packed.weight_layout = outline.layout.to("meta")
        self._staying_packed[owner] = type(module) is Conv1D
        parent, _, child = owner.rpartition(".")
        setattr(model.get_submodule(parent), child, packed.requires_grad_(False))
        return True

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **_: Any
    ) -> PreTrainedModel:
        model.config.__dict__.pop(
            "transformers_weights", None
        )  # or a saved model would look for packed files
        if not hasattr(HfQuantizer, "get_load_operations"):  # Transformers 5.17
            model.__dict__.pop(
                "_weight_conversions", None
            )  # or a saved model would have the names of packed parts
            # It leaves tensors that it renames in the dtype of the file, which may not be the one asked for.
            in_float32 = model._get_dtype_plan(torch.bfloat16)
            for name, parameter in model.named_parameters():
                if not any(part in name for part in in_float32):
                    parameter.data = parameter.to(self._dtypes.get(name, parameter.dtype))
        for name, is_transposed in self._staying_packed.items():
            module: Any = model.get_submodule(name)
            if module.weight_mask.is_meta:
                advice = "pass offload_buffers=False, with which packed weights stay in memory, or runtime='dense'"
                raise ValueError(
                    f"offload_buffers=True leaves the packed weight of {name} on disk: {advice}."
                )
            if is_transposed:
                module.transpose_()  # `Conv1D` computes x W, the kernels W x
            else:
                module.prepare()
        return model

    def is_serializable(self) -> bool:
        """True if `save_pretrained` can save the model as it is."""
        return False

    @property
    def is_trainable(self) -> bool:
        """True if the loaded model can be trained."""
        return self.quantization_config.runtime == "dense"


# Options for other types of configurations are ignored.
vars(auto)["LOADING_ATTRIBUTES_CONFIG_TYPES"] = (
    *auto.LOADING_ATTRIBUTES_CONFIG_TYPES,
    FistaPackedConfig,
)
