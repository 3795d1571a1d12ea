"""Removing whole parts of a model: the run prunes columns of some operators, then the model becomes a smaller one.

A channel, a head or an expert is a group of columns of the operator that reads it. So the loop prunes these columns by
any method, and the rows that compute them are removed afterwards. The smaller model must compute the same as the model
with zeros. This is proved on shapes (`removal.shrinking`), and once on numbers for every kind of decoder layer.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol, TypeVar

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
from optimum_fista.model.inputs import HiddenStates, LayerActivations
from optimum_fista.model.layers import DecoderLayers
from optimum_fista.model.operators import Group, LinearOperator
from optimum_fista.model.sensitivity import DenseLoss
from optimum_fista.removal.earlier_masks import EarlierMasks
from optimum_fista.removal.experts import SmallerMixture, experts_of, experts_to_keep, score_experts
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
from optimum_fista.removal.shrinking import Shrinking, plan_shrinking, plan_shrinkings
from optimum_fista.removal.smaller_modules import shrink_model, smaller_copy
from optimum_fista.report import (
    LayerRecord,
    LayerReport,
    MixtureReport,
    OperatorReport,
    PruningReport,
)
from optimum_fista.solve.method import METHODS
from optimum_fista.solve.pattern import SparsityPattern, pack_mask, unpack_mask
from optimum_fista.solve.patterns import Columns
from optimum_fista.source.names import StoredName, stored_names

T = TypeVar("T")
Operators = Mapping[
    str, Mapping[str, LinearOperator]
]  # to prune, by the names of their decoder layers
Reasons = Mapping[str, str]  # why other operators stay dense
Losses = Mapping[int, float]  # removed decoder layers, each with the loss after its removal
Reports = list[OperatorReport]
Chosen = tuple[list[Group], dict[str, str], nn.Module | None]
Leaving = tuple[HiddenStates, Reports, MixtureReport | None]
Tensors = dict[str, Tensor]


class PrunedWeights(Protocol):
    """What a removal uses of the run's sink (`prune.sink`), which overwrites weights and undoes it after an error."""

    masks: dict[str, Tensor]  # packed, by "{operator}.weight"

    def write(self, operator: LinearOperator, weight: Tensor, mask: Tensor | None = None) -> None:
        """Overwrite a weight [out, in], and keep its mask."""

    def undo_at_failure(self, put_back: Callable[[], None]) -> None:
        """Have `put_back` called if the run fails."""


@dataclass(frozen=True, kw_only=True)
class Removal:
    """What a run takes from a model: zeros in linear operators, and, in a subclass, whole parts.

    `plan_removal` makes it before the run. This base class removes no parts.
    """

    layers: DecoderLayers  # of the model
    config: FistaPruningConfig  # as the user passed it, with a choice for every option
    operators: Operators  # to prune, by the names of all decoder layers; removed layers have none
    patterns: Mapping[str, SparsityPattern]  # of each of these operators, by its name
    left_dense: Reasons  # other operators, with the reason
    # Parts whose channels change places before they are pruned, by the operators that read them.
    channels: Mapping[str, Part] = field(default_factory=dict)
    # Mixtures that lose experts, by their decoder layers.
    mixtures: Mapping[str, Part] = field(default_factory=dict)
    # How many parts of each kind are removed, such as "1 of 3 heads of every decoder layer (33.33%)".
    removed_parts: Sequence[RemovedParts] = ()
    num_removed_layers: int = 0
    removed_layers: Losses = field(default_factory=dict)  # empty until they are chosen

    @property
    def num_parameters(self) -> int:
        """Count the parameters of the model after the removal."""
        return self.layers.model.num_parameters()

    @property
    def counts_kept(self) -> Mapping[str, int]:
        """How many groups each part keeps, by its name, of those that become smaller."""
        return {}

    def choose_layers(self, loss: DenseLoss) -> list[tuple[int, float]]:
        """Choose the decoder layers to remove by the loss of the model without them; none here.

        Returns their numbers in the order of their removal, each with the loss after it.
        """
        return []

    def without_layers(self, removed_layers: Losses) -> "Removal":
        """Return the removal with the decoder layers that the loss has chosen; none here."""
        return self

    def is_asked_dense(self, name: str) -> bool:
        """Tell whether the user's options, and nothing in the model, leave an operator dense."""
        return self.config.reason_left_dense(name) is not None

    def before(
        self, layer_name: str, groups: list[Group], activations: LayerActivations, hidden: Tensor
    ) -> Chosen:
        """Choose the groups to prune in a decoder layer, and prove that zeros there equal their removal.

        Returns also its other operators, with the reason, and the module with its experts if some are removed.
        """
        return groups, {}, None

    def after(
        self, layer_name: str, sink: PrunedWeights, targets: LayerTargets, operators: Reports
    ) -> Leaving:
        """Remove experts of a pruned decoder layer, and refit the others.

        Returns the layer's output, and the reports of its pruned operators as they will be in the smaller model.
        """
        return targets.leave(), operators, None

    def new_name(self, name: str) -> str | None:
        """The name of a module or tensor in the pruned model; `None` if it is removed."""
        return name

    def renamed(self, values: Mapping[str, T]) -> dict[str, T]:
        """Values by their names in the pruned model, without those of removed modules."""
        return {
            new: value for name, value in values.items() if (new := self.new_name(name)) is not None
        }

    def part_of(self, name: str) -> Part | None:
        """The part that a tensor of the model belongs to and that becomes smaller; `None` if it stays as it is."""
        return None

    @property
    def keeps_values(self) -> bool:
        """Tell whether all weights that stay keep their values."""
        return False

    def shrink_tensors(self, record: LayerRecord, tensors: Tensors) -> Tensors:
        """Return the tensors of a pruned decoder layer in their smaller form, by their new names."""
        return tensors

    def carry_masks(
        self, layer: nn.Module, record: LayerRecord, sink: PrunedWeights
    ) -> LayerRecord:
        """Carry masks of an earlier run through the removal of parts; see `earlier_masks`.

        `layer` is pruned and on its device, and `record` is its report. The masks are added to those of the sink.
        Returns the record, with what became of them.
        """
        return record

    def names_of_carried(self, report: PruningReport) -> dict[str, StoredName]:
        """Names in the checkpoint of the weights whose masks were carried, by their names in the pruned model."""
        return {}

    def describe(self, report: PruningReport) -> None:
        """Write into the report of all decoder layers, and into the model's configuration, what was removed."""

    def make_smaller(
        self, model: PreTrainedModel, report: PruningReport, sink: PrunedWeights
    ) -> None:
        """Make a pruned model in memory smaller, after its report."""


@dataclass(frozen=True, kw_only=True)
class PartsRemoval(Removal):
    """Removes whole parts of a model in a run."""

    outline: ModelOutline  # of the whole model
    counts: Mapping[Kind, int]  # how many parts of each kind a decoder layer keeps
    smaller: (
        Shrinking  # the smaller model; it has all decoder layers until those to remove are chosen
    )
    columns: Shrinking  # a model that keeps all experts, for the proof of the other kinds
    experts: Shrinking  # a model that loses experts only, to run a decoder layer without them
    earlier_masks: (
        EarlierMasks | None
    )  # of the run that the model comes from; None: there are none, or not known
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
            mixtures={
                name: part
                for name, _ in layers
                for part in mixtures
                if part.name.startswith(f"{name}.")
            },
            removed_parts=removed,
            num_removed_layers=sum(
                part.number - part.kept for part in removed if part.share.kind == "layers"
            ),
            outline=outline,
            earlier_masks=EarlierMasks.find(layers),
            counts=counts,
            smaller=smaller,
            columns=columns,
            experts=_plan_fewer_experts(outline, counts, otherwise=columns),
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

    def is_asked_dense(self, name: str) -> bool:
        """See `Removal.is_asked_dense`: only operators that read parts are asked to lose columns."""
        part = self.smaller.parts.get(name)
        return part is None or part.is_mixture

    def new_name(self, name: str) -> str | None:
        """The name of a module or tensor in the smaller model; `None` if its decoder layer is removed."""
        return self.smaller.new_name(name)

    def part_of(self, name: str) -> Part | None:
        """See `Removal.part_of`. Scales of the inputs of experts are no parameters, but go with them."""
        mixtures = (part for part in self.mixtures.values() if name.startswith(f"{part.name}."))
        return self.smaller.part_of(name) or next(mixtures, None)

    @property
    def keeps_values(self) -> bool:
        """See `Removal.keeps_values`."""
        config, correction = self.config, self.config.correction
        repairs = "heads" in self.counts or (self.num_removed_layers and correction.carry == "full")
        updates = METHODS[config.method].updates_weights and not self.counts.keys() <= {"experts"}
        refits = bool(self.mixtures) and config.expert_refit
        return not (updates or refits or (repairs and correction.residual_share > 0))

    def choose_layers(self, loss: DenseLoss) -> list[tuple[int, float]]:
        """See `Removal.choose_layers`."""
        return choose_layers(loss, self.outline, self.num_removed_layers)

    def without_layers(self, removed_layers: Losses) -> "PartsRemoval":
        """Return the removal with the decoder layers that the loss has chosen: they lose no weights before."""
        stay = [index for index in range(len(self.layers)) if index not in removed_layers]
        smaller, columns = plan_shrinkings(self.outline, self.counts, stay)
        mixtures = {
            name: part for name, part in self.mixtures.items() if part.name in smaller.parts
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

        pruned = {name for group in operators.values() for name in group}
        left_dense = self.smaller.reasons_left_dense(
            name for name in self.left_dense if name not in pruned
        )
        return replace(self, operators=operators, patterns=patterns, left_dense=left_dense)

    def before(
        self, layer_name: str, groups: list[Group], activations: LayerActivations, hidden: Tensor
    ) -> Chosen:
        """See `Removal.before`. Besides the operators that lose columns, the last one may be refitted."""
        self._prove(layer_name, activations, hidden)
        called = {operator.name for group in groups for operator in group}
        for name, part in self.smaller.parts.items():
            if name.startswith(f"{layer_name}.") and not part.is_mixture and name not in called:
                raise UnsupportedArchitectureError(
                    f"{name} loses columns, and is never called: pass another pattern."
                )
        chosen = [[o for o in group if o.name in self.smaller.parts] for group in groups]
        if groups and not chosen[-1] and len(groups[-1]) == 1:
            # it can be refitted only if the layer's output is a sum of its output and the rest
            chosen[-1] = [
                o for o in groups[-1] if is_added_to_output(activations, o.module, hidden)
            ]
        pruned = {operator.name for group in chosen for operator in group}
        names = [
            operator.name for group in groups for operator in group if operator.name not in pruned
        ]
        mixture, layer = self.mixtures.get(layer_name), activations.layer
        experts = (
            None
            if mixture is None
            else layer.get_submodule(mixture.name.removeprefix(f"{layer_name}."))
        )
        return [group for group in chosen if group], self.smaller.reasons_left_dense(names), experts

    def _prove(self, layer_name: str, activations: LayerActivations, hidden_states: Tensor) -> None:
        """Prove once for each kind of decoder layer that it returns the same without the groups as with zeros there."""
        names = [name for name in self.columns.parts if name.startswith(f"{layer_name}.")]
        modules = ((name, type(module)) for name, module in activations.layer.named_modules())
        kind = tuple(modules), tuple(name.removeprefix(layer_name) for name in names)
        if kind in self.proven or not names:
            return
        # The groups to remove are not known yet. Without the first ones all others get new numbers. So the test also
        # finds modules that depend on the number of a group, or on all groups together.
        groups = {
            name: (self.columns.parts[name].groups, self.columns.counts[name]) for name in names
        }
        kept = {name: tuple(range(total - count, total)) for name, (total, count) in groups.items()}
        call, hidden = (
            activations.calls[0],
            small_hidden_states(hidden_states.to(activations.device)),
        )
        run, layer = partial(call.run, hidden_states=hidden), activations.layer
        try:
            require_same_outputs(self.columns, layer_name, layer, kept, run)
        except UnsupportedArchitectureError as error:
            if error.__cause__ is not None and is_out_of_memory(error.__cause__):
                raise error.__cause__ from None  # smaller batches may fit
            raise
        self.proven.add(kind)

    def after(
        self, layer_name: str, sink: PrunedWeights, targets: LayerTargets, operators: Reports
    ) -> Leaving:
        """See `Removal.after`. The kept experts are refitted so that their sum comes close to the layer's targets."""
        operators = [self._smaller(operator, sink) for operator in operators]
        if layer_name not in self.mixtures:
            return targets.leave(), operators, None
        started, part, layer = (
            time.perf_counter(),
            self.mixtures[layer_name],
            targets.activations.layer,
        )
        experts = experts_of(part, layer_name, layer)
        num_tokens, saliency, wanted = score_experts(experts, targets)
        kept = experts_to_keep(saliency, self.smaller.counts[part.name], part.equal_runs)
        smaller = smaller_copy(self.experts, layer_name, layer, {part.name: kept})
        left = experts_of(part, layer_name, smaller)  # on the tokens that the router sends them now
        mixture = SmallerMixture(
            left, replace(targets.activations, layer=smaller), targets.entering.entering, wanted
        )
        before, held_out = mixture.errors()
        fit_error, num_refitted, message = before, 0, ""  # before refits
        if self.config.expert_refit:
            down = [operator for operator in experts.operators if operator.kind == "down_proj"]
            num_refitted, message = mixture.refit(
                lambda expert, weight: sink.write(down[kept[expert]], weight)
            )
            fit_error, held_out = mixture.errors()
        report = MixtureReport(
            name=part.name,
            groups_kept=kept,
            saliency=tuple(saliency.tolist()),
            expert_tokens=tuple(num_tokens.tolist()),
            fit_error=fit_error,
            fit_error_before=before,
            num_refitted=num_refitted,
            solve_seconds=time.perf_counter() - started,
            message=message,
            held_out_fit_error=held_out,
            residual_corrected=targets.adds_experts,
        )
        return targets.leave(smaller), operators, report

    def _smaller(self, operator: OperatorReport, sink: PrunedWeights) -> OperatorReport:
        """Report an operator as it is without the removed parts; all weights that stay are kept."""
        mask = unpack_mask(sink.masks[operator.name], operator.stored_shape)
        part = self.smaller.parts.get(
            operator.name.removesuffix(".weight")
        )  # None: it was only refitted
        groups = (
            None if part is None else part.kept_by(mask.T if operator.stored_transposed else mask)
        )
        left = torch.ones(
            self.smaller.model.get_parameter(self.new_name(operator.name) or "").shape,
            dtype=torch.bool,
        )
        sink.masks[operator.name] = pack_mask(left)
        out, columns = left.shape[::-1] if operator.stored_transposed else left.shape
        return replace(
            operator, shape=(out, columns), groups_kept=groups, num_kept=left.numel(), sparsity=0.0
        )

    def shrink_tensors(self, record: LayerRecord, tensors: Tensors) -> Tensors:
        """See `Removal.shrink_tensors`."""
        kept = groups_kept([record.report], record.operators)
        return self.renamed(
            {
                name: self.smaller.shrink_tensor(name, tensor, kept)
                for name, tensor in tensors.items()
            }
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

    def names_of_carried(self, report: PruningReport) -> dict[str, StoredName]:
        """See `Removal.names_of_carried`. The smaller model decides, because experts have new numbers there."""
        if not report.carried:
            return {}
        smaller = self.smaller.model
        internals.copy_weight_conversions(self.layers.model, smaller)
        operators = operators_by_weight(smaller, report)
        return stored_names(smaller, [operators[entry.name] for entry in report.carried])

    def describe(self, report: PruningReport) -> None:
        """Give what is left the names of the smaller model, and count its parameters; see `Removal.describe`."""
        layers, report.layers = report.layers, []
        for layer in layers:
            if (name := self.new_name(layer.name)) is not None:
                found = layer.mixture
                mixture = (
                    None
                    if found is None
                    else replace(found, name=self.new_name(found.name) or found.name)
                )
                report.layers.append(replace(layer, name=name, mixture=mixture))
        report.operators = [
            replace(o, name=self.new_name(o.name) or o.name) for o in report.operators
        ]
        report.left_dense = self.renamed(report.left_dense)
        report.carried = [replace(o, name=self.new_name(o.name) or o.name) for o in report.carried]
        report.lost_masks = [self.new_name(name) or name for name in report.lost_masks]
        _warn_of_lost_masks(
            report, self.layers.model.config, is_known=self.earlier_masks is not None
        )
        self.layers.model.config = self.smaller.model.config
        report.model["parts_removed"] = [str(removed) for removed in self.removed_parts]
        report.model["dense_num_parameters"] = report.model["num_parameters"]
        report.model["num_parameters"] = self.smaller.model.num_parameters()
        if self.removed_layers:
            report.model["layers_kept"] = list(self.smaller.layers)
            report.model["layers_removed"] = [
                [index, loss] for index, loss in self.removed_layers.items()
            ]

    def make_smaller(
        self, model: PreTrainedModel, report: PruningReport, sink: PrunedWeights
    ) -> None:
        """Make a pruned model in memory smaller; see `Removal.make_smaller`."""
        groups = groups_kept(report.layers, report.operators)
        kept = {
            name: groups[new]
            for name in self.smaller.parts
            if (new := self.new_name(name)) is not None
        }
        # old tensors are kept on the CPU: a device that is nearly full has no room for both sizes of all tensors
        before = [
            (
                tensor,
                tensor.device,
                tensor.data if self.smaller.part_of(name) is None else tensor.data.cpu(),
            )
            for name, tensor in (*model.named_parameters(), *model.named_buffers())
        ]

        def restore() -> None:
            for tensor, device, data in before:
                tensor.data = data.to(device)

        sink.undo_at_failure(restore)
        sink.masks = self.renamed(sink.masks)
        shrink_model(model, self.smaller, kept)


def plan_removal(layers: DecoderLayers, config: FistaPruningConfig) -> Removal:
    """Decide what a run takes from a model: which operators get zeros, and which parts are removed.

    `config` is the user's; `layers` come from `prunable_layers`. Nothing is changed, and no weight is read except to
    refuse NaN and Inf. The loss of the model decides later which decoder layers go (`Removal.without_layers`).
    """
    if config.tokens_removal is not None:
        raise ValueError(
            f"pattern={config.pattern!r} removes tokens from files, and their tokenizer: pass the model's folder or "
            "Hub id, and output_dir, to FistaPruner.prune."
        )
    config = config.resolved()
    removal = (
        PartsRemoval.planned(layers, config)
        if config.whole_parts is not None
        else _removal_of_zeros(layers, config)
    )
    for operators in removal.operators.values():
        for name, operator in operators.items():
            removal.patterns[name].require_shape(operator.shape, name)

    # to remove experts or decoder layers, no operator need be pruned
    prunes = any(removal.operators.values())
    if not prunes and not removal.num_removed_layers and not removal.mixtures:
        left_dense = removal.left_dense
        shown = first_names([f"{name} ({why})" for name, why in left_dense.items()]) or "none"
        raise UnsupportedArchitectureError(
            f"no linear operator to prune in {layers.name}: of nn.Linear and Conv1D modules, include="
            f"{list(config.include)}, exclude={list(config.exclude)} found {len(left_dense)}, all left dense: {shown}."
        )
    return removal


def _removal_of_zeros(layers: DecoderLayers, config: FistaPruningConfig) -> Removal:
    """Choose the operators that get zeros, with the user's pattern for each."""
    channels: dict[str, Part] = {}
    if config.reorder_channels:
        try:
            parts = ModelOutline(layers).parts("channels").parts
        except UnsupportedArchitectureError as error:
            raise UnsupportedArchitectureError(
                f"reorder_channels=True: {error} Leave it out."
            ) from error
        channels = {part.name: part for part in parts}

    patterns: dict[str, SparsityPattern] = {}

    def reason_left_dense(name: str) -> str | None:
        """Say why the operator `name` stays dense; otherwise note its pattern, so that it is read once."""
        reason = config.reason_left_dense(name)
        if reason is None:
            patterns[name] = config.pattern_for(name)
        return reason

    operators, left_dense = choose_operators(layers, config.exclude, reason_left_dense)
    return Removal(
        layers=layers,
        config=config,
        operators=operators,
        patterns=patterns,
        left_dense=left_dense,
        channels=channels,
    )


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


def _plan_fewer_experts(
    outline: ModelOutline, counts: Mapping[Kind, int], otherwise: Shrinking
) -> Shrinking:
    """Plan a model that loses experts only; `otherwise` if the run removes no experts."""
    if "experts" not in counts:
        return otherwise
    return plan_shrinking(outline, {"experts": counts["experts"]})


def groups_kept(
    layers: Iterable[LayerReport], operators: Iterable[OperatorReport]
) -> dict[str, tuple[int, ...]]:
    """The groups that stay of each part, by its name in the reports."""
    kept = {
        layer.mixture.name: layer.mixture.groups_kept
        for layer in layers
        if layer.mixture is not None
    }
    return kept | {
        o.name.removesuffix(".weight"): o.groups_kept
        for o in operators
        if o.groups_kept is not None
    }


def first_names(names: Sequence[str]) -> str:
    """The first four of many names, for a message."""
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")


def require_zeros_to_pack(config: FistaPruningConfig, packed: bool) -> None:
    """Refuse `packed` for a run that removes whole parts or tokens."""
    removes = config.whole_parts is not None or config.tokens_removal is not None
    if packed and removes:
        raise ValueError(
            f"packed=True: pattern={config.pattern!r} leaves a dense model: there are no zeros to pack."
        )
