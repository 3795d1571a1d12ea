"""Prune a model from its files to the files of the pruned model, by one process or several, and resume after a crash.

The `Journal` of a run holds what is finished. Every start works like a resumed one: it reads there which layers are
left, and shares those. Several processes only have to agree on the run and its budgets.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from optimum_fista.config import FistaPruningConfig
from optimum_fista.folder.checkpoint import names_in, write_index
from optimum_fista.folder.output import FOLDER, install, locked_output, require_output
from optimum_fista.folder.packed_folder import Packer, packed_settings, require_packable
from optimum_fista.folder.writing import as_stored, write_all_but_weights
from optimum_fista.model.held_out import HeldOut
from optimum_fista.model.hooks import evaluation_mode
from optimum_fista.model.inputs import HiddenStates
from optimum_fista.model.layers import prunable_layers
from optimum_fista.model.offload import execution_device, stored_tensor
from optimum_fista.model.precision import products_as
from optimum_fista.packed.format import packed_names
from optimum_fista.prune.batches import Calibration, begin, cut_batches
from optimum_fista.prune.budgets import share_budgets
from optimum_fista.prune.callback import PruningCallback
from optimum_fista.prune.journal import (
    Journal,
    KeptLayer,
    SourceFiles,
    join_run,
    run_fingerprint,
    shared_files,
)
from optimum_fista.prune.loop import prune_layers
from optimum_fista.prune.notes import complete_report
from optimum_fista.prune.plan import Plan, plan_run
from optimum_fista.prune.ranks import (
    RankError,
    Ranks,
    joined_ranks,
    require_independent_layers,
    share_layers,
)
from optimum_fista.prune.sink import ModelSink, Travelling
from optimum_fista.removal.parts_removal import (
    groups_kept,
    plan_removal,
    require_zeros_to_pack,
)
from optimum_fista.removal.tokens import remove_tokens
from optimum_fista.report import LayerRecord, PruningReport
from optimum_fista.source.files import copy_source
from optimum_fista.source.loading import load_lazily, reading, storage_place, usable_device
from optimum_fista.source.names import as_saved, stored_names
from optimum_fista.source.source_tensors import StoredTensor, source_tensors, write_stored


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
    progress: bool,
    storage_device: str | torch.device | Path | None,
    callbacks: Sequence[PruningCallback],
) -> PruningReport:
    """Prune a model from its files to the files of `output_dir`; see `FistaPruner.prune`."""
    started = time.perf_counter()
    require_output(output_dir, overwrite, source=name)  # cheap checks come before the model is read
    require_zeros_to_pack(config, packed)
    if config.tokens_removal is not None:

        def begin_tokens(report: PruningReport) -> None:
            """Tell the callbacks that the run begins."""
            for callback in callbacks:
                callback.on_prune_begin(report)

        report = remove_tokens(
            name,
            calib_dataloader,
            output_dir,
            config,
            text_name=calibration_source,
            device=device,
            dtype=dtype,
            overwrite=overwrite,
            progress=progress,
            on_begin=begin_tokens,
        )
        for callback in callbacks:
            callback.on_prune_end(report)
        return report
    usable_device(device)
    storage = storage_place(storage_device)
    with joined_ranks(device) as ranks, ExitStack() as opened, ExitStack() as offloaded:

        def load() -> tuple[Plan, PreTrainedTokenizerBase | None, Path]:
            if not (folder / FOLDER).exists():
                raise ValueError(
                    f"output: rank 0 began {str(folder)!r}, and it isn't here: pass a shared folder."
                )
            require_independent_layers(config, ranks.count)
            offload = offloaded.enter_context(
                tempfile.TemporaryDirectory(prefix="offload-", dir=folder / FOLDER)
            )
            model, tokenizer, read_from = load_lazily(
                name, Path(offload), device=ranks.device, dtype=dtype
            )
            on_cpu = execution_device(model.get_input_embeddings()).type == "cpu"
            on_disk = storage_device == "disk" or (storage is None and on_cpu)
            place, shows = folder / FOLDER if on_disk else storage, progress and not ranks.index
            places: dict[str, Any] = {"storage": place, "progress": shows, "callbacks": callbacks}
            files_dtypes = dtype == "auto"
            removal = plan_removal(prunable_layers(model), config)
            with reading(str(read_from)):
                tensors = source_tensors(
                    model,
                    read_from,
                    removal.part_of,
                    quantized=files_dtypes and removal.keeps_values,
                )
            plan = plan_run(removal, tensors, files_dtypes=files_dtypes, **places)
            if packed:
                require_packable(
                    n.name for n in stored_names(model, plan.all_operators.values()).values()
                )
            return plan, tokenizer, read_from

        def tell() -> None:
            for callback in callbacks:
                callback.on_prune_begin(report)

        folder = ranks.first(lambda: opened.enter_context(locked_output(output_dir)))
        ranks.first(
            lambda: require_output(output_dir, overwrite)
        )  # another run may just have ended
        plan, tokenizer, read_from = ranks.each(load)
        calibration, held_out, report = ranks.each(
            lambda: begin(plan, calib_dataloader, calibration_source)
        )
        held_out = None if ranks.count > 1 else held_out  # a rank runs only some of the layers
        source = shared_files(read_from, folder, ranks, progress and not ranks.index)
        fingerprint = run_fingerprint(source, plan, calibration.batches, report, packed)
        join_run(folder, fingerprint, overwrite, ranks)
        journal = ranks.each(lambda: Journal(folder, fingerprint))
        run = StreamedRun(
            ranks, plan, calibration, held_out, report, source, journal, packed, started
        )
        with run.advising():
            ranks.each(tell)
            sink = run.prune()
            report = ranks.first(lambda: run.complete(sink, tokenizer, output_dir, overwrite))
            offloaded.close()
            with suppress(RankError):  # the model is in its place, so no failed rank can do harm
                ranks.gather(
                    None
                )  # after that, rank 0 may tidy the folder to which all ranks offload
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
    packed: bool
    started: float
    seconds_before: float = 0.0  # for decoder layers that an earlier start has finished

    def prune(self) -> FileSink:
        """Prune this process's share of the decoder layers that are left, and write each when it is finished."""
        ranks, journal = self.ranks, self.journal

        def share() -> None:
            if journal.budgets() is None:  # otherwise an earlier start has shared them
                with evaluation_mode(self.plan.layers.model), torch.no_grad():
                    budgets = share_budgets(self.plan, self.calibration.batches, self.report)
                self.source.require_unchanged()
                journal.keep_budgets(budgets, self.source.hashes)

        ranks.first(share)
        budgets = ranks.each(
            journal.budgets
        )  # read from disk, so that all ranks and all starts have the same
        assert budgets is not None
        self.plan = plan = self.plan.with_budgets(budgets)
        finished = ranks.first(lambda: journal.finished(progress=plan.progress))
        if ranks.count == 1:
            finished = self._resume(finished)
        self.seconds_before = sum(layer.record.report.seconds for layer in finished.values())
        # any number of processes may resume: the layers that are left are shared anew
        unfinished = [index for index in range(len(plan.layers)) if index not in finished]
        todo = share_layers(unfinished, plan.costs, ranks.count)[ranks.index]
        sink = FileSink(plan, journal, self.source, self.packed)

        def work() -> None:
            with sink, sink.interruptible, products_as(plan.products):
                num_done = (
                    len(finished) if ranks.count == 1 else 0
                )  # shared layers: each rank counts its own
                prune_layers(
                    plan, self.calibration, self.report, sink, self.held_out, todo, num_done
                )

        ranks.each(work if todo else lambda: None)
        return sink

    def complete(
        self,
        sink: FileSink,
        tokenizer: PreTrainedTokenizerBase | None,
        output_dir: Path,
        overwrite: bool,
    ) -> PruningReport:
        """Write everything except decoder layers, and move the model to `output_dir`."""
        report, plan, journal, folder = self.report, self.plan, self.journal, self.journal.model
        model, layers = plan.layers.model, journal.finished(read_shards=False)
        if len(layers) < len(plan.layers):
            raise RankError(
                "decoder layers that other ranks finished are not here: pass a folder that all nodes share"
            )
        report.operators, report.layers, report.left_dense = [], [], {}
        for layer in layers.values():
            report.add(layer.record)
        report.seconds["total"] = self.seconds_before + time.perf_counter() - self.started
        complete_report(plan, report, self.held_out)
        shards = {folder / layer.shard for layer in layers.values() if layer.shard}
        for left in {
            *folder.iterdir()
        } - shards:  # files of a killed process, or of a run with more layers
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        rest = {name: stored_tensor(model, name) for name in plan.layers.names_around}
        around = sink.to_write(plan.stored(None, {}), {} if plan.as_stored else sink.stored(rest))
        shards.add(folder / sink.write_shard(len(sink.left), around | plan.source.unplaced)[0])
        weight_map = {name: shard.name for shard in shards for name in names_in(shard)}
        index_name = write_index(
            folder, sink.stem, weight_map, {"total_parameters": report.model["num_parameters"]}
        )
        masks = {name: mask for index in layers for name, mask in journal.masks(index).items()}
        operators, masks = as_stored(report.operators, plan.removal.renamed(masks), sink.names)
        report = replace(report, operators=operators)
        packed = packed_settings(index_name, packed_names(weight_map)) if self.packed else None
        copy_source(self.source.folder, folder)  # before our own files, which replace some of them
        quantized = plan.source.settings if plan.as_stored else {}
        write_all_but_weights(folder, model, tokenizer, report, masks, packed, quantized)
        self.source.require_unchanged()
        install(journal.folder, output_dir, overwrite, self.source.folder)
        return report

    @contextmanager
    def advising(self) -> Iterator[None]:
        """Add to errors which layers are kept, and what to do."""
        try:
            yield
        except (OSError, RankError) as error:
            finished, folder = (
                len(self.journal.finished(read_shards=False)),
                str(self.journal.folder),
            )
            kept = f"{finished} of {len(self.plan.layers)} decoder layers are finished and kept in {folder!r}"
            advice = f"{kept}; start again with the same output"
            if isinstance(error, RankError):
                raise RankError(f"{error}; {advice}") from error
            if error.errno is None:
                raise type(error)(f"{error} {advice}") from error
            raise OSError(error.errno, f"{error.strerror}: {advice}", error.filename) from error

    def _resume(self, finished: dict[int, KeptLayer]) -> dict[int, KeptLayer]:
        """Resume the run; returns the decoder layers that need not be pruned again.

        If layers depend on each other, these are the first ones, each pruned on the output of the layer before.
        """
        plan, held_out, batches = self.plan, self.held_out, self.calibration.batches
        device = execution_device(plan.layers.model.get_input_embeddings())
        first, streams = self.journal.resume(finished, plan.storage or device)
        if plan.config.correction.carry == "full":
            if 0 < first <= max(plan.pruned_layers, default=-1):
                if streams is None:
                    first = 0  # without hidden states, all layers must run again
                else:
                    states = HiddenStates(streams.get("dense"), streams.get("pruned"))
                    sizes = [len(hidden) for hidden in states.entering]
                    if sizes != [
                        batch.input_ids.shape[0] for batch in batches
                    ]:  # memory ran out before
                        batches, most = cut_batches(batches, sizes), max(sizes)
                        self.report.warnings.append(
                            f"continues with the batches of the last run, {most} sequences at most"
                        )
                    self.calibration = Calibration(batches, states)
            finished = {index: finished[index] for index in range(first)}
        if (
            held_out is not None
            and finished
            and not (len(finished) == first and held_out.resume(streams or {}))
        ):
            self.held_out = None  # its sequences must pass all layers in both networks
        return finished


class FileSink(ModelSink):
    """Writes every finished decoder layer to a shard of its own, so dense weights are kept for one layer only."""

    _model: PreTrainedModel

    def __init__(self, plan: Plan, journal: Journal, source: SourceFiles, packed: bool) -> None:
        super().__init__(plan.layers.model)
        self._plan, self._journal, self._source, self._packed = plan, journal, source, packed
        self.stem = (
            "packed" if packed else "model"
        )  # plain Transformers finds no weights in a packed folder
        self.left = [
            index for index in range(len(plan.layers)) if index not in plan.removal.removed_layers
        ]
        self.names = stored_names(
            plan.layers.model, plan.all_operators.values(), plan.removal.new_name
        )

    def commit(
        self, index: int, layer: nn.Module, record: LayerRecord, travelling: Travelling
    ) -> None:
        """Write a finished decoder layer; for a removed one, only its record.

        The record comes last. `StreamedRun.complete` deletes all files beside the shards that records name.
        """
        self.forget()  # the dense weights of this layer: the checkpoint has them
        streams = {name: stream for part in travelling for name, stream in part.kept().items()}
        plan, masks, self.masks = self._plan, self.masks, {}
        written: dict[str, StoredTensor] | None = None
        if index not in plan.removal.removed_layers:
            originals = plan.stored(
                record.report.name, groups_kept([record.report], record.operators)
            )
            dense = {
                f"{record.report.name}.{key}": tensor for key, tensor in layer.state_dict().items()
            }
            tensors = (
                {} if plan.as_stored else self.stored(plan.removal.shrink_tensors(record, dense))
            )
            if self._packed:
                operators, stored = as_stored(record.operators, masks, self.names)
                # zeros never reach the disk
                tensors = Packer(operators, tensors, stored.__getitem__).pack(tensors)
            written = self.to_write(originals, tensors)
        self._source.require_unchanged()  # before it counts as finished: the files read must be those that were hashed
        shard = None if written is None else self.write_shard(self.left.index(index), written)
        self._journal.keep_layer(index, shard, masks, record, streams)

    def write_shard(self, index: int, tensors: Mapping[str, StoredTensor]) -> tuple[str, str]:
        """Write the file of the decoder layer with this number among those that stay; return its name and digest.

        The last file has the rest.
        """
        total = len(self.left) + 1
        shard = self._journal.model / f"{self.stem}-{index + 1:05}-of-{total:05}.safetensors"
        return shard.name, write_stored(shard, tensors)

    def to_write(
        self, originals: Mapping[str, StoredTensor], tensors: Mapping[str, Tensor]
    ) -> dict[str, StoredTensor]:
        """The tensors to write: stored ones if the run only removes, otherwise new values in the dtypes of these."""
        if self._plan.as_stored:
            return dict(originals)
        known = originals if self._plan.files_dtypes else {}
        return {
            name: known[name].holding(t) if name in known else StoredTensor.of(t)
            for name, t in tensors.items()
        }

    def stored(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors under their names in the checkpoint, on the CPU, without those that are tied to others."""
        # Transformers ties them again when it loads the folder
        left_out = set(self._model.all_tied_weights_keys) | set(
            self._model._keys_to_ignore_on_save or ()
        )
        kept = {
            name: tensor.detach().cpu().contiguous()
            for name, tensor in tensors.items()
            if name not in left_out
        }
        return as_saved(self._model, kept)
