"""Packed checkpoints in plain `from_pretrained`: as a dense model, or with linears that stay packed.

Importing this module registers its classes with Transformers; everything heavier is imported when it is needed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from optimum_fista.packed.validation import SUFFIXES

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from optimum_fista.folder.packed_modules import PackedModules

QUANT_METHOD = "fista_packed"
RUNTIMES = ("dense", "packed")


@auto.register_quantization_config(QUANT_METHOD)
class FistaPackedConfig(QuantizationConfigMixin):
    """How a packed checkpoint is stored and loaded; pass one to `from_pretrained(quantization_config=)` to choose.

    Args:
        runtime: `"dense"`: the model that was packed, bit for bit. `"packed"`: `nn.Linear` and `Conv1D` modules and the
            experts of a mixture stay packed and compute from there; other packed weights become dense.
        weights: The weight file, or the index of the weight files, in the model folder.
        parameters: Last parts of the names of the parameters that are packed, such as `"weight"`: names, not patterns.

    Raises:
        ValueError: If the runtime is not known, or `weights` or `parameters` are not such names.
    """

    def __init__(
        self,
        runtime: str = "dense",
        weights: str = "packed.safetensors",
        parameters: Sequence[str] = ("weight",),
        **_: Any,
    ) -> None:
        if runtime not in RUNTIMES:
            raise ValueError(f"runtime={runtime!r}: pass 'dense' or 'packed'.")
        if not isinstance(weights, str) or not re.fullmatch(r"[^/\\]+\.safetensors(\.index\.json)?", weights):
            raise ValueError(
                f"weights={weights!r}: pass the name of a safetensors file in the folder, or of its index."
            )
        # Transformers makes regular expressions of them: a name, which has none of their signs, matches itself alone.
        if isinstance(parameters, str) or not all(isinstance(p, str) and p.isidentifier() for p in parameters):
            raise ValueError(f"parameters={parameters!r}: pass a list of names such as 'weight'.")
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]
        self.runtime = runtime
        self.weights = weights
        self.parameters = list(parameters)

    @property
    def dequantize(self) -> bool:
        """Whether the loaded model is dense."""
        return self.runtime == "dense"

    def get_loading_attributes(self) -> dict[str, Any]:
        """What a caller may choose for a checkpoint."""
        return {"runtime": self.runtime}


@auto.register_quantizer(QUANT_METHOD)
class FistaPackedQuantizer(HfQuantizer):
    """Loads packed checkpoints; Transformers calls it a quantizer, but nothing is rounded."""

    quantization_config: FistaPackedConfig

    def __init__(self, quantization_config: FistaPackedConfig, **keywords: Any) -> None:
        super().__init__(quantization_config, **keywords)
        if not self.pre_quantized:
            raise ValueError(
                "quantization_config is a FistaPackedConfig, but the model is not packed: pack the folder of a pruned "
                "model with `optimum-fista pack`."
            )
        self._modules: PackedModules | None = None

    @property
    def serialized_names(self) -> dict[str, list[str]]:  # type: ignore[override]
        """The tensors that a parameter is stored as: three if it is packed, itself if it was left dense."""
        return {name: [name + suffix for suffix in (*SUFFIXES, "")] for name in self.quantization_config.parameters}

    def update_attn_implementation(self, config: Any) -> Any:
        """The first call with the configuration: point it to the packed files, which no loader finds by itself."""
        config.transformers_weights = self.quantization_config.weights
        return config

    def get_load_operations(self) -> dict[str, Any]:
        """What makes a dense tensor of the stored ones."""
        from optimum_fista.folder.unpacking import Unpack

        return {"dequantize": Unpack}

    def update_weight_conversions(self, weight_conversions: list[Any], model: PreTrainedModel) -> list[Any]:
        """Renamings that name a whole parameter rename its packed parts too."""
        from transformers.core_model_loading import WeightRenaming

        renamings = []
        for renaming in weight_conversions:
            if isinstance(renaming, WeightRenaming) and len(renaming._original_source_patterns) == 1:
                (source,), (target,) = renaming._original_source_patterns, renaming._original_target_patterns
                if source.rpartition(".")[2] in self.quantization_config.parameters:
                    renamings += [renaming.copy(source + suffix, target + suffix) for suffix in SUFFIXES]
        return super().update_weight_conversions(renamings + weight_conversions, model)

    def get_weight_conversions(self) -> list[Any]:
        """Conversions of packed parameters that no conversion of the model takes up."""
        from transformers.core_model_loading import WeightConverter

        names = self.quantization_config.parameters if self._modules is None else self._modules.becoming_dense
        operation = self.get_load_operations()["dequantize"]
        return [WeightConverter([name + s for s in SUFFIXES], name, [operation(self)]) for name in names]

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Sequence[str] | None = None, **_: Any
    ) -> None:
        """Refuse files that are not whole, and make room for weights that stay packed."""
        from optimum_fista.folder.packed_modules import PackedModules
        from optimum_fista.folder.unpacking import PackedFiles

        files = PackedFiles.in_files(checkpoint_files or [])
        outlines = {name: files.outline(name) for name in files.names}  # checks all
        kept = {name.rpartition(".")[2] for name, parameter in model.named_parameters() if parameter.ndim > 1}
        self.quantization_config.parameters = sorted(kept.union(self.quantization_config.parameters))
        if self.quantization_config.runtime == "packed":
            self._modules = PackedModules(model, files, outlines)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        model.config.__dict__.pop("transformers_weights", None)
        if self._modules is not None:
            self._modules.complete(model)
        return model

    def is_serializable(self) -> bool:
        """Whether `save_pretrained` can save the model as it is."""
        return False

    @property
    def is_trainable(self) -> bool:
        """Whether the loaded model can be trained."""
        return self.quantization_config.runtime == "dense"


# What a caller chooses for configurations of other types is ignored.
vars(auto)["LOADING_ATTRIBUTES_CONFIG_TYPES"] = (*auto.LOADING_ATTRIBUTES_CONFIG_TYPES, FistaPackedConfig)
