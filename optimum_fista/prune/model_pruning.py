"""What a run over the decoder layers of a model begins with, and what changes on its way: batches, budgets, report."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from optimum_fista.config import FistaPruningConfig
from optimum_fista.folder.loading import require_unquantized, storage_place
from optimum_fista.folder.stored_names import StoredName, stored_names
from optimum_fista.memory import is_out_of_memory, release_memory
from optimum_fista.model import UnsupportedArchitectureError
from optimum_fista.model.activation_store import ActivationStore, Storage
from optimum_fista.model.architecture import prunable_layers, token_limits
from optimum_fista.model.calibration import CalibrationBatch, hold_out, read_batches
from optimum_fista.model.forward import compute_dtype_of, quick_products_in
from optimum_fista.model.held_out import HeldOut
from optimum_fista.model.layer_inputs import HiddenStates, RecordedInputs, record_inputs
from optimum_fista.model.losses import choose_layers
from optimum_fista.model.offload import combined_sha256, execution_device, sha256_of
from optimum_fista.model.operator import split_experts
from optimum_fista.model.parts import Part, find_parts
from optimum_fista.model.sensitivity import DenseLoss
from optimum_fista.prune.budgets import Budgets, share_budgets
from optimum_fista.prune.callback import PruningCallback
from optimum_fista.prune.plan import plan_run
from optimum_fista.prune.removal import PartsRemoval
from optimum_fista.prune.run_report import begin_report, complete_report
from optimum_fista.report import LayerRecord, public_name

_PRUNING_COST = 8.0  # forward passes of the layer; measured 2 (wanda) to 9 (fista) on a CPU, see docs/ranks.md


class ModelPruning:
    """One run over the decoder layers of a model, whose `operators` it prunes.

    `states` enter the next decoder layer, `batches` have held-out sequences at the end, and zeros are allocated once
    there are `budgets`. `channels` are parts whose channels change places, `removed` decoder layers that go.
    `held_out` is `None` if no perplexity is measured.
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
        self.model, self.layers = model, prunable_layers(model)
        require_unquantized(model)
        self.channels: dict[str, Part] = {}
        if config.reorder_channels:
            try:
                self.channels = {part.name: part for part in find_parts(model, "channels").parts}
            except UnsupportedArchitectureError as error:
                raise UnsupportedArchitectureError(f"reorder_channels=True: {error} Leave it out.") from error
        self.removal, self.config, self.operators, left_dense = plan_run(model, self.layers, config.resolved())
        chosen = (o for group in self.operators.values() for o in group.values())
        self.stored_names: dict[str, StoredName] = stored_names(model, chosen)
        given = read_batches(calib_dataloader, *token_limits(model))
        measured = [batch for batch in given if batch.held_out]
        self.batches = hold_out([batch for batch in given if not batch.held_out], config.held_out)
        self.report = begin_report(
            model, self.batches + measured, calibration_source, self.removal.asked, self.operators, left_dense
        )
        self._compute_dtype = compute_dtype_of(config.compute_dtype, execution_device(model.get_input_embeddings()))
        self.report.environment["products"] = str(self._compute_dtype)
        self.callbacks = callbacks
        self.progress = progress
        self.title, self.num_before = "Pruning", 0  # what the progress bar says, and where it begins
        self.dense_layers: list[str | None] = []  # digests of the layers before they were pruned, once they are
        self.storage_device = storage_device
        self.states: HiddenStates | None = None
        self.budgets: Budgets | None = None
        self.removed: frozenset[int] = frozenset()
        if not measured:
            measured = [replace(batch, text=calibration_source) for batch in self.batches if batch.held_out]
        self.held_out: HeldOut | None = None
        if measured and not any(map(self.removal.mixture_of, self.operators)):
            held_out = HeldOut(self.layers, measured, self.storage)
            self.held_out = held_out if held_out.sequences else None

    @property
    def storage(self) -> Storage:
        """Where hidden states wait between decoder layers."""
        return storage_place(self.storage_device, execution_device(self.model.get_input_embeddings()))

    @property
    def pruned_layers(self) -> list[int]:
        """Indices of the decoder layers with something to prune; losing experts counts."""
        groups = enumerate(self.operators.items())
        return [i for i, (name, group) in groups if group or self.removal.mixture_of(name)]

    def costs(self) -> list[float]:
        """What pruning each decoder layer costs besides its forward pass, in forward passes of the largest."""
        weights = [sum(o.shape[0] * o.shape[1] for o in group.values()) for group in self.operators.values()]
        return [_PRUNING_COST * count / max(1, *weights) for count in weights]

    @contextmanager
    def working(self) -> Iterator[None]:
        """Inside, every matrix of every expert to prune is called as a module, and products are in the run's dtype."""
        operators = (operator for group in self.operators.values() for operator in group.values())
        with split_experts(operators), quick_products_in(self._compute_dtype):
            yield

    def shared_budgets(self) -> Budgets:
        """The operators' sparsity patterns; the first call chooses the decoder layers to remove and allocates zeros."""
        if self.budgets is None:
            started, removed = time.perf_counter(), list[tuple[int, float]]()
            calibration = [batch for batch in self.batches if not batch.held_out]
            tokens = self.config.allocation_tokens
            loss = DenseLoss(self.layers, calibration, tokens, self.progress, self.storage)
            if self.removal.num_removed_layers:
                with quick_products_in(self._compute_dtype):
                    removed = choose_layers(loss, self.removal.num_removed_layers)
            gone = {f"{self.layers.name}.{index}" for index, _ in removed}
            left = [group for name, group in self.operators.items() if name not in gone]
            flat = {name: operator for group in left for name, operator in group.items()}
            with self.working():
                budgets = share_budgets(loss, flat, self.config)
            budgets.removed_layers = removed
            self.use_budgets(budgets)
            release_memory(self.model)
            self.report.seconds["allocation"] = time.perf_counter() - started
        assert self.budgets is not None
        return self.budgets

    def use_budgets(self, budgets: Budgets) -> None:
        """Prune with budgets that were shared before, and without what they remove."""
        if budgets.removed_layers:
            assert isinstance(self.removal, PartsRemoval)
            losses = dict(budgets.removed_layers)
            self.removed = frozenset(losses)
            self.operators = self.removal.remove_layers(self.model, self.layers, self.operators, losses)
            self.config = budgets.config = self.removal.config
            chosen = (o for group in self.operators.values() for o in group.values())
            self.stored_names = stored_names(self.model, chosen, self.removal.plan.new_name)
            self.report.left_dense = self.removal.reasons_left_dense(self.report.left_dense, self.operators)
        self.budgets = budgets

    def record(self) -> RecordedInputs:
        """What the decoder layers are called with, in batches that fit into the memory; `states` are cut like them."""
        while True:
            try:
                recorded = record_inputs(self.model, self.layers, self.batches, self.storage)
                break
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                reason = str(error) or repr(error)
            # outside of the handler: the error holds the frames, and they hold what filled the memory
            self.halve("the embeddings", reason)
        if recorded.handed_on and self.report.operators:  # what is handed on must be the dense network's
            most = max(batch.input_ids.shape[0] for batch in self.batches)
            raise torch.OutOfMemoryError(
                f"the device ran out of memory after the first decoder layer of a {type(self.model).__name__}, whose "
                f"decoder layers hand more to the next than hidden states: pass batches of at most {most} sequences."
            )
        return recorded

    def halve(self, where: str, reason: str) -> None:
        """Cut every batch in two after the device ran out of memory in `where`; `reason` is what it said."""
        sizes = [batch.input_ids.shape[0] for batch in self.batches]
        if max(sizes) == 1:
            longest = max(batch.input_ids.shape[1] for batch in self.batches)
            raise torch.OutOfMemoryError(
                f"the device ran out of memory on a batch of one sequence of {longest} tokens: pass "
                f"storage_device='cpu' (--storage-device cpu) or shorter sequences (--sequence-length) [{reason}]"
            )
        sizes = [part for size in sizes for part in ((size + 1) // 2, size // 2) if part]
        self.batches = cut_batches(self.batches, sizes)
        if self.states is not None:
            device = execution_device(self.model.get_input_embeddings())
            self.states = cut_states(self.states, sizes, self.storage, device)
        release_memory(collect=True)
        self.report.warn(
            f"out of memory in {where}: batches of {max(sizes)} sequences from here on ({reason.splitlines()[0]})"
        )

    def resume(self, states: HiddenStates) -> None:
        """Go on with hidden states that a run before has left, and with batches as large as theirs."""
        self.states, sizes = states, [hidden.shape[0] for hidden in states.entering]
        if sizes != [batch.input_ids.shape[0] for batch in self.batches]:
            self.batches = cut_batches(self.batches, sizes)
            self.report.warnings.append(f"continues with the batches of the last run, {max(sizes)} sequences at most")

    def finished(self, record: LayerRecord, seconds: float, dense_sha256: str | None) -> LayerRecord:
        """The whole record of a layer, which joins the report."""
        prefix = f"{record.report.name}."
        left_dense = {name: why for name, why in self.report.left_dense.items() if name.startswith(prefix)}
        report = replace(record.report, seconds=seconds, dense_sha256=dense_sha256)
        self.dense_layers.append(dense_sha256)
        record = replace(record, report=report, left_dense=left_dense | record.left_dense)
        self.report.add(record)
        return record

    def complete_report(self) -> None:
        """Add what the user should know once all operators are pruned."""
        complete_report(self.report, self.config, self.layers.name, self.budgets)
        if self.held_out is not None and (found := self.held_out.perplexity()) is not None:
            text = self.held_out.text and public_name(self.held_out.text)
            self.report.perplexity = found | {"text": text, "vocabulary": token_limits(self.model)[0]}
        rest = sha256_of(self.model, self.layers.names_around)
        self.report.model["sha256"] = combined_sha256([*map(str, self.dense_layers), rest])
        self.removal.describe(self.report)


def cut_batches(batches: Sequence[CalibrationBatch], sizes: Sequence[int]) -> list[CalibrationBatch]:
    """The same sequences in batches of other sizes, none of which reaches over the end of a batch."""
    cut, wanted = [], iter(sizes)
    for batch in batches:
        row = 0
        while row < batch.input_ids.shape[0]:
            end = row + next(wanted)
            cut.append(batch.sequences(row, end))
            row = end
    return cut


def cut_states(states: HiddenStates, sizes: Sequence[int], storage: Storage, device: torch.device) -> HiddenStates:
    """The same hidden states in batches of other sizes, kept at `storage`."""

    def cut(stream: Sequence[Tensor] | None) -> ActivationStore | None:
        if stream is None:
            return None
        store, wanted = ActivationStore(storage, device), iter(sizes)
        for hidden in stream:
            row = 0
            while row < hidden.shape[0]:
                size = next(wanted)
                store.append(hidden[row : row + size])
                row += size
        return store

    dense = cut(states.dense)  # before the first pruned layer both streams are the same tensors: cut them once
    return HiddenStates(dense, dense if states.pruned is states.dense else cut(states.pruned))
