"""The plan of a run, made before its first decoder layer, and what its report says before and after the layers.

A plan is frozen: it does not change while the loop runs. It is made in two steps, because the loss of the dense model
decides where the zeros go: `plan_run` chooses the operators, `Plan.with_budgets` gives each its zeros.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from optimum_fista.config import FistaPruningConfig
from optimum_fista.environment import processor_name
from optimum_fista.memory import size_text
from optimum_fista.model import UnsupportedArchitectureError
from optimum_fista.model.activations import Storage
from optimum_fista.model.choice import choose_operators
from optimum_fista.model.held_out import HeldOut
from optimum_fista.model.layers import DecoderLayers, prunable_layers
from optimum_fista.model.offload import execution_device
from optimum_fista.model.operators import LinearOperator
from optimum_fista.model.precision import Products, choose_products
from optimum_fista.origin import read_origin
from optimum_fista.prune.callback import PruningCallback
from optimum_fista.removal.parts import Part, find_parts
from optimum_fista.removal.parts_removal import PartsRemoval, Removal, first_names
from optimum_fista.report import PruningReport, layer_and_kind, lines_of_unplaced, public_name
from optimum_fista.solve.method import PruningMethod
from optimum_fista.solve.methods.magnitude import Magnitude
from optimum_fista.source.formats.dequantization import quantized_source
from optimum_fista.source.loading import local_source, reading
from optimum_fista.source.names import stored_names
from optimum_fista.source.source_tensors import SourceTensors, StoredTensor, source_tensors

UNDER_CALIBRATED_TOKENS = 128
"""An expert to which the router sends fewer calibration tokens is pruned by magnitude."""
_PRUNING_COST = 8.0  # in forward passes of the layer; measured: 2 (wanda) to 9 (fista) on a CPU, see docs/ranks.md


@dataclass(frozen=True)
class Budgets:
    """What the loss of the dense model decides: how many zeros each operator gets, which decoder layers are removed."""

    sparsities: dict[str, float] = field(
        default_factory=dict
    )  # of the operators that share the zeros of the model
    # Cost [out] in nats of an error in each of their outputs; it decides how they share the zeros of their group.
    output_weights: dict[str, torch.Tensor] = field(default_factory=dict)
    unfelt: list[str] = field(
        default_factory=list
    )  # operators without a gradient; they keep the average sparsity
    # Layer numbers in the order of removal, each with the loss after it was removed.
    removed_layers: list[tuple[int, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Plan:
    """What a run prunes, how, and where it keeps activations."""

    layers: DecoderLayers
    asked: FistaPruningConfig  # as the user passed it, with a choice for every option
    config: FistaPruningConfig  # the same, with a pattern of columns for each operator that reads a part to remove
    operators: Mapping[
        str, Mapping[str, LinearOperator]
    ]  # to prune, by the names of all decoder layers
    left_dense: Mapping[str, str]  # other operators, with the reason
    removal: Removal
    products: Products
    channels: Mapping[
        str, Part
    ]  # parts whose channels change places, by the operators that read them
    budgets: Budgets = field(default_factory=Budgets)
    storage: Storage | None = (
        None  # where activations are kept; None: on the device of their decoder layer
    )
    source: SourceTensors = field(default_factory=SourceTensors)  # by their names in the result
    files_dtypes: bool = (
        False  # whether tensors are written in the dtypes of the files, not in the model's
    )
    progress: bool = False
    callbacks: Sequence[PruningCallback] = ()

    def with_budgets(self, budgets: Budgets) -> Plan:
        """Return the plan with the zeros of every operator, and without the decoder layers to remove."""
        gone, plan = dict(budgets.removed_layers), replace(self, budgets=budgets)
        if not gone:
            return plan
        assert isinstance(self.removal, PartsRemoval)
        removal, operators, left, config = self.removal.applied(
            self.operators, self.left_dense, self.config, gone
        )
        stay = [index for index in range(len(self.layers)) if index not in gone]
        source = self.source.renamed(stay, len(self.layers))
        return replace(
            plan,
            removal=removal,
            config=config,
            source=source,
            operators=operators,
            left_dense=left,
        )

    @property
    def as_stored(self) -> bool:
        """Tell whether all that stays is written as it is stored, because the run only removes parts."""
        return self.files_dtypes and bool(self.source.stored) and self.removal.keeps_values

    def stored(
        self, layer_name: str | None, kept: Mapping[str, Sequence[int]]
    ) -> dict[str, StoredTensor]:
        """The stored tensors of a decoder layer, or of all but these (`None`), with the groups `kept` of each part."""
        prefix, found = f"{layer_name or self.layers.name}.", layer_name is not None
        inside = {
            name: place
            for name, place in self.source.places.items()
            if place.startswith(prefix) == found
        }
        source = replace(self.source, places=inside)
        return source.smaller(self.layers.model, self.removal.part_of, kept, strict=self.as_stored)

    @cached_property
    def method(self) -> PruningMethod:
        """The pruning method, with its defaults for models of this type."""
        return self.config.create_method(self.layers.model.config.model_type)

    @property
    def all_operators(self) -> dict[str, LinearOperator]:
        """All operators to prune, by name, in the order of their decoder layers."""
        return {
            name: operator for group in self.operators.values() for name, operator in group.items()
        }

    @property
    def pruned_layers(self) -> list[int]:
        """Indices of the decoder layers that lose weights or experts."""
        groups = enumerate(self.operators.items())
        return [index for index, (name, group) in groups if group or name in self.removal.mixtures]

    @property
    def costs(self) -> list[float]:
        """Cost of pruning each decoder layer, without its forward pass, in forward passes of the largest layer."""
        weights = [
            sum(math.prod(o.shape) for o in group.values()) for group in self.operators.values()
        ]
        return [_PRUNING_COST * count / max(1, *weights) for count in weights]


def plan_run(
    model: PreTrainedModel,
    config: FistaPruningConfig,
    folder: Path | None = None,
    *,
    loaded: bool = True,
    in_memory: bool = False,
    **places: Any,
) -> Plan:
    """Check that a model can be pruned and saved, and plan the run; `places` are fields of `Plan`.

    No zeros are allocated yet. If `loaded` is False, the model may be on the meta device, for an estimate. `folder` has
    its files; those of a model `in_memory` are found, and need not fit it any more.
    """
    asked = config = config.resolved()
    layers = prunable_layers(
        model, loaded=loaded
    )  # first: it refuses models that the rest can't describe
    removal = Removal(layers)
    if config.whole_parts is not None:
        removal, asked, config = PartsRemoval.planned(layers, config)
    operators, left_dense = choose_operators(layers, config.exclude, config.reason_left_dense)
    for name, operator in ((n, o) for group in operators.values() for n, o in group.items()):
        config.pattern_for(name).require_shape(operator.shape, name)
    if isinstance(removal, PartsRemoval):
        removal, operators, left_dense, config = removal.applied(operators, left_dense, config, {})
    # to remove experts or decoder layers, no operator need be pruned
    if not any(operators.values()) and not removal.num_removed_layers and not removal.mixtures:
        shown = first_names([f"{name} ({why})" for name, why in left_dense.items()]) or "none"
        raise UnsupportedArchitectureError(
            f"no linear operator to prune in {layers.name}: of nn.Linear and Conv1D modules, include="
            f"{list(config.include)}, exclude={list(config.exclude)} found {len(left_dense)}, all left dense: {shown}."
        )
    try:
        parts = find_parts(model, "channels").parts if config.reorder_channels else ()
    except UnsupportedArchitectureError as error:
        raise UnsupportedArchitectureError(
            f"reorder_channels=True: {error} Leave it out."
        ) from error
    products = choose_products(
        config.compute_dtype, execution_device(model.get_input_embeddings()), model.dtype
    )
    plan = Plan(
        layers,
        asked,
        config,
        operators,
        left_dense,
        removal,
        products,
        {p.name: p for p in parts},
        **places,
    )
    if loaded:
        stored_names(
            model, plan.all_operators.values()
        )  # refuses a weight whose mask could not be saved
    if in_memory:
        folder = local_source(model)
    if folder is not None:
        quantized = plan.files_dtypes and removal.keeps_values  # in the result
        try:
            with reading(str(folder)):
                source = source_tensors(model, folder, removal.part_of, quantized=quantized)
        except (OSError, ValueError) as error:
            if not in_memory:
                raise
            what = f"tensors in {str(folder)!r} that the model's class does not load"
            source = SourceTensors(lost={what: f"the files can't be read: {error}"})
        plan = replace(plan, source=source)
    if isinstance(removal, PartsRemoval) and plan.as_stored:
        kept = {name: range(count) for name, count in removal.smaller.counts.items()}
        for name, _ in layers:  # refuses scales that belong to several groups
            plan.stored(name, kept)
        if removal.num_removed_layers:
            plan.source.require_no_numbers()
    return plan


def begin_report(plan: Plan) -> PruningReport:
    """Begin the report of a run; warns of name patterns that match nothing, and of tensors that it will lack."""
    model, processor = (
        plan.layers.model,
        {"name": processor_name(), "threads": torch.get_num_threads()},
    )
    processor["instructions"] = torch.backends.cpu.get_cpu_capability()
    report = PruningReport(
        config=plan.asked.to_dict(),
        model={
            "class": type(model).__name__,
            "model_type": model.config.model_type,
            "name": public_name(getattr(model.config, "_name_or_path", "") or ""),
            "num_parameters": model.num_parameters(),
            "dtype": str(model.dtype).removeprefix("torch."),
        },
        calibration={},
        origin=read_origin(model.config),
        left_dense=dict(plan.left_dense),
        # The bytes of a result depend on these, too, besides the model, configuration, tokens and versions.
        environment={
            "dtype": str(model.dtype),
            "device": execution_device(model.get_input_embeddings()).type,
            "attention": model.config._attn_implementation,
            "experts": getattr(model.config, "_experts_implementation", None),
            "processor": processor,
            "written": "in the dtypes of the files" if plan.files_dtypes else str(model.dtype),
            "products": plan.products,
        },
    )
    before = getattr(model.config, "fista_pruning", None)
    if isinstance(before, dict) and not str(before.get("pattern")).startswith(
        "vocab:"
    ):  # tokens have no errors
        report.warn(
            f"the model was pruned before ({before.get('method')}, {before.get('pattern')}, {before.get('num_zeros')} "
            "zeros): errors are measured against it as it is, and zeros outside of the new pattern may be overwritten."
        )
    if source := quantized_source(model):
        size = size_text(sum(p.numel() * p.element_size() for p in model.parameters()))
        written = "as they are stored" if plan.as_stored else f"in {report.model['dtype']} ({size})"
        report.warn(
            f"weights quantized by {source['quant_method']!r} are dequantized to prune, and written {written}."
        )
    idle = plan.asked.idle_patterns([*plan.all_operators, *plan.left_dense])
    for message in (*idle, *lines_of_unplaced({}, plan.source.lost)):
        report.warn(message)
    return report


def complete_report(plan: Plan, report: PruningReport, held_out: HeldOut | None) -> None:
    """Describe the pruned model once all operators are pruned, and add what the user should know."""
    plan.removal.describe(report)
    report.model |= {
        k: v
        for k, v in {"copied": plan.source.copied, "lacks": dict(plan.source.lost)}.items()
        if v
    }
    operators, config = report.operators, plan.config
    if unfelt := plan.budgets.unfelt:
        report.warnings.append(
            f"the loss has no gradient for {len(unfelt)} operators on the first {config.allocation_tokens} "
            f"calibration tokens, so they keep the average sparsity: {first_names(unfelt)}"
        )
    reasons = {
        name: why for name, why in report.left_dense.items() if why not in ("router", "exclude")
    }
    left = {name: why for name, why in reasons.items() if config.reason_left_dense(name) is None}
    if not operators and not report.mixtures and not plan.budgets.removed_layers:
        name = next(iter(left))
        why = f"{name}, for one: {left[name]}"
        raise UnsupportedArchitectureError(
            f"no linear operator of {plan.layers.name} can be pruned; {why}."
        )
    if left:
        shown = first_names([f"{name} ({reason})" for name, reason in left.items()])
        report.warn(f"{len(left)} operators were left dense: {shown}")
    overflown = [
        o.name
        for o in operators
        if not all(map(math.isfinite, (o.fit_error, o.output_error or 0.0)))
    ]
    if overflown:
        which = f"{len(overflown)} operators are NaN or Inf ({first_names(overflown)})"
        report.warn(
            f"the errors of {which} and so not known: squares of their outputs overflow float32."
        )
    found, by_rows = (
        report.totals["sparsity"],
        operators and all(operator.scope == "row" for operator in operators),
    )
    if by_rows and not config.overrides and abs(found - (config.sparsity or 0.0)) > 1e-4:
        share = f"{found:.2%} of the weights are zero instead of {config.sparsity:.2%}"
        report.warnings.append(
            f"rows have whole numbers of zeros, so {share}: pass scope='matrix' for an exact one."
        )
    if config.correction.residual_share:
        parts: list[Any] = [*operators, *report.mixtures]
        pruned = dict.fromkeys(layer_and_kind(part.name)[0] for part in parts)
        corrected = {layer_and_kind(part.name)[0] for part in parts if part.residual_corrected}
        if without := [name for name in pruned if name not in corrected]:
            report.warnings.append(
                f"no residual correction in {len(without)} of {len(pruned)} decoder layers "
                f"({first_names(without)}): the output of one pruned operator, the last, is not added to the layer's "
                "output there (a norm or a scale comes between, or it is a mixture of experts)"
            )
    report.warnings.extend(
        f"{o.name}: {o.message}" for o in operators if o.message and not o.converged
    )
    report.warnings.extend(
        f"{mixture.name}: {mixture.message}" for mixture in report.mixtures if mixture.message
    )
    under_calibrated = [o for o in operators if config.method != o.method == Magnitude.name]
    if under_calibrated:
        least = min(under_calibrated, key=lambda o: o.num_tokens)
        report.warn(
            f"{len(under_calibrated)} of {len(operators)} operators were pruned by magnitude: fewer than "
            f"{UNDER_CALIBRATED_TOKENS} tokens reached their experts ({least.name}: {least.num_tokens}). Pass more."
        )
    if held_out is not None and (measured := held_out.perplexity()) is not None:
        text = held_out.text and public_name(held_out.text)
        vocabulary = len(next(plan.layers.model.get_input_embeddings().parameters()))
        report.perplexity = measured | {"text": text, "vocabulary": vocabulary}
