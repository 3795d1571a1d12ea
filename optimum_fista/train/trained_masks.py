"""The masks of a pruned model, by the names of its parameters."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel
from transformers.utils import cached_file

from optimum_fista.folder.checkpoint import (
    CONFIG_KEY,
    MASKS_FILE,
    REPORT_FILE,
    read_report,
)
from optimum_fista.folder.loading import require_unquantized
from optimum_fista.folder.packed_folder import is_packed, packed_operators
from optimum_fista.folder.stored_names import as_in_model, operators_by_weight
from optimum_fista.model.architecture import find_decoder_layers
from optimum_fista.model.operator import LINEAR, is_fused_experts
from optimum_fista.pruner import FistaPruner
from optimum_fista.report import PruningReport
from optimum_fista.solve.pattern import unpack_mask

MaskSource: TypeAlias = FistaPruner | str | Path | Mapping[str, Tensor] | None

_LEAST_ZEROS = 1e-3  # a model with a smaller share of zeros counts as dense: a few may be zero by chance


def find_masks(model: PreTrainedModel, source: MaskSource = None) -> dict[str, Tensor]:
    """Masks of the parameters that hold pruned weights, True = kept; of sharded ones (FSDP2) this process's part.

    The source is the `FistaPruner` that pruned this model; a folder or Hub id saved by optimum-fista; boolean masks by
    parameter name, which are checked; or `None`: the zeros that the linear operators of the decoder layers have.
    """
    if not isinstance(model, PreTrainedModel) and hasattr(model, "get_base_model"):
        raise ValueError(f"model is a {type(model).__name__}: merge its adapters first (merge_and_unload()).")
    require_unquantized(model)
    if source is None:
        masks = _from_zeros(model)
    elif isinstance(source, Mapping):
        masks = _as_given(model, source)
    else:
        masks = _assemble(model, *find_record(model, source))
    parameters = dict(model.named_parameters())
    for name, mask in masks.items():
        weight = parameters[name]
        if weight.device.type == "meta":
            raise ValueError(f"{name} is offloaded, and offloaded weights can't be trained: load the model without it.")
        if isinstance(weight, DTensor):
            mask = distribute_tensor(mask, weight.device_mesh, weight.placements, src_data_rank=None).to_local()
        masks[name] = mask.to(weight.device)
        stray = int(torch.count_nonzero(local(weight.detach()).masked_fill(masks[name], 0)))
        if stray:
            raise ValueError(
                f"{name} has {stray} weights outside its mask that are not zero: the model was changed after pruning, "
                "or the masks are those of another model. Load the pruned model, or pass its own masks."
            )
    return masks


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that is in this process (FSDP2), in the same memory; all of it if it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def find_record(model: PreTrainedModel, source: FistaPruner | str | Path) -> tuple[PruningReport, dict[str, Tensor]]:
    """The report and the packed masks of a pruned model, under the names of the model."""
    if isinstance(source, FistaPruner):
        return source.result(model)
    folder = pruned_folder(source)
    report = read_report(folder)
    operators = operators_by_weight(model, report).values()
    if is_packed(folder):
        packed = {operator.name: mask for operator, _, mask in packed_operators(folder, report)}
        return as_in_model(model, operators, report, packed)
    return as_in_model(model, operators, report, load_file(_file_of(source, MASKS_FILE)))


def pruned_folder(source: str | Path) -> Path:
    """The folder of a pruned model by name, which has a report."""
    return _file_of(source, REPORT_FILE).parents[1]


def _file_of(source: str | Path, file: str) -> Path:
    try:
        return Path(str(cached_file(str(source), file)))
    except OSError as error:
        raise FileNotFoundError(
            f"{str(source)!r} holds no {file}: pass a folder or Hub id saved by optimum-fista."
        ) from error


def _assemble(model: PreTrainedModel, report: PruningReport, packed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Masks of parameters from those of operators; several operators may share a parameter."""
    operators = operators_by_weight(model, report)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    masks: dict[str, Tensor] = {}
    for entry in report.operators:
        operator = operators[entry.name]
        parameter = getattr(operator.owner, operator.tensor)
        mask = masks.setdefault(names[id(parameter)], torch.ones(parameter.shape, dtype=torch.bool))
        part = operator.select(mask)
        part.copy_(unpack_mask(packed[entry.name], tuple(part.shape)))
    return masks


def _from_zeros(model: PreTrainedModel) -> dict[str, Tensor]:
    masks: dict[str, Tensor] = {}
    record = getattr(model.config, CONFIG_KEY, None)
    if record is not None and not record.get("num_zeros", 1):  # whole parts were removed: nothing has to stay zero
        return masks
    zeros = weights = 0
    candidates = (
        (f"{name}.{key}", weight)
        for layer_name, layer in find_decoder_layers(model)
        for name, module in layer.named_modules(prefix=layer_name)
        if isinstance(module, LINEAR) or is_fused_experts(module)
        for key, weight in module.named_parameters(recurse=False)
        if weight.ndim > 1 and weight.device.type != "meta"
    )
    for name, weight in candidates:
        if local(weight.detach()).shape != weight.shape:
            raise ValueError(f"{name} is sharded, so its zeros are not all here: pass the folder of the pruned model.")
        kept = weight.detach() != 0
        found = weight.numel() - int(kept.sum())
        zeros, weights = zeros + found, weights + weight.numel()
        if found:
            masks[name] = kept
    promised = int((record or {}).get("num_zeros", 0))
    if zeros < max(promised, _LEAST_ZEROS * weights):
        raise ValueError(
            f"{type(model).__name__} is not pruned, or no longer: {zeros:,} of the {weights:,} weights of its decoder "
            f"layers' linear operators are zero" + (f", its configuration says {promised:,}." if promised else ".")
        )
    return masks


def _as_given(model: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    parameters = dict(model.named_parameters())
    for name, mask in masks.items():
        if name not in parameters:
            raise ValueError(f"masks name {name!r}, which is no parameter of {type(model).__name__}.")
        if mask.dtype != torch.bool or mask.shape != parameters[name].shape:
            raise ValueError(
                f"masks[{name!r}] has shape {tuple(mask.shape)} and dtype {mask.dtype}: pass torch.bool of shape "
                f"{tuple(parameters[name].shape)}, True = kept."
            )
    return dict(masks)
