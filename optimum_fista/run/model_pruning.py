"""Pruning a model: its decoder layers one after another, each on the device only while it is worked on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from optimum_fista.model.architecture import DecoderLayers
from optimum_fista.model.calibration import CalibrationBatch
from optimum_fista.model.hidden_states import record_inputs
from optimum_fista.model.offload import execution_device, is_offloaded, onloaded
from optimum_fista.model.operator import LinearOperator
from optimum_fista.model.sharing import trace_groups
from optimum_fista.model.statistics import LayerActivations
from optimum_fista.run.budgets import Budgets, share_budgets
from optimum_fista.run.config import FistaPruningConfig
from optimum_fista.run.layer_pruning import HiddenStates, LayerPruning, report_group
from optimum_fista.run.report import PruningReport
from optimum_fista.solve.pruned import PrunedOperator

Operators = Mapping[str, Mapping[str, LinearOperator]]
"""Operators to prune, by name, by name of their decoder layer."""


class ModelPruning:
    """One run over the decoder layers of a model.

    Attributes:
        states: Hidden states that enter the next decoder layer; `None` before the first.
        budgets: The operators' sparsity patterns; `None` before they are shared.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layers: DecoderLayers,
        operators: Operators,
        batches: Sequence[CalibrationBatch],
        config: FistaPruningConfig,
        report: PruningReport,
        write: Callable[[LinearOperator, PrunedOperator], None],
        *,
        progress: bool = True,
        storage_device: str | torch.device | None = None,
    ) -> None:
        self.model = model
        self.layers = layers
        self.operators = operators
        self.batches = batches
        self.config = config.resolved()
        self.report = report
        self.write = write
        self.progress = progress
        self.storage_device = storage_device
        self.states: HiddenStates | None = None
        self.budgets: Budgets | None = None

    def run(self, first: int = 0) -> Iterator[tuple[int, str, nn.Module]]:
        """Prune the decoder layers from `first` on in place.

        Yields:
            Index, name and module of every decoder layer when it is pruned, before its weights leave the device.
            Layers behind the last operator to prune are not run.

        Raises:
            ValueError: If weights or activations are not finite.
        """
        pruning = self._layer_pruning(self._shared_budgets())
        recorded = record_inputs(self.model, self.layers, self.batches)
        storage = torch.device(self.storage_device or recorded.hidden_states[0].device)
        if self.states is None:
            self.states = pruning.enter([hidden.to(storage) for hidden in recorded.hidden_states])
        recorded.hidden_states.clear()
        last_layer = max(index for index, group in enumerate(self.operators.values()) if group)
        counts = [len(group) for group in self.operators.values()]
        with tqdm(
            total=sum(counts), initial=sum(counts[:first]), desc="Pruning", unit="operator", disable=not self.progress
        ) as bar:
            for index, (name, layer) in enumerate(self.layers):
                calls, recorded.calls[index] = recorded.calls[index], []
                if index < first:
                    continue
                with onloaded(layer):
                    if index <= last_layer:
                        activations = LayerActivations(layer, calls, recorded.token_masks, storage)
                        self._prune_layer(pruning, activations, name, index, bar)
                    yield index, name, layer
        self.report.warnings.extend(
            f"{o.name}: {o.message}" for o in self.report.operators if o.message and not o.converged
        )

    def _shared_budgets(self) -> Budgets:
        if self.budgets is None:
            started = time.perf_counter()
            flat = {name: operator for group in self.operators.values() for name, operator in group.items()}
            self.budgets = share_budgets(self.model, self.layers, flat, self.batches, self.config, self.progress)
            self.report.seconds["allocation"] = time.perf_counter() - started
        if self.budgets.unseen:
            self.report.warnings.append(
                f"the loss does not feel {len(self.budgets.unseen)} operators on the first "
                f"{self.config.allocation_tokens} calibration tokens, so they keep the average sparsity: "
                f"{', '.join(self.budgets.unseen[:4])}"
            )
        return self.budgets

    def _layer_pruning(self, budgets: Budgets) -> LayerPruning:
        assert self.config.error_correction is not None
        return LayerPruning(
            self.config.create_method(self.model.config.model_type),
            budgets.pattern_for,
            self.config.error_correction,
            self.write,
            self.config.residual_correction or 0.0,
            budgets.output_weights if self.config.scope == "matrix" else None,
        )

    def _prune_layer(
        self, pruning: LayerPruning, activations: LayerActivations, name: str, index: int, bar: tqdm
    ) -> None:
        """Prune the operators of one decoder layer, group by group, and move on the hidden states."""
        assert self.states is not None
        layer, operators = activations.layer, self.operators[name]
        for operator in operators.values():
            if is_offloaded(operator.module):
                require_finite(operator)
        entering = self.states.entering[0].to(execution_device(layer))
        groups = trace_groups(layer, dict(operators), activations.calls[0], entering)
        with closing(pruning.prune(activations, groups, self.states)) as pruned_groups:
            for group in pruned_groups:
                reports = report_group(group, self.config.method)
                self.report.operators.extend(reports)
                last = group.operators[-1].name.removeprefix(f"{name}.")
                error = reports[-1].relative_error
                bar.set_postfix_str(f"layer {index + 1}/{len(self.layers)} {last} error {error:.4f}")
                bar.update(len(reports))


def require_finite(operator: LinearOperator) -> None:
    """Refuse damaged weights.

    Raises:
        ValueError: If a weight is NaN or Inf.
    """
    if not bool(torch.isfinite(operator.parameter).all()):
        raise ValueError(f"the weight of {operator.name} holds NaN or Inf: the model is damaged, load it again.")
