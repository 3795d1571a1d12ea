"""What a run takes from a model: `Removal`, which the plan of a run holds.

A model is seen as decoder layers with linear *operators*. Names are those in the whole model, such as
"model.layers.3.mlp.down_proj" of an operator and "model.layers.3" of a decoder layer.

A run always sets zeros in linear operators. `Removal` says in which, by which patterns, and has a method for each
moment at which a run that removes whole parts does more. They do nothing here; `parts_removal.PartsRemoval` overrides
them. The loop calls them in this order:

1. before the first decoder layer: `choose_layers`, then `without_layers`;
2. for each decoder layer: `choose_operators` before it is pruned, `finish_layer` when its operators are pruned, then
   `carry_masks`;
3. at the end: `describe` the result in the report, and `make_smaller` a model in memory. A run from files calls
   `shrink_tensors` for each layer instead.

A *part* loses *groups*: channels of an MLP, heads of an attention, or experts of a *mixture*. "Groups" are two things
here: lists of operators with the same inputs, which are solved together (`Group` of `model.operators`), and the groups
of a part. A *mask* says which weights are kept (True). The *sink* of a run overwrites weights and keeps the masks.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol, TypeVar

from torch import Tensor, nn
from transformers import PreTrainedModel

from optimum_fista.config import FistaPruningConfig
from optimum_fista.folder.checkpoint import summary_of_latest_run
from optimum_fista.model.correction import LayerTargets
from optimum_fista.model.inputs import HiddenStates, LayerActivations
from optimum_fista.model.layers import DecoderLayers
from optimum_fista.model.operators import Group, LinearOperator
from optimum_fista.model.sensitivity import DenseLoss
from optimum_fista.records import LayerRecord, LayerReport, MixtureReport, OperatorReport
from optimum_fista.removal.earlier_masks import EarlierMasks, Reordering
from optimum_fista.removal.parts import Part
from optimum_fista.removal.removed_parts import RemovedParts
from optimum_fista.removal.routing_table import KeptExperts
from optimum_fista.report import PruningReport
from optimum_fista.solve.pattern import SparsityPattern
from optimum_fista.source.names import StoredName

T = TypeVar("T")


class PrunedWeights(Protocol):
    """What a removal uses of the run's sink (`prune.sink`), which overwrites weights and undoes it after an error."""

    masks: dict[str, Tensor]  # packed, by "{operator}.weight"

    def write(self, operator: LinearOperator, weight: Tensor, mask: Tensor | None = None) -> None:
        """Overwrite the weight of `operator` in the model by `weight` [out, in], and keep its mask in `masks`."""

    def undo_at_failure(self, put_back: Callable[[], None]) -> None:
        """Have `put_back` called if the run fails."""


class ChosenGroups(NamedTuple):
    """What is pruned in a decoder layer."""

    groups: list[Group]
    left_dense: dict[str, str]  # other operators of the layer by name, with the reason
    experts: nn.Module | None  # the module of its experts, if some are removed


class LeavingLayer(NamedTuple):
    """What leaves a decoder layer once it is pruned."""

    states: HiddenStates  # that leave it, in the dense and in the pruned network
    operators: list[OperatorReport]  # as they will be in the smaller model
    mixture: MixtureReport | None  # if experts were removed


@dataclass(frozen=True, kw_only=True)
class Removal:
    """What a run takes from a model: zeros in linear operators, and, in a subclass, whole parts.

    `planning.plan_removal` makes it before the run. This base class removes no parts.
    """

    layers: DecoderLayers  # of the model
    config: FistaPruningConfig  # as the user passed it, with a choice for every option
    # Operators to prune by their names, by the names of all decoder layers. Removed layers have none.
    operators: Mapping[str, Mapping[str, LinearOperator]]
    patterns: Mapping[str, SparsityPattern]  # of each of these operators, by its name
    left_dense: Mapping[str, str]  # other operators by name, with the reason
    # Parts whose channels change places before they are pruned, by the name of the operator that reads them.
    channels: Mapping[str, Part] = field(default_factory=dict)
    # Mixtures that lose experts, by the name of their decoder layer.
    mixtures: Mapping[str, Part] = field(default_factory=dict)
    # Whether experts that stay are refitted: the user wants it, and several texts can test it (`mixture_refit`).
    refits_experts: bool = False
    # How many parts of each kind are removed, such as "1 of 3 heads of every decoder layer (33.33%)".
    removed_parts: Sequence[RemovedParts] = ()
    num_removed_layers: int = 0
    # The loss after the removal of each layer, by its number; empty until they are chosen.
    removed_layers: Mapping[int, float] = field(default_factory=dict)
    # Of the run that the model comes from; None: there are none, or they are not known.
    earlier_masks: EarlierMasks | None = None

    @property
    def num_parameters(self) -> int:
        """Count the parameters of the model after the removal."""
        return self.layers.model.num_parameters()

    @property
    def num_groups_kept(self) -> Mapping[str, int]:
        """How many groups each part keeps that becomes smaller, by the name of the part."""
        return {}

    @property
    def keeps_values(self) -> bool:
        """Tell whether all weights that stay keep their values."""
        return False

    def is_asked_dense(self, name: str) -> bool:
        """Tell whether the user's options, and nothing in the model, leave an operator dense."""
        return self.config.reason_left_dense(name) is not None

    def choose_layers(self, loss: DenseLoss) -> list[tuple[int, float]]:
        """Choose the decoder layers to remove by the loss of the model without them; none here.

        `loss` has the model and the sequences to measure on. The model may run, and is not changed. Returns the numbers
        of the layers in the order of their removal, each with the loss after it, in nats per token.
        """
        return []

    def without_layers(self, removed_layers: Mapping[int, float]) -> "Removal":
        """Return a removal that also removes the decoder layers that `choose_layers` has chosen; here, this one.

        `removed_layers` has the loss after the removal of each layer, by its number.
        """
        return self

    def choose_operators(
        self, layer_name: str, groups: list[Group], activations: LayerActivations, hidden: Tensor
    ) -> ChosenGroups:
        """Choose the operators to prune in a decoder layer, and prove that zeros there equal their removal.

        Here, all are pruned. `groups` are lists of operators with the same inputs, in execution order. `activations`
        has the layer, which is dense, and `hidden` [batch, tokens, hidden] of the first batch enters it. The layer may
        run, and is not changed.
        """
        return ChosenGroups(groups, left_dense={}, experts=None)

    def finish_layer(
        self,
        layer_name: str,
        sink: PrunedWeights,
        targets: LayerTargets,
        operators: list[OperatorReport],
    ) -> LeavingLayer:
        """Remove experts of a decoder layer whose operators are pruned, and refit the others; here, remove nothing.

        `targets` has the layer, and what it should return. `operators` are the reports of its pruned operators. Weights
        are overwritten through `sink`. The layer runs, for the hidden states that leave it.
        """
        return LeavingLayer(targets.leave(), operators, mixture=None)

    def carry_masks(
        self, layer: nn.Module, record: LayerRecord, sink: PrunedWeights
    ) -> LayerRecord:
        """Keep the masks that an earlier run has left for a decoder layer: add them to `sink.masks`.

        Here, these are the masks of operators that this run leaves dense; `PartsRemoval` makes all masks smaller. A
        mask is kept only if all weights that it calls zero still are. Returns a copy of the record that says what
        became of the masks.

        `layer` is pruned and on its device. `record` has its report, and those of the operators that were pruned; their
        new masks are in `sink.masks`. `self.earlier_masks` finds the earlier masks in the folder that the model was
        loaded from. `self.channels` are the parts whose channels may have changed places, by the name of the operator
        that reads them.
        """
        if self.earlier_masks is None:
            return record
        reorderings = []
        for operator in record.operators:
            # `input_order` has the old number of each channel that the operator reads; None: none has changed places.
            if operator.input_order is not None:
                part = self.channels[operator.name.removesuffix(".weight")]
                reorderings.append(Reordering(part, operator.input_order))

        new_masks = {operator.name: sink.masks[operator.name] for operator in record.operators}
        carried = self.earlier_masks.carried(record.report.name, layer, new_masks, reorderings)
        sink.masks.update(carried.masks)
        # Earlier zeros of operators that have a new mask: `filled` ones have a value now, and `uncovered` ones are
        # zero, although the new mask lets a training fill them.
        zeros = carried.zeros_of_pruned_again
        return replace(
            record,
            carried=carried.operators,
            lost_masks=carried.lost,
            zeros_filled=zeros.filled,
            zeros_uncovered=zeros.uncovered,
        )

    def new_name(self, name: str) -> str | None:
        """The name in the pruned model of the module or tensor `name` of the model; `None` if it is removed."""
        return name

    def renamed(self, values: Mapping[str, T]) -> dict[str, T]:
        """Return a copy of `values` with the names of the pruned model as keys, without those of removed modules.

        The values are anything; their keys are names of modules or tensors in the model.
        """
        renamed = dict[str, T]()
        for name, value in values.items():
            new_name = self.new_name(name)
            if new_name is not None:
                renamed[new_name] = value
        return renamed

    def part_of(self, name: str) -> Part | None:
        """The part that becomes smaller and to which the tensor `name` belongs; `None` if the tensor stays as it is.

        `name` is that of a parameter of the model, or of a tensor in its files that stands in the place of one. Here,
        no part becomes smaller.
        """
        return None

    def shrink_tensors(self, record: LayerRecord, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors of a pruned decoder layer in their smaller form, by their new names.

        `tensors` are by their names in the whole model, and are not changed; `record` is the report of the layer.
        """
        return tensors

    def names_of_carried(self, report: PruningReport) -> dict[str, StoredName]:
        """Names in the checkpoint of weights with masks of an earlier run, by their names in the pruned model.

        `report` is complete; its `carried` lists these weights. Here they have the names of the earlier run's files.
        """
        if self.earlier_masks is None:
            return {}
        return {
            operator.name: self.earlier_masks.names[operator.name] for operator in report.carried
        }

    def describe(self, report: PruningReport) -> None:
        """Write what was removed into the report of all decoder layers, and into the model's configuration.

        Here, nothing was removed. Only warnings are added to `report`, of zeros and masks of an earlier run that are
        lost. (If parts are removed, `report` changes, and the model gets another `config`.)

        `self.earlier_masks` is `None` if no masks of an earlier run were found. That the model was pruned before also
        stands in its configuration.
        """
        if report.zeros_filled or report.zeros_uncovered:
            report.warn(
                "the model was pruned before, and this run pruned operators with zeros again: "
                f"{report.zeros_filled:,} of these zeros have other values now, and {report.zeros_uncovered:,} stay "
                "zero without a mask. A training fills the latter if it is told to (--fill-zeros)."
            )
        if report.lost_masks:
            names = first_names([name.removesuffix(".weight") for name in report.lost_masks])
            report.warn(
                f"{len(report.lost_masks)} operators that this run left dense have other weights than after the "
                f"earlier run, so their masks are not carried: {names}. A change of the model since it was loaded "
                "overwrote their zeros."
            )
            return
        earlier = summary_of_latest_run(self.layers.model.config)
        masks_are_unknown = bool(earlier.get("num_zeros")) and self.earlier_masks is None
        # Routers are never pruned, so they have no masks to lose.
        leaves_operators = any(reason != "router" for reason in report.left_dense.values())
        if masks_are_unknown and leaves_operators:
            report.warn(
                f"the masks of an earlier run ({earlier.get('pattern')}) are not known, so those of operators that "
                "this run left dense are not carried: prune the folder that the earlier run has saved."
            )

    def make_smaller(
        self, model: PreTrainedModel, report: PruningReport, sink: PrunedWeights
    ) -> None:
        """Make a pruned model in memory smaller, in place, after `describe`; here, it stays as it is.

        `report` says which groups stay. The masks of `sink` get the names of the smaller model; it puts the old tensors
        back if the run fails later.
        """


def groups_kept(
    layers: Iterable[LayerReport], operators: Iterable[OperatorReport]
) -> dict[str, tuple[int, ...]]:
    """Read from reports the numbers of the groups that stay of each part, by the name of the part.

    The reports of decoder layers have the experts that stay in a mixture. Those of operators have the groups of columns
    that stay; an operator that is no part has none. Names are as in the reports: those of the model, or of the smaller
    one after `Removal.describe`. Nothing is changed.
    """
    kept = dict[str, tuple[int, ...]]()
    for layer in layers:
        if layer.mixture is not None:
            kept[layer.mixture.name] = kept_experts(layer.mixture)
    for operator in operators:
        if operator.groups_kept is not None:
            kept[operator.name.removesuffix(".weight")] = operator.groups_kept
    return kept


def kept_experts(mixture: MixtureReport) -> KeptExperts:
    """Read from the report of a mixture which experts stay, and which of them replace the others in a table."""
    return KeptExperts(mixture.groups_kept, mixture.substitutes)


def first_names(names: Sequence[str]) -> str:
    """The first four of many names, for a message."""
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
