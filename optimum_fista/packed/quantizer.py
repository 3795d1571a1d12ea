"""Loading of packed model folders by plain `from_pretrained`, as the dense model that was packed, bit for bit.

A packed folder stores each pruned weight as three tensors (its kept values, its mask and a layout; see
`packed.format`). Transformers has one interface for weights that are stored in another form than the model needs: a
quantizer. So importing this module registers one, although nothing is rounded. `from_pretrained` then calls it in this
order:

1. `update_attn_implementation` points the configuration to the packed files.
2. `_process_model_before_weight_loading` checks all packed tensors in the files.
3. `update_weight_conversions` puts the conversion `Unpack` before those of the model.
4. `_process_model_after_weight_loading` removes from the model what would disturb its saving.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers.core_model_loading import (
    ConversionOps,
    WeightConverter,
    WeightRenaming,
)
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from optimum_fista import internals
from optimum_fista.packed.format import (
    SUFFIXES,
    VALUES_SUFFIX,
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
    """The `quantization_config` in the `config.json` of a packed folder.

    Args:
        weights: The weight file, or the index of the weight files, in the model folder.
        parameters: Last parts of the names of the parameters that are packed, such as `"weight"`. These are names, and
            no patterns.
        runtime: How the model computes. Only `"dense"` is possible.

    Raises:
        ValueError: If an argument has another form. The values come from a file of other people: another file must not
            be read, and Transformers makes regular expressions of the names.
    """

    def __init__(
        self,
        weights: str = "packed.safetensors",
        parameters: Sequence[str] = ("weight",),
        runtime: str = "dense",
        **_: Any,
    ) -> None:
        """Check and keep the settings; the arguments are those of the class, others are ignored.

        Transformers calls this with the values of the `config.json`.
        """
        if runtime != "dense":
            raise ValueError(
                f"runtime={runtime!r}: a packed folder is loaded as a dense model, so pass 'dense'."
            )
        file_name = r"[^/\\]+\.safetensors(\.index\.json)?"
        is_file_name = isinstance(weights, str) and re.fullmatch(file_name, weights) is not None
        if not is_file_name:
            raise ValueError(
                f"weights={weights!r}: pass the name of a safetensors file in the folder, or its index."
            )
        # Patterns of the conversion `Unpack` are made of these names (`update_weight_conversions`). An identifier has
        # no sign of a regular expression, so it matches itself alone.
        is_list = not isinstance(parameters, str)
        if not is_list or not all(_is_identifier(name) for name in parameters):
            raise ValueError(f"parameters={parameters!r}: pass a list of names such as 'weight'.")
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]
        self.runtime = runtime
        self.weights = weights
        self.parameters = list(parameters)  # JSON has no tuples
        # Transformers reads this attribute after loading. If it is True, Transformers removes the settings from the
        # model, which then is a dense one.
        self.dequantize = True


def _is_identifier(name: object) -> bool:
    """Tell whether a value of a JSON file is a name of letters, digits and underscores, such as "weight"."""
    return isinstance(name, str) and name.isidentifier()


def read_packed(files: Mapping[str, Path], name: str) -> PackedTensor:
    """Read a packed tensor from its files, and check it with its checksum.

    `files` has the file of every stored tensor by its name, such as "model.layers.0.mlp.up_proj.weight_mask". `name` is
    that of the dense tensor, such as "model.layers.0.mlp.up_proj.weight".

    Raises:
        PackedFormatError: If the three tensors are not a packed tensor, or are damaged.
    """
    parts = []
    for suffix in SUFFIXES:
        with safe_open(files[name + suffix], "pt") as file:
            parts.append(file.get_tensor(name + suffix))

    values, mask, layout = parts  # in the order of `SUFFIXES`
    packed = PackedTensor(values, mask, layout)
    check(packed, name)
    return packed


class Unpack(ConversionOps):
    """Makes dense tensors of the three parts of packed ones, while Transformers loads a model."""

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
        """Turn lists of values, masks and layouts into lists of dense tensors. Transformers calls this.

        Args:
            input_dict: Tensors of the file by the pattern of their names, such as `"weight_values"`: a list for each
                pattern, which has several tensors if several names fit (the experts of a mixture). Dense tensors of the
                file may be among them, under a pattern without a suffix; they keep their pattern.
            source_patterns: Not used.
            target_patterns: Patterns of the model's names. The dense tensors get the target's, if the stem of their own
                is one. Otherwise other operations follow, which merge several sources, and they keep the pattern of
                their values.
            model: The model that is loaded. Its parameter `full_layer_name` says in which dtype the caller wants it.
            full_layer_name: Name of the parameter, such as "model.layers.0.mlp.up_proj.weight".
        """
        dtype = None  # that the caller wants; None: it is not known, so tensors keep theirs
        if model is not None:
            dtype = model.get_parameter_or_buffer(full_layer_name).dtype

        dense: dict[str, list[Tensor]] = {}
        for pattern, tensors in input_dict.items():
            is_dense = not pattern.endswith(SUFFIXES)  # with none of the three
            if is_dense:
                dense[pattern] = [tensor.to(dtype or tensor.dtype) for tensor in tensors]
                continue
            if not pattern.endswith(VALUES_SUFFIX):  # masks and layouts are read with their values
                continue

            stem = pattern.removesuffix(VALUES_SUFFIX)
            # Three lists: values, masks and layouts of all tensors with this pattern.
            parts = [input_dict[stem + suffix] for suffix in SUFFIXES]
            name_in_target = stem if stem in target_patterns else pattern
            dense[name_in_target] = []
            for values, mask, layout in zip(*parts, strict=True):
                tensor = unpack(PackedTensor(values, mask, layout), full_layer_name or stem)
                dense[name_in_target].append(tensor.to(dtype or values.dtype))
        return dense

    @property
    def reverse_op(self) -> ConversionOps:
        """The operation that saving a loaded model does instead: none, because the model is saved dense."""
        return internals.unchanged()


@auto.register_quantizer(QUANT_METHOD)
class FistaPackedQuantizer(HfQuantizer):
    """Loads packed folders; Transformers calls it a quantizer, but nothing is rounded."""

    quantization_config: FistaPackedConfig

    def __init__(self, quantization_config: FistaPackedConfig, **keywords: Any) -> None:
        """Keep the settings; ValueError if the weights are not packed yet. Transformers calls this.

        `keywords` are those of Transformers. By `pre_quantized`, the base class notes in `self.pre_quantized` whether
        the weights in the files are packed.
        """
        super().__init__(quantization_config, **keywords)
        if not self.pre_quantized:
            raise ValueError(
                "quantization_config is a FistaPackedConfig, but the model is not packed: pack the folder of a pruned "
                "model with `optimum-fista pack`."
            )
        # dtypes of the model's parameters before their tensors are loaded, as the caller wants them
        self._dtypes: dict[str, torch.dtype] = {}

    def update_attn_implementation(self, config: Any) -> Any:
        """Set `config.transformers_weights` to the packed files, which no loader finds by their names; return `config`.

        It has nothing to do with attention. It is the first call that gets the configuration.
        """
        config.transformers_weights = self.quantization_config.weights
        return config

    # The first call of older versions of Transformers, such as 5.17.
    update_tp_plan = update_attn_implementation

    def update_weight_conversions(self, weight_conversions: list[Any], *_: Any) -> list[Any]:
        """Return the conversions of a model's tensors, made to work on packed parts, too.

        `weight_conversions` are the model's own `WeightRenaming`s and `WeightConverter`s, which are not changed. They
        say which tensors of the file become which of the model. A renaming gets copies for the three suffixes of packed
        parts. A converter, such as one that merges experts, unpacks them first (`_for_packed_parts`). At the end come
        those of `get_weight_conversions`.
        """
        updated = []
        for conversion in weight_conversions:
            replacements = self._for_packed_parts(conversion)
            # Each applies to the same part of the model as the conversion that it replaces.
            for replacement in replacements:
                replacement.scope_prefix = conversion.scope_prefix
                replacement.base_model_prefix = conversion.base_model_prefix
            updated += replacements
        return updated + self.get_weight_conversions()

    def _for_packed_parts(self, conversion: Any) -> list[Any]:
        """Return the conversions that take the place of one conversion of the model, so that packed tensors work, too.

        `conversion` is a `WeightRenaming`, by which a tensor of the file gets another name, or a `WeightConverter`,
        which also computes, such as one that merges the matrices of experts. It is not changed. `parameters` of
        `self.quantization_config` are the last parts of the names of tensors that may be packed, such as "weight".

        - A converter of such tensors is replaced by one that unpacks them first.
        - A renaming of such a tensor stays, after copies of it that rename the three parts of a packed one.
        - Another conversion stays alone.
        """
        # Patterns of names in the file, such as "experts.*.w1.weight", and of names in the model: as the conversion was
        # made with them, before Transformers rewrote them for its own use.
        sources = internals.original_sources(conversion)
        targets = internals.original_targets(conversion)
        packed_parameters = self.quantization_config.parameters
        # A conversion that also reads other tensors, such as scales, stays alone.
        may_be_packed = all(source.rpartition(".")[2] in packed_parameters for source in sources)

        if may_be_packed and isinstance(conversion, WeightConverter):
            # Transformers takes the first pattern that fits, and the name of a dense tensor begins those of its packed
            # parts. So it comes last; it is needed because the file may have some of the tensors dense.
            sources_with_parts = [
                source + suffix for source in sources for suffix in (*SUFFIXES, "")
            ]
            operations = [Unpack(self), *conversion.operations]
            replacement = WeightConverter(
                sources_with_parts,
                targets,
                operations,
                conversion.force_cpu,  # whether it computes on the CPU; stays as it is
            )
            return [replacement]
        if may_be_packed and len(sources) == 1:
            renamings = [
                WeightRenaming(sources[0] + suffix, targets[0] + suffix) for suffix in SUFFIXES
            ]
            return [*renamings, conversion]
        return [conversion]

    def get_weight_conversions(self) -> list[Any]:
        """Return conversions that unpack; Transformers uses them for tensors that no earlier conversion takes.

        `parameters` of `self.quantization_config` are the last parts of the names of tensors that may be packed, such
        as "weight". For each of these, a conversion makes one tensor of the three parts, in all modules that have a
        tensor so called.
        """
        conversions = []
        for name in self.quantization_config.parameters:
            parts = [name + suffix for suffix in SUFFIXES]
            conversions.append(WeightConverter(parts, name, [Unpack(self)]))
        return conversions

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Sequence[str] | None = None, **_: Any
    ) -> None:
        """Check every packed tensor in the files against its checksum and the model, before the first is used.

        Changes two things of the quantizer: it notes the dtype of each parameter in `self._dtypes`, and it adds to
        `quantization_config.parameters` the last names of all matrices of the model, such as "weight". Any matrix with
        such a name may be packed in the files.

        Args:
            model: Made without weights, in the dtypes that the caller wants.
            checkpoint_files: The weight files that Transformers is going to read.
        """
        files: dict[str, Path] = {}
        for path in checkpoint_files or []:
            with safe_open(path, "pt") as file:
                files |= dict.fromkeys(file.keys(), Path(path))

        parameters = dict(model.named_parameters())
        self._dtypes = {name: parameter.dtype for name, parameter in parameters.items()}
        for name in packed_names(files):
            packed = read_packed(files, name)  # raises PackedFormatError if the checksum is wrong
            # Transformers may load a tensor under another name than it has in the files. Then no parameter is found,
            # and no shape is compared.
            shape = tuple(parameters[name].shape) if name in parameters else ()
            is_matrix = len(shape) == 2  # fused experts may be stored transposed
            if is_matrix and packed.shape != shape:
                raise PackedFormatError(
                    f"{name}_layout says shape {packed.shape}: the model's is {shape}."
                )

        matrices = [name for name, parameter in parameters.items() if parameter.ndim > 1]
        last_names = {name.rpartition(".")[2] for name in matrices}
        self.quantization_config.parameters = sorted(
            last_names.union(self.quantization_config.parameters)
        )

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **_: Any
    ) -> PreTrainedModel:
        """Remove from the loaded model what would make `save_pretrained` look for packed files, and return the model.

        Transformers before 5.22 leaves two more things to do: parameters get the dtype that the caller wanted
        (`self._dtypes`, by name, noted before the loading), and the model forgets the conversions by which it was
        loaded.
        """
        vars(model.config).pop("transformers_weights", None)
        is_before_5_22 = internals.renames_without_casting()
        if is_before_5_22:
            # With these conversions a saved model would have the names of packed parts.
            internals.forget_weight_conversions(model)
            # Tensors that are only renamed still have the dtype of the file, which may not be the one asked for. Some
            # parameters stay in float32 whatever is asked for: those that do so for bfloat16, by parts of their names.
            stay_in_float32 = internals.parts_in_float32(model, torch.bfloat16)
            for name, parameter in model.named_parameters():
                if not any(part in name for part in stay_in_float32):
                    parameter.data = parameter.to(self._dtypes.get(name, parameter.dtype))
        return model

    def is_serializable(self) -> bool:
        """Tell Transformers that this form can't be saved: the loaded model is saved as a dense one."""
        return False

    @property
    def is_trainable(self) -> bool:
        """Tell Transformers that the loaded model can be trained, because it is dense."""
        return True
