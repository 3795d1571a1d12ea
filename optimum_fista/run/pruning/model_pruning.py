"""Pruning a model: its decoder layers one after another, each on the device only while it is worked on."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from optimum_fista.model.activation_store import Storage
from optimum_fista.model.architecture import find_decoder_layers, input_embedding, require_bare, require_own_weights
from optimum_fista.model.calibration import hold_out, read_batches
from optimum_fista.model.experts import split_experts
from optimum_fista.model.hidden_states import RecordedInputs
from optimum_fista.model.offload import execution_device, onloaded
from optimum_fista.model.sharing import trace_groups
from optimum_fista.model.statistics import LayerActivations
from optimum_fista.run.callbacks.pruning_callback import PruningCallback
from optimum_fista.run.checkpoints.loading import require_unquantized, storage_place
from optimum_fista.run.checkpoints.stored_names import stored_names
from optimum_fista.run.config import FistaPruningConfig
from optimum_fista.run.memory.available_memory import is_out_of_memory
from optimum_fista.run.memory.free_memory import release_memory_of
from optimum_fista.run.memory.peak_memory import PeakMemory
from optimum_fista.run.pruning.budgets import Budgets, share_budgets
from optimum_fista.run.pruning.layer_finetuning import finetune_layer
from optimum_fista.run.pruning.layer_pruning import HiddenStates, LayerPruning, StarvedRule, hidden_state_error
from optimum_fista.run.pruning.operators import choose_operators, require_finite
from optimum_fista.run.pruning.pruned_group import report_group
from optimum_fista.run.pruning.run_batches import RunBatches
from optimum_fista.run.pruning.run_report import begin_report, complete_report
from optimum_fista.run.pruning.sink import Sink
from optimum_fista.run.reports.report import LayerRecord, LayerReport, OperatorReport
from optimum_fista.solve.methods import create_method

_PRUNING_COST = 8.0  # forward passes of the layer; measured 2 (wanda) to 9 (fista) on a CPU, see docs/ranks.md


class ModelPruning:
    """One run over the decoder layers of a model.

    Attributes:
        layers: The decoder layers.
        operators: The operators to prune.
        stored_names: Where a checkpoint keeps their weights.
        batches: The calibration batches.
        report: The report; decoder layers are added as they are pruned.
        callbacks: What is told of it.
        states: Hidden states that enter the next decoder layer; `None` before the first.
        budgets: The operators' sparsity patterns; `None` before they are shared.
        title: What the progress bar is called.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        calib_dataloader: Iterable[Any],
        config: FistaPruningConfig,
        *,
        calibration_source: str | None = None,
        progress: bool = True,
        storage_device: str | torch.device | Path | None = None,
        callbacks: Sequence[PruningCallback] = (),
    ) -> None:
        require_bare(model)
        require_unquantized(model)
        self.model = model
        self.layers = find_decoder_layers(model)
        self.config = config.resolved()
        self.operators, left_dense = choose_operators(self.layers, config)
        require_own_weights(model, self.layers)
        self.stored_names = stored_names(model, (o for group in self.operators.values() for o in group.values()))
        batches = hold_out(read_batches(calib_dataloader, input_embedding(model).shape[0]), config.held_out)
        self.report = begin_report(model, batches, calibration_source, self.config, self.operators, left_dense)
        self.batches = RunBatches(model, self.layers, batches, self.report)
        self.callbacks = callbacks
        self.progress = progress
        self.title = "Pruning"
        self.storage_device = storage_device
        self.states: HiddenStates | None = None
        self.budgets: Budgets | None = None

    @property
    def storage(self) -> Storage:
        """Where hidden states wait between decoder layers."""
        return storage_place(self.storage_device, execution_device(self.model.get_input_embeddings()))

    @property
    def last_layer(self) -> int:
        """Index of the last decoder layer with an operator to prune."""
        return max(index for index, group in enumerate(self.operators.values()) if group)

    def costs(self) -> list[float]:
        """What pruning each decoder layer costs besides its forward pass, in forward passes of the largest."""
        weights = [sum(o.shape[0] * o.shape[1] for o in group.values()) for group in self.operators.values()]
        return [_PRUNING_COST * count / max(weights) for count in weights]

    def run(self, sink: Sink, todo: Collection[int] | None = None) -> None:
        """Prune decoder layers in place.

        Args:
            sink: Where they go; a layer is committed before callbacks are called with it. Layers after the last
                operator to prune are committed without being run.
            todo: Their indices; `None`: all. If `states` is set, it holds those that enter the first of them;
                otherwise the layers must be independent of each other, and those that are not to do stay dense.

        Raises:
            ValueError: If weights or activations are not finite.
        """
        pruning = self._layer_pruning(self.shared_budgets(), sink)
        todo = range(len(self.layers)) if todo is None else todo
        counts = {index: len(group) for index, group in enumerate(self.operators.values()) if index in todo}
        last = max((index for index, count in counts.items() if count), default=-1)
        with (
            self._split_experts(),
            tqdm(total=sum(counts.values()), desc=self.title, unit="operator", disable=not self.progress) as bar,
        ):
            recorded, self.states = self.batches.record(self.states, self.storage)
            first = 0 if self.states is None else min(todo)
            if self.states is None:
                self.states = pruning.enter(recorded.hidden_states)
            del recorded.hidden_states
            for index, (name, layer) in enumerate(self.layers):
                if index < first or (index > last and index not in todo):
                    recorded.calls[index] = []
                    continue
                started = time.perf_counter()
                record = LayerRecord(LayerReport(name, None, 0.0)) if index > last else None
                with onloaded(layer.modules()):
                    while record is None:
                        record = self._try_layer(name, index, todo, pruning, recorded, bar, sink)
                        if record is None:
                            recorded, self.states = self.batches.record(self.states, self.storage)
                            recorded.hidden_states.clear()
                    recorded.calls[index] = []
                    if index in todo:
                        record = self._finished(record, time.perf_counter() - started)
                        carried = index < self.last_layer and not self.config.independent_layers
                        sink.commit(index, layer, record, self.states if carried else None)
                release_memory_of(layer)
                if index in todo:
                    for callback in self.callbacks:
                        callback.on_layer_end(index, record.report, record.operators)

    def complete_report(self) -> None:
        """Add what the user should know once all operators are pruned.

        Raises:
            UnsupportedArchitectureError: If there is no other.
        """
        complete_report(self.report, self.config, self.layers.name, self.budgets)

    def shared_budgets(self) -> Budgets:
        """The operators' sparsity patterns; the first call shares the zeros.

        Raises:
            ValueError: If gradients of the loss are not finite.
        """
        if self.budgets is None:
            started = time.perf_counter()
            flat = {name: operator for group in self.operators.values() for name, operator in group.items()}
            with self._split_experts():
                calibration, config = self.batches.calibration, self.config
                self.budgets = share_budgets(
                    self.model, self.layers, flat, calibration, config, self.progress, self.storage
                )
            release_memory_of(self.model)
            self.report.seconds["allocation"] = time.perf_counter() - started
        return self.budgets

    def _split_experts(self) -> AbstractContextManager[None]:
        return split_experts(operator for group in self.operators.values() for operator in group.values())

    def _layer_pruning(self, budgets: Budgets, sink: Sink) -> LayerPruning:
        assert self.config.error_correction is not None
        return LayerPruning(
            self.config.create_method(self.model.config.model_type),
            budgets.pattern_for,
            self.config.error_correction,
            sink.write,
            self.config.residual_correction or 0.0,
            budgets.output_weights if self.config.scope == "matrix" else None,
            StarvedRule(self.config.starved_tokens, create_method(self.config.starved_method)),
            keeps_dense=self.config.finetune is not None,
        )

    def _finished(self, record: LayerRecord, seconds: float) -> LayerRecord:
        """The whole record of a layer, which joins the report."""
        prefix = f"{record.report.name}."
        left_dense = {name: why for name, why in self.report.left_dense.items() if name.startswith(prefix)}
        report = replace(record.report, seconds=seconds)
        record = replace(record, report=report, left_dense=left_dense | record.left_dense)
        self.report.add(record)
        return record

    def _try_layer(
        self,
        name: str,
        index: int,
        todo: Collection[int],
        pruning: LayerPruning,
        recorded: RecordedInputs,
        bar: tqdm,
        sink: Sink,
    ) -> LayerRecord | None:
        """Prune or pass a decoder layer; `None`, with it dense again and batches halved, if memory ran out."""
        assert self.states is not None
        entering = HiddenStates(self.states.dense, self.states.pruned)
        layer, shown = self.layers.modules[index], bar.n
        calls, masks = recorded.calls[index], recorded.token_masks
        storage = storage_place(self.storage_device, execution_device(layer))
        try:
            self.states.move(storage, execution_device(layer))
            activations = LayerActivations(layer, calls, masks, storage, recorded.held_out)
            if index in todo:
                return self._prune_layer(pruning, activations, name, index, bar)
            pruning.pass_on(activations, self.states)
            return LayerRecord(LayerReport(name, None, 0.0))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            reason = str(error) or repr(error)
        sink.undo()
        bar.update(shown - bar.n)
        self.states = self.batches.halve(name, reason, entering, self.storage)
        return None

    def _prune_layer(
        self, pruning: LayerPruning, activations: LayerActivations, name: str, index: int, bar: tqdm
    ) -> LayerRecord:
        """Prune the operators of one decoder layer, group by group, and move on the hidden states."""
        assert self.states is not None
        layer, operators = activations.layer, self.operators[name]
        require_finite([operator for operator in operators.values() if operator.is_offloaded])
        entering = self.states.entering[0].to(execution_device(layer))
        groups, left_dense = trace_groups(layer, operators, activations.calls[0], entering)
        bar.update(len(left_dense))
        before, finetuning = HiddenStates(self.states.dense, self.states.pruned), None
        masks: dict[str, Tensor] = {}
        found: list[OperatorReport] = []
        with (
            PeakMemory(execution_device(layer)) as memory,
            closing(pruning.prune(activations, groups, self.states)) as pruned_groups,
        ):
            for group in pruned_groups:
                reports = report_group(group)
                found.extend(reports)
                last = group.operators[-1].name.removeprefix(f"{name}.")
                error, held_out = reports[-1].relative_error, reports[-1].held_out_error
                beside = "" if held_out is None else f", held out {held_out:.4f}"
                bar.set_postfix_str(f"layer {index + 1}/{len(self.layers)} {last} error {error:.4f}{beside}")
                bar.update(len(reports))
                for callback in self.callbacks:
                    for report in reports:
                        callback.on_operator_end(report)
                if self.config.finetune is not None:
                    masks |= {o.name: p.mask for o, p in zip(group.operators, group.pruned, strict=True)}
                del group  # its matrices, before those of the next group are made
            if masks:
                chosen = [operators[operator] for operator in masks]
                finetuning = finetune_layer(activations, chosen, masks, before, self.states, self.config)
        drift = hidden_state_error(self.states, activations)
        peak = memory.peak if operators else None
        return LayerRecord(LayerReport(name, drift, 0.0, peak, finetuning), found, left_dense)
