"""Modules of a model whose weights stay packed in memory."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.pytorch_utils import Conv1D

from optimum_fista.folder.stored_names import StoredName, split_index, stored_names
from optimum_fista.folder.unpacking import PackedFiles
from optimum_fista.model.operator import ExpertOperator, FusedExperts, can_be_split
from optimum_fista.packed.format import PackedTensor, matrices_of, stacked_rows, transposed
from optimum_fista.packed.linear import PackedLinear
from optimum_fista.packed.packed_experts import packed_experts_forward
from optimum_fista.packed.validation import PackedFormatError

EXPERTS_IMPLEMENTATION = "fista_packed"


class PackedModules:
    """The modules of a model on the meta device whose weights, packed in files, can stay as they are.

    `nn.Linear` and Transformers' `Conv1D` become `PackedLinear` at once, and Transformers loads their tensors. Those of
    fused experts are laid out in another way; they are read when everything else is loaded.

    Attributes:
        becoming_dense: Names of the packed weights that belong to none of these modules.
    """

    def __init__(self, model: PreTrainedModel, files: PackedFiles, outlines: Mapping[str, PackedTensor]) -> None:
        self._files, self._outlines = files, outlines
        self._transposed: list[str] = []
        self._experts = _expert_parameters(model, files)
        taken = {split_index(stored.name)[0] for experts in self._experts.values() for e in experts for stored in e}
        self.becoming_dense = [name for name in files.names if name not in taken and not self._replace(model, name)]
        ignored = model._keys_to_ignore_on_load_unexpected or set()
        model._keys_to_ignore_on_load_unexpected = {*ignored, *(rf"{re.escape(name)}(_|$)" for name in self._experts)}
        self._dtypes = {name: model.get_parameter(name).dtype for name in self._experts}
        for name, experts in self._experts.items():
            owner, _, tensor = name.rpartition(".")
            module = model.get_submodule(owner)
            _, *matrix = model.get_parameter(name).shape
            self._check_shapes(name, experts, matrix[::-1] if module.is_transposed else matrix)
            delattr(module, tensor)
            vars(module)["_is_hf_initialized"] = True

    def complete(self, model: PreTrainedModel) -> None:
        """Bring the loaded modules into the form that they compute with, and read the experts."""
        for name, module in model.named_modules():
            if isinstance(module, PackedLinear):
                if module.weight_mask.is_meta:
                    raise ValueError(
                        f"offload_buffers=True leaves the packed weight of {name} on disk, and runtime='packed' can't "
                        "compute there: pass offload_buffers=False, with which packed weights stay in memory, or "
                        "runtime='dense'."
                    )
                if name in self._transposed:
                    module.transpose_()
                else:
                    module.prepare()
        for name, experts in self._experts.items():
            owner, _, tensor = name.rpartition(".")
            module = model.get_submodule(owner)
            device = _execution_device(model, name)
            matrices = self._read(experts, self._dtypes[name], device)
            setattr(module, tensor, nn.ModuleList(map(PackedLinear.from_packed, matrices)).eval())
            module.config._experts_implementation = EXPERTS_IMPLEMENTATION  # type: ignore[union-attr]
        for owner in dict.fromkeys(name.rpartition(".")[0] for name in self._experts):
            model.get_submodule(owner).register_forward_pre_hook(_require_packed_implementation)

    def _replace(self, model: PreTrainedModel, name: str) -> bool:
        """Make the `nn.Linear` or `Conv1D` of a packed weight a `PackedLinear`; False if it is neither."""
        owner, _, leaf = name.rpartition(".")
        try:
            module = model.get_submodule(owner)
        except AttributeError:
            return False
        if leaf != "weight" or type(module) not in (nn.Linear, Conv1D):
            return False
        outline, dense = self._outlines[name], cast(Tensor, module.weight)
        if outline.shape != tuple(dense.shape):
            raise PackedFormatError(f"{name}_layout says shape {outline.shape}: the model's is {tuple(dense.shape)}.")
        rows, columns = outline.shape
        packed = PackedLinear(
            columns, rows, outline.values.numel(), False, outline.n_of_m, device="meta", dtype=dense.dtype
        )
        packed.weight_layout = torch.empty_like(outline.layout, device="meta")
        packed.bias = module.bias  # type: ignore[assignment]
        packed.weight_starts = torch.empty(0, dtype=torch.int64, device="meta")  # Accelerate wants a tensor
        if type(module) is Conv1D:
            self._transposed.append(owner)
        parent, _, child = owner.rpartition(".")
        setattr(model.get_submodule(parent), child, packed.requires_grad_(False))
        return True

    def _check_shapes(self, name: str, experts: list[list[StoredName]], matrix: Sequence[int]) -> None:
        """Compare what is stored with one matrix [out, in] an expert."""
        for stored in experts:
            rows, columns = 0, set()
            for part in stored:
                tensor, index = split_index(part.name)
                shape = self._outlines[tensor].shape
                if index and shape[0] != len(experts):
                    raise PackedFormatError(f"{tensor} holds {shape[0]} experts: the model has {len(experts)}.")
                height, *width = shape[-2:][::-1] if part.transposed else shape[-2:]
                rows += height
                columns.add((*shape[: -2 - bool(index)], *width))
            if rows != matrix[0] or columns != {(matrix[1],)}:
                raise PackedFormatError(
                    f"{', '.join(split_index(part.name)[0] for part in stored)} have other shapes than the matrices "
                    f"{tuple(matrix)} of {name}."
                )

    def _read(
        self, experts: list[list[StoredName]], dtype: torch.dtype, device: torch.device
    ) -> Iterator[PackedTensor]:
        """One matrix [out, in] an expert, in a dtype and on a device."""
        if split_index(experts[0][0].name)[1]:
            name = split_index(experts[0][0].name)[0]
            found = ([matrix] for matrix in matrices_of(self._files.read(name)))
        else:
            found = ([self._files.read(part.name) for part in parts] for parts in experts)
        for parts, stored in zip(found, experts, strict=True):
            turned = [transposed(part) if stored[0].transposed else part for part in parts]
            matrix = stacked_rows(turned)
            yield PackedTensor(matrix.values.to(device, dtype), matrix.mask.to(device), matrix.layout.to(device))


def _expert_parameters(model: PreTrainedModel, files: PackedFiles) -> dict[str, list[list[StoredName]]]:
    """By parameter of fused experts that can stay packed: what an expert's matrix in it is stored as, by experts.

    That is one part of a tensor of all experts, or its tensors in the order of its rows.
    """
    modules = {
        name: FusedExperts(name, module)
        for name, module in model.named_modules()
        if hasattr(module, "is_concatenated") and can_be_split(module)
    }
    operators = [operator for fused in modules.values() for operator in fused.operators]
    with torch.device("cpu"):  # not the meta device that models are made on
        names = stored_names(model, operators, all_of_them=False)
    found: dict[str, list[list[StoredName]]] = {}
    for name, fused in modules.items():
        for tensor in dict.fromkeys(operator.tensor for operator in fused.operators):
            experts = _stored_experts([o for o in fused.operators if o.tensor == tensor], len(fused), names)
            packed = {split_index(stored.name)[0] for expert in experts for stored in expert} <= set(files.names)
            whole = all(expert and (len(expert) == 1 or not fused.interleaved) for expert in experts)
            if packed and whole:
                found[f"{name}.{tensor}"] = experts
    return found


def _stored_experts(
    operators: list[ExpertOperator], num_experts: int, names: Mapping[str, StoredName]
) -> list[list[StoredName]]:
    """What the matrices of one parameter are stored as, by experts; empty if it is not known."""
    known = [names[weight] for operator in operators if (weight := f"{operator.name}.weight") in names]
    if len(known) < len(operators):
        return [[] for _ in range(num_experts)]
    each = len(operators) // num_experts
    experts = [known[i * each : (i + 1) * each] for i in range(num_experts)]
    return [expert[:1] if split_index(expert[0].name)[1] else expert for expert in experts]


def _require_packed_implementation(experts: nn.Module, _: Any) -> None:
    """Refuse to compute by another implementation, which would look for a tensor that is not there."""
    set_to = experts.config._experts_implementation  # type: ignore[union-attr]
    if set_to != EXPERTS_IMPLEMENTATION:
        raise ValueError(
            f"experts_implementation={set_to!r} can't compute with packed experts: pass {EXPERTS_IMPLEMENTATION!r} to "
            "model.set_experts_implementation, or load the folder with runtime='dense'."
        )


def _execution_device(model: PreTrainedModel, name: str) -> torch.device:
    """Where a weight is needed: its place in the device map, or the main device if it is offloaded from there."""
    places: dict[str, Any] = getattr(model, "hf_device_map", {})
    parts = name.split(".")
    owners = (".".join(parts[:count]) for count in range(len(parts), -1, -1))  # the last one, "", is the model
    place = next((places[owner] for owner in owners if owner in places), None)
    if place is None:
        return model.device
    if place in ("cpu", "disk"):
        place = next((other for other in places.values() if other not in ("cpu", "disk")), "cpu")
    return torch.device(place)


ALL_EXPERTS_FUNCTIONS.register(EXPERTS_IMPLEMENTATION, packed_experts_forward)
