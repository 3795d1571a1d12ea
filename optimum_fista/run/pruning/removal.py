"""Removing whole parts of a model: the run prunes columns of some operators, then the model becomes a smaller one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from optimum_fista.model.activations import LayerActivations
from optimum_fista.model.offload import is_offloaded
from optimum_fista.model.parts import find_parts
from optimum_fista.model.shrinking import Shrinking, plan_shrinking, require_same_outputs, shrink_model
from optimum_fista.run.config import FistaPruningConfig
from optimum_fista.run.reports.report import LayerRecord, OperatorReport, PruningReport
from optimum_fista.solve.bitmask import pack_mask, unpack_mask
from optimum_fista.solve.patterns import Columns, WholeParts


@dataclass
class Removal:
    """How a run removes whole parts.

    Attributes:
        plan: The smaller model.
        config: The configuration with a pattern of whole columns for each operator that reads what is removed, and
            with all others left as they are.
        proven: Kinds of decoder layers that were seen to return the same without the removed groups.
    """

    plan: Shrinking
    config: FistaPruningConfig
    proven: set[object] = field(default_factory=set)

    @classmethod
    def planned(cls, model: PreTrainedModel, config: FistaPruningConfig) -> Removal | None:
        """The removal that a configuration asks for; `None` if its pattern is another.

        Raises:
            ValueError: If the numbers are impossible, no configuration of Transformers describes the smaller model, or
                other options contradict the pattern.
            UnsupportedArchitectureError: If the model has no such parts.
        """
        pattern = config.whole_parts
        if pattern is None:
            return None
        counts = {part.kind: part.num_kept(find_parts(model, part.kind).groups) for part in pattern.shares}
        plan = plan_shrinking(model, channels=counts.get("channels"), heads=counts.get("heads"))
        columns = {
            name: Columns.keeping(plan.counts[name], part.groups, part.width).text for name, part in plan.parts.items()
        }
        widest = f"columns:{pattern.sparsity!r}"
        expanded = replace(config, pattern=widest, sparsity=None, include=tuple(columns), overrides=columns)
        return cls(plan, expanded)

    def reason_left_dense(self, name: str) -> str:
        """Why an operator's weights are not pruned."""
        part = self.plan.part_of(f"{name}.weight")
        return "no part of the pattern" if part is None else f"loses the rows that {part.name} no longer reads"

    def prove(self, layer_name: str, activations: LayerActivations, hidden_states: Tensor) -> None:
        """Prove of every kind of decoder layer that it returns the same without the groups as with zeros there.

        Raises:
            UnsupportedArchitectureError: If it does not.
        """
        names = [name for name in self.plan.parts if name.startswith(f"{layer_name}.")]
        modules = ((name, type(module)) for name, module in activations.layer.named_modules())
        kind = tuple(modules), tuple(name.removeprefix(layer_name) for name in names)
        if kind in self.proven or not names:
            return
        # Which groups go is not known yet. Without the first ones all others get new numbers, so that what depends on
        # the number of a group shows, as does what depends on all of them.
        groups = {name: (self.plan.parts[name].groups, self.plan.counts[name]) for name in names}
        kept = {name: tuple(range(total - count, total)) for name, (total, count) in groups.items()}
        # Small hidden states: the rounding of large ones in 16 bits hides what attention and MLP add to them.
        call, hidden = activations.calls[0], hidden_states.to(activations.device, torch.float32)
        small = nn.functional.normalize(hidden, dim=-1) * (0.01 * hidden.shape[-1] ** 0.5)
        hidden = small.to(hidden_states.dtype)
        require_same_outputs(self.plan, layer_name, activations.layer, kept, lambda layer: call.run(layer, hidden))
        self.proven.add(kind)

    def shrink_layer(
        self, record: LayerRecord, masks: Mapping[str, Tensor], tensors: Mapping[str, Tensor]
    ) -> tuple[LayerRecord, dict[str, Tensor], dict[str, Tensor]]:
        """A pruned decoder layer as the smaller model has it: its record, its packed masks, and its tensors by name."""
        kept = self._kept(record.operators, masks)
        operators, smaller = self._reports(record.operators, kept)
        return (
            replace(record, operators=operators),
            smaller,
            {name: self.plan.shrink_tensor(name, tensor, kept) for name, tensor in tensors.items()},
        )

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
        kept = self._kept(report.operators, masks)
        operators, smaller = self._reports(report.operators, kept)
        held = [*model.parameters(), *model.buffers()]
        before = [(tensor, tensor.data) for tensor in held]

        def restore() -> None:
            for tensor, data in before:
                tensor.data = data

        undo_first(restore)
        shrink_model(model, self.plan, kept)
        masks.clear()
        masks.update(smaller)
        self.describe(report)
        report.operators = operators

    def describe(self, report: PruningReport) -> None:
        """Count the parameters that stay."""
        report.model["dense_num_parameters"] = report.model["num_parameters"]
        report.model["num_parameters"] = self.plan.model.num_parameters()

    def _kept(self, operators: Sequence[OperatorReport], masks: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
        """The groups that stay, by the names of the parts."""
        kept = {}
        for operator in operators:
            shape = operator.shape[::-1] if operator.stored_transposed else operator.shape
            mask = unpack_mask(masks[operator.name], shape)
            name = operator.name.removesuffix(".weight")
            kept[name] = self.plan.parts[name].kept_by(mask.T if operator.stored_transposed else mask)
        return kept

    def _reports(
        self, operators: Sequence[OperatorReport], kept: Mapping[str, tuple[int, ...]]
    ) -> tuple[list[OperatorReport], dict[str, Tensor]]:
        """Reports of the operators without their removed columns, and packed masks that keep all that is left."""
        reports, masks = [], {}
        for operator in operators:
            name = operator.name.removesuffix(".weight")
            out, columns = operator.shape[0], len(kept[name]) * self.plan.parts[name].width
            stored = (columns, out) if operator.stored_transposed else (out, columns)
            masks[operator.name] = pack_mask(torch.ones(stored, dtype=torch.bool))
            reports.append(
                replace(operator, shape=(out, columns), num_kept=out * columns, sparsity=0.0, groups_kept=kept[name])
            )
        return reports, masks


def require_in_memory(model: PreTrainedModel, pattern: WholeParts) -> None:
    """Refuse a model whose weights Accelerate keeps elsewhere: it can't become a smaller one in place.

    Raises:
        ValueError: If it is.
    """
    if any(is_offloaded(module) for module in model.modules()):
        raise ValueError(
            f"pattern={pattern.text!r}: the model is offloaded, so it can't be made smaller in place: pass its name or "
            "folder and output_dir instead."
        )


def require_zeros_to_pack(config: FistaPruningConfig, packed: bool) -> None:
    """Refuse to pack what a run leaves if it removes whole parts.

    Raises:
        ValueError: If so.
    """
    if packed and config.whole_parts is not None:
        raise ValueError(f"packed=True: pattern={config.pattern!r} leaves a dense model: there are no zeros to pack.")
