"""Removing whole parts of a model: the run prunes columns of some operators, then the model becomes a smaller one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from optimum_fista.config import FistaPruningConfig
from optimum_fista.memory import is_out_of_memory
from optimum_fista.model import UnsupportedArchitectureError
from optimum_fista.model.architecture import DecoderLayers, find_decoder_layers, find_operators
from optimum_fista.model.correction import LayerTargets
from optimum_fista.model.expert_removal import SmallerMixture, experts_of, experts_to_keep, score_experts
from optimum_fista.model.groups import is_added_to_output
from optimum_fista.model.layer_inputs import LayerActivations
from optimum_fista.model.offload import offload_hook
from optimum_fista.model.operator import FusedExperts, Group, LinearOperator
from optimum_fista.model.parts import Part, numbers_kept
from optimum_fista.model.shrinking import (
    Shrinking,
    plan_shrinking,
    require_same_outputs,
    shrink_model,
    small_hidden_states,
    smaller_copy,
)
from optimum_fista.prune.run_report import first_names
from optimum_fista.prune.sink import ModelSink
from optimum_fista.report import LayerRecord, LayerReport, MixtureReport, OperatorReport, PruningReport
from optimum_fista.solve.pattern import pack_mask, unpack_mask
from optimum_fista.solve.patterns import Columns, WholeParts

T = TypeVar("T")


@dataclass
class Removal:
    """What a run does besides setting weights to zero: here nothing."""

    asked: FistaPruningConfig  # as the user passed it
    num_removed_layers: int = field(default=0, kw_only=True)

    def mixture_of(self, layer_name: str) -> Part | None:  # noqa: ARG002
        """The mixture of a decoder layer that loses experts; `None` without."""
        return None

    def prove(self, layer_name: str, activations: LayerActivations, hidden_states: Tensor) -> None:
        """Prove of every kind of decoder layer that it returns the same without the groups as with zeros there."""

    def to_prune(
        self,
        layer_name: str,  # noqa: ARG002
        groups: list[Group],
        activations: LayerActivations,  # noqa: ARG002
        hidden_states: Tensor,  # noqa: ARG002
    ) -> tuple[list[Group], dict[str, str]]:
        """The groups of a decoder layer to prune, and its operators that stay as they are, with the reason."""
        return groups, {}

    def experts_of(self, layer_name: str, layer: nn.Module) -> FusedExperts | None:
        """The experts of a decoder layer of which some go; `None` if none does."""
        part = self.mixture_of(layer_name)
        return None if part is None else experts_of(part, layer_name, layer)

    def remove_experts(
        self,
        sink: ModelSink,  # noqa: ARG002
        layer_name: str,  # noqa: ARG002
        experts: FusedExperts | None,  # noqa: ARG002
        targets: LayerTargets,  # noqa: ARG002
    ) -> tuple[MixtureReport | None, nn.Module | None]:
        """Choose the experts of a decoder layer that stay, and refit them; the report, and the layer without others."""
        return None, None

    def shrink_layer(
        self, record: LayerRecord, masks: dict[str, Tensor], tensors: dict[str, Tensor]
    ) -> tuple[LayerRecord, dict[str, Tensor], dict[str, Tensor]]:
        """A pruned decoder layer as the smaller model has it: its record, its packed masks, and its tensors by name."""
        return record, masks, tensors

    def shrink(
        self,
        model: PreTrainedModel,
        report: PruningReport,
        masks: dict[str, Tensor],
        undo_first: Callable[[Callable[[], None]], None],
    ) -> None:
        """Make a pruned model in memory the smaller one, with the report and the packed masks of the smaller one.

        Before, `undo_first` is called with what gives tensors their old sizes back.
        """

    def model_config(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """The configuration of the pruned model."""
        return config

    def describe(self, report: PruningReport) -> None:
        """Add to the report what went."""


@dataclass
class PartsRemoval(Removal):
    """How a run removes whole parts."""

    plan: Shrinking  # the smaller model; until `remove_layers`, with all decoder layers
    config: (
        FistaPruningConfig  # with a pattern of whole columns for each operator that reads what is removed, no others
    )
    counts: Mapping[str, int]  # how many parts of each kind a decoder layer keeps
    columns: Shrinking  # a model that keeps its experts, by which the other kinds are proved
    experts: Shrinking  # a model that loses experts only, by which a decoder layer runs without them
    removed_layers: Mapping[int, float] = field(default_factory=dict)  # each with the loss without it and those before
    proven: set[object] = field(default_factory=set)  # kinds of layers seen to return the same without removed groups

    @classmethod
    def planned(cls, model: PreTrainedModel, config: FistaPruningConfig) -> PartsRemoval:
        """The removal that a configuration asks for, whose pattern is of whole parts."""
        pattern = config.whole_parts
        assert pattern is not None
        counts, total = numbers_kept(model, pattern), len(find_decoder_layers(model))
        going = sum(total - part.num_kept(total) for part in pattern.shares if part.kind == "layers")
        plan, columns_only = _plans(model, counts)
        parts = {name: part for name, part in plan.parts.items() if not part.is_mixture}
        columns = {
            name: str(Columns.keeping(plan.counts[name], part.groups, part.width)) for name, part in parts.items()
        }
        others = tuple(name for name in plan.parts if name not in parts)  # mixtures: not an operator for every matrix
        options: dict[str, Any] = {"expert_refit": True}
        options |= {"include": tuple(columns), "exclude": others if columns else ("*",), "overrides": columns}
        widest = max(part.share for part in pattern.shares)
        expanded = replace(config, pattern=f"columns:{widest!r}", sparsity=None, scope=None, **options)
        experts_only = plan_shrinking(model, experts=counts.get("experts"))
        return cls(config, plan, expanded, counts, columns_only, experts_only, num_removed_layers=going)

    def mixture_of(self, layer_name: str) -> Part | None:
        """The mixture of a decoder layer that loses experts; `None` without."""
        found = (part for part in self.plan.parts.values() if part.is_mixture)
        return next((part for part in found if part.name.startswith(f"{layer_name}.")), None)

    def remove_layers(
        self,
        model: PreTrainedModel,
        layers: DecoderLayers,
        operators: Mapping[str, Mapping[str, LinearOperator]],
        removed: Mapping[int, float],
    ) -> dict[str, dict[str, LinearOperator]]:
        """Plan the model without the decoder layers `removed`; returns the operators to prune in the others."""
        stay = [index for index in range(len(layers)) if index not in removed]
        self.plan, self.columns = _plans(model, self.counts, stay)
        self.removed_layers = removed
        return self.with_repairs(layers, operators)

    def with_repairs(
        self, layers: DecoderLayers, operators: Mapping[str, Mapping[str, LinearOperator]]
    ) -> dict[str, dict[str, LinearOperator]]:
        """The operators to prune, with those that may repair decoder layers.

        A decoder layer that loses heads, or comes after a removed one, is repaired if the correction has a share of the
        residual: its last operator, if it loses no columns itself, keeps all of them and is refitted. Which one is the
        last shows when the layer runs (`to_prune`).
        """
        correction = self.config.correction
        repairs = correction.residual_share > 0
        after_removed = {index + 1 for index in self.removed_layers if correction.carry == "full"}
        left = {name: dict(found) for name, found in operators.items()}
        all_columns: dict[str, float | str] = {}
        for index, (name, layer) in enumerate(layers):
            if index in self.removed_layers:
                left[name] = {}
            elif repairs and (("heads" in self.counts and left[name]) or index in after_removed):
                others = find_operators(name, layer, dense_experts=("*",))
                all_columns |= {key: f"columns:{o.shape[1]}of{o.shape[1]}" for key, o in others.items()}
                left[name] = others | left[name]
        if all_columns:
            self.config = replace(self.config, overrides={**all_columns, **self.config.overrides})
        return left

    def to_prune(
        self, layer_name: str, groups: list[Group], activations: LayerActivations, hidden_states: Tensor
    ) -> tuple[list[Group], dict[str, str]]:
        """The groups of a decoder layer to prune, and its operators that stay as they are, with the reason.

        Of a layer to repair these are the operators that lose columns, and the last one, if the layer's output is
        something plus its output. `groups` are those that the layer calls.
        """
        called = {operator.name for group in groups for operator in group}
        for name, part in self.plan.parts.items():
            if name.startswith(f"{layer_name}.") and not part.is_mixture and name not in called:
                raise UnsupportedArchitectureError(
                    f"{name} is never called, so nothing tells which of its columns to remove: use another pattern."
                )
        chosen = [[o for o in group if self.config.pattern_for(o.name).sparsity] for group in groups]
        if groups and not chosen[-1] and len(groups[-1]) == 1:
            chosen[-1] = [o for o in groups[-1] if is_added_to_output(activations, o.module, hidden_states)]
        pruned = {operator.name for group in chosen for operator in group}
        names = [operator.name for group in groups for operator in group if operator.name not in pruned]
        return [group for group in chosen if group], {name: self.reason_left_dense(name) for name in names}

    def reasons_left_dense(
        self, reasons: Iterable[str], operators: Mapping[str, Mapping[str, LinearOperator]]
    ) -> dict[str, str]:
        """Why operators are not pruned, without those to prune and those of removed decoder layers."""
        chosen = {name for found in operators.values() for name in found}
        left = [name for name in reasons if name not in chosen and self.plan.new_name(name) is not None]
        return {name: self.reason_left_dense(name) for name in left}

    def reason_left_dense(self, name: str) -> str:
        """Why an operator's weights are not pruned."""
        part = self.plan.part_of(f"{name}.weight") or self.plan.parts.get(name)
        if part is None:
            return "no part of the pattern"
        if part.is_mixture:
            return f"keeps {self.plan.counts[part.name]} of {part.groups} experts"
        return f"loses the rows that {self.plan.new_name(part.name)} no longer reads"

    def prove(self, layer_name: str, activations: LayerActivations, hidden_states: Tensor) -> None:
        """Prove of every kind of decoder layer that it returns the same without the groups as with zeros there."""
        names = [name for name in self.columns.parts if name.startswith(f"{layer_name}.")]
        modules = ((name, type(module)) for name, module in activations.layer.named_modules())
        kind = tuple(modules), tuple(name.removeprefix(layer_name) for name in names)
        if kind in self.proven or not names:
            return
        # Which groups go is not known yet. Without the first ones all others get new numbers, so that what depends on
        # the number of a group shows, as does what depends on all of them.
        groups = {name: (self.columns.parts[name].groups, self.columns.counts[name]) for name in names}
        kept = {name: tuple(range(total - count, total)) for name, (total, count) in groups.items()}
        call, hidden = activations.calls[0], small_hidden_states(hidden_states.to(activations.device))
        try:
            require_same_outputs(
                self.columns, layer_name, activations.layer, kept, lambda layer: call.run(layer, hidden)
            )
        except UnsupportedArchitectureError as error:
            if error.__cause__ is not None and is_out_of_memory(error.__cause__):
                raise error.__cause__ from None  # smaller batches may fit
            raise
        self.proven.add(kind)

    def remove_experts(
        self, sink: ModelSink, layer_name: str, experts: FusedExperts | None, targets: LayerTargets
    ) -> tuple[MixtureReport | None, nn.Module | None]:
        """Choose the experts of a decoder layer that stay, and refit them, so that they return its targets together.

        Returns also the layer without the experts that go.
        """
        if experts is None:
            return None, None
        started, part = time.perf_counter(), self.plan.parts[experts.name]
        num_tokens, saliency, wanted = score_experts(experts, targets)
        kept = experts_to_keep(saliency, self.plan.counts[part.name], part.equal_runs)
        smaller = smaller_copy(self.experts, layer_name, targets.activations.layer, {part.name: kept})
        left = experts_of(part, layer_name, smaller)
        mixture = SmallerMixture(left, replace(targets.activations, layer=smaller), targets.entering.entering, wanted)
        before, unseen = mixture.errors()
        fit_error, num_refitted, message = before, 0, ""
        if self.asked.expert_refit:
            down = [operator for operator in experts.operators if operator.kind == "down_proj"]
            num_refitted, message = mixture.refit(lambda expert, weight: sink.write(down[kept[expert]], weight))
            fit_error, unseen = mixture.errors()
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
            held_out_fit_error=unseen,
            residual_corrected=targets.adds_experts,
        )
        return report, smaller

    def shrink_layer(
        self, record: LayerRecord, masks: dict[str, Tensor], tensors: dict[str, Tensor]
    ) -> tuple[LayerRecord, dict[str, Tensor], dict[str, Tensor]]:
        """A pruned decoder layer as the smaller model has it; see `Removal.shrink_layer`."""
        kept = self._kept([record.report], record.operators, masks)
        operators, smaller = self._reports(record.operators, kept, masks)
        (report,), left_dense = self._layers([record.report]), self._renamed(record.left_dense)
        shrunk = {name: self.plan.shrink_tensor(name, tensor, kept) for name, tensor in tensors.items()}
        return LayerRecord(report, operators, left_dense), smaller, self._renamed(shrunk)

    def model_config(self, config: PreTrainedConfig) -> PreTrainedConfig:  # noqa: ARG002
        """The configuration of the smaller model."""
        return self.plan.model.config

    def shrink(
        self,
        model: PreTrainedModel,
        report: PruningReport,
        masks: dict[str, Tensor],
        undo_first: Callable[[Callable[[], None]], None],
    ) -> None:
        """Make a pruned model in memory the smaller one; see `Removal.shrink`."""
        kept = self._kept(report.layers, report.operators, masks)
        operators, smaller = self._reports(report.operators, kept, masks)
        # what becomes smaller waits on the CPU: a device that is nearly full has no room for both sizes of all tensors
        before = [
            (tensor, tensor.device, tensor.data if self.plan.part_of(name) is None else tensor.data.cpu())
            for name, tensor in (*model.named_parameters(), *model.named_buffers())
        ]

        def restore() -> None:
            for tensor, device, data in before:
                tensor.data = data.to(device)

        undo_first(restore)
        shrink_model(model, self.plan, kept)
        masks.clear()
        masks.update(smaller)
        report.operators, report.layers = operators, self._layers(report.layers)
        report.left_dense = self._renamed(report.left_dense)

    def describe(self, report: PruningReport) -> None:
        """Count the parameters that stay, and say which decoder layers go and which of the others are not repaired.

        The report has the names of the smaller model.
        """
        report.model["dense_num_parameters"] = report.model["num_parameters"]
        report.model["num_parameters"] = self.plan.model.num_parameters()
        if not self.removed_layers:
            return
        report.model["layers_kept"] = list(self.plan.layers)
        report.model["layers_removed"] = [[index, loss] for index, loss in self.removed_layers.items()]
        correction = self.config.correction
        asked = correction.residual_share > 0 and correction.carry == "full"
        repaired = [operator.name for operator in report.operators if operator.residual_corrected and asked]
        numbers = [new for new, old in enumerate(self.plan.layers) if old - 1 in self.removed_layers]
        after = [f"{self.plan.layers_name}.{number}" for number in numbers]
        without = [name for name in after if not any(operator.startswith(f"{name}.") for operator in repaired)]
        if without:
            why = "that takes error_correction='full' or a number, and residual_correction above 0"
            if asked:
                why = "the output of their last operator is not added to theirs"
            report.warn(
                f"{len(without)} of {len(after)} decoder layers after removed ones are not repaired "
                f"({first_names(without)}): {why}"
            )

    def _kept(
        self, layers: Sequence[LayerReport], operators: Sequence[OperatorReport], masks: Mapping[str, Tensor]
    ) -> dict[str, tuple[int, ...]]:
        """The groups that stay, by the names of the parts."""
        kept = {layer.mixture.name: layer.mixture.groups_kept for layer in layers if layer.mixture is not None}
        for operator in operators:
            mask = unpack_mask(masks[operator.name], operator.stored_shape)
            part = self.plan.parts.get(operator.name.removesuffix(".weight"))
            if part is not None:  # not one that repairs its decoder layer
                kept[part.name] = part.kept_by(mask.T if operator.stored_transposed else mask)
        return kept

    def _reports(
        self, operators: Sequence[OperatorReport], kept: Mapping[str, tuple[int, ...]], masks: Mapping[str, Tensor]
    ) -> tuple[list[OperatorReport], dict[str, Tensor]]:
        """Reports of the operators without what goes, and their packed masks."""
        reports, smaller = [], {}
        for operator in operators:
            new, groups = self.plan.new_name(operator.name), kept.get(operator.name.removesuffix(".weight"))
            assert new is not None
            mask = unpack_mask(masks[operator.name], operator.stored_shape)
            mask = self.plan.shrink_tensor(operator.name, mask, kept)
            smaller[new] = pack_mask(mask)
            out, columns = mask.shape[::-1] if operator.stored_transposed else mask.shape
            report = replace(operator, name=new, shape=(out, columns), groups_kept=groups)
            reports.append(replace(report, num_kept=mask.numel(), sparsity=0.0))  # no mask has zeros in what stays
        return reports, smaller

    def _renamed(self, values: Mapping[str, T]) -> dict[str, T]:
        """What is kept by name, under the names of the smaller model, without what goes."""
        return {new: value for name, value in values.items() if (new := self.plan.new_name(name)) is not None}

    def _layers(self, reports: Sequence[LayerReport]) -> list[LayerReport]:
        """The same of reports of decoder layers, and of their mixtures."""
        left = []
        for report in reports:
            name, mixture = self.plan.new_name(report.name), report.mixture
            if name is not None:
                new = None if mixture is None else self.plan.new_name(mixture.name)
                mixture = None if mixture is None or new is None else replace(mixture, name=new)
                left.append(replace(report, name=name, mixture=mixture))
        return left


def _plans(
    model: PreTrainedModel, counts: Mapping[str, int], layers: Sequence[int] | None = None
) -> tuple[Shrinking, Shrinking]:
    """The plan of a model whose decoder layers keep so many parts of each kind, and that of one with all experts."""
    plan = plan_shrinking(model, layers=layers, **counts)
    if "experts" not in counts:
        return plan, plan
    others = {kind: count for kind, count in counts.items() if kind != "experts"}
    return plan, plan_shrinking(model, layers=layers, **others)


def require_in_memory(model: PreTrainedModel, pattern: WholeParts) -> None:
    """Refuse a model whose weights Accelerate keeps elsewhere: it can't become a smaller one in place."""
    if any(offload_hook(module) for module in model.modules()):
        raise ValueError(
            f"pattern='{pattern}': the model is offloaded, so it can't be made smaller in place: pass its name or "
            "folder and output_dir instead."
        )


def require_zeros_to_pack(config: FistaPruningConfig, packed: bool) -> None:
    """Refuse to pack what a run leaves if it removes whole parts."""
    if packed and config.whole_parts is not None:
        raise ValueError(f"packed=True: pattern={config.pattern!r} leaves a dense model: there are no zeros to pack.")
