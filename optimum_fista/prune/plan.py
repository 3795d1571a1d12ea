"""The plan of a run: which operators are pruned, by which method, and where activations are kept.

The order of a run: `plan_removal` (removal/) decides what is taken from the model, `source_tensors` (source/) finds the
tensors in its files, and `plan_run` here joins both to a `Plan`. Then `budgets.share_budgets` measures the loss of the
dense model, which decides where the zeros go (`Budgets`), and `Plan.with_budgets` puts them into the plan. A plan is
frozen: it does not change while the loop runs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch

from optimum_fista.config import FistaPruningConfig
from optimum_fista.model.activations import Storage
from optimum_fista.model.layers import DecoderLayers
from optimum_fista.model.offload import execution_device
from optimum_fista.model.operators import LinearOperator
from optimum_fista.model.precision import Products, choose_products
from optimum_fista.packed.format import packed_names
from optimum_fista.prune.callback import PruningCallback
from optimum_fista.removal.prediction_experts import (
    LoadedPredictionLayer,
    load_prediction_layers,
)
from optimum_fista.removal.removal import Removal
from optimum_fista.run_record import RunRecord
from optimum_fista.solve.method import PruningMethod
from optimum_fista.source.names import stored_names
from optimum_fista.source.prediction_layers import with_fewer_experts
from optimum_fista.source.source_tensors import SourceTensors
from optimum_fista.source.stored_tensor import StoredTensor

UNDER_CALIBRATED_TOKENS = 128
"""An expert to which the router sends fewer calibration tokens is pruned by magnitude."""

# Cost of pruning the decoder layer with the most weights, in forward passes of it. Measured on a CPU: 2 (wanda) to 9
# (fista), docs/ranks.md.
_PRUNING_COST = 8.0


@dataclass(frozen=True, kw_only=True)
class Budgets:
    """What the loss of the dense model decides: the zeros of each operator, and the decoder layers to remove.

    Operators are named as in `Plan.operators`, such as "model.layers.3.mlp.down_proj".
    """

    # Share of zeros in [0, 1), of the operators that share the zeros of the model. Others keep that of their pattern.
    sparsities: dict[str, float] = field(default_factory=dict)
    # Cost [out], in nats, of an error in each output of an operator. It decides how operators with the same inputs
    # share the zeros of their group.
    output_weights: dict[str, torch.Tensor] = field(default_factory=dict)
    # Operators for which the loss has no gradient; they keep the average sparsity.
    without_gradient: list[str] = field(default_factory=list)
    # Numbers of the decoder layers in the order of their removal, each with the loss after it.
    removed_layers: list[tuple[int, float]] = field(default_factory=list)
    # Bytes of logits that the gradients took beyond the estimate of memory; 0 if the model runs without its head.
    num_bytes_not_estimated: int = 0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run prunes, how, and where it keeps activations; `plan_run` makes it.

    Attributes:
        removal: What is taken from the model: operators to prune with their patterns, and parts to remove.
        source: The tensors in the files of the model, by their names in the result; empty if they are not known.
        prediction_layers: Layers that predict more tokens and lose experts, too; they run after the decoder layers.
        files_dtypes: Whether tensors are written in the dtypes of the files, not in the model's.
        budgets: Decided by the loss of the dense model; empty until `with_budgets`.
        storage: Where activations are kept between passes; `None`: on the device of their decoder layer.
        progress: Whether bars are shown.
        callbacks: Called as operators and decoder layers are pruned.
    """

    removal: Removal
    source: SourceTensors = field(default_factory=SourceTensors)
    prediction_layers: Sequence[LoadedPredictionLayer] = ()
    files_dtypes: bool = False
    budgets: Budgets = field(default_factory=Budgets)
    storage: Storage | None = None
    progress: bool = False
    callbacks: Sequence[PruningCallback] = ()

    def with_budgets(self, budgets: Budgets) -> Plan:
        """Return a copy of the plan with the zeros of every operator, and without the decoder layers to remove.

        `budgets` are as `budgets.share_budgets` makes them. Layers that are removed have no operators to prune in the
        copy, and the layers that stay are numbered anew in its `source`. This plan and the model are not changed.
        """
        plan = replace(self, budgets=budgets)
        # The loss after the removal, by the number of the layer.
        removed_layers = dict(budgets.removed_layers)
        if not removed_layers:
            return plan

        stay = [index for index in range(len(self.layers)) if index not in removed_layers]
        return replace(
            plan,
            removal=self.removal.without_layers(removed_layers),
            source=self.source.renamed(stay, len(self.layers)),
        )

    def with_fewer_prediction_experts(self, report: RunRecord) -> Plan:
        """Return a copy of the plan whose `source` has layers that predict more tokens without the removed experts.

        `report` is that of the run after the last decoder layer; its `prediction_mixtures` say which experts stay. It
        is only read. The model is still dense.
        """
        kept = {mixture.name: mixture.groups_kept for mixture in report.prediction_mixtures}
        return replace(self, source=with_fewer_experts(self.source, self.layers.model, kept))

    @property
    def layers(self) -> DecoderLayers:
        """The decoder layers of the model, with the model itself (`layers.model`)."""
        return self.removal.layers

    @property
    def config(self) -> FistaPruningConfig:
        """The user's configuration, with a choice for each option that was left open."""
        return self.removal.config

    @cached_property
    def products(self) -> Products:
        """How matrices are multiplied in forward passes, by the option `compute_dtype` and the device."""
        model = self.layers.model
        device = execution_device(model.get_input_embeddings())
        return choose_products(self.config.compute_dtype, device, model.dtype)

    @cached_property
    def method(self) -> PruningMethod:
        """The pruning method, with its defaults for models of this type."""
        return self.config.create_method(self.layers.model.config.model_type)

    @cached_property
    def operators(self) -> dict[str, LinearOperator]:
        """All operators to prune, by name, such as "model.layers.3.mlp.down_proj", in the order of their layers.

        `self.removal.operators` has them by the name of each decoder layer.
        """
        return {
            name: operator
            for operators in self.removal.operators.values()
            for name, operator in operators.items()
        }

    @property
    def pruned_layers(self) -> list[int]:
        """Indices of the decoder layers that lose weights or experts; a removed layer is none of them.

        `self.removal.operators` has the operators to prune by the name of each decoder layer, in the order of the
        layers, and `self.removal.mixtures` the layers that lose experts.
        """
        return [
            index
            for index, (name, operators) in enumerate(self.removal.operators.items())
            if operators or name in self.removal.mixtures
        ]

    @property
    def layers_to_reach(self) -> list[int]:
        """Indices of the decoder layers that have to run: those of `pruned_layers`, and perhaps the last one.

        If layers that predict more tokens lose experts (`self.prediction_layers`), they get the hidden states that
        leave the last decoder layer.
        """
        indices = self.pruned_layers
        last = len(self.layers) - 1
        if self.prediction_layers and last not in indices:
            indices.append(last)
        return indices

    @property
    def costs(self) -> list[float]:
        """Estimate the cost of pruning each decoder layer, in forward passes of the layer with the most weights.

        Pruning the layer with the most weights to prune costs `_PRUNING_COST` forward passes, and another layer as much
        less as it has fewer weights. `self.removal.operators` has the operators of each decoder layer, and
        `self.removal.mixtures` the experts of those layers that lose some. The forward pass of the layer itself is not
        counted.
        """
        parameters = dict(self.layers.model.named_parameters())
        num_weights = list[int]()  # of each decoder layer
        for layer_name, operators in self.removal.operators.items():
            number = sum(math.prod(operator.shape) for operator in operators.values())
            mixture = self.removal.mixtures.get(layer_name)
            if mixture is not None:
                number += sum(
                    parameters[name].numel() for name in mixture.tensors if name in parameters
                )
            num_weights.append(number)
        largest = max(1, *num_weights)  # not zero, because it divides
        return [_PRUNING_COST * number / largest for number in num_weights]

    @cached_property
    def as_stored(self) -> bool:
        """Tell whether all that stays is written as it is stored, because the run only removes parts.

        Packed weights are not: the result has dense files, so these weights are written as they were loaded.
        """
        has_files = bool(self.source.stored)
        is_packed = bool(packed_names(self.source.stored))
        return self.files_dtypes and has_files and not is_packed and self.removal.keeps_values

    def stored(
        self, layer_name: str | None, kept: Mapping[str, Sequence[int]]
    ) -> dict[str, StoredTensor]:
        """Describe the stored tensors of a decoder layer in their smaller form, by their names in the result's files.

        `layer_name` is such as "model.layers.3"; `None` stands for all tensors outside the decoder layers. `kept` are
        the numbers of the groups (heads, channels, experts) that stay, by the name of their part, such as
        "model.layers.3.self_attn". `self.source` has the tensors in the files of the model, and `self.removal` says to
        which part each belongs. No values are read, and nothing is changed.
        """
        # The names of the parameters in the dense model, by the names of their tensors in the result's files.
        places = dict(self.source.places)
        if layer_name is None:
            in_layers = f"{self.layers.name}."  # such as "model.layers."
            places = {
                name: place for name, place in places.items() if not place.startswith(in_layers)
            }
        else:
            in_layer = f"{layer_name}."
            places = {name: place for name, place in places.items() if place.startswith(in_layer)}
        source = replace(self.source, places=places)
        return source.cut_tensors(
            self.layers.model, self.removal.part_of, kept, strict=self.as_stored
        )


def prediction_layers_of(
    removal: Removal, source: SourceTensors, copies: Path
) -> tuple[SourceTensors, list[LoadedPredictionLayer]]:
    """Load the layers that predict more tokens and lose experts, too; return `source` as it is known then.

    In the returned copy of `source` (the tensors in the files of the model), modules that can't be loaded are not
    copied. `removal` says how many experts stay. The layers are copied to the folder `copies`, and read from there
    until the run ends. Without such layers, nothing is written.
    """
    if not source.prediction_layers:
        return source, []
    first = source.prediction_layers[0]
    num_kept = removal.num_groups_kept[first.part.name]  # equally many in all mixtures
    return load_prediction_layers(source, removal.layers, num_kept, copies)


def plan_run(
    removal: Removal,
    source: SourceTensors | None = None,
    *,
    loaded: bool = True,
    prediction_layers: Sequence[LoadedPredictionLayer] = (),
    files_dtypes: bool = False,
    storage: Storage | None = None,
    progress: bool = False,
    callbacks: Sequence[PruningCallback] = (),
) -> Plan:
    """Join what is removed and what is known of the model's files to a plan, and refuse what can't be written.

    Nothing is changed, and no zeros are allocated yet. `removal` comes from `plan_removal`, and `source` from
    `source_tensors`; it is `None` if the files are not known. If `loaded` is False, the model may be on the meta
    device, for an estimate. `prediction_layers` are those of `source`, as `prediction_layers_of` loads them.
    `files_dtypes` says whether tensors are written in the dtypes of the files, and not in that of the model. `storage`
    is where activations are kept between passes (`None`: on the device of their decoder layer). `progress` shows bars,
    and `callbacks` are called as operators and decoder layers are pruned.
    """
    plan = Plan(
        removal=removal,
        source=SourceTensors() if source is None else source,
        prediction_layers=prediction_layers,
        files_dtypes=files_dtypes,
        storage=storage,
        progress=progress,
        callbacks=callbacks,
    )

    # If the run only removes parts of tensors, it copies what stays from the files, where it may be quantized.
    if plan.as_stored:
        # The tensors are described only to refuse what can't be cut: a scale that belongs to several groups. Which
        # groups will stay is not known yet, so the first ones stand for them.
        kept = {name: range(count) for name, count in removal.num_groups_kept.items()}
        for name, _ in removal.layers:
            plan.stored(name, kept)
        if removal.num_removed_layers:
            # The others get new numbers: this refuses quantization settings with patterns that name layers by number.
            plan.source.refuse_numbered_layers()

    if loaded:
        # This refuses a weight that is not stored as one matrix: its mask could not be saved.
        layers = removal.layers
        stored_names(layers.model, plan.operators.values(), layers_name=layers.name)
    return plan
