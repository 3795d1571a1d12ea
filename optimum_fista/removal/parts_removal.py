"""Removing whole parts of a model: the run prunes columns of some operators, then the model becomes a smaller one.

A *part* of a decoder layer consists of *groups*: channels of its MLP, heads of its attention, or experts of its
*mixture*. Experts may lose channels, too. A channel or a head is a group of columns of the linear *operator* that reads
it. So the loop prunes these columns by any method, and the rows that compute them are removed afterwards. Experts are
removed after the operators are pruned. The smaller model must compute the same as the model with zeros. This is proved
on shapes (`removal.shrinking`), and once on numbers for every kind of decoder layer.

`PartsRemoval` is the `Removal` of such a run; removal.py says in which order its methods are called. A *plan* here is a
`Shrinking`: which tensors become smaller, under which new names, and the smaller model without weights. The *sink*
(`PrunedWeights`) overwrites weights, and keeps their masks, packed, by "{operator}.weight". Names are those in the
whole model, such as "model.layers.3.mlp.down_proj", unless they are called new.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from optimum_fista import internals
from optimum_fista.config import FistaPruningConfig
from optimum_fista.folder.checkpoint import summary_of_latest_run
from optimum_fista.folder.naming import operators_by_weight
from optimum_fista.model import UnsupportedArchitectureError
from optimum_fista.model.active_parameters import active_parameters
from optimum_fista.model.choice import find_operators, operators_to_prune
from optimum_fista.model.correction import LayerTargets
from optimum_fista.model.inputs import LayerActivations
from optimum_fista.model.last_operator import is_added_to_output
from optimum_fista.model.layers import DecoderLayers
from optimum_fista.model.operators import Group, LinearOperator
from optimum_fista.model.sensitivity import DenseLoss
from optimum_fista.records import LayerRecord, LayerReport, OperatorReport
from optimum_fista.removal.earlier_masks import EarlierMasks
from optimum_fista.removal.experts import remove_experts
from optimum_fista.removal.layers import layers_with_least_loss
from optimum_fista.removal.model_outline import ModelOutline
from optimum_fista.removal.parts import Kind, Part
from optimum_fista.removal.proof import require_same_outputs, scaled_down
from optimum_fista.removal.removal import (
    ChosenGroups,
    LeavingLayer,
    PrunedWeights,
    Removal,
    first_names,
    groups_kept,
)
from optimum_fista.removal.removed_parts import RemovedParts, kept_by_kind, removed_parts
from optimum_fista.removal.shrinking import Shrinking, plan_shrinking, plan_shrinkings
from optimum_fista.removal.smaller_modules import shrink_model, tensors_of
from optimum_fista.report import PruningReport
from optimum_fista.solve.method import METHODS
from optimum_fista.solve.pattern import SparsityPattern, pack_mask, unpack_mask
from optimum_fista.solve.patterns import Columns
from optimum_fista.source.names import StoredName, divided_weights, stored_names


@dataclass(frozen=True, kw_only=True)
class PartsRemoval(Removal):
    """Removes whole parts of a model in a run."""

    outline: ModelOutline  # of the whole model
    num_kept_by_kind: Mapping[Kind, int]  # groups that a decoder layer keeps, such as {"heads": 6}
    # Of the smaller model. It has all decoder layers until those to remove are chosen.
    smaller_plan: Shrinking
    columns_plan: Shrinking  # of a model that keeps all experts, for the proof of the other kinds
    experts_plan: Shrinking  # of a model that loses experts only, to run a layer without them
    # Kinds of layers that are proved to return the same without removed groups; only this changes during the run.
    proven: set[object] = field(default_factory=set, compare=False)

    @classmethod
    def planned(
        cls, layers: DecoderLayers, config: FistaPruningConfig, *, num_texts: int
    ) -> "PartsRemoval":
        """Plan the removal of the parts that the pattern of `config` names, such as "heads:0.25".

        An operator that reads a removed part gets a pattern of whole columns. No other operator is pruned; some may be
        refitted (`_with_compensation`). `layers` are those of the model, which is not changed; the masks of an earlier
        run are looked for in its folder. `num_texts` says of how many texts the calibration is.
        """
        pattern = config.whole_parts
        assert pattern is not None
        outline = ModelOutline(layers)
        removed = removed_parts(outline, pattern)
        num_kept_by_kind = kept_by_kind(removed)  # groups of a part, in every decoder layer
        # Plans of the smaller model, and of the same model with all experts.
        smaller, columns = plan_shrinkings(outline, num_kept_by_kind)
        mixtures = [part for part in smaller.parts.values() if part.is_mixture]
        patterns: dict[str, SparsityPattern] = {
            name: Columns.keeping(smaller.num_kept[name], part.groups, part.width)
            for name, part in smaller.parts.items()
            if not part.is_mixture
        }

        def reason_left_dense(name: str) -> str | None:
            """Say why the operator `name` is not pruned; `None` if it is. Only those in `patterns` are."""
            return None if name in patterns else "no part"

        # Names of modules of experts whose matrices are not pruned as operators: these mixtures lose whole experts.
        dense_experts = tuple(part.name for part in mixtures)
        if not patterns:
            dense_experts = ("*",)  # all of them: no operator is pruned at all
        operators, left_dense = operators_to_prune(layers, dense_experts, reason_left_dense)

        experts_plan = columns  # not used if no experts are removed
        if "experts" in num_kept_by_kind:
            experts_plan = plan_shrinking(outline, {"experts": num_kept_by_kind["experts"]})
        removal = cls(
            layers=layers,
            config=config,
            operators=operators,
            patterns=patterns,
            left_dense=left_dense,
            mixtures=_by_layer(mixtures, layers),
            removed_parts=removed,
            num_removed_layers=_count_removed_layers(removed),
            outline=outline,
            num_kept_by_kind=num_kept_by_kind,
            smaller_plan=smaller,
            columns_plan=columns,
            experts_plan=experts_plan,
            refits_experts=bool(mixtures) and config.expert_refit and num_texts > 1,
            earlier_masks=EarlierMasks.find(layers),
        )
        return removal._with_compensation()

    @property
    def num_parameters(self) -> int:
        """Count the parameters of the smaller model; it has all decoder layers until those to remove are chosen."""
        return self.smaller_plan.model.num_parameters()

    @property
    def num_groups_kept(self) -> Mapping[str, int]:
        """How many groups each part keeps that becomes smaller, by the name of the part."""
        return self.smaller_plan.num_kept

    @property
    def keeps_values(self) -> bool:
        """Tell whether all weights that stay keep their values, because nothing is refitted.

        If experts lose channels, the answer is no, so that their matrices are never cut as the files store them: each
        expert keeps other channels, and the files may have all experts in one tensor.

        `self.num_kept_by_kind` has the kinds of parts that are removed, such as "heads", and `self.mixtures` those that
        lose experts.
        """
        if "expert_channels" in self.num_kept_by_kind:
            return False
        loses_heads = "heads" in self.num_kept_by_kind
        loses_columns = loses_heads or "channels" in self.num_kept_by_kind
        method_updates_weights = loses_columns and METHODS[self.config.method].updates_weights

        correction = self.config.correction
        # With "full", decoder layers see the error of those before them, as of a removed one, and can compensate.
        follows_removed_layer = self.num_removed_layers > 0 and correction.carry == "full"
        # the last operator of a decoder layer is refitted (`_with_compensation`)
        compensates = correction.residual_share > 0 and (loses_heads or follows_removed_layer)
        return not (method_updates_weights or self.refits_experts or compensates)

    def is_asked_dense(self, name: str) -> bool:
        """Tell whether the user's pattern leaves the operator `name` dense: it names only those that read parts."""
        part = self.smaller_plan.parts.get(name)
        return part is None or part.is_mixture

    def new_name(self, name: str) -> str | None:
        """The name in the smaller model of the module or tensor `name`; `None` if its decoder layer is removed."""
        return self.smaller_plan.new_name(name)

    def part_of(self, name: str) -> Part | None:
        """The part that becomes smaller and to which the tensor `name` belongs; `None` if the tensor stays as it is.

        `name` is that of a parameter of the model, or of a tensor in its files that stands in the place of one.
        `self.mixtures` are the mixtures that lose experts, by the name of their decoder layer.
        """
        part = self.smaller_plan.part_of(name)
        if part is not None:
            return part
        # Scales of the inputs of experts are no tensors of the plan.
        for mixture in self.mixtures.values():
            if mixture.includes(name):
                return mixture
        return None

    def choose_layers(self, loss: DenseLoss) -> list[tuple[int, float]]:
        """Choose the decoder layers to remove by the loss of the model without them; none if the pattern names none.

        `loss` has the model and the sequences to measure on. The model runs, and is not changed.

        Returns their numbers in the order of their removal, each with the loss after it, in nats per token.
        """
        return layers_with_least_loss(loss, self.outline, self.num_removed_layers)

    def without_layers(self, removed_layers: Mapping[int, float]) -> "PartsRemoval":
        """Return a removal that also removes the decoder layers that `choose_layers` has chosen.

        `removed_layers` has the loss after the removal of each layer, by its number. Operators of these layers are no
        longer pruned. With the residual correction, the last operator of the layer after a removed one is refitted to
        compensate (`_with_compensation`). This removal and the model are not changed.
        """
        remaining = [index for index in range(len(self.layers)) if index not in removed_layers]
        smaller, columns = plan_shrinkings(self.outline, self.num_kept_by_kind, remaining)
        mixtures = {  # without those of removed layers, which are no parts of the smaller model
            layer_name: part
            for layer_name, part in self.mixtures.items()
            if part.name in smaller.parts
        }
        removal = replace(
            self,
            mixtures=mixtures,
            smaller_plan=smaller,
            columns_plan=columns,
            removed_layers=dict(removed_layers),
        )
        return removal._with_compensation()

    def _with_compensation(self) -> "PartsRemoval":
        """Return a removal with operators that compensate for removed parts, and without those of removed layers.

        If the residual correction is on, a decoder layer that loses heads or comes after a removed one compensates for
        it: its last operator is refitted, unless it loses columns itself. Which operator is the last is known only when
        the layer runs (`choose_operators` finds out). Until then any of them may be the last, so all operators of such
        a layer get a pattern that keeps all columns. Operators that lose columns keep the pattern that they have.

        `self.operators` are by the name of their decoder layer, then by their own, and `self.patterns` by the name of
        the operator. `self.removed_layers` has the numbers of the removed layers. `self.left_dense` has the operators
        that are not pruned, by name, each with the reason; for those that still are not, `self.smaller_plan` (the
        `Shrinking` of the run) words the reasons anew. This removal and the model are not changed.
        """
        compensating_layers = self._compensating_layers()
        # Operators without a place for their mask in the files can't be refitted.
        divided = set[str]()
        if compensating_layers:
            divided = divided_weights(self.layers.model, self.layers.name)

        operators = dict[str, Mapping[str, LinearOperator]]()
        patterns = dict(self.patterns)
        for index, (layer_name, layer) in enumerate(self.layers):
            if index in self.removed_layers:
                operators[layer_name] = {}
            elif index not in compensating_layers:
                operators[layer_name] = self.operators[layer_name]
            else:
                refitted = _refitted_operators(layer_name, layer, divided)
                for name, operator in refitted.items():
                    num_columns = operator.shape[1]
                    # Operators that lose columns have a pattern already, and keep it.
                    patterns.setdefault(name, Columns.keeping(num_columns, num_columns))
                # An operator that is in both has the same matrix there. `self.operators` may also have matrices of
                # experts, which are never refitted here.
                operators[layer_name] = {**refitted, **self.operators[layer_name]}

        pruned = {name for of_layer in operators.values() for name in of_layer}
        not_pruned = [name for name in self.left_dense if name not in pruned]
        left_dense = self.smaller_plan.reasons_left_dense(not_pruned)
        return replace(self, operators=operators, patterns=patterns, left_dense=left_dense)

    def _compensating_layers(self) -> set[int]:
        """Return the numbers of the decoder layers whose last operator compensates for removed parts; often none.

        These are the layers that lose heads, and those that come after a removed one. The option
        `residual_correction` says whether there is a compensation at all.
        """
        correction = self.config.correction
        compensating = set[int]()
        if correction.residual_share == 0:
            return compensating
        for index, (layer_name, _) in enumerate(self.layers):
            if index in self.removed_layers:
                continue
            # A layer of which no operator loses columns loses no heads. If other layers lose heads, one that loses only
            # channels counts, too.
            loses_columns = bool(self.operators[layer_name])
            may_lose_heads = "heads" in self.num_kept_by_kind and loses_columns
            # With "full", a layer sees the error of those before it. Otherwise dense states enter it, without an error.
            sees_removed_layer = correction.carry == "full" and index - 1 in self.removed_layers
            if may_lose_heads or sees_removed_layer:
                compensating.add(index)
        return compensating

    def choose_operators(
        self, layer_name: str, groups: list[Group], activations: LayerActivations, hidden: Tensor
    ) -> ChosenGroups:
        """Choose the operators to prune in a decoder layer: those that lose columns, and perhaps the last one.

        First it is proved that zeros in the columns equal their removal; then the kind of the layer is in
        `self.proven`. The last operator is refitted, without a loss of columns, to compensate for errors of the layer.
        The layer runs, and is not changed.

        `self.smaller_plan.parts` are by the name of the operator that loses columns, and `self.mixtures`, those that
        lose experts, by the name of their decoder layer.

        Args:
            layer_name: The name of the layer, such as "model.layers.3".
            groups: Lists of operators with the same inputs, in execution order.
            activations: Has the layer, which is dense.
            hidden: [batch, tokens, hidden] of the first batch, which enters the layer.

        Returns:
            The operators to prune, the other operators of the layer with the reason, and the module of the experts if
            some are removed.
        """
        self._prove(layer_name, activations, hidden)
        self._require_called(layer_name, groups)

        # a list for each group: its operators that lose columns
        chosen = list[Group]()
        for group in groups:
            chosen.append([o for o in group if o.name in self.smaller_plan.parts])
        # The last operator is refitted if it is alone in its group, and loses no columns. Without a compensation,
        # `groups` has only operators that lose columns, so it is not refitted.
        if groups and len(groups[-1]) == 1 and not chosen[-1]:
            last = groups[-1][0]
            # It can compensate only if the output of the layer is that of this operator plus something else.
            if is_added_to_output(activations, last.module, hidden):
                chosen[-1] = [last]

        pruned = {operator.name for group in chosen for operator in group}
        not_pruned = [o.name for group in groups for o in group if o.name not in pruned]

        experts = None  # the module of the mixture that loses experts
        if layer_name in self.mixtures:
            name_in_layer = self.mixtures[layer_name].name.removeprefix(f"{layer_name}.")
            experts = activations.layer.get_submodule(name_in_layer)
        return ChosenGroups(
            groups=[group for group in chosen if group],
            left_dense=self.smaller_plan.reasons_left_dense(not_pruned),
            experts=experts,
        )

    def _require_called(self, layer_name: str, groups: list[Group]) -> None:
        """Refuse a decoder layer with an operator that would lose columns, but is in no group. Changes nothing.

        `groups` are the operators that a run of the layer called exactly once, and that returned `W x + b`.
        `self.smaller_plan.parts` are by the name of the operator that loses columns.
        """
        called = {operator.name for group in groups for operator in group}
        for name, part in self.smaller_plan.parts.items():
            is_operator_of_layer = name.startswith(f"{layer_name}.") and not part.is_mixture
            if is_operator_of_layer and name not in called:
                raise UnsupportedArchitectureError(
                    f"{name} would lose columns, but its layer does not call it once as W x + b: pass a pattern that "
                    "does not cut it, such as '2:4'."
                )

    def _prove(self, layer_name: str, activations: LayerActivations, hidden: Tensor) -> None:
        """Prove, once for each kind of decoder layer, that removing groups of columns changes its output as zeros do.

        Layers are of one kind if they have modules of the same classes, and lose groups of the same operators; their
        numbers of groups may differ. The kind is added to `self.proven`. `activations` has the layer, of which copies
        run, and `hidden` [batch, tokens, hidden] of the first batch enters it. `self.columns_plan` has the parts that
        lose columns, by the operator's name.

        Raises UnsupportedArchitectureError if the outputs differ.
        """
        layer = activations.layer
        # of operators in this layer that lose columns
        names = [name for name in self.columns_plan.parts if name.startswith(f"{layer_name}.")]
        if not names:
            return
        classes = tuple((name, type(module)) for name, module in layer.named_modules())
        # without the number of the layer, so that they are equal in layers of one kind
        names_in_layer = tuple(name.removeprefix(layer_name) for name in names)
        kind = (classes, names_in_layer)
        if kind in self.proven:
            return

        # Which groups the run removes is not known yet, so the first ones are removed for the proof. Then every other
        # group gets a new number. So the proof also finds modules that depend on the number of a group, or on all
        # groups together.
        kept = dict[str, tuple[int, ...]]()
        for name in names:
            total = self.columns_plan.parts[name].groups
            num_kept = self.columns_plan.num_kept[name]
            kept[name] = tuple(range(total - num_kept, total))
        call = activations.calls[0]  # the other arguments of the layer for the first batch
        hidden_with_small_values = scaled_down(hidden.to(activations.device))

        def run(module: nn.Module) -> Tensor:
            """Run a copy of the layer on the hidden states `hidden_with_small_values`, with the arguments of `call`."""
            return call.run(module, hidden_with_small_values)

        require_same_outputs(self.columns_plan, layer_name, layer, kept, run)
        self.proven.add(kind)

    def finish_layer(
        self,
        layer_name: str,
        sink: PrunedWeights,
        targets: LayerTargets,
        operators: list[OperatorReport],
    ) -> LeavingLayer:
        """Remove experts of a decoder layer whose operators are pruned, and refit the other experts.

        `targets` has the layer, and what it should return. `operators` are the reports of its pruned operators. Experts
        are overwritten through `sink`, and its masks become those of the smaller operators (`_smaller`). The layer
        runs, for the hidden states that leave it without the removed experts. Returns these states, and the reports of
        the operators and the mixture as they will be; the layer itself keeps all experts.

        `self.mixtures` are those that lose experts, by the name of their decoder layer. `self.experts_plan` is the plan
        of a model that loses experts only, and `self.smaller_plan` that of the result.
        """
        smaller_operators = [self._smaller(operator, sink) for operator in operators]
        if layer_name not in self.mixtures:
            return LeavingLayer(targets.leave(), smaller_operators, mixture=None)

        part = self.mixtures[layer_name]
        smaller_layer, mixture = remove_experts(
            part,
            layer_name,
            targets=targets,
            count=self.smaller_plan.num_kept[part.name],
            shrinking=self.experts_plan,
            write=sink.write if self.refits_experts else None,
        )
        return LeavingLayer(targets.leave(smaller_layer), smaller_operators, mixture)

    def _smaller(self, operator: OperatorReport, sink: PrunedWeights) -> OperatorReport:
        """Copy the report of an operator as it will be without the removed parts; its mask then keeps all weights.

        Replaces the mask of the operator in `sink.masks`: the old mask says which groups of columns stay, and the new
        one, of the smaller weight, keeps all. `operator.name` is that of the weight, such as
        "model.layers.3.mlp.down_proj.weight". `self.smaller_plan.parts` are by the name of the operator without
        ".weight".
        """
        mask = unpack_mask(sink.masks[operator.name], operator.stored_shape)
        part = self.smaller_plan.parts.get(operator.name.removesuffix(".weight"))
        groups = None  # an operator that is no part was only refitted
        num_outputs, num_inputs = operator.shape
        if part is not None:
            mask_by_outputs = mask.T if operator.stored_transposed else mask  # [out, in]
            groups = part.kept_by(mask_by_outputs)
            num_inputs = len(groups) * part.width

        smaller = replace(
            operator,
            shape=(num_outputs, num_inputs),
            groups_kept=groups,
            num_kept=num_outputs * num_inputs,
            sparsity=0.0,
        )
        smaller_mask = torch.ones(smaller.stored_shape, dtype=torch.bool)
        sink.masks[operator.name] = pack_mask(smaller_mask)
        return smaller

    def carry_masks(
        self, layer: nn.Module, record: LayerRecord, sink: PrunedWeights
    ) -> LayerRecord:
        """Keep the masks that an earlier run has left for a decoder layer: add them to `sink.masks`.

        They become smaller, as the weights will be. A mask is kept only if all weights that it calls zero still are
        (`EarlierMasks.carried_smaller` compares them); otherwise it is lost. Returns a copy of the record that says
        which masks were kept, and which are lost.

        `layer` is pruned and on its device. `record` has its report, and those of its pruned operators.
        `self.earlier_masks` finds the masks in the folder that the model was loaded from.
        """
        if self.earlier_masks is None:
            return record
        # numbers of the groups that stay, by the name of the part
        kept = groups_kept([record.report], record.operators)
        carried = self.earlier_masks.carried_smaller(
            record.report.name, layer, self.smaller_plan, kept
        )
        sink.masks.update(carried.masks)
        return replace(record, carried=carried.operators, lost_masks=carried.lost)

    def shrink_tensors(self, record: LayerRecord, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors of a pruned decoder layer in their smaller form, by their new names.

        `tensors` are by their names in the whole model, and are not changed. `record` has the report of the layer, and
        those of its operators, which say which groups stay.
        """
        # numbers of the groups that stay, by the name of the part
        kept = groups_kept([record.report], record.operators)
        smaller = {
            name: self.smaller_plan.shrink_tensor(name, tensor, kept)
            for name, tensor in tensors.items()
        }
        return self.renamed(smaller)

    def names_of_carried(self, report: PruningReport) -> dict[str, StoredName]:
        """Names in the checkpoint of weights with masks of an earlier run, by their names in the smaller model.

        `report` is complete: `describe` has given its entries the names of the smaller model. `report.carried` are the
        operators with such masks, each named by its weight, such as "model.layers.3.mlp.up_proj.weight". The names in
        the checkpoint are found in the smaller model (`self.smaller_plan.model`, without weights), because experts have
        new numbers there. If the model (`self.layers.model`) was loaded from files, its attribute with the conversions
        to the names in the files is set in the smaller model, too. The result may name weights of further operators.
        """
        if not report.carried:
            return {}
        smaller = self.smaller_plan.model
        internals.copy_weight_conversions(self.layers.model, smaller)
        # The list of decoder layers has the same name in both models.
        layers_name = self.layers.name
        # by the names of their weights in the smaller model
        operators = operators_by_weight(smaller, report, layers_name=layers_name)
        carried = [operators[entry.name] for entry in report.carried]
        return stored_names(smaller, carried, layers_name=layers_name)

    def describe(self, report: PruningReport) -> None:
        """Write what was removed into the report of all decoder layers, and into the model's configuration.

        Changes `report`: what stays gets the names of the smaller model, and masks of an earlier run that are lost give
        a warning. The parameters of the smaller model are counted, and if experts are removed, also those that a token
        uses. `self.layers.model.config` becomes that of the smaller model.

        `self.removed_layers` has the loss after the removal of each decoder layer, by its number; it is empty if all
        layers stay.
        """
        # by the old names of the mixtures, so before they are renamed
        used_before = _shares_of_experts_used(report, of_smaller_model=False)

        # All names become those of the smaller model.
        report.layers = self._renamed_layers(report.layers)
        report.operators = [self._renamed_operator(operator) for operator in report.operators]
        report.left_dense = self.renamed(report.left_dense)
        report.carried = [self._renamed_operator(operator) for operator in report.carried]
        # No mask is lost with a removed layer (`carry_masks`), so each of these names has a new one.
        report.lost_masks = [self.new_name(name) or name for name in report.lost_masks]

        # The warning needs the configuration as the earlier run has left it, so it comes before the new one.
        model = self.layers.model
        masks_were_found = self.earlier_masks is not None
        _warn_of_lost_masks(report, model.config, masks_were_found)
        model.config = self.smaller_plan.model.config

        # What was removed, and the parameters before and after.
        report.model["parts_removed"] = [str(removed) for removed in self.removed_parts]
        report.model["parts_counted"] = {
            removed.share.kind: {
                "before": removed.number,
                "after": removed.kept,
                "router_groups": removed.num_router_groups,
            }
            for removed in self.removed_parts
        }
        report.model["dense_num_parameters"] = report.model["num_parameters"]
        report.model["num_parameters"] = self.smaller_plan.model.num_parameters()

        # Parameters that a token uses; nothing is known of the routers of removed layers.
        if used_before and not self.removed_layers:
            used_after = _shares_of_experts_used(report, of_smaller_model=True)
            report.model["active_parameters"] = {
                "before": active_parameters(model, used_before),
                "after": active_parameters(self.smaller_plan.model, used_after),
            }

        if self.removed_layers:
            report.model["layers_kept"] = list(self.smaller_plan.layers)  # their old numbers
            report.model["layers_removed"] = [
                [index, loss] for index, loss in self.removed_layers.items()
            ]

    def _renamed_layers(self, layers: Sequence[LayerReport]) -> list[LayerReport]:
        """Copy the reports of the decoder layers that stay, with their names in the smaller model (`self.new_name`)."""
        renamed = list[LayerReport]()
        for layer in layers:
            new_name = self.new_name(layer.name)
            if new_name is None:
                continue
            mixture = layer.mixture
            if mixture is not None:
                new_name_of_mixture = self.new_name(mixture.name)
                assert new_name_of_mixture is not None  # its decoder layer stays
                mixture = replace(mixture, name=new_name_of_mixture)
            renamed.append(replace(layer, name=new_name, mixture=mixture))
        return renamed

    def _renamed_operator(self, operator: OperatorReport) -> OperatorReport:
        """Copy the report of an operator, with its name in the smaller model."""
        return replace(operator, name=self.new_name(operator.name) or operator.name)

    def make_smaller(
        self, model: PreTrainedModel, report: PruningReport, sink: PrunedWeights
    ) -> None:
        """Make a pruned model in memory smaller, in place, after `describe`.

        `report` says which groups stay, by the new names of the parts. The masks of `sink` get the new names. If the
        run fails later, `sink` gives the tensors their old values and sizes. `self.smaller_plan.parts` are by their old
        names.
        """
        groups = groups_kept(report.layers, report.operators)  # by their new names
        # numbers of the groups that stay, by the old names, which the model still has
        kept = dict[str, tuple[int, ...]]()
        for name in self.smaller_plan.parts:
            new_name = self.new_name(name)
            if new_name is not None:
                kept[name] = groups[new_name]

        # Old tensors are kept on the CPU: a device that is nearly full has no room for both sizes of all tensors.
        # Those that keep their size also keep their memory, so they are not copied.
        before = []  # each tensor, its device, and its old values
        for name, tensor in tensors_of(model):
            becomes_smaller = self.smaller_plan.part_of(name) is not None
            data = tensor.data.cpu() if becomes_smaller else tensor.data
            before.append((tensor, tensor.device, data))

        def restore() -> None:
            """Give all tensors of the model their old values and sizes, on their old devices (`before`)."""
            for tensor, device, data in before:
                tensor.data = data.to(device)

        sink.undo_at_failure(restore)
        sink.masks = self.renamed(sink.masks)
        shrink_model(model, self.smaller_plan, kept)


def _refitted_operators(
    layer_name: str, layer: nn.Module, divided: Collection[str]
) -> dict[str, LinearOperator]:
    """Find the operators of a decoder layer of which the last one is refitted to compensate, by name.

    These are all but matrices of experts, and but those whose mask has no place in the files (`divided`).
    """
    operators = find_operators(layer_name, layer, dense_experts=("*",))
    return {name: operator for name, operator in operators.items() if name not in divided}


def _by_layer(mixtures: Sequence[Part], layers: DecoderLayers) -> dict[str, Part]:
    """Return the mixtures that lose experts by the name of their decoder layer; a layer has one at most."""
    by_layer = dict[str, Part]()
    for layer_name, _ in layers:
        for part in mixtures:
            if part.name.startswith(f"{layer_name}."):
                by_layer[layer_name] = part
    return by_layer


def _shares_of_experts_used(report: PruningReport, *, of_smaller_model: bool) -> dict[str, float]:
    """Return which share of the experts of each mixture a router chooses for a token, by the name of the mixture.

    It chooses as many experts in the smaller model as before, out of fewer. How many that is follows from the tokens
    of the calibration that reached each expert. Empty if the run of `report` removes no experts.
    """
    shares = dict[str, float]()
    for mixture in report.mixtures:
        num_chosen = sum(mixture.expert_tokens) / report.calibration["num_tokens"]
        num_experts = len(mixture.groups_kept if of_smaller_model else mixture.saliency)
        shares[mixture.name] = min(1.0, num_chosen / num_experts)
    return shares


def _count_removed_layers(removed: Sequence[RemovedParts]) -> int:
    """Count the decoder layers that a run removes."""
    return sum(parts.number - parts.kept for parts in removed if parts.share.kind == "layers")


def _warn_of_lost_masks(
    report: PruningReport, config: PreTrainedConfig, masks_were_found: bool
) -> None:
    """Add a warning to the report if the model has zeros of an earlier run whose masks are not carried.

    There are two reasons, which exclude each other. If the masks were found in the folder of the model
    (`masks_were_found`), the run may have fitted some weights anew (`report.lost_masks`, names such as
    "model.layers.3.mlp.down_proj.weight"). Otherwise nobody knows where the zeros are.

    `config` is the model's. The earlier run has noted its pattern and its number of zeros in it.
    """
    earlier = summary_of_latest_run(config)
    num_zeros = earlier.get("num_zeros", 0)
    if report.lost_masks:
        names = first_names([name.removesuffix(".weight") for name in report.lost_masks])
        report.warn(
            f"weights of {len(report.lost_masks)} operators were fitted anew, which overwrote their zeros of an "
            f"earlier run ({earlier.get('pattern')}): {names}. Pass a method that changes no weights, such as "
            "method='wanda' and residual_correction=0, or remove parts first."
        )
    elif num_zeros > 0 and not masks_were_found:
        report.warn(
            f"the masks of an earlier run ({earlier.get('pattern')}, {num_zeros:,} zeros) are not known, so they are "
            "not carried: prune the folder that the earlier run has saved."
        )
