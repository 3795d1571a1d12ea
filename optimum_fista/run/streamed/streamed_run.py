"""One run from a model's files to shards, by one process or several."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from optimum_fista.model.evaluation_mode import evaluation_mode
from optimum_fista.run.callbacks.pruning_callback import PruningCallback
from optimum_fista.run.checkpoints.installation import discard, install
from optimum_fista.run.checkpoints.output_folder import FOLDER
from optimum_fista.run.checkpoints.stored_names import as_stored
from optimum_fista.run.config import FistaPruningConfig
from optimum_fista.run.pruning.model_pruning import ModelPruning
from optimum_fista.run.reports.report import PruningReport
from optimum_fista.run.streamed.file_sink import FileSink
from optimum_fista.run.streamed.fingerprint import SourceFiles, is_of_another_run, run_fingerprint
from optimum_fista.run.streamed.journal import WEIGHTS_FILE, Journal, KeptLayer, read_record
from optimum_fista.run.streamed.ranks import RankError, Ranks
from optimum_fista.run.streamed.remaining_files import write_remaining
from optimum_fista.run.streamed.shares import share_layers


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
        self.finished: dict[int, KeptLayer] = {}
        self.pruning = ModelPruning(
            model,
            calib_dataloader,
            config,
            calibration_source=source,
            progress=progress,
            storage_device=storage_device,
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
        known = ranks.first(lambda: SourceFiles(source, read_record(folder / FOLDER / WEIGHTS_FILE) or {}).hashes)
        self.source = ranks.each(lambda: SourceFiles(source, known))
        fingerprint = run_fingerprint(self.source, self.pruning) | ({"packed": True} if self.packed else {})

        def begin() -> dict[str, Any]:
            if overwrite and is_of_another_run(folder, fingerprint):
                discard(folder, overwrite)
            Journal(folder, fingerprint, num_layers, self.packed).keep_weights(self.source.hashes)
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
        contexts = evaluation_mode(self.model), torch.no_grad()
        with FileSink(self.model, self.journal, self.source, self.pruning.stored_names, *contexts) as sink:
            ranks.first(self._share_budgets)
            self.finished = ranks.first(self._finished)
            unfinished = [index for index in range(len(self.pruning.layers)) if index not in self.finished]
            if unfinished:
                todo = share_layers(unfinished, self.pruning.costs(), ranks.count)[ranks.index]
                ranks.each(lambda: self._prune_layers(sink, todo))

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
        report.operators, report.layers, report.left_dense = [], [], {}
        for _, layer in sorted(layers.items()):
            report.add(layer.record)
        before = sum(layer.record.report.seconds for layer in self.finished.values())
        report.seconds["total"] = before + time.perf_counter() - started
        self.pruning.complete_report()
        masks = {name: mask for index in sorted(layers) for name, mask in journal.masks(index).items()}
        operators, masks = as_stored(report.operators, masks, self.pruning.stored_names)
        report = dataclasses.replace(report, operators=operators)
        ours = {layer.shard for layer in layers.values()}
        for pattern in (".tmp*", ".*.partial", "*.safetensors"):
            for left in [path for path in journal.folder.glob(pattern) if path.name not in ours]:
                left.unlink()  # of a process that was killed while it wrote, or of a run with more layers
        write_remaining(self.model, self.tokenizer, report, None if self.packed else masks, journal, layers)
        self.source.require_unchanged()
        install(journal.folder, output_dir, overwrite)
        return report

    def kept(self) -> str:
        """What is not lost."""
        finished = len(self.journal.finished(read_shards=False))
        total, folder = len(self.pruning.layers), str(self.journal.folder)
        return f"{finished} of {total} decoder layers are finished and kept in {folder!r}"

    def _finished(self) -> dict[int, KeptLayer]:
        """The decoder layers that need not be pruned again.

        They were pruned with the budgets at hand. If layers depend on each other, these are the first ones, each pruned
        on the hidden states that the layer before it left.
        """
        journal, pruning = self.journal, self.pruning
        budgets = journal.budgets_sha256
        finished = {i: layer for i, layer in journal.finished().items() if layer.sha256["budgets"] == budgets}
        if pruning.config.independent_layers:
            return finished
        first, states = 0, None
        while first in finished and finished[first].sha256["before"] == states:
            first, states = first + 1, finished[first].sha256["after"]
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
            self.source.require_unchanged()
            self.journal.keep_budgets(budgets)

    def _prune_layers(self, sink: FileSink, todo: Sequence[int]) -> None:
        if self.pruning.budgets is None:
            self.pruning.budgets = self.journal.budgets(self.pruning.config)
        if todo:
            self.pruning.run(sink, todo)
