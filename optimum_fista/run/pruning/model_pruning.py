"""Pruning a model: its decoder layers one after another, each on the device only while it is worked on."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Generator, Iterable, Sequence
from contextlib import AbstractContextManager, closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from optimum_fista.model.activation_store import Storage
from optimum_fista.model.architecture import find_decoder_layers, input_embedding, require_bare, require_own_weights
from optimum_fista.model.calibration import hold_out, read_batches
from optimum_fista.model.experts import split_experts
from optimum_fista.model.hidden_states import RecordedInputs
from optimum_fista.model.offload import execution_device, onloaded
from optimum_fista.model.operator import LinearOperator
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
from optimum_fista.run.reports.report import LayerReport
from optimum_fista.solve.methods import create_method
from optimum_fista.solve.pruned import PrunedOperator

_PRUNING_COST = 8.0  # forward passes of the layer; measured 2 (wanda) to 9 (fista) on a CPU, see docs/ranks.md


class ModelPruning:
    """One run over the decoder layers of a model.

    Attributes:
        layers: The decoder layers.
        operators: The operators to prune.
        stored_names: Where a checkpoint keeps their weights.
        batches: The calibration batches.
        report: The report; operators and decoder layers are added as they are pruned.
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
        write: Callable[[LinearOperator, PrunedOperator], None],
        *,
        calibration_source: str | None = None,
        progress: bool = True,
        storage_device: str | torch.device | Path | None = None,
        undo: Callable[[Sequence[LinearOperator]], None],
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
        self.write = write
        self.undo = undo
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

    def run(self, todo: Collection[int] | None = None) -> Generator[tuple[int, str, nn.Module]]:
        """Prune decoder layers in place.

        Args:
            todo: Their indices; `None`: all. Where `states` is set, it holds those that enter the first of them;
                otherwise the layers must be independent of each other, and those that are not to do stay dense.

        Yields:
            Index, name and module of every such layer when it is pruned, before its weights leave the device, and
            before callbacks are told of it. Layers behind the last operator to prune are not run.

        Raises:
            ValueError: If weights or activations are not finite.
        """
        pruning = self._layer_pruning(self.shared_budgets())
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
                work = self._prune_layer if index in todo else self._pass_on
                done = len(self.report.operators)
                with onloaded(layer.modules()):
                    while index <= last and not self._try_layer(work, pruning, recorded, name, index, bar):
                        recorded, self.states = self.batches.record(self.states, self.storage)
                        recorded.hidden_states.clear()
                    recorded.calls[index] = []
                    if index in todo:
                        if index > last:
                            self.report.layers.append(LayerReport(name, None, 0.0))
                        yield index, name, layer
                release_memory_of(layer)
                if index in todo:
                    for callback in self.callbacks:
                        callback.on_layer_end(index, self.report.layers[-1], self.report.operators[done:])

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

    def _layer_pruning(self, budgets: Budgets) -> LayerPruning:
        assert self.config.error_correction is not None
        return LayerPruning(
            self.config.create_method(self.model.config.model_type),
            budgets.pattern_for,
            self.config.error_correction,
            self._write,
            self.config.residual_correction or 0.0,
            budgets.output_weights if self.config.scope == "matrix" else None,
            StarvedRule(self.config.starved_tokens, create_method(self.config.starved_method)),
            keeps_dense=self.config.finetune is not None,
        )

    def _try_layer(
        self,
        work: Callable[[LayerPruning, LayerActivations, str, int, tqdm], None],
        pruning: LayerPruning,
        recorded: RecordedInputs,
        name: str,
        index: int,
        bar: tqdm,
    ) -> bool:
        """Prune or pass a decoder layer; False, with it dense again and batches halved, where memory ran out."""
        assert self.states is not None
        entering = HiddenStates(self.states.dense, self.states.pruned)
        layer, done = self.layers.modules[index], len(self.report.operators)
        calls, masks = recorded.calls[index], recorded.token_masks
        storage = storage_place(self.storage_device, execution_device(layer))
        self._written: list[LinearOperator] = []
        try:
            self.states.move(storage, execution_device(layer))
            activations = LayerActivations(layer, calls, masks, storage, recorded.held_out)
            work(pruning, activations, name, index, bar)
            return True
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            reason = str(error) or repr(error)
        self.undo(self._written)
        bar.update(done - len(self.report.operators))
        del self.report.operators[done:]
        self.states = self.batches.halve(name, reason, entering, self.storage)
        return False

    def _pass_on(self, pruning: LayerPruning, activations: LayerActivations, *_: object) -> None:
        """Move on the hidden states through a decoder layer that stays dense."""
        assert self.states is not None
        pruning.pass_on(activations, self.states)

    def _write(self, operator: LinearOperator, pruned: PrunedOperator) -> None:
        self._written.append(operator)
        self.write(operator, pruned)

    def _prune_layer(
        self, pruning: LayerPruning, activations: LayerActivations, name: str, index: int, bar: tqdm
    ) -> None:
        """Prune the operators of one decoder layer, group by group, and move on the hidden states."""
        assert self.states is not None
        started = time.perf_counter()
        layer, operators = activations.layer, self.operators[name]
        require_finite([operator for operator in operators.values() if operator.is_offloaded])
        entering = self.states.entering[0].to(execution_device(layer))
        groups, left_dense = trace_groups(layer, operators, activations.calls[0], entering)
        self.report.left_dense |= left_dense
        bar.update(len(left_dense))
        before, finetuning = HiddenStates(self.states.dense, self.states.pruned), None
        masks: dict[str, Tensor] = {}
        with (
            PeakMemory(execution_device(layer)) as memory,
            closing(pruning.prune(activations, groups, self.states)) as pruned_groups,
        ):
            for group in pruned_groups:
                reports = report_group(group)
                self.report.operators.extend(reports)
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
        self.report.layers.append(LayerReport(name, drift, time.perf_counter() - started, peak, finetuning))
