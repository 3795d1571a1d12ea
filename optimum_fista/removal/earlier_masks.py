"""Masks of an earlier run, carried through a later run.

A model may have zeros already: the folder that it was loaded from has a report, and a mask for each pruned operator.
A run that sets zeros carries the masks of the operators that it leaves dense, in the new order if it reorders channels.
A run that removes parts slices all masks as it slices the weights, and gives them the new names. So a later training
keeps the zeros. A refit may write into the zeros of an operator. Then its mask is *lost*, and the report says so. What
happened is not guessed: a mask is *carried* if and only if all weights outside of it are zero. An operator that the run
prunes again has a new mask, which need not have the earlier zeros: the report counts those that the run filled, and
those that no mask covers any more.

A *mask* says which weights are kept (True); packed, it has a bit for each weight. A *part* loses *groups*, such as
channels of an MLP. The plan of the smaller model is a `Shrinking`: it says which tensors become smaller, and has the
smaller model without weights. Linear operators and parameters have the names of the model, such as
"model.layers.3.mlp.up_proj" and "model.layers.3.mlp.up_proj.weight". An `OperatorReport` is what a run reports of one
operator. Files may have other names, and weights as [in, out] instead of [out, in].

`EarlierMasks.find` looks for the masks. `carried` is called for each decoder layer once it is pruned, or
`carried_smaller` if the run removes parts. A run that removes tokens changes no decoder layer, and asks
`masks_in_folder`.
"""

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from optimum_fista.folder.checkpoint import (
    CONFIG_KEY,
    MASKS_FILE,
    REPORT_FILE,
    read_report,
    summary_of_latest_run,
)
from optimum_fista.folder.naming import prunable_operators, renamed_operators
from optimum_fista.folder.packed_folder import is_packed, packed_masks
from optimum_fista.model.layers import DecoderLayers
from optimum_fista.model.operators import LinearOperator
from optimum_fista.records import OperatorReport
from optimum_fista.removal.parts import Part
from optimum_fista.removal.shrinking import Kept, Shrinking
from optimum_fista.solve.pattern import pack_mask, parse_pattern, unpack_mask
from optimum_fista.source.loading import local_source
from optimum_fista.source.model_folder import (
    CONFIG_FILE,
    checkpoint_files,
    read_json,
    read_tensors,
)
from optimum_fista.source.names import StoredName, split_index, stored_names


@dataclass(frozen=True)
class ZerosOfPrunedAgain:
    """What became of the earlier zeros in the operators of one decoder layer that a run pruned again."""

    filled: int = 0  # that have other values now
    uncovered: int = 0  # that are zero, although the new mask keeps these weights


@dataclass(frozen=True)
class CarriedMasks:
    """What became of the earlier masks of one decoder layer.

    Names are those of weights in the smaller layer, with the number that the layer has in the whole model, such as
    `model.layers.3.mlp.up_proj.weight`.
    """

    operators: list[OperatorReport] = field(default_factory=list)
    masks: dict[str, Tensor] = field(default_factory=dict)  # packed, laid out as the weights
    lost: list[str] = field(default_factory=list)  # weights whose zeros were overwritten
    zeros_of_pruned_again: ZerosOfPrunedAgain = ZerosOfPrunedAgain()


@dataclass(frozen=True)
class Reordering:
    """The new order of the channels of a part."""

    part: Part
    order: Sequence[int]  # the old number of each channel


@dataclass(frozen=True)
class EarlierMasks:
    """The masks in the folder that a model was loaded from."""

    folder: Path  # also a packed one, in which masks are stored with the weights
    # Reports of the earlier run, with the names of the files, by the name of the weight in the model.
    entries: Mapping[str, OperatorReport]
    # Names of these weights in the files, by their names in the model.
    names: Mapping[str, StoredName]

    @classmethod
    def find(cls, layers: DecoderLayers) -> "EarlierMasks | None":
        """Look for masks in the folder that the model of `layers` was loaded from; `None` if it has none.

        Only the report and the names are read, and the model is not changed.
        """
        model = layers.model
        summary_of_model = summary_of_latest_run(model.config)
        if not summary_of_model:  # no run has pruned it
            return None
        folder = local_source(model)  # None if it was not loaded from a folder on this machine
        if folder is None:
            return None
        if not (folder / REPORT_FILE).exists():
            return None
        if not (folder / MASKS_FILE).exists() and not is_packed(folder):
            return None
        try:
            report = read_report(folder)
        except ValueError:  # damaged, or of another version
            return None
        # If a run has changed the model in memory since, its masks are in no folder: then the two summaries of the
        # latest run differ. Training changes no masks, but marks the summary: so both get the mark here.
        summary_of_folder = read_json(folder / CONFIG_FILE).get(CONFIG_KEY) or {}
        retrained = {"retrained": True}
        if summary_of_folder | retrained != summary_of_model | retrained:
            return None

        operators = list[LinearOperator]()  # of all decoder layers
        for layer_name, layer in layers:
            operators += prunable_operators(layer_name, layer).values()
        # The report has the names of the files; weights that are not a matrix of their own there are left out.
        names = stored_names(model, operators, all_of_them=False, layers_name=layers.name)
        names_by_stored_name = {stored.name: name for name, stored in names.items()}
        entries = {
            names_by_stored_name[entry.name]: entry
            for entry in report.masked  # the reports of the operators that have a mask
            if entry.name in names_by_stored_name
        }
        return cls(folder, entries, {name: names[name] for name in entries})

    def carried(
        self,
        layer_name: str,
        layer: nn.Module,
        new_masks: Mapping[str, Tensor],
        reorderings: Sequence[Reordering],
    ) -> CarriedMasks:
        """Read the earlier masks of a decoder layer, and return those that still hold, of operators left dense.

        A mask holds if all weights that it calls zero are zero. The result also names the weights whose masks no longer
        hold. Operators that this run pruned have new masks; the result counts how many of their earlier zeros the run
        filled, and how many no mask covers any more. `self.entries` are the earlier reports of operators, by the
        name of the weight, such as "model.layers.3.mlp.up_proj.weight". Nothing is changed.

        Args:
            layer_name: The name of the layer, such as "model.layers.3".
            layer: The layer, with its weights as the run leaves them. It is only read.
            new_masks: Masks of the operators that this run pruned in the layer, packed and laid out as the weights, by
                the name of the weight.
            reorderings: Of the channels in the layer that the run has reordered; the masks follow them.
        """

        def unchanged(_: str, tensor: Tensor) -> Tensor:
            """Return a parameter or its mask as it is, because no part is removed."""
            return tensor

        # Both by the name of a parameter. If it holds several operators (experts), `entries` has the earlier report of
        # one of these.
        masks, entries = self._masks_of_parameters(layer_name, layer)
        _reorder(masks, reorderings)  # changes `masks`
        carried = _masks_that_hold(
            layer_name,
            layer,
            remaining_layer=layer,
            masks=masks,
            # Reports by the name of the parameter, and of each expert by the name of its own weight. A name in both is
            # a parameter with one operator, which has the same report in both.
            entries=entries | dict(self.entries),
            shrink=unchanged,
            skipped=new_masks,
        )
        zeros = _zeros_of_pruned_again(layer_name, layer, masks, new_masks)
        return replace(carried, zeros_of_pruned_again=zeros)

    def carried_smaller(
        self, layer_name: str, layer: nn.Module, smaller: Shrinking, kept: Kept
    ) -> CarriedMasks:
        """Read the earlier masks of a pruned decoder layer, and return, made smaller, those that still hold.

        A mask holds if all weights that it calls zero, and that stay, are zero. Without a layer that stays, there are
        none.

        Args:
            layer_name: The name of the layer, such as "model.layers.3".
            layer: The layer, with its weights as the run leaves them, not yet smaller. It is only read.
            smaller: The plan of the smaller model.
            kept: Numbers of the groups that stay, by the name of their part.
        """
        new_name = smaller.new_name(layer_name)
        if new_name is None:  # the layer is removed
            return CarriedMasks()

        def shrink(name: str, tensor: Tensor) -> Tensor:
            """Return the parameter `name`, or its mask, with only the groups `kept`, as the plan `smaller` says."""
            return smaller.shrink_tensor(name, tensor, kept)

        masks, entries = self._masks_of_parameters(layer_name, layer)
        return _masks_that_hold(
            layer_name,
            layer,
            remaining_layer=smaller.model.get_submodule(new_name),
            masks=masks,
            entries=entries,
            shrink=shrink,
            skipped=(),
        )

    def _masks_of_parameters(
        self, layer_name: str, layer: nn.Module
    ) -> tuple[dict[str, Tensor], dict[str, OperatorReport]]:
        """Read the masks of a decoder layer from the folder of the earlier run.

        Returns bool masks of whole parameters, as they are in the model, by the name of the parameter. A parameter may
        hold several operators, such as the matrices of all experts: those without a mask keep all their weights.
        Returns also the earlier report of one operator in each parameter, by the same names. `self.entries` has the
        report of each operator, by the name of its weight in the model. The layer is only read.
        """
        masks = dict[str, Tensor]()
        entries = dict[str, OperatorReport]()
        parameters = dict(layer.named_parameters(prefix=layer_name))
        operators = prunable_operators(layer_name, layer).values()
        stored_masks = self._stored_masks([f"{operator.name}.weight" for operator in operators])
        for operator in operators:
            name = f"{operator.name}.weight"
            entry = self.entries.get(name)
            if entry is None or entry.name not in stored_masks or entry.shape != operator.shape:
                continue

            # `renamed_operators` changes names and layout: here, those of the file to those of the model
            packed_mask = stored_masks[entry.name]
            name_in_model = {entry.name: StoredName(name, operator.transposed)}
            _, masks_in_model = renamed_operators([entry], {entry.name: packed_mask}, name_in_model)

            parameter_name = _parameter_of(operator, layer_name, layer)
            parameter = parameters[parameter_name]
            if parameter_name not in masks:
                masks[parameter_name] = torch.ones(parameter.shape, dtype=torch.bool)
                entries[parameter_name] = entry
            of_operator = operator.select(masks[parameter_name])  # a view, which is written
            mask = unpack_mask(masks_in_model[name], tuple(of_operator.shape))
            of_operator.copy_(mask)
        return masks, entries

    def _stored_masks(self, weights: Iterable[str]) -> dict[str, Tensor]:
        """Read the packed masks of weights, named as in the model; returns them by their names in the files.

        Weights without a mask are left out. `self.entries` has the names in the files (`name` of the earlier report),
        by the names in the model. A packed folder has no file of masks: they are stored with the weights.
        """
        names = [self.entries[name].name for name in weights if name in self.entries]
        if is_packed(self.folder):
            return packed_masks(self.folder, names)
        with safe_open(self.folder / MASKS_FILE, "pt") as file:
            stored = set(file.keys())
            return {name: file.get_tensor(name) for name in names if name in stored}


def _reorder(masks: dict[str, Tensor], reorderings: Iterable[Reordering]) -> None:
    """Give masks of whole parameters, by the name of the parameter, the new order of channels; changes `masks`."""
    for reordering in reorderings:
        for name in reordering.part.tensors:
            if name in masks:
                # `shrink` returns the channels that it is given, in their order: here all of them.
                masks[name] = reordering.part.shrink(name, masks[name], list(reordering.order))


def _zeros_of_pruned_again(
    layer_name: str,
    layer: nn.Module,
    masks: Mapping[str, Tensor],
    new_masks: Mapping[str, Tensor],
) -> ZerosOfPrunedAgain:
    """Count what became of the earlier zeros of operators that have a new mask.

    Args:
        layer_name: The name of the layer, such as "model.layers.3".
        layer: The layer, with its weights as the run leaves them. It is only read.
        masks: Earlier masks, bool, of whole parameters of `layer`, by the name of the parameter.
        new_masks: Masks that this run made, packed and laid out as the weights, by the name of the weight.
    """
    parameters = dict(layer.named_parameters(prefix=layer_name))
    filled = 0
    uncovered = 0
    for operator in prunable_operators(layer_name, layer).values():
        name = f"{operator.name}.weight"
        parameter_name = _parameter_of(operator, layer_name, layer)
        if name not in new_masks or parameter_name not in masks:
            continue
        # Each parameter may hold several operators: `select` returns the part of this one.
        was_zero = ~operator.select(masks[parameter_name])
        weight = operator.select(parameters[parameter_name].detach())
        is_zero = (weight == 0).cpu()
        # True: the run may have given the weight a value, so a later training may, too.
        new_mask = unpack_mask(new_masks[name].cpu(), tuple(weight.shape))
        filled += int((was_zero & ~is_zero).sum())
        uncovered += int((was_zero & is_zero & new_mask).sum())
    return ZerosOfPrunedAgain(filled, uncovered)


def _masks_that_hold(
    layer_name: str,
    layer: nn.Module,
    *,
    remaining_layer: nn.Module,
    masks: Mapping[str, Tensor],
    entries: Mapping[str, OperatorReport],
    shrink: Callable[[str, Tensor], Tensor],
    skipped: Collection[str],
) -> CarriedMasks:
    """Return the masks of a decoder layer that still hold, and the names of the weights whose masks are lost.

    A mask holds if all weights that it calls zero are zero. Masks without a zero are in neither list.

    Args:
        layer_name: The name of the layer, such as "model.layers.3".
        layer: The layer, with its weights as the run leaves them. It is only read.
        remaining_layer: The layer with the operators that stay; it may be without weights. An expert is found there,
            where it has its new number.
        masks: bool masks of whole parameters of `layer`, by the name of the parameter.
        entries: The earlier report of an operator in each parameter, by the name of the parameter. If experts keep
            their numbers, also that of each weight, by the name of the weight.
        shrink: Is called with the name of a parameter, and with the parameter or its mask; returns the tensor without
            the groups that the run removes.
        skipped: Names of weights whose masks are not carried.
    """
    carried = CarriedMasks()
    parameters = dict(layer.named_parameters(prefix=layer_name))
    for operator in prunable_operators(layer_name, remaining_layer).values():
        name = f"{operator.name}.weight"
        parameter_name = _parameter_of(operator, layer_name, remaining_layer)
        if parameter_name not in masks or name in skipped:
            continue
        # that of one expert, if the parameter has several
        mask = operator.select(shrink(parameter_name, masks[parameter_name]))
        if bool(mask.all()):
            continue  # no zero is left

        weight = operator.select(shrink(parameter_name, parameters[parameter_name].detach()))
        outside = weight.masked_select(~mask.to(weight.device))  # what the mask calls zero
        is_overwritten = bool(torch.count_nonzero(outside))
        if is_overwritten:
            carried.lost.append(name)
            continue
        # The earlier report of this operator or, of experts with new numbers, that of any expert in the parameter.
        entry = entries.get(name, entries[parameter_name])
        carried.operators.append(_report_of_carried(operator, mask, entry))
        carried.masks[name] = pack_mask(mask)
    return carried


def masks_in_folder(folder: Path) -> CarriedMasks:
    """Find the masks in a model's folder that hold, for a run that changes no decoder layer: one that removes tokens.

    All names are those of the files. `operators` of the result are what the earlier run reported, and `lost` are the
    weights that somebody has changed since then, so that not all weights outside of their masks are zero. It has no
    masks: they stay on disk, and `packed_masks_of` reads them. A weight that the files have in no form of its own (it
    is quantized) can't be compared, and its mask counts as one that holds.

    Reads the weights of all operators with zeros, one at a time. The result is empty if the folder has no masks that
    can be read.
    """
    found = CarriedMasks()
    if not (folder / MASKS_FILE).exists() or not (folder / REPORT_FILE).exists():
        return found
    try:
        report = read_report(folder)
    except ValueError:  # damaged, or of another version
        return found

    files = checkpoint_files(folder)  # the file of each tensor, by the name of the tensor
    with safe_open(folder / MASKS_FILE, "pt") as masks:
        names_of_masks = set(masks.keys())
        for entry in report.masked:  # the reports of the operators that have a mask
            has_zeros = entry.num_kept < math.prod(entry.shape)
            if entry.name not in names_of_masks or not has_zeros:
                continue
            # Experts share a tensor: "gate_up_proj[2, :, 1::2]" is a part of "gate_up_proj".
            tensor_name, index = split_index(entry.name)
            if tensor_name in files:
                ((_, tensor),) = read_tensors(files, [tensor_name])
                if not _mask_holds(entry, tensor[index], masks.get_tensor(entry.name)):
                    found.lost.append(entry.name)
                    continue
            found.operators.append(entry)
    return found


def _mask_holds(entry: OperatorReport, weight: Tensor, packed_mask: Tensor) -> bool:
    """Tell whether all weights of an operator that its mask calls zero are zero.

    `entry` is the earlier report of the operator. `weight` and `packed_mask` are laid out as in the files. A weight of
    another shape than reported is one that somebody has changed.
    """
    shape = tuple(weight.T.shape) if entry.stored_transposed else tuple(weight.shape)  # [out, in]
    if shape != tuple(entry.shape):
        return False
    mask = unpack_mask(packed_mask, tuple(weight.shape))
    outside = weight.masked_select(~mask)  # what the mask calls zero
    return not bool(torch.count_nonzero(outside))


def packed_masks_of(folder: Path, operators: Iterable[OperatorReport]) -> dict[str, Tensor]:
    """Read the packed masks of operators from a model's folder, by the name of the weight in the files.

    `operators` are some of those in the report of the folder, such as `masks_in_folder` returns them.
    """
    names = [operator.name for operator in operators]
    if not names:
        return {}
    with safe_open(folder / MASKS_FILE, "pt") as masks:
        return {name: masks.get_tensor(name) for name in names}


def _parameter_of(operator: LinearOperator, layer_name: str, layer: nn.Module) -> str:
    """Find the name in the model of the parameter that holds the weight of an operator in the layer `layer_name`.

    `operator.owner` is the module that has the parameter, and `operator.tensor` the parameter's name there, such as
    "weight".
    """
    for name, module in layer.named_modules(prefix=layer_name):
        if module is operator.owner:
            return f"{name}.{operator.tensor}"
    raise AssertionError(operator.name)


def _report_of_carried(
    operator: LinearOperator, mask: Tensor, earlier: OperatorReport
) -> OperatorReport:
    """Report an operator with a carried mask: errors and method of the `earlier` run, counts of the mask as it is now.

    `operator` is that of the smaller layer, and `mask`, bool, is laid out as its weight: [in, out] if that is stored
    transposed. Shapes in reports are always (out, in). If the mask no longer keeps its pattern, because columns are
    gone, it is called unstructured.
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
        # They say what the earlier run removed and reordered. This run begins with its result.
        groups_kept=None,
        input_order=None,
    )
    is_unchanged = operator.shape == earlier.shape and num_kept == earlier.num_kept
    if is_unchanged:
        return entry
    mask_by_outputs = mask.T if operator.transposed else mask  # [out, in]
    if not _keeps_pattern(entry, mask_by_outputs):
        entry = replace(entry, pattern="unstructured", target_sparsity=sparsity, scope="matrix")
    return entry


def _keeps_pattern(entry: OperatorReport, mask: Tensor) -> bool:
    """Tell whether a mask [out, in] that has changed since an earlier run still keeps the pattern of that run.

    The operator had another shape then, or kept another number of weights. `entry` reports the operator, with the text
    of the pattern (such as "2:4") and the present shape.
    """
    try:
        pattern = parse_pattern(entry.pattern)
        pattern.require_shape(entry.shape)
    except ValueError:  # the shape no longer fits
        return False
    # `span` is the m of n:m, and `None` for other patterns: they count the zeros of a row or matrix, now others.
    return pattern.span is not None and pattern.violation(mask) is None
