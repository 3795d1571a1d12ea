"""From a model's files to the files of the pruned model, by one process or several."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from optimum_fista.config import FistaPruningConfig
from optimum_fista.folder.loading import load_lazily
from optimum_fista.folder.output import FOLDER, install, locked_output, require_output, unfinished_folder
from optimum_fista.folder.source_files import require_no_loss, source_folder
from optimum_fista.model.forward import evaluation_mode
from optimum_fista.model.layer_inputs import HiddenStates
from optimum_fista.prune.callback import PruningCallback
from optimum_fista.prune.file_sink import FileSink
from optimum_fista.prune.fingerprint import run_fingerprint, shared_files
from optimum_fista.prune.journal import WEIGHTS_FILE, Journal, KeptLayer, join_run, read_record
from optimum_fista.prune.loop import prune_layers
from optimum_fista.prune.model_pruning import ModelPruning
from optimum_fista.prune.ranks import RankError, Ranks, joined_ranks, require_independent_layers, share_layers
from optimum_fista.prune.removal import require_zeros_to_pack
from optimum_fista.report import PruningReport


def prune_files(
    name: str | Path,
    calib_dataloader: Iterable[Any],
    output_dir: Path,
    config: FistaPruningConfig,
    *,
    calibration_source: str | None,
    device: str | None,
    dtype: str | torch.dtype,
    overwrite: bool,
    progress: bool,
    storage_device: str | torch.device | Path | None,
    callbacks: Sequence[PruningCallback],
    packed: bool,
    drop_unused: bool,
) -> PruningReport:
    """Prune a model from its files to the files of `output_dir`; see `FistaPruner.prune`."""
    started = time.perf_counter()
    require_output(output_dir, overwrite, source=name)
    require_zeros_to_pack(config, packed)
    folder = unfinished_folder(output_dir)
    with joined_ranks(device) as ranks, ExitStack() as opened, ExitStack() as offloaded:

        def lock() -> None:
            opened.enter_context(locked_output(output_dir))
            require_output(output_dir, overwrite)  # another run may just have ended

        def load() -> tuple[ModelPruning, PreTrainedTokenizerBase | None, Path]:
            if not (folder / FOLDER).exists():
                raise ValueError(f"output: rank 0 began {str(folder)!r}, and it isn't here: pass a shared folder.")
            require_independent_layers(config, ranks.count)
            offload = offloaded.enter_context(tempfile.TemporaryDirectory(prefix="offload-", dir=folder / FOLDER))
            model, tokenizer = load_lazily(str(name), Path(offload), device=ranks.device, dtype=dtype)
            source = source_folder(str(name), getattr(model.config, "_commit_hash", None))
            pruning = ModelPruning(
                model,
                calib_dataloader,
                config,
                calibration_source=calibration_source,
                progress=progress and not ranks.index,
                storage_device=storage_device,
                callbacks=callbacks,
            )
            if lost := require_no_loss(model, source, drop_unused):
                pruning.report.lack(lost)
            if storage_device == "disk" or (storage_device is None and pruning.storage == torch.device("cpu")):
                pruning.storage_device = folder / FOLDER  # files on the output's disk
            if ranks.count > 1:
                pruning.held_out = None  # each process has some of the decoder layers
                pruning.title = f"Pruning, rank {ranks.index} of {ranks.count}"
            return pruning, tokenizer, source

        def begin() -> None:
            for callback in callbacks:
                callback.on_prune_begin(pruning.report)

        ranks.first(lock)
        pruning, tokenizer, source = ranks.each(load)
        run = StreamedRun(pruning, tokenizer, source, folder, ranks, overwrite=overwrite, packed=packed)
        try:
            ranks.each(begin)
            run.prune()
            report = ranks.first(lambda: run.complete(output_dir, overwrite, started))
            offloaded.close()
            with suppress(RankError):  # nothing is lost with a rank any more: the model is in its place
                ranks.gather(None)  # only then does rank 0 tidy the folder that all of them offload to
        except OSError as error:
            advice = f"{run.kept()}; start again with the same output"
            if error.errno is None:
                raise type(error)(f"{error} {advice}") from error
            raise OSError(error.errno, f"{error.strerror}: {advice}", error.filename) from error
        except RankError as error:
            raise RankError(f"{error}; {run.kept()}; start again with the same output") from error
    for callback in callbacks:
        callback.on_prune_end(report)
    return report


class StreamedRun:
    """One run from the files of a model in `source` to a folder, dense or packed, in this process.

    If the folder, an unfinished one, holds a run with the same fingerprint, that is resumed; the layers of another run
    are thrown away if `overwrite`. Of the processes that share the layers rank 0 begins the journal.
    """

    def __init__(
        self,
        pruning: ModelPruning,
        tokenizer: PreTrainedTokenizerBase | None,
        source: Path,
        folder: Path,
        ranks: Ranks,
        *,
        overwrite: bool,
        packed: bool,
    ) -> None:
        self.pruning = pruning
        self.finished: dict[int, KeptLayer] = {}
        self._tokenizer = tokenizer
        self._ranks = ranks
        known = read_record(folder / WEIGHTS_FILE) or {}
        self.source = shared_files(source, known, ranks, pruning.progress)
        fingerprint = run_fingerprint(self.source, pruning, packed)
        join_run(folder, fingerprint, overwrite, ranks)
        self.journal = ranks.each(lambda: Journal(folder, fingerprint))
        contexts = evaluation_mode(pruning.model), torch.no_grad()
        self.sink = FileSink(pruning, self.journal, self.source, packed, *contexts)

    def prune(self) -> None:
        """Prune this process's share of the decoder layers that are left, and write each once it is finished."""
        ranks, pruning = self._ranks, self.pruning
        with self.sink, self.sink.interruptible:
            ranks.first(self._share_budgets)
            ranks.each(self._read_budgets)
            self.finished = ranks.first(self._finished)
            unfinished = [index for index in range(len(pruning.layers)) if index not in self.finished]
            if self.finished and ranks.count == 1:
                pruning.num_before = len(self.finished)
                pruning.title = f"Resuming, {len(self.finished)} of {len(pruning.layers)} decoder layers done"
            if unfinished:
                todo = share_layers(unfinished, pruning.costs(), ranks.count)[ranks.index]
                ranks.each(lambda: prune_layers(pruning, self.sink, todo) if todo else None)

    def complete(self, output_dir: Path, overwrite: bool, started: float) -> PruningReport:
        """Write all that is not a decoder layer, and bring the model into `output_dir`."""
        report, layers = self.pruning.report, self.journal.finished(read_shards=False)
        if len(layers) < len(self.pruning.layers):
            raise RankError("decoder layers that other ranks finished are not here: pass a folder that all nodes share")
        report.operators, report.layers, report.left_dense = [], [], {}
        self.pruning.dense_layers = [layer.record.report.dense_sha256 for layer in layers.values()]
        for layer in layers.values():
            if layer.shard:
                report.add(layer.record)
        before = sum(layer.record.report.seconds for layer in self.finished.values())
        report.seconds["total"] = before + time.perf_counter() - started
        self.pruning.complete_report()
        report = self.sink.complete(self._tokenizer, report, layers)
        install(self.journal.folder, output_dir, overwrite, self.source.folder)
        return report

    def kept(self) -> str:
        """What is not lost."""
        finished, total = len(self.journal.finished(read_shards=False)), len(self.pruning.layers)
        return f"{finished} of {total} decoder layers are finished and kept in {str(self.journal.folder)!r}"

    def _finished(self) -> dict[int, KeptLayer]:
        """The decoder layers that need not be pruned again.

        They were pruned with the budgets at hand. If layers depend on each other, these are the first ones, each pruned
        on the hidden states that the layer before it left.
        """
        journal, pruning = self.journal, self.pruning
        budgets = journal.budgets_sha256
        finished = {i: layer for i, layer in journal.finished().items() if layer.sha256["budgets"] == budgets}
        first, states = 0, None
        while first in finished and finished[first].sha256["before"] == states:
            first, states = first + 1, finished[first].sha256["after"]
        streams = journal.states(first, states, pruning.storage)
        if pruning.config.correction.carry == "full":
            if 0 < first <= max(pruning.pruned_layers, default=-1):
                if streams is None:
                    first = 0  # they can't be made again without the layers before
                else:
                    pruning.resume(HiddenStates(streams.get("dense"), streams.get("pruned")))
            finished = {index: finished[index] for index in range(first)}
        if pruning.held_out is not None and finished:
            goes_on = len(finished) == first and pruning.held_out.resume(streams or {})
            pruning.held_out = pruning.held_out if goes_on else None
        return finished

    def _share_budgets(self) -> None:
        """Allocate the zeros to the operators, unless an earlier start of the run did."""
        self._read_budgets()
        if self.pruning.budgets is None:
            budgets = self.pruning.shared_budgets()
            self.source.require_unchanged()
            self.journal.keep_budgets(budgets, self.source.hashes)

    def _read_budgets(self) -> None:
        """How the zeros were allocated, by an earlier start or by rank 0; they say what each layer costs."""
        if self.pruning.budgets is None and (budgets := self.journal.budgets(self.pruning.config)) is not None:
            self.pruning.use_budgets(budgets)
