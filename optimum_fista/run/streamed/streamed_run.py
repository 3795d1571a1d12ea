"""One run from a model's files to shards, by one process or several."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from optimum_fista.model.evaluation_mode import evaluation_mode
from optimum_fista.model.operator import LinearOperator
from optimum_fista.run.callbacks.pruning_callback import PruningCallback
from optimum_fista.run.checkpoints.output_folder import FOLDER, discard, install
from optimum_fista.run.checkpoints.stored_names import as_stored
from optimum_fista.run.config import FistaPruningConfig
from optimum_fista.run.packed_folders.packing import Packer
from optimum_fista.run.pruning.model_pruning import ModelPruning
from optimum_fista.run.reports.report import LayerReport, OperatorReport, PruningReport
from optimum_fista.run.rollback import Rollback
from optimum_fista.run.streamed.fingerprint import digests, hash_weights, is_of_another_run, run_fingerprint
from optimum_fista.run.streamed.journal import WEIGHTS_FILE, FinishedLayer, Journal, read_record
from optimum_fista.run.streamed.ranks import RankError, Ranks
from optimum_fista.run.streamed.remaining_files import as_saved, write_remaining
from optimum_fista.run.streamed.shares import share_layers
from optimum_fista.solve.bitmask import pack_mask
from optimum_fista.solve.pruned import PrunedOperator


class StreamedRun:
    """One run from files to shards."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        calib_dataloader: Iterable[Any],
        config: FistaPruningConfig,
        source: str | None,
        progress: bool,
        storage_device: str | torch.device | Path | None,
        callbacks: Sequence[PruningCallback],
        packed: bool,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.packed = packed
        self.masks: dict[str, Tensor] = {}
        self.finished: dict[int, FinishedLayer] = {}
        self.rollback = Rollback(model, evaluation_mode(model), torch.no_grad())
        self.pruning = ModelPruning(
            model,
            calib_dataloader,
            config,
            self._write,
            calibration_source=source,
            progress=progress,
            storage_device=storage_device,
            undo=self.rollback.undo,
            callbacks=callbacks,
        )

    def store_beside(self, folder: Path) -> None:
        """Keep activations in files of the output's disk, where files are asked for or the device is the CPU."""
        on_cpu = self.pruning.storage_device is None and self.pruning.storage == torch.device("cpu")
        if on_cpu or self.pruning.storage_device == "disk":
            self.pruning.storage_device = folder

    def open(self, folder: Path, source: Path, overwrite: bool, ranks: Ranks) -> None:
        """Open the journal of the run that prunes the weights in `source` as this one."""
        num_layers = len(self.pruning.layers)
        self.source = source
        known = ranks.first(lambda: hash_weights(source, read_record(folder / FOLDER / WEIGHTS_FILE) or {}))
        self.weights = ranks.each(lambda: hash_weights(source, known))
        fingerprint = run_fingerprint(self.weights, self.pruning) | ({"packed": True} if self.packed else {})

        def begin() -> dict[str, Any]:
            if overwrite and is_of_another_run(folder, fingerprint):
                discard(folder, overwrite)
            Journal(folder, fingerprint, num_layers, self.packed).keep_weights(self.weights)
            return fingerprint

        def join(begun: dict[str, Any]) -> Journal:
            different = [key for key in fingerprint if fingerprint[key] != begun[key]]
            if different:
                raise ValueError(
                    f"{' and '.join(different)} differ from those of rank 0: start every process with the same "
                    "model, configuration and calibration batches."
                )
            return Journal(folder, fingerprint, num_layers, self.packed)

        begun = ranks.first(begin)
        self.journal = ranks.each(lambda: join(begun))

    def begin(self) -> None:
        """Tell callbacks that the run is about to prune."""
        for callback in self.pruning.callbacks:
            callback.on_prune_begin(self.pruning.report)

    def prune(self, ranks: Ranks) -> None:
        """Prune this process's share of the decoder layers that are left, and write each for good."""
        with self.rollback:
            ranks.first(self._share_budgets)
            self.finished = ranks.first(self._finished)
            unfinished = [index for index in range(len(self.pruning.layers)) if index not in self.finished]
            if unfinished:
                todo = share_layers(unfinished, self.pruning.costs(), ranks.count)[ranks.index]
                ranks.each(lambda: self._prune_layers(todo))

    def complete(self, output_dir: Path, overwrite: bool, started: float) -> PruningReport:
        """Write all that is not a decoder layer, and bring the model into `output_dir`.

        Raises:
            ValueError: If the weights changed meanwhile.
            RankError: If decoder layers are not there.
        """
        report, journal = self.pruning.report, self.journal
        layers = journal.finished(read_shards=False)
        if len(layers) < len(self.pruning.layers):
            raise RankError("decoder layers that other ranks finished are not here: pass a folder that all nodes share")
        report.operators = [operator for _, layer in sorted(layers.items()) for operator in layer.operators]
        report.layers = [
            LayerReport(name, done.hidden_state_error, done.seconds, done.memory, done.finetuning)
            for (_, done), (name, _) in zip(sorted(layers.items()), self.pruning.layers, strict=True)
        ]
        report.seconds["total"] = time.perf_counter() - started + sum(o.seconds for o in self.finished.values())
        report.left_dense = {k: why for _, layer in sorted(layers.items()) for k, why in layer.left_dense.items()}
        self.pruning.complete_report()
        masks = {name: mask for index in sorted(layers) for name, mask in journal.masks(index).items()}
        report, masks = as_stored(report, masks, self.pruning.stored_names)
        ours = {layer.shard for layer in layers.values()}
        for pattern in (".tmp*", ".*.partial", "*.safetensors"):
            for left in [path for path in journal.folder.glob(pattern) if path.name not in ours]:
                left.unlink()  # of a process that was killed while it wrote, or of a run with more layers
        write_remaining(self.model, self.tokenizer, report, None if self.packed else masks, journal, layers)
        self._require_same_weights()
        install(journal.folder, output_dir, overwrite)
        return report

    def kept(self) -> str:
        """What is not lost."""
        finished = len(self.journal.finished(read_shards=False))
        total, folder = len(self.pruning.layers), str(self.journal.folder)
        return f"{finished} of {total} decoder layers are finished and kept in {folder!r}"

    def _finished(self) -> dict[int, FinishedLayer]:
        """The decoder layers that need not be pruned again.

        They were pruned with the budgets at hand. If layers depend on each other, these are the first ones, each pruned
        on the hidden states that the layer before it left.
        """
        journal, pruning = self.journal, self.pruning
        finished = {
            i: layer for i, layer in journal.finished().items() if layer.budgets_sha256 == journal.budgets_sha256
        }
        if pruning.config.independent_layers:
            return finished
        first, states = 0, None
        while first in finished and finished[first].entered_sha256 == states:
            first, states = first + 1, finished[first].states_sha256
        if 0 < first <= pruning.last_layer:
            pruning.states = journal.states(first, states, pruning.storage)
            if pruning.states is None:
                first = 0  # they can't be made again without the layers before
            else:
                pruning.batches.use_sizes_of(pruning.states)
        return {index: finished[index] for index in range(first)}

    def _share_budgets(self) -> None:
        """Share the zeros over the operators, or take up how they were shared."""
        self.pruning.budgets = self.journal.budgets(self.pruning.config)
        if self.pruning.budgets is None:
            budgets = self.pruning.shared_budgets()
            self._require_same_weights()
            self.journal.keep_budgets(budgets)

    def _prune_layers(self, todo: Sequence[int]) -> None:
        pruning, journal = self.pruning, self.journal
        if pruning.budgets is None:
            pruning.budgets = journal.budgets(pruning.config)
        if not todo:
            return
        started = time.perf_counter()
        for index, name, layer in pruning.run(todo):
            self.rollback.forget()
            tensors = {f"{name}.{key}": tensor for key, tensor in layer.state_dict().items()}
            tensors = as_saved(self.model, tensors)
            masks, self.masks = self.masks, {}
            reports = [o for o in pruning.report.operators if o.name.startswith(f"{name}.")]
            if self.packed:
                tensors = self._pack(tensors, reports, masks)
            carried = index < pruning.last_layer and not pruning.config.independent_layers
            states = pruning.states if carried else None
            left_dense = {key: why for key, why in pruning.report.left_dense.items() if key.startswith(f"{name}.")}
            seconds, found = time.perf_counter() - started, pruning.report.layers[-1]
            numbers = (found.hidden_state_error, found.memory, found.finetuning)
            self._require_same_weights()
            journal.keep_layer(index, tensors, masks, reports, left_dense, states, seconds, *numbers)
            del tensors
            started = time.perf_counter()

    def _require_same_weights(self) -> None:
        """Refuse what was made of weights that changed after they were hashed."""
        found = hash_weights(self.source, self.weights)
        if digests(found) != digests(self.weights):
            raise ValueError(
                f"the weight files in {str(self.source)!r} changed while they were pruned: put them back and start "
                "again with the same output, or pass overwrite=True (--overwrite) to begin with what they are now."
            )
        self.weights = found

    def _pack(
        self, tensors: dict[str, Tensor], operators: list[OperatorReport], masks: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """The tensors of a decoder layer as a packed folder stores them."""
        layer = dataclasses.replace(self.pruning.report, operators=operators)
        report, stored = as_stored(layer, masks, self.pruning.stored_names)
        return Packer(report.operators, tensors, stored.__getitem__).pack(tensors)

    def _write(self, operator: LinearOperator, pruned: PrunedOperator) -> None:
        self.rollback.write(operator, pruned.weight)
        self.masks[f"{operator.name}.weight"] = pack_mask(pruned.mask.T if operator.transposed else pruned.mask)
