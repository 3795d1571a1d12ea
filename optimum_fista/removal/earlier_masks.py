"""Masks of an earlier run, carried through a run that removes parts.

A model may have zeros already: the folder that it was loaded from has a report, and a mask for each pruned operator.
A run that removes parts slices these masks as it slices the weights, and gives them the new names, so that a later
training keeps the zeros. A refit may write into the zeros of an operator. Then its mask is *lost*, and the report says
so. What happened is not guessed: a mask is carried if and only if all weights outside of it are zero.

`EarlierMasks.find` looks for the masks, and `carried` is called for each decoder layer once it is pruned.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from optimum_fista.folder.checkpoint import CONFIG_KEY, MASKS_FILE, REPORT_FILE, read_report
from optimum_fista.folder.naming import all_operators, as_stored
from optimum_fista.model.layers import DecoderLayers
from optimum_fista.model.operators import LinearOperator
from optimum_fista.removal.shrinking import Kept, Shrinking
from optimum_fista.report import OperatorReport
from optimum_fista.solve.pattern import pack_mask, parse_pattern, unpack_mask
from optimum_fista.source.loading import local_source
from optimum_fista.source.names import StoredName, stored_names


@dataclass(frozen=True)
class CarriedMasks:
    """What became of the earlier masks of one decoder layer.

    Names are those of weights in the smaller layer, with the number that the layer has in the whole model, such as
    `model.layers.3.mlp.up_proj.weight`.
    """

    operators: list[OperatorReport] = field(default_factory=list)
    masks: dict[str, Tensor] = field(
        default_factory=dict
    )  # packed to bits, laid out as the weights
    lost: list[str] = field(default_factory=list)  # operators whose zeros were overwritten


@dataclass(frozen=True)
class EarlierMasks:
    """The masks in the folder that a model was loaded from."""

    file: Path  # safetensors
    # Reports of the earlier run, with the names of the files, by the name of the weight in the model.
    entries: Mapping[str, OperatorReport]

    @classmethod
    def find(cls, layers: DecoderLayers) -> "EarlierMasks | None":
        """Look for masks in the folder that the model of `layers` was loaded from; `None` if it has none.

        Only the report and the names are read, and the model is not changed.
        """
        model = layers.model
        folder = local_source(model) if hasattr(model.config, CONFIG_KEY) else None
        if folder is None:
            return None
        if not (folder / MASKS_FILE).exists() or not (folder / REPORT_FILE).exists():
            return None
        try:
            report = read_report(folder)
        except ValueError:  # damaged, or of another version
            return None

        operators = [
            operator for name, layer in layers for operator in all_operators(name, layer).values()
        ]
        names = stored_names(model, operators, all_of_them=False, layers_name=layers.name)
        by_stored_name = {stored.name: name for name, stored in names.items()}
        entries = {
            by_stored_name[entry.name]: entry
            for entry in report.masked
            if entry.name in by_stored_name
        }
        return cls(folder / MASKS_FILE, entries)

    def carried(
        self, layer_name: str, layer: nn.Module, smaller: Shrinking, kept: Kept
    ) -> CarriedMasks:
        """Slice the masks of a pruned decoder layer, and keep those outside of which all weights are zero.

        `layer` is the layer called `layer_name` with its weights as the run leaves them, not yet smaller. `kept` are
        the groups of its parts that stay. Changes nothing.
        """
        carried = CarriedMasks()
        new_name = smaller.new_name(layer_name)
        masks, entries = self._masks_of_parameters(layer_name, layer)
        if new_name is None or not masks:
            return carried

        parameters = dict(layer.named_parameters(prefix=layer_name))
        small_layer = smaller.model.get_submodule(new_name)
        for operator in all_operators(layer_name, small_layer).values():
            parameter_name = _parameter_of(operator, layer_name, small_layer)
            if parameter_name not in masks:
                continue
            small_mask = smaller.shrink_tensor(parameter_name, masks[parameter_name], kept)
            mask = operator.select(small_mask)
            if bool(mask.all()):
                continue
            weight = smaller.shrink_tensor(
                parameter_name, parameters[parameter_name].detach(), kept
            )
            outside = operator.select(weight).masked_select(~mask.to(weight.device))
            name = f"{operator.name}.weight"
            if bool(torch.count_nonzero(outside)):
                carried.lost.append(name)
                continue
            carried.operators.append(_entry_of(operator, mask, entries[parameter_name]))
            carried.masks[name] = pack_mask(mask)
        return carried

    def _masks_of_parameters(
        self, layer_name: str, layer: nn.Module
    ) -> tuple[dict[str, Tensor], dict[str, OperatorReport]]:
        """Read the masks of a decoder layer, bool, by the names of its parameters; several experts share a parameter.

        Returns also an entry of the earlier report for each parameter.
        """
        masks = dict[str, Tensor]()
        entries = dict[str, OperatorReport]()
        parameters = dict(layer.named_parameters(prefix=layer_name))
        with safe_open(self.file, "pt") as file:
            stored = set(file.keys())
            for operator in all_operators(layer_name, layer).values():
                name = f"{operator.name}.weight"
                entry = self.entries.get(name)
                if entry is None or entry.name not in stored or entry.shape != operator.shape:
                    continue
                # from the layout of the files to that of the model
                in_model = {entry.name: StoredName(name, operator.transposed)}
                _, by_name = as_stored([entry], {entry.name: file.get_tensor(entry.name)}, in_model)
                parameter_name = _parameter_of(operator, layer_name, layer)
                parameter = parameters[parameter_name]
                if parameter_name not in masks:
                    masks[parameter_name] = torch.ones(parameter.shape, dtype=torch.bool)
                    entries[parameter_name] = entry
                of_operator = operator.select(masks[parameter_name])  # a view
                of_operator.copy_(unpack_mask(by_name[name], tuple(of_operator.shape)))
        return masks, entries


def unchanged_masks(folder: Path) -> tuple[list[OperatorReport], dict[str, Tensor]]:
    """Read the masks in a model's folder for a run that changes no decoder layer, such as one that removes tokens.

    Returns what the earlier run reported of the operators with zeros, and their packed masks, both by the names of the
    files; nothing if the folder has no masks that can be read.
    """
    if not (folder / MASKS_FILE).exists() or not (folder / REPORT_FILE).exists():
        return [], {}
    try:
        report = read_report(folder)
    except ValueError:  # damaged, or of another version
        return [], {}
    with safe_open(folder / MASKS_FILE, "pt") as file:
        stored = set(file.keys())
        carried = [
            entry
            for entry in report.masked
            if entry.name in stored and entry.num_kept < math.prod(entry.shape)
        ]
        return carried, {entry.name: file.get_tensor(entry.name) for entry in carried}


def _parameter_of(operator: LinearOperator, layer_name: str, layer: nn.Module) -> str:
    """The name in the model of the parameter that holds the weight of an operator."""
    for name, module in layer.named_modules(prefix=layer_name):
        if module is operator.owner:
            return f"{name}.{operator.tensor}"
    raise AssertionError(operator.name)


def _entry_of(operator: LinearOperator, mask: Tensor, earlier: OperatorReport) -> OperatorReport:
    """Describe a carried mask: errors and method of the `earlier` run, counts of the mask as it is now.

    `mask` is laid out as the weight. If it no longer keeps its pattern, because columns are gone, it is called
    unstructured.
    """
    num_kept = int(mask.sum())
    sparsity = 1 - num_kept / mask.numel()
    entry = replace(
        earlier,
        name=f"{operator.name}.weight",
        shape=operator.shape,
        stored_transposed=operator.transposed,
        num_kept=num_kept,
        sparsity=sparsity,
        groups_kept=None,
        input_order=None,
    )
    if not _keeps_pattern(entry, mask.T if operator.transposed else mask):
        entry = replace(entry, pattern="unstructured", target_sparsity=sparsity, scope="matrix")
    return entry


def _keeps_pattern(entry: OperatorReport, mask: Tensor) -> bool:
    """Tell whether a mask [out, in] still keeps the pattern that an earlier run gave it."""
    try:
        pattern = parse_pattern(entry.pattern)
        pattern.require_shape(entry.shape)
    except ValueError:
        return False
    return pattern.span is not None and pattern.violation(mask) is None
