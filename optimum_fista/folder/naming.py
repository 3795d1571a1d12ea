"""Reports of operators and their masks, by the names in a checkpoint or by those in the model.

A weight may have another name in the files than in the model, and another layout: `Conv1D` of GPT-2 stores [in, out],
and the files of a mixture may have a tensor for each expert. A run works with the names of the model.
`renamed_operators` translates what a folder gets, and `as_in_model` translates back what is read from a folder.

A mask is a uint8 tensor with one bit for each weight (`solve.pattern.pack_mask`), True = kept. An operator is a pruned
linear map: a module, or one matrix of an expert. `report.operators` are those that a run pruned, `report.carried` those
whose masks of an earlier run it carried over, and `report.masked` both.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from optimum_fista.model.choice import find_operators
from optimum_fista.model.experts import FusedExperts, can_be_split, is_fused_experts
from optimum_fista.model.layers import find_decoder_layers
from optimum_fista.model.operators import LinearOperator
from optimum_fista.records import OperatorReport
from optimum_fista.report import PruningReport
from optimum_fista.solve.pattern import pack_mask, unpack_mask
from optimum_fista.source.names import StoredName, stored_names


def operators_by_weight(
    model: PreTrainedModel, report: PruningReport, *, layers_name: str | None = None
) -> dict[str, LinearOperator]:
    """Return the linear operators of a pruned model, by the names of their weights in the model.

    A name is such as "model.layers.3.mlp.up_proj.weight". `report` is that of the run which pruned the model; it tells
    which experts were left alone. `layers_name` is the name of the list of decoder layers, such as "model.layers";
    `None`: it is looked for. Nothing is changed, and no weight is read.
    """
    if layers_name is None:
        layers_name = find_decoder_layers(model).name
    layers: Any = model.get_submodule(layers_name)  # nn.ModuleList

    operators = {}
    for index, layer in enumerate(layers):
        layer_name = f"{layers_name}.{index}"
        if report.removed or report.carried:
            # Experts that this run did not prune as operators may have masks of an earlier run.
            of_layer = prunable_operators(layer_name, layer)
        else:
            # without the experts that the user excluded from the run
            of_layer = find_operators(layer_name, layer, report.config["exclude"])
        for name, operator in of_layer.items():
            operators[f"{name}.weight"] = operator
    return operators


def prunable_operators(layer_name: str, layer: nn.Module) -> dict[str, LinearOperator]:
    """Return all linear operators of the decoder layer called `layer_name`, by their names, with those of experts.

    `layer_name` is such as "model.layers.3", the name of an operator such as "model.layers.3.mlp.up_proj". Experts
    whose weights are in a form that can't be pruned are left out.
    """
    # `find_operators` would raise an error at experts that can't be pruned. So it leaves out all experts ("*" matches
    # every name), and those that can be pruned are added here.
    operators = find_operators(layer_name, layer, dense_experts=("*",))
    for name, module in layer.named_modules(prefix=layer_name):
        if is_fused_experts(module) and can_be_split(module):
            for operator in FusedExperts(name, module).operators:
                operators[operator.name] = operator
    return operators


def renamed_operators(
    reports: Iterable[OperatorReport], masks: Mapping[str, Tensor], names: Mapping[str, StoredName]
) -> tuple[list[OperatorReport], dict[str, Tensor]]:
    """Copy reports of operators and their masks, under other names and with masks in the layout of these names.

    Used in both directions: a folder that is written gets the names of its files, and what is read from a folder gets
    the names of the model (`as_in_model`).

    Args:
        reports: Of the operators; `name` is that of the weight, such as "model.layers.0.mlp.up_proj.weight".
        masks: By the same names, laid out as the weights are stored there.
        names: The new name of each weight, and whether it is stored there as [in, out]. Masks are laid out likewise.
    """
    renamed_reports = []
    renamed_masks = {}
    for report in reports:
        new = names[report.name]  # the new name and layout
        mask = masks[report.name]
        if new.transposed != report.stored_transposed:
            # The bits of a mask follow row by row, so they have another order in the other layout: [out, in] becomes
            # [in, out], or the other way round.
            mask = pack_mask(unpack_mask(mask, report.stored_shape).T)
        renamed_masks[new.name] = mask
        renamed_reports.append(
            dataclasses.replace(report, name=new.name, stored_transposed=new.transposed)
        )
    return renamed_reports, renamed_masks


def renamed_report(
    report: PruningReport, masks: Mapping[str, Tensor], names: Mapping[str, StoredName]
) -> tuple[PruningReport, dict[str, Tensor]]:
    """Return a copy of a run's report in which operators have other names, and the masks under these names.

    Args:
        report: Of a run. It is not changed.
        masks: Of the operators that it pruned and of those whose masks it carried over, by their names in it.
        names: As for `renamed_operators`.
    """
    operators, masks_of_run = renamed_operators(report.operators, masks, names)
    carried, carried_masks = renamed_operators(report.carried, masks, names)
    # Names of weights only. One that the folder does not know keeps its name.
    lost_masks = [names[name].name if name in names else name for name in report.lost_masks]
    renamed = dataclasses.replace(
        report, operators=operators, carried=carried, lost_masks=lost_masks
    )
    return renamed, masks_of_run | carried_masks


def as_in_model(
    model: PreTrainedModel,
    operators: Iterable[LinearOperator],
    report: PruningReport,
    masks: Mapping[str, Tensor],
) -> tuple[PruningReport, dict[str, Tensor]]:
    """Return a report and masks, read from a checkpoint, under the names of the model.

    Args:
        model: The model that was loaded from this checkpoint.
        operators: Its linear operators (the values of `operators_by_weight`).
        report: With the names of the checkpoint. It is not changed.
        masks: By the names of the checkpoint.

    Raises:
        ValueError: If the model has no such weight, or one of another shape.
    """
    operators = list(operators)
    # The name and layout in the files, by the name of the weight in the model. Weights that are not stored as one
    # matrix have no entry.
    names = stored_names(model, operators, all_of_them=False)
    by_stored_name = {}
    for operator in operators:
        weight = f"{operator.name}.weight"
        if weight in names:
            by_stored_name[names[weight].name] = operator

    # By the name in the checkpoint: the name and layout in the model.
    in_model = {}
    for entry in report.masked:  # the reports of the operators that have a mask
        stored_operator = by_stored_name.get(entry.name)
        if stored_operator is None:
            raise ValueError(
                f"{entry.name} of shape {entry.shape} has a mask, but {type(model).__name__} has no such weight: pass "
                "the folder or Hub id that this model was loaded from."
            )
        if stored_operator.shape != entry.shape:
            raise ValueError(
                f"{entry.name} of shape {entry.shape} has a mask, but {type(model).__name__} has it in shape "
                f"{stored_operator.shape}: pass the folder or Hub id that this model was loaded from."
            )
        # A report calls an operator by the name of its weight. This is its place in the model, not in a file.
        in_model[entry.name] = StoredName(
            f"{stored_operator.name}.weight", stored_operator.transposed
        )
    return renamed_report(report, masks, in_model)
