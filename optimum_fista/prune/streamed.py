"""From a model's files to the files of the pruned model, by one process or several; and on after a crash.

What a run has finished is in its `Journal`. Resuming is no case of its own: every start reads there which layers are
left, and shares those. Several processes need to agree on the run and its budgets, and on nothing else.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from optimum_fista.config import FistaPruningConfig
from optimum_fista.folder.loading import load_lazily, storage_place, usable_device
from optimum_fista.folder.output import FOLDER, install, locked_output, require_output, unfinished_folder
from optimum_fista.folder.source_files import require_no_loss, source_folder
from optimum_fista.model.forward import evaluation_mode
from optimum_fista.model.held_out import HeldOut
from optimum_fista.model.layer_inputs import HiddenStates
from optimum_fista.model.offload import execution_device
from optimum_fista.prune.batches import Calibration, begin, cut_batches
from optimum_fista.prune.budgets import share_budgets
from optimum_fista.prune.callback import PruningCallback
from optimum_fista.prune.file_sink import FileSink
from optimum_fista.prune.journal import (
    WEIGHTS_FILE,
    Journal,
    KeptLayer,
    SourceFiles,
    join_run,
    read_record,
    run_fingerprint,
    shared_files,
)
from optimum_fista.prune.loop import prune_layers
from optimum_fista.prune.plan import Plan, complete_report, prepare
from optimum_fista.prune.ranks import RankError, Ranks, joined_ranks, require_independent_layers, share_layers
from optimum_fista.prune.removal import require_zeros_to_pack
from optimum_fista.report import PruningReport


def prune_files(
    name: str,
    calib_dataloader: Iterable[Any],
    output_dir: Path,
    config: FistaPruningConfig,
    *,
    calibration_source: str | None,
    device: str | None,
    dtype: str | torch.dtype,
    overwrite: bool,
    packed: bool,
    drop_unused: bool,
    progress: bool,
    storage_device: str | torch.device | Path | None,
    callbacks: Sequence[PruningCallback],
) -> PruningReport:
    """Prune a model from its files to the files of `output_dir`; see `FistaPruner.prune`."""
    started = time.perf_counter()
    require_output(output_dir, overwrite, source=name)  # what costs nothing comes before the model is read
    require_zeros_to_pack(config, packed)
    usable_device(device)
    storage = storage_place(storage_device)
    folder = unfinished_folder(output_dir)
    with joined_ranks(device) as ranks, ExitStack() as opened, ExitStack() as offloaded:

        def lock() -> None:
            opened.enter_context(locked_output(output_dir))
            require_output(output_dir, overwrite)  # another run may just have ended

        def load() -> tuple[Plan, PreTrainedTokenizerBase | None, Path]:
            if not (folder / FOLDER).exists():
                raise ValueError(f"output: rank 0 began {str(folder)!r}, and it isn't here: pass a shared folder.")
            require_independent_layers(config, ranks.count)
            offload = offloaded.enter_context(tempfile.TemporaryDirectory(prefix="offload-", dir=folder / FOLDER))
            model, tokenizer = load_lazily(name, Path(offload), device=ranks.device, dtype=dtype)
            on_cpu = execution_device(model.get_input_embeddings()).type == "cpu"
            on_disk = storage_device == "disk" or (storage is None and on_cpu)
            place, shows = folder / FOLDER if on_disk else storage, progress and not ranks.index
            plan = prepare(model, config, storage=place, progress=shows, callbacks=callbacks)
            return plan, tokenizer, source_folder(name, getattr(model.config, "_commit_hash", None))

        def read() -> tuple[Calibration, HeldOut | None, PruningReport]:
            lost = require_no_loss(plan.layers.model, read_from, drop_unused)
            calibration, held_out, report = begin(plan, calib_dataloader, calibration_source)
            if lost:
                report.lack(lost)
            return calibration, None if ranks.count > 1 else held_out, report  # a rank runs some of the layers only

        def tell() -> None:
            for callback in callbacks:
                callback.on_prune_begin(report)

        ranks.first(lock)
        plan, tokenizer, read_from = ranks.each(load)
        calibration, held_out, report = ranks.each(read)
        source = shared_files(read_from, read_record(folder / WEIGHTS_FILE) or {}, ranks, plan.progress)
        fingerprint = run_fingerprint(source, plan, calibration.batches, report, packed)
        join_run(folder, fingerprint, overwrite, ranks)
        journal = ranks.each(lambda: Journal(folder, fingerprint))
        run = StreamedRun(ranks, plan, calibration, held_out, report, source, journal)
        with run.advising():
            ranks.each(tell)
            sink = run.prune(packed)
            report = ranks.first(lambda: run.complete(sink, tokenizer, output_dir, overwrite, started))
            offloaded.close()
            with suppress(RankError):  # nothing is lost with a rank any more: the model is in its place
                ranks.gather(None)  # only then does rank 0 tidy the folder that all of them offload to
    for callback in callbacks:
        callback.on_prune_end(report)
    return report


@dataclass
class StreamedRun:
    """One run from the files of a model to an unfinished folder, in this process."""

    ranks: Ranks
    plan: Plan
    calibration: Calibration
    held_out: HeldOut | None
    report: PruningReport
    source: SourceFiles
    journal: Journal
    seconds_before: float = 0.0  # of decoder layers that an earlier start has finished

    def prune(self, packed: bool) -> FileSink:
        """Prune this process's share of the decoder layers that are left, and write each once it is finished."""
        ranks, journal = self.ranks, self.journal
        ranks.first(self._share_budgets)
        budgets = ranks.each(journal.budgets)  # as written, so that all ranks and all starts have the same
        assert budgets is not None
        self.plan = plan = self.plan.with_budgets(budgets)
        finished = ranks.first(journal.finished)
        if ranks.count == 1:
            finished = self._resume(finished)
        self.seconds_before = sum(layer.record.report.seconds for layer in finished.values())
        # any number of processes may go on: the layers that are left are shared anew
        unfinished = [index for index in range(len(plan.layers)) if index not in finished]
        todo = share_layers(unfinished, plan.costs, ranks.count)[ranks.index]
        sink = FileSink(plan, journal, self.source, packed, evaluation_mode(plan.layers.model), torch.no_grad())

        def work() -> None:
            with sink, sink.interruptible:
                prune_layers(plan, self.calibration, self.report, sink, self.held_out, todo)

        ranks.each(work if todo else lambda: None)
        return sink

    def complete(
        self,
        sink: FileSink,
        tokenizer: PreTrainedTokenizerBase | None,
        output_dir: Path,
        overwrite: bool,
        started: float,
    ) -> PruningReport:
        """Write all that is not a decoder layer, and bring the model into `output_dir`."""
        report, layers = self.report, self.journal.finished(read_shards=False)
        if len(layers) < len(self.plan.layers):
            raise RankError("decoder layers that other ranks finished are not here: pass a folder that all nodes share")
        report.operators, report.layers, report.left_dense = [], [], {}
        for layer in layers.values():
            if layer.shard:  # the report has no layer that is gone
                report.add(layer.record)
        report.seconds["total"] = self.seconds_before + time.perf_counter() - started
        complete_report(self.plan, report, self.held_out, [one.record.report.dense_sha256 for one in layers.values()])
        self.plan.removal.describe(self.plan.layers.model, report)
        report = sink.complete(tokenizer, report, layers)
        install(self.journal.folder, output_dir, overwrite, self.source.folder)
        return report

    @contextmanager
    def advising(self) -> Iterator[None]:
        """Have errors say what is not lost, and what to do."""
        try:
            yield
        except (OSError, RankError) as error:
            finished, folder = len(self.journal.finished(read_shards=False)), str(self.journal.folder)
            kept = f"{finished} of {len(self.plan.layers)} decoder layers are finished and kept in {folder!r}"
            advice = f"{kept}; start again with the same output"
            if isinstance(error, RankError):
                raise RankError(f"{error}; {advice}") from error
            if error.errno is None:
                raise type(error)(f"{error} {advice}") from error
            raise OSError(error.errno, f"{error.strerror}: {advice}", error.filename) from error

    def _share_budgets(self) -> None:
        """Allocate the zeros to the operators, unless an earlier start of the run did."""
        if self.journal.budgets() is None:
            with evaluation_mode(self.plan.layers.model), torch.no_grad():
                budgets = share_budgets(self.plan, self.calibration.batches, self.report)
            self.source.require_unchanged()
            self.journal.keep_budgets(budgets, self.source.hashes)

    def _resume(self, finished: dict[int, KeptLayer]) -> dict[int, KeptLayer]:
        """Go on where the run before ended; returns the decoder layers that need not be pruned again.

        If layers depend on each other, these are the first ones, each pruned on the hidden states that the layer before
        it left.
        """
        plan, held_out, batches = self.plan, self.held_out, self.calibration.batches
        device = execution_device(plan.layers.model.get_input_embeddings())
        first, streams = self.journal.resume(finished, plan.storage or device)
        if plan.config.correction.carry == "full":
            if 0 < first <= max(plan.pruned_layers, default=-1):
                if streams is None:
                    first = 0  # they can't be made again without the layers before
                else:
                    states = HiddenStates(streams.get("dense"), streams.get("pruned"))
                    sizes = [len(hidden) for hidden in states.entering]
                    if sizes != [batch.input_ids.shape[0] for batch in batches]:  # memory ran out before
                        batches, most = cut_batches(batches, sizes), max(sizes)
                        self.report.warnings.append(
                            f"continues with the batches of the last run, {most} sequences at most"
                        )
                    self.calibration = Calibration(batches, states)
            finished = {index: finished[index] for index in range(first)}
        if held_out is not None and finished and not (len(finished) == first and held_out.resume(streams or {})):
            self.held_out = None  # its sequences have to pass all layers in both networks
        return finished
