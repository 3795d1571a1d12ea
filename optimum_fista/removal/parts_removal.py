"""Removing whole parts of a model: the run prunes columns of some operators, then the model becomes a smaller one.

A channel, a head or an expert is a group of columns of the operator that reads it. So the loop prunes these columns by
any method, and the rows that compute them are removed afterwards. The smaller model must compute the same as the model
with zeros. This is proved on shapes (`removal.shrinking`), and once on numbers for every kind of decoder layer.

`PartsRemoval` is the `Removal` of such a run; removal.py says in which order its methods are called.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from optimum_fista import internals
from optimum_fista.config import FistaPruningConfig
from optimum_fista.folder.checkpoint import CONFIG_KEY
from optimum_fista.folder.naming import operators_by_weight
from optimum_fista.memory import is_out_of_memory
from optimum_fista.model import UnsupportedArchitectureError
from optimum_fista.model.choice import choose_operators, find_operators
from optimum_fista.model.correction import LayerTargets
from optimum_fista.model.groups import is_added_to_output
from optimum_fista.model.inputs import LayerActivations
from optimum_fista.model.layers import DecoderLayers
from optimum_fista.model.operators import Group, LinearOperator
from optimum_fista.model.sensitivity import DenseLoss
from optimum_fista.removal.earlier_masks import EarlierMasks
from optimum_fista.removal.experts import remove_experts
from optimum_fista.removal.layers import choose_layers
from optimum_fista.removal.parts import (
    Kind,
    ModelOutline,
    Part,
    RemovedParts,
    kept_by_kind,
    removed_parts,
)
from optimum_fista.removal.proof import require_same_outputs, small_hidden_states
from optimum_fista.removal.removal import (
    ChosenGroups,
    LeavingLayer,
    PrunedWeights,
    Removal,
    first_names,
    groups_kept,
)
from optimum_fista.removal.shrinking import Shrinking, plan_shrinking, plan_shrinkings
from optimum_fista.removal.smaller_modules import shrink_model, tensors_of
from optimum_fista.report import LayerRecord, LayerReport, OperatorReport, PruningReport
from optimum_fista.solve.method import METHODS
from optimum_fista.solve.pattern import SparsityPattern, pack_mask, unpack_mask
from optimum_fista.solve.patterns import Columns
from optimum_fista.source.names import StoredName, stored_names


@dataclass(frozen=True, kw_only=True)
class PartsRemoval(Removal):
    """Removes whole parts of a model in a run."""

    outline: ModelOutline  # of the whole model
    counts: Mapping[Kind, int]  # how many parts of each kind a decoder layer keeps
    # The smaller model. It has all decoder layers until those to remove are chosen.
    smaller: Shrinking
    columns: Shrinking  # a model that keeps all experts, for the proof of the other kinds
    experts: Shrinking  # a model that loses experts only, to run a decoder layer without them
    # Of the run that the model comes from; None: there are none, or they are not known.
    earlier_masks: EarlierMasks | None
    # Kinds of layers that are proved to return the same without removed groups; only this changes during the run.
    proven: set[object] = field(default_factory=set, compare=False)

    @classmethod
    def planned(cls, layers: DecoderLayers, config: FistaPruningConfig) -> "PartsRemoval":
        """Plan the removal of the parts that a configuration names; it changes nothing.

        An operator that reads a removed part gets a pattern of whole columns. No other operator is pruned.
        """
        pattern = config.whole_parts
        assert pattern is not None
        outline = ModelOutline(layers)
        removed = removed_parts(outline, pattern)
        counts = kept_by_kind(removed)
        smaller, columns = plan_shrinkings(outline, counts)
        mixtures = [part for part in smaller.parts.values() if part.is_mixture]
        patterns: dict[str, SparsityPattern] = {
            name: Columns.keeping(smaller.counts[name], part.groups, part.width)
            for name, part in smaller.parts.items()
            if not part.is_mixture
        }

        # The matrices of mixtures that lose experts are not pruned as operators.
        dense_experts = tuple(part.name for part in mixtures) if patterns else ("*",)
        operators, left_dense = choose_operators(
            layers, dense_experts, lambda name: None if name in patterns else "no part"
        )
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
            counts=counts,
            smaller=smaller,
            columns=columns,
            experts=_plan_fewer_experts(outline, counts, otherwise=columns),
            earlier_masks=EarlierMasks.find(layers),
        )
        return removal._with_compensation()

    @property
    def num_parameters(self) -> int:
        """See `Removal.num_parameters`; all decoder layers count until those to remove are chosen."""
        return self.smaller.model.num_parameters()

    @property
    def counts_kept(self) -> Mapping[str, int]:
        """See `Removal.counts_kept`."""
        return self.smaller.counts

    @property
    def keeps_values(self) -> bool:
        """See `Removal.keeps_values`."""
        correction = self.config.correction
        loses_columns = not self.counts.keys() <= {"experts"}
        method_updates_weights = loses_columns and METHODS[self.config.method].updates_weights
        refits_experts = bool(self.mixtures) and self.config.expert_refit
        follows_removed_layer = self.num_removed_layers > 0 and correction.carry == "full"
        compensates = correction.residual_share > 0 and (
            "heads" in self.counts or follows_removed_layer
        )
        return not (method_updates_weights or refits_experts or compensates)

    def is_asked_dense(self, name: str) -> bool:
        """See `Removal.is_asked_dense`: only operators that read parts are asked to lose columns."""
        part = self.smaller.parts.get(name)
        return part is None or part.is_mixture

    def new_name(self, name: str) -> str | None:
        """The name of a module or tensor in the smaller model; `None` if its decoder layer is removed."""
        return self.smaller.new_name(name)

    def part_of(self, name: str) -> Part | None:
        """See `Removal.part_of`."""
        part = self.smaller.part_of(name)
        if part is not None:
            return part
        # Scales of the inputs of experts are no parameters, but are removed with the experts.
        for mixture in self.mixtures.values():
            if name.startswith(f"{mixture.name}."):
                return mixture
        return None

    def choose_layers(self, loss: DenseLoss) -> list[tuple[int, float]]:
        """See `Removal.choose_layers`."""
        return choose_layers(loss, self.outline, self.num_removed_layers)

    def without_layers(self, removed_layers: Mapping[int, float]) -> "PartsRemoval":
        """Return the removal with the decoder layers that the loss has chosen: they lose no weights before."""
        stay = [index for index in range(len(self.layers)) if index not in removed_layers]
        smaller, columns = plan_shrinkings(self.outline, self.counts, stay)
        mixtures = {
            layer_name: part
            for layer_name, part in self.mixtures.items()
            if part.name in smaller.parts
        }
        removal = replace(
            self,
            mixtures=mixtures,
            smaller=smaller,
            columns=columns,
            removed_layers=dict(removed_layers),
        )
        return removal._with_compensation()

    def _with_compensation(self) -> "PartsRemoval":
        """Add operators that compensate for removed parts, and leave out those of removed decoder layers.

        If the residual correction is on, a decoder layer that loses heads or comes after a removed one compensates for
        it: its last operator is refitted, unless it loses columns itself. `before` finds out which operator is the
        last, when the layer runs. So all operators of such a layer get a pattern here, one that keeps all columns.
        """
        correction = self.config.correction
        after_removed = {index + 1 for index in self.removed_layers if correction.carry == "full"}
        operators = dict[str, Mapping[str, LinearOperator]]()
        patterns = dict(self.patterns)
        for index, (name, layer) in enumerate(self.layers):
            if index in self.removed_layers:
                operators[name] = {}
                continue
            own = self.operators[name]
            loses_heads = "heads" in self.counts and bool(own)
            if (loses_heads or index in after_removed) and correction.residual_share > 0:
                others = find_operators(name, layer, dense_experts=("*",))
                for other, operator in others.items():
                    num_columns = operator.shape[1]
                    patterns.setdefault(other, Columns.keeping(num_columns, num_columns))
                own = {**others, **own}
            operators[name] = own

        pruned = {name for of_layer in operators.values() for name in of_layer}
        not_pruned = [name for name in self.left_dense if name not in pruned]
        left_dense = self.smaller.reasons_left_dense(not_pruned)
        return replace(self, operators=operators, patterns=patterns, left_dense=left_dense)

    def before(
        self, layer_name: str, groups: list[Group], activations: LayerActivations, hidden: Tensor
    ) -> ChosenGroups:
        """See `Removal.before`. Besides the operators that lose columns, the last one may be refitted."""
        self._prove(layer_name, activations, hidden)
        self._require_called(layer_name, groups)

        chosen = [[o for o in group if o.name in self.smaller.parts] for group in groups]
        last_can_be_refitted = bool(groups) and not chosen[-1] and len(groups[-1]) == 1
        if last_can_be_refitted:
            # only if the layer's output is a sum of its output and the rest
            (last,) = groups[-1]
            if is_added_to_output(activations, last.module, hidden):
                chosen[-1] = [last]

        pruned = {operator.name for group in chosen for operator in group}
        not_pruned = [o.name for group in groups for o in group if o.name not in pruned]
        experts = None
        if layer_name in self.mixtures:
            name_in_layer = self.mixtures[layer_name].name.removeprefix(f"{layer_name}.")
            experts = activations.layer.get_submodule(name_in_layer)
        return ChosenGroups(
            groups=[group for group in chosen if group],
            left_dense=self.smaller.reasons_left_dense(not_pruned),
            experts=experts,
        )

    def _require_called(self, layer_name: str, groups: list[Group]) -> None:
        """Refuse a decoder layer if an operator that loses columns is in none of the `groups`, which were called."""
        called = {operator.name for group in groups for operator in group}
        for name, part in self.smaller.parts.items():
            is_operator_of_layer = name.startswith(f"{layer_name}.") and not part.is_mixture
            if is_operator_of_layer and name not in called:
                raise UnsupportedArchitectureError(
                    f"{name} loses columns, and is never called: pass another pattern."
                )

    def _prove(self, layer_name: str, activations: LayerActivations, hidden: Tensor) -> None:
        """Prove once for each kind of decoder layer that it returns the same without the groups as with zeros there.

        Layers are of one kind if they have modules of the same classes, and lose groups of the same operators. The kind
        is added to `proven`.
        """
        layer = activations.layer
        names = [name for name in self.columns.parts if name.startswith(f"{layer_name}.")]
        classes = tuple((name, type(module)) for name, module in layer.named_modules())
        kind = classes, tuple(name.removeprefix(layer_name) for name in names)
        if kind in self.proven or not names:
            return

        # The groups to remove are not known yet. Without the first ones all others get new numbers. So the test also
        # finds modules that depend on the number of a group, or on all groups together.
        kept = dict[str, tuple[int, ...]]()
        for name in names:
            total = self.columns.parts[name].groups
            kept[name] = tuple(range(total - self.columns.counts[name], total))
        call = activations.calls[0]
        small_hidden = small_hidden_states(hidden.to(activations.device))

        def run(module: nn.Module) -> Tensor:
            """Run the layer, or a copy of it, on small hidden states."""
            return call.run(module, small_hidden)

        try:
            require_same_outputs(self.columns, layer_name, layer, kept, run)
        except UnsupportedArchitectureError as error:
            if error.__cause__ is not None and is_out_of_memory(error.__cause__):
                raise error.__cause__ from None  # smaller batches may fit
            raise
        self.proven.add(kind)

    def after(
        self,
        layer_name: str,
        sink: PrunedWeights,
        targets: LayerTargets,
        operators: list[OperatorReport],
    ) -> LeavingLayer:
        """See `Removal.after`. The masks in `sink` become those of the smaller operators."""
        smaller_operators = [self._smaller(operator, sink) for operator in operators]
        if layer_name not in self.mixtures:
            return LeavingLayer(targets.leave(), smaller_operators, mixture=None)

        part = self.mixtures[layer_name]
        smaller_layer, mixture = remove_experts(
            part,
            layer_name,
            targets=targets,
            count=self.smaller.counts[part.name],
            plan=self.experts,
            write=sink.write if self.config.expert_refit else None,
        )
        return LeavingLayer(targets.leave(smaller_layer), smaller_operators, mixture)

    def _smaller(self, operator: OperatorReport, sink: PrunedWeights) -> OperatorReport:
        """Report an operator as it is without the removed parts; all weights that stay are kept.

        Its mask in `sink`, of whole groups of columns, is replaced by one of the smaller weight that keeps all.
        """
        mask = unpack_mask(sink.masks[operator.name], operator.stored_shape)
        part = self.smaller.parts.get(operator.name.removesuffix(".weight"))
        groups = None  # it was only refitted
        if part is not None:
            groups = part.kept_by(mask.T if operator.stored_transposed else mask)

        new_name = self.new_name(operator.name)
        assert new_name is not None  # operators of removed layers are not pruned
        stored_shape = self.smaller.model.get_parameter(new_name).shape
        smaller_mask = torch.ones(stored_shape, dtype=torch.bool)
        sink.masks[operator.name] = pack_mask(smaller_mask)
        out, columns = stored_shape[::-1] if operator.stored_transposed else stored_shape
        return replace(
            operator,
            shape=(out, columns),
            groups_kept=groups,
            num_kept=smaller_mask.numel(),
            sparsity=0.0,
        )

    def carry_masks(
        self, layer: nn.Module, record: LayerRecord, sink: PrunedWeights
    ) -> LayerRecord:
        """See `Removal.carry_masks`."""
        if self.earlier_masks is None:
            return record
        kept = groups_kept([record.report], record.operators)
        carried = self.earlier_masks.carried(record.report.name, layer, self.smaller, kept)
        sink.masks.update(carried.masks)
        return replace(record, carried=carried.operators, lost_masks=carried.lost)

    def shrink_tensors(self, record: LayerRecord, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """See `Removal.shrink_tensors`."""
        kept = groups_kept([record.report], record.operators)
        smaller = {
            name: self.smaller.shrink_tensor(name, tensor, kept) for name, tensor in tensors.items()
        }
        return self.renamed(smaller)

    def names_of_carried(self, report: PruningReport) -> dict[str, StoredName]:
        """See `Removal.names_of_carried`. The smaller model decides, because experts have new numbers there."""
        if not report.carried:
            return {}
        smaller = self.smaller.model
        internals.copy_weight_conversions(self.layers.model, smaller)
        operators = operators_by_weight(smaller, report)
        return stored_names(smaller, [operators[entry.name] for entry in report.carried])

    def describe(self, report: PruningReport) -> None:
        """See `Removal.describe`: what stays gets the names of the smaller model, whose parameters are counted.

        The model gets the configuration of the smaller one.
        """
        report.layers = self._renamed_layers(report.layers)
        report.operators = [self._renamed_operator(operator) for operator in report.operators]
        report.left_dense = self.renamed(report.left_dense)
        report.carried = [self._renamed_operator(operator) for operator in report.carried]
        report.lost_masks = [self.new_name(name) or name for name in report.lost_masks]
        model = self.layers.model
        _warn_of_lost_masks(report, model.config, is_known=self.earlier_masks is not None)

        model.config = self.smaller.model.config
        report.model["parts_removed"] = [str(removed) for removed in self.removed_parts]
        report.model["dense_num_parameters"] = report.model["num_parameters"]
        report.model["num_parameters"] = self.smaller.model.num_parameters()
        if self.removed_layers:
            report.model["layers_kept"] = list(self.smaller.layers)
            report.model["layers_removed"] = [
                [index, loss] for index, loss in self.removed_layers.items()
            ]

    def _renamed_layers(self, layers: Sequence[LayerReport]) -> list[LayerReport]:
        """Copy the reports of the decoder layers that stay, with their names in the smaller model."""
        renamed = list[LayerReport]()
        for layer in layers:
            new_name = self.new_name(layer.name)
            if new_name is None:
                continue
            mixture = layer.mixture
            if mixture is not None:
                mixture = replace(mixture, name=self.new_name(mixture.name) or mixture.name)
            renamed.append(replace(layer, name=new_name, mixture=mixture))
        return renamed

    def _renamed_operator(self, operator: OperatorReport) -> OperatorReport:
        """Copy the report of an operator, with its name in the smaller model."""
        return replace(operator, name=self.new_name(operator.name) or operator.name)

    def make_smaller(
        self, model: PreTrainedModel, report: PruningReport, sink: PrunedWeights
    ) -> None:
        """See `Removal.make_smaller`. If the run fails later, the tensors get their old sizes again."""
        groups = groups_kept(report.layers, report.operators)  # by their new names
        kept = dict[str, tuple[int, ...]]()
        for name in self.smaller.parts:
            new_name = self.new_name(name)
            if new_name is not None:
                kept[name] = groups[new_name]

        # Old tensors are kept on the CPU: a device that is nearly full has no room for both sizes of all tensors.
        before = []
        for name, tensor in tensors_of(model):
            becomes_smaller = self.smaller.part_of(name) is not None
            data = tensor.data.cpu() if becomes_smaller else tensor.data
            before.append((tensor, tensor.device, data))

        def restore() -> None:
            """Give all tensors of the model their old values."""
            for tensor, device, data in before:
                tensor.data = data.to(device)

        sink.undo_at_failure(restore)
        sink.masks = self.renamed(sink.masks)
        shrink_model(model, self.smaller, kept)


def _by_layer(mixtures: Sequence[Part], layers: DecoderLayers) -> dict[str, Part]:
    """Sort mixtures by the names of their decoder layers; a layer has one at most."""
    by_layer = dict[str, Part]()
    for layer_name, _ in layers:
        for part in mixtures:
            if part.name.startswith(f"{layer_name}."):
                by_layer[layer_name] = part
    return by_layer


def _count_removed_layers(removed: Sequence[RemovedParts]) -> int:
    """Count the decoder layers that a run removes."""
    return sum(parts.number - parts.kept for parts in removed if parts.share.kind == "layers")


def _plan_fewer_experts(
    outline: ModelOutline, counts: Mapping[Kind, int], otherwise: Shrinking
) -> Shrinking:
    """Plan a model that loses experts only; `otherwise` if the run removes no experts."""
    if "experts" not in counts:
        return otherwise
    return plan_shrinking(outline, {"experts": counts["experts"]})


def _warn_of_lost_masks(report: PruningReport, config: PreTrainedConfig, is_known: bool) -> None:
    """Warn in the report of zeros of an earlier run, named in the model's configuration, whose masks are not carried.

    `is_known` says whether the masks were found.
    """
    earlier = getattr(config, CONFIG_KEY, None) or {}
    num_zeros = earlier.get("num_zeros") or 0
    if report.lost_masks:
        names = first_names([name.removesuffix(".weight") for name in report.lost_masks])
        report.warn(
            f"weights of {len(report.lost_masks)} operators were fitted anew, which overwrote their zeros of an "
            f"earlier run ({earlier.get('pattern')}): {names}. Pass a method that changes no weights, such as "
            "method='wanda' and residual_correction=0, or remove parts first."
        )
    elif num_zeros and not is_known:
        report.warn(
            f"the masks of an earlier run ({earlier.get('pattern')}, {num_zeros:,} zeros) are not known, so they are "
            "not carried: prune the folder that the earlier run has saved."
        )
