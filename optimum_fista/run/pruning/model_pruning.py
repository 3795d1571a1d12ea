"""What a run over the decoder layers of a model begins with: operators, batches, budgets, report."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from optimum_fista.model import UnsupportedArchitectureError
from optimum_fista.model.activation_store import Storage
from optimum_fista.model.activations import HiddenStates
from optimum_fista.model.architecture import (
    find_decoder_layers,
    input_embedding,
    names_around,
    position_limit,
    require_bare,
    require_own_weights,
)
from optimum_fista.model.calibration import hold_out, read_batches
from optimum_fista.model.digest import combined_sha256, sha256_of
from optimum_fista.model.experts import split_experts
from optimum_fista.model.held_out import HeldOut
from optimum_fista.model.losses import choose_layers
from optimum_fista.model.offload import execution_device, settle_ties
from optimum_fista.model.parts import Part, find_parts
from optimum_fista.model.products import compute_dtype_of, quick_products_in
from optimum_fista.model.sensitivity import DenseLoss
from optimum_fista.run.callbacks.pruning_callback import PruningCallback
from optimum_fista.run.checkpoints.loading import require_unquantized, storage_place
from optimum_fista.run.checkpoints.stored_names import StoredName, stored_names
from optimum_fista.run.config import FistaPruningConfig
from optimum_fista.run.memory import release_memory_of
from optimum_fista.run.pruning.budgets import Budgets, share_budgets
from optimum_fista.run.pruning.removal import plan_run
from optimum_fista.run.pruning.run_batches import RunBatches
from optimum_fista.run.pruning.run_report import begin_report, complete_report
from optimum_fista.run.pruning.size import with_channels_for_size
from optimum_fista.run.reports.report import LayerRecord, public_name

_PRUNING_COST = 8.0  # forward passes of the layer; measured 2 (wanda) to 9 (fista) on a CPU, see docs/ranks.md


class ModelPruning:
    """One run over the decoder layers of a model.

    Attributes:
        layers: The decoder layers.
        operators: The operators to prune.
        stored_names: Where a checkpoint keeps their weights.
        batches: The calibration batches.
        compute_dtype: Dtype of the products in forward passes and in sums over tokens.
        report: The report; decoder layers are added as they are pruned.
        callbacks: Called while it prunes.
        states: Hidden states that enter the next decoder layer; `None` before the first.
        budgets: The operators' sparsity patterns; `None` before zeros are allocated.
        removal: How whole parts of the model are removed; `None` if they are not.
        channels: Parts whose channels change places, by the names of their down projections.
        removed: Numbers of the decoder layers that are removed; known with the budgets.
        title: What the progress bar is called.
        num_before: Operators of decoder layers that an earlier start of the run finished.
        held_out: Sequences on which the perplexity is measured before and after; `None` if there are none.
        dense_layers: Digests of all decoder layers before they were pruned, once they are.
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
        settle_ties(model)
        self.model = model
        self.layers = find_decoder_layers(model)
        asked = with_channels_for_size(model, config.resolved())
        self.channels: dict[str, Part] = {}
        if asked.reorder_channels:
            try:
                self.channels = {part.name: part for part in find_parts(model, "channels").parts}
            except UnsupportedArchitectureError as error:
                raise UnsupportedArchitectureError(f"reorder_channels=True: {error} Leave it out.") from error
        self.removal, self.config, self.operators, left_dense = plan_run(model, self.layers, asked)
        chosen = (o for group in self.operators.values() for o in group.values())
        self.stored_names: dict[str, StoredName] = stored_names(model, chosen)
        require_own_weights(model, self.layers)
        vocab_size = input_embedding(model).shape[0]
        given = read_batches(calib_dataloader, vocab_size, position_limit(model))
        measured = [batch for batch in given if batch.held_out]
        batches = hold_out([batch for batch in given if not batch.held_out], config.held_out)
        self.compute_dtype = compute_dtype_of(config.compute_dtype, execution_device(model.get_input_embeddings()))
        self.report = begin_report(model, batches + measured, calibration_source, asked, self.operators, left_dense)
        self.batches = RunBatches(model, self.layers, batches, self.report)
        self.callbacks = callbacks
        self.progress = progress
        self.title = "Pruning"
        self.num_before = 0
        self.dense_layers: list[str | None] = []
        self.storage_device = storage_device
        self.states: HiddenStates | None = None
        self.budgets: Budgets | None = None
        self.removed: frozenset[int] = frozenset()
        loses_experts = self.removal is not None and any(map(self.removal.mixture_of, self.operators))
        if not measured:
            measured = [replace(batch, text=calibration_source) for batch in batches if batch.held_out]
        self.held_out: HeldOut | None = None
        if measured and not loses_experts:
            held_out = HeldOut(model, self.layers, measured, self.storage)
            self.held_out = held_out if held_out.sequences else None

    @property
    def storage(self) -> Storage:
        """Where hidden states wait between decoder layers."""
        return storage_place(self.storage_device, execution_device(self.model.get_input_embeddings()))

    @property
    def num_steps(self) -> list[int]:
        """How many operators each decoder layer has to prune; a mixture that loses experts counts as one."""
        mixtures = (self.removal is not None and self.removal.mixture_of(name) is not None for name in self.operators)
        return [len(group) + loses for group, loses in zip(self.operators.values(), mixtures, strict=True)]

    @property
    def last_layer(self) -> int:
        """Index of the last decoder layer with something to prune; -1 if there is none."""
        return max((index for index, count in enumerate(self.num_steps) if count), default=-1)

    def costs(self) -> list[float]:
        """What pruning each decoder layer costs besides its forward pass, in forward passes of the largest."""
        weights = [sum(o.shape[0] * o.shape[1] for o in group.values()) for group in self.operators.values()]
        return [_PRUNING_COST * count / max(1, *weights) for count in weights]

    def complete_report(self) -> None:
        """Add what the user should know once all operators are pruned."""
        complete_report(self.report, self.config, self.layers.name, self.budgets)
        if self.held_out is not None and (found := self.held_out.perplexity()) is not None:
            text = self.held_out.text and public_name(self.held_out.text)
            self.report.perplexity = found | {"text": text, "vocabulary": input_embedding(self.model).shape[0]}
        rest = sha256_of(self.model, names_around(self.model, self.layers))
        self.report.model["sha256"] = combined_sha256([*map(str, self.dense_layers), rest])
        if self.removal is not None:
            self.removal.describe(self.report)

    def shared_budgets(self) -> Budgets:
        """The operators' sparsity patterns; the first call chooses the decoder layers to remove and allocates zeros."""
        if self.budgets is None:
            started, removed = time.perf_counter(), list[tuple[int, float]]()
            calibration, tokens = self.batches.calibration, self.config.allocation_tokens
            loss = DenseLoss(self.model, self.layers, calibration, tokens, self.progress, self.storage)
            if self.removal is not None and self.removal.num_removed_layers:
                with quick_products_in(self.compute_dtype):
                    removed = choose_layers(loss, self.removal.num_removed_layers)
            gone = {f"{self.layers.name}.{index}" for index, _ in removed}
            left = [group for name, group in self.operators.items() if name not in gone]
            flat = {name: operator for group in left for name, operator in group.items()}
            with self.working():
                budgets = share_budgets(loss, flat, self.config)
            budgets.removed_layers = removed
            self.use_budgets(budgets)
            release_memory_of(self.model)
            self.report.seconds["allocation"] = time.perf_counter() - started
        assert self.budgets is not None
        return self.budgets

    def use_budgets(self, budgets: Budgets) -> None:
        """Prune with budgets that were shared before, and without what they remove."""
        if budgets.removed_layers:
            assert self.removal is not None
            losses = dict(budgets.removed_layers)
            self.removed = frozenset(losses)
            self.operators = self.removal.remove_layers(self.model, self.layers, self.operators, losses)
            self.config = budgets.config = self.removal.config
            chosen = (o for group in self.operators.values() for o in group.values())
            self.stored_names = stored_names(self.model, chosen, self.removal.plan.new_name)
            self.report.left_dense = self.removal.reasons_left_dense(self.report.left_dense, self.operators)
        self.budgets = budgets

    @contextmanager
    def working(self) -> Iterator[None]:
        """Inside, every matrix of every expert to prune is called as a module, and products are in the run's dtype."""
        operators = (operator for group in self.operators.values() for operator in group.values())
        with split_experts(operators), quick_products_in(self.compute_dtype):
            yield

    def finished(self, record: LayerRecord, seconds: float, dense_sha256: str | None) -> LayerRecord:
        """The whole record of a layer, which joins the report."""
        prefix = f"{record.report.name}."
        left_dense = {name: why for name, why in self.report.left_dense.items() if name.startswith(prefix)}
        report = replace(record.report, seconds=seconds, dense_sha256=dense_sha256)
        self.dense_layers.append(dense_sha256)
        record = replace(record, report=report, left_dense=left_dense | record.left_dense)
        self.report.add(record)
        return record
