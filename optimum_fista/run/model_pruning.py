"""Pruning a model: its decoder layers one after another, each on the device only while it is worked on."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, closing
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from optimum_fista.model.activation_store import Storage
from optimum_fista.model.architecture import (
    UnsupportedArchitectureError,
    find_decoder_layers,
    input_embedding,
    matches,
)
from optimum_fista.model.calibration import CalibrationBatch, read_batches, tokens_sha256
from optimum_fista.model.experts import split_experts
from optimum_fista.model.hidden_states import RecordedInputs, record_inputs
from optimum_fista.model.offload import execution_device, onloaded
from optimum_fista.model.operator import LinearOperator
from optimum_fista.model.sharing import trace_groups
from optimum_fista.model.statistics import LayerActivations
from optimum_fista.run.batch_size import cut_batches, cut_states, halved_sizes
from optimum_fista.run.budgets import Budgets, share_budgets
from optimum_fista.run.config import FistaPruningConfig
from optimum_fista.run.free_memory import release_free_memory, release_memory_of
from optimum_fista.run.layer_pruning import HiddenStates, LayerPruning, StarvedRule, hidden_state_error, report_group
from optimum_fista.run.loading import require_unquantized, storage_place
from optimum_fista.run.operators import choose_operators, require_finite
from optimum_fista.run.planning.batches import FittedBatches, fit_batches
from optimum_fista.run.pruning_callback import PruningCallback
from optimum_fista.run.report import LayerReport, PruningReport
from optimum_fista.run.stored_names import stored_names
from optimum_fista.solve.methods import create_method
from optimum_fista.solve.pruned import PrunedOperator

_PRUNING_COST = 8.0  # forward passes of the layer; measured 2 (wanda) to 9 (fista) on a CPU, see docs/ranks.md


class ModelPruning:
    """One run over the decoder layers of a model.

    Attributes:
        layers: The decoder layers.
        operators: The operators to prune.
        stored_names: Where a checkpoint keeps their weights.
        batches: Calibration batches.
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
        require_unquantized(model)
        self.model = model
        self.layers = find_decoder_layers(model)
        self.config = config.resolved()
        self.operators, left_dense = choose_operators(self.layers, config)
        self.stored_names = stored_names(model, (o for group in self.operators.values() for o in group.values()))
        self.batches = read_batches(calib_dataloader, input_embedding(model).shape[0])
        self.report = PruningReport(
            config=self.config.to_dict(),
            model=_describe(model),
            calibration=_describe_calibration(self.batches, calibration_source),
            left_dense=left_dense,
        )
        self.write = write
        self.undo = undo
        self.callbacks = callbacks
        self.progress = progress
        self.title = "Pruning"
        self.storage_device = storage_device
        self.states: HiddenStates | None = None
        self.budgets: Budgets | None = None
        self._warn_if_rank_deficient()
        self._warn_if_patterns_match_nothing()

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

    def fitted_batches(self) -> FittedBatches:
        """Batches that the plan of this run finds memory for.

        It is a forecast: where it does not suffice, batches are halved once the memory has run out.
        """
        return fit_batches(self.model, self.config, self.batches, self.storage)

    def use_batches(self, fitted: FittedBatches) -> None:
        """Cut the batches to other sizes."""
        self.batches = cut_batches(self.batches, fitted.sizes)
        if fitted.message:
            self._warn(fitted.message)

    def run(self, todo: Collection[int] | None = None) -> Iterator[tuple[int, str, nn.Module]]:
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
            recorded = self._record()
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
                with onloaded(layer):
                    while index <= last and not self._try_layer(work, pruning, recorded, name, index, bar):
                        recorded = self._record()
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
        if self.budgets is not None and self.budgets.unseen:
            self.report.warnings.append(
                f"the loss does not feel {len(self.budgets.unseen)} operators on the first "
                f"{self.config.allocation_tokens} calibration tokens, so they keep the average sparsity: "
                f"{', '.join(self.budgets.unseen[:4])}"
            )
        chosen = ("router", "exclude")
        reasons = {name: reason for name, reason in self.report.left_dense.items() if reason not in chosen}
        left = {name: reason for name, reason in reasons.items() if self.config.reason_left_dense(name) is None}
        if not self.report.operators:
            name = next(iter(left))
            raise UnsupportedArchitectureError(
                f"no linear operator of {self.layers.name} can be pruned; {name}, for one: {left[name]}."
            )
        if left:
            shown = ", ".join(f"{name} ({reason})" for name, reason in list(left.items())[:4])
            self._warn(f"{len(left)} operators were left dense: {shown}{', ...' if len(left) > 4 else ''}")
        operators = self.report.operators
        self.report.warnings.extend(f"{o.name}: {o.message}" for o in operators if o.message and not o.converged)
        starved = [o for o in operators if o.method != self.config.method]
        if starved:
            least = min(starved, key=lambda o: o.num_tokens)
            self._warn(
                f"{len(starved)} of {len(operators)} operators belong to experts that fewer than "
                f"{self.config.starved_tokens} calibration tokens reached, and were pruned by "
                f"{self.config.starved_method} ({least.name}: {least.num_tokens}). Pass more calibration tokens."
            )

    def _warn_if_rank_deficient(self) -> None:
        """Warn once when an operator has more inputs than there are calibration tokens."""
        tokens = self.report.calibration["num_tokens"]
        widest = max((o for group in self.operators.values() for o in group.values()), key=lambda o: o.shape[1])
        if tokens < widest.shape[1]:
            self._warn(
                f"{tokens} calibration tokens for the {widest.shape[1]} inputs of {widest.name}: its Gram matrix is "
                "rank-deficient and the result will fit these tokens only. Pass more calibration tokens."
            )

    def _warn_if_patterns_match_nothing(self) -> None:
        """Warn of name patterns that say something about no operator, such as those that end with ".weight"."""
        pruned = [name for group in self.operators.values() for name in group]
        names = [*pruned, *self.report.left_dense]
        for option in ("include", "exclude", "overrides"):
            idle = [p for p in getattr(self.config, option) if not any(matches(name, (p,)) for name in names)]
            if idle:
                shown = ", ".join(map(repr, idle))
                self._warn(f"{option}: {shown} matches no linear operator of the decoder layers: {pruned[0]!r} is one.")

    def _warn(self, message: str) -> None:
        self.report.warnings.append(message)
        warnings.warn(message, stacklevel=5)

    def shared_budgets(self) -> Budgets:
        """The operators' sparsity patterns; the first call shares the zeros.

        Raises:
            ValueError: If gradients of the loss are not finite.
        """
        if self.budgets is None:
            started = time.perf_counter()
            flat = {name: operator for group in self.operators.values() for name, operator in group.items()}
            with self._split_experts():
                self.budgets = share_budgets(self.model, self.layers, flat, self.batches, self.config, self.progress)
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
        )

    def take_batches_of(self, states: HiddenStates) -> None:
        """Cut the calibration batches as those of hidden states that a run before has left."""
        sizes = [hidden.shape[0] for hidden in states.entering]
        if sizes != [batch.input_ids.shape[0] for batch in self.batches]:
            self.batches = cut_batches(self.batches, sizes)
            self.report.warnings.append(f"goes on with the batches of the run before, {max(sizes)} sequences at most")

    def _halve_batches(self, where: str, reason: str, states: HiddenStates | None) -> None:
        """Cut every batch in two after the device ran out of memory; `states` enter the decoder layer at hand."""
        sizes = halved_sizes(self.batches, reason)
        self.batches = cut_batches(self.batches, sizes)
        if states is not None:
            device = execution_device(self.model.get_input_embeddings())
            self.states = cut_states(states, sizes, self.storage, device)
        release_free_memory(collect=True)
        message = f"out of memory in {where}: batches of {max(sizes)} sequences from here on ({reason.splitlines()[0]})"
        self.report.warnings.append(message)
        warnings.warn(message, stacklevel=5)

    def _record(self) -> RecordedInputs:
        """What the decoder layers are called with, in batches that fit into the memory."""
        while True:
            try:
                return record_inputs(self.model, self.layers, self.batches, self.storage)
            except torch.OutOfMemoryError as error:
                reason = str(error)
            self._halve_batches("the embeddings", reason, self.states)

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
        activations = LayerActivations(layer, recorded.calls[index], recorded.token_masks, self.storage)
        self._written: list[LinearOperator] = []
        try:
            work(pruning, activations, name, index, bar)
            return True
        except torch.OutOfMemoryError as error:
            reason = str(error)
        self.undo(self._written)
        bar.update(done - len(self.report.operators))
        del self.report.operators[done:]
        self._halve_batches(name, reason, entering)
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
        for operator in operators.values():
            if operator.is_offloaded:
                require_finite(operator)
        entering = self.states.entering[0].to(execution_device(layer))
        groups, left_dense = trace_groups(layer, operators, activations.calls[0], entering)
        self.report.left_dense |= left_dense
        bar.update(len(left_dense))
        with closing(pruning.prune(activations, groups, self.states)) as pruned_groups:
            for group in pruned_groups:
                reports = report_group(group)
                self.report.operators.extend(reports)
                last = group.operators[-1].name.removeprefix(f"{name}.")
                error = reports[-1].relative_error
                bar.set_postfix_str(f"layer {index + 1}/{len(self.layers)} {last} error {error:.4f}")
                bar.update(len(reports))
                for callback in self.callbacks:
                    for report in reports:
                        callback.on_operator_end(report)
                del group  # its matrices, before those of the next group are made
        drift = hidden_state_error(self.states, activations.token_masks)
        self.report.layers.append(LayerReport(name, drift, time.perf_counter() - started))


def _describe(model: PreTrainedModel) -> dict[str, Any]:
    return {
        "class": type(model).__name__,
        "model_type": model.config.model_type,
        "name": getattr(model.config, "_name_or_path", "") or "",
        "num_parameters": model.num_parameters(),
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def _describe_calibration(batches: list[CalibrationBatch], source: str | None) -> dict[str, Any]:
    return {
        "source": source,
        "sha256": tokens_sha256(batches),
        "num_sequences": sum(batch.input_ids.shape[0] for batch in batches),
        "num_tokens": sum(batch.num_tokens for batch in batches),
    }
