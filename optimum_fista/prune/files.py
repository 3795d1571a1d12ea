"""The sink of a run from files to files, by one process or several, which resumes after a crash.

`run.run` calls `FileSink` in this order: `opened`, `together`, `budgets`, `share`, then `write`, `store` and `commit`
for each decoder layer, and `complete`. Terms:

- `Plan`: what is pruned and how; it holds the model, whose weights stay in their files until they are needed.
- `Budgets`: how many zeros each operator gets, and which decoder layers are removed.
- `Calibration`: the batches of the calibration text, with the hidden states that enter the next decoder layer.
- `HeldOut`: held-out sequences on their way through the dense and the pruned model, to measure perplexities.
- `Ranks`: the processes that work on the model; a step is done by each of them, or by rank 0 for all.
- `Journal`: what is finished, on disk, in the unfinished folder. Every start works like a resumed one: it reads there
  which decoder layers are left, and shares those.
- shard: a safetensors file of the pruned model, with one decoder layer, or with the rest.
"""

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from optimum_fista.folder.naming import renamed_report
from optimum_fista.folder.output import install
from optimum_fista.folder.packed_folder import packed_settings
from optimum_fista.folder.writing import write_all_but_weights
from optimum_fista.model.calibration import cut_batches
from optimum_fista.model.held_out import HeldOut
from optimum_fista.model.hooks import evaluation_mode
from optimum_fista.model.inputs import HiddenStates
from optimum_fista.model.offload import execution_device
from optimum_fista.model.precision import Products, products_as
from optimum_fista.packed.format import packed_names
from optimum_fista.prune.batches import Calibration
from optimum_fista.prune.journal import Journal, KeptLayer
from optimum_fista.prune.notes import complete_report
from optimum_fista.prune.plan import Budgets, Plan
from optimum_fista.prune.ranks import RankError, Ranks, share_layers
from optimum_fista.prune.shards import ShardWriter
from optimum_fista.prune.sink import Sink, Travelling, Work
from optimum_fista.prune.source_files import SourceFiles
from optimum_fista.records import LayerRecord
from optimum_fista.report import PruningReport
from optimum_fista.source.files import copy_source
from optimum_fista.source.model_folder import bytes_of_weight_files, names_in, write_index

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Output:
    """Where the pruned model goes, and what goes there besides weights.

    Attributes:
        folder: The folder that the user named.
        overwrite: Whether a model there is replaced.
        packed: Whether weights are stored without their zeros.
        tokenizer: Written if it is not among the files of the source (the tokenizer of a GGUF file); otherwise `None`.
    """

    folder: Path
    overwrite: bool
    packed: bool
    tokenizer: PreTrainedTokenizerBase | None


class FileSink(Sink):
    """Writes every finished decoder layer to a shard of its own, so dense weights are kept for one layer only.

    Args:
        plan: The plan of the run, of a model whose weights stay in its files until they are needed (`load_lazily`).
        source: Its files, which must not change during the run.
        journal: What is finished; in the unfinished folder of the run.
        ranks: The processes that work on the model.
        output: Where the model goes at the end.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        source: SourceFiles,
        journal: Journal,
        ranks: Ranks,
        output: Output,
    ) -> None:
        """Keep the arguments; nothing is written yet. The docstring of the class explains them.

        `source` are the files of the model. `journal` is what the run has finished, on disk, in the unfinished folder.
        `ranks` are the processes of the run, and `output` says where the model goes at the end.
        """
        super().__init__(plan.layers.model)
        self._plan = plan  # `share` replaces it by the plan with its budgets
        self._source = source
        self._journal = journal
        self._ranks = ranks
        self._output = output
        # What earlier starts of the run have taken for the decoder layers that they finished; `share` sets it.
        self._seconds_before = 0.0
        # Name and digest of the shard of the decoder layer that is finished next; `store` sets it.
        self._shard: tuple[str, str] | None = None

    @contextmanager
    def opened(self, products: Products) -> Iterator[None]:
        """Around the run: put the model in evaluation mode without gradients, and multiply as `products` says.

        The model is `self._model`. Errors of files (OSError) and of other processes (RankError) get a sentence that
        says how many decoder layers are kept. `products` is "float32", "tf32", "bfloat16" or "widened". At the end,
        modes and settings are as before. What the run inside has done to weights in memory stays: nobody uses the model
        afterwards.
        """
        try:
            with evaluation_mode(self._model), torch.no_grad(), products_as(products):
                yield
        except RankError as error:
            raise RankError(f"{error}; {self._advice()}") from error
        except OSError as error:
            # An error without a number has only a message: it was raised by Python code, not by the system.
            if error.errno is None:
                raise type(error)(f"{error} {self._advice()}") from error
            message = f"{error.strerror}: {self._advice()}"
            raise OSError(error.errno, message, error.filename) from error

    def _advice(self) -> str:
        """Say how many decoder layers are kept, and what to do, for the end of an error.

        `self._journal` is what the run has finished on disk, in the unfinished folder. `self._plan` has all layers.
        """
        num_finished = len(self._journal.finished(check_shards=False))
        return (
            f"{num_finished} of {len(self._plan.layers)} decoder layers are finished and kept in "
            f"{str(self._journal.folder)!r}; start again with the same output"
        )

    def budgets(self, share_budgets: Callable[[], Budgets]) -> Budgets:
        """Return the budgets of the run, which rank 0 makes by `share_budgets` and writes to the journal.

        All ranks (`self._ranks`), and all later starts of the run, read the same. `share_budgets` runs the model, so it
        is called only if the journal on disk (`self._journal`) has no budgets yet. Before they are written, the files
        of the model must still be those that were hashed (`self._source`).
        """
        journal = self._journal

        def make_and_keep() -> None:
            """Make the budgets by `share_budgets`, and write them to `journal`, unless an earlier start did.

            Rank 0 does this, for all.
            """
            if journal.budgets() is None:
                budgets = share_budgets()
                self._source.require_unchanged()
                journal.keep_budgets(budgets, self._source.hashes)

        self._ranks.first(make_and_keep)
        budgets = self._ranks.each(journal.budgets)
        assert budgets is not None
        return budgets

    def share(
        self,
        plan: Plan,
        calibration: Calibration,
        held_out: HeldOut | None,
        report: PruningReport,
    ) -> Work:
        """Take the plan with its budgets, and find out which decoder layers this process prunes.

        Finished layers are read from the journal (`self._journal`); the others are shared anew by any number of
        processes (`self._ranks`). Sets the plan of this sink (`self._plan`), the writer of its shards (`self._shards`),
        and the seconds that finished layers have taken (`self._seconds_before`).

        Args:
            plan: The plan of the run, with its budgets.
            calibration: All batches, without hidden states.
            held_out: Measures perplexities, or `None`.
            report: Gets a warning if an earlier start had to cut the batches.

        Returns:
            The work of this process. Its calibration has hidden states if the run resumes after a finished layer.
        """
        ranks = self._ranks
        self._plan = plan
        self._shards = ShardWriter(plan, self._journal.model, self._output.packed)
        # By the index of the layer. Shards on disk are read and compared with their digests, by rank 0 for all.
        finished = ranks.first(lambda: self._journal.finished(progress=plan.progress))
        if ranks.count == 1:
            finished, calibration, held_out = self._resumed(
                plan,
                finished,
                calibration=calibration,
                held_out=held_out,
                report=report,
            )
            num_done = len(finished)
        else:
            held_out = None  # a rank runs only some of the layers
            num_done = 0  # each rank counts its own
        self._seconds_before = sum(layer.record.report.seconds for layer in finished.values())

        unfinished = [index for index in range(len(plan.layers)) if index not in finished]
        todo_of_ranks = share_layers(unfinished, plan.costs, ranks.count)
        return Work(todo_of_ranks[ranks.index], num_done, calibration, held_out)

    def _resumed(
        self,
        plan: Plan,
        finished: dict[int, KeptLayer],
        *,
        calibration: Calibration,
        held_out: HeldOut | None,
        report: PruningReport,
    ) -> tuple[dict[int, KeptLayer], Calibration, HeldOut | None]:
        """Find out which decoder layers need not be pruned again, and where the calibration text resumes.

        `plan` is that of the run, with its budgets. `finished` are the layers on disk, by index, with their records.
        Returns those of them that count: if layers depend on each other, these are the first ones, each pruned on the
        output of the layer before. `calibration` is returned with the hidden states that enter the next layer, if the
        run resumes after a finished layer; if its batches are cut for that, `report` gets a warning. `held_out` gets
        its kept hidden states or losses; it is returned as `None` if its sequences would have to pass the finished
        layers again. `self._journal` reads the hidden states from disk, and notes their digest.
        """
        storage = plan.storage
        if storage is None:
            storage = execution_device(plan.layers.model.get_input_embeddings())
        # How many layers from the first one on are finished, and the hidden states after them, by name; `None` if these
        # are missing.
        num_first, streams = self._journal.resume(finished, storage)
        # "full": each layer is pruned on what the pruned layers before it give.
        layers_depend = plan.config.correction.carry == "full"
        if layers_depend:
            last_to_reach = max(plan.layers_to_reach, default=-1)
            needs_states = 0 < num_first <= last_to_reach
            if needs_states and streams is None:
                num_first = 0  # without hidden states, all layers must run again
            elif needs_states:
                assert streams is not None
                states = HiddenStates(streams.get("dense"), streams.get("pruned"))
                calibration = _with_states(calibration, states, report)
            finished = {index: finished[index] for index in range(num_first)}

        if held_out is not None and finished:
            are_first = len(finished) == num_first  # no layer is finished after one that is not
            can_resume = are_first and held_out.resume(streams or {})
            if not can_resume:
                held_out = None  # its sequences must pass all layers in both networks
        return finished, calibration, held_out

    def together(self, step: Callable[[], T]) -> T:
        """Do a step in every process, and wait for the others; return the result of this process."""
        return self._ranks.each(step)

    def store(self, index: int, layer: nn.Module, record: LayerRecord) -> None:
        """Write the shard of a decoder layer; a removed layer has none.

        The old weights of the layer are freed. The layer does not count as finished until `commit` writes its record:
        `self._shard` keeps the name and the digest of the shard until then. `self._shards` writes shards, and
        `self._plan` says which layers are removed. Raises ValueError if a file of the model has changed since it was
        hashed (`self._source`).

        Args:
            index: The number of the layer.
            layer: The layer, pruned, on its device.
            record: What its report says.
        """
        self.forget_old_weights()  # the dense ones of this layer: the files of the source have them
        is_removed = index in self._plan.removal.removed_layers
        tensors = {} if is_removed else self._shards.tensors_of_layer(layer, record, self.masks)

        # The files that were read must be those that were hashed, or the layer does not count as finished.
        self._source.require_unchanged()
        self._shard = None if is_removed else self._shards.write_layer(index, tensors)

    def commit(self, index: int, record: LayerRecord, travelling: Travelling) -> None:
        """Write the record of the decoder layer whose shard `store` has written: now it is finished.

        The masks of its operators go from `self.masks` to the journal on disk (`self._journal`), which also gets the
        hidden states of `travelling` and drops those that entered this layer. The record is written last: a layer
        without a record is not finished, and `complete` deletes all files that no record names. `self._shard` is the
        name and the digest of the shard.

        Args:
            index: The number of the layer.
            record: What its report says.
            travelling: Hidden states (dense and pruned) and held-out sequences that enter the next layer, as far as a
                run that resumes there needs them. Each has a method `to_save`, which returns lists of tensors by name.
        """
        masks = self.masks
        self.masks = {}
        streams: dict[str, list[torch.Tensor]] = {}  # by name, such as "pruned", a batch each
        for traveller in travelling:
            streams |= traveller.to_save()
        self._journal.keep_layer(index, self._shard, masks, record, streams)

    def complete(
        self, plan: Plan, report: PruningReport, held_out: HeldOut | None, started: float
    ) -> PruningReport:
        """Have rank 0 write all but the decoder layers and move the model to its folder; all ranks get the report.

        `plan` has its budgets. `report` is that of this process, and rank 0 completes it in place; the returned one has
        the names of the files. `held_out` is `None` if nothing was measured. `started` is the time of
        `time.perf_counter` at which this start of the run began. The configuration of `plan.layers.model` becomes that
        of the result.
        """
        return self._ranks.first(lambda: self._complete(plan, report, held_out, started))

    def _complete(
        self, plan: Plan, report: PruningReport, held_out: HeldOut | None, started: float
    ) -> PruningReport:
        """Do the work of `complete` in rank 0, with the same arguments.

        The report gets the records of all processes and of earlier starts, and the seconds of both
        (`self._seconds_before`: what earlier starts have taken). The configuration of `plan.layers.model` becomes that
        of the result. The folder of the output is replaced at the very end, and the unfinished folder is gone then.
        Returns the report by the names in the files. `self._journal` is what is finished, on disk; `self._shards`
        writes the tensors outside the decoder layers; `self._source` are the files of the model that the run was given,
        and `self._output` says where the result goes.
        """
        layers = self._collect_records(report)
        report.seconds["total"] = self._seconds_before + time.perf_counter() - started
        plan = plan.with_fewer_prediction_experts(report)
        # Renames the operators in the report, and gives the model the smaller configuration if parts are removed.
        complete_report(plan, report, held_out)

        folder = self._journal.model
        shards = {folder / layer.shard for layer in layers.values() if layer.shard}
        _delete_all_but(folder, shards)
        shards.add(folder / self._shards.write_rest(plan.source.tensors_to_copy))
        report.weight_bytes_before = bytes_of_weight_files(self._source.folder)
        # The file of each tensor, by the name of the tensor.
        weight_map = {name: shard.name for shard in shards for name in names_in(shard)}
        totals = {"total_parameters": report.model["num_parameters"]}
        index_name = write_index(folder, self._shards.stem, weight_map, totals)
        packed = None  # the entry of `config.json` by which a packed folder is loaded
        if self._output.packed:
            packed = packed_settings(index_name, packed_names(weight_map))

        masks: dict[str, torch.Tensor] = {}
        for index in layers:
            masks |= self._journal.masks(index)
        # Stored names: of the operators that this run pruned, and of those whose masks an earlier run left.
        stored_names = self._shards.names | plan.removal.names_of_carried(report)
        stored_report, stored_masks = renamed_report(
            report, plan.removal.renamed(masks), stored_names
        )
        copy_source(self._source.folder, folder)  # before our own files, which replace some of them
        write_all_but_weights(
            folder,
            plan.layers.model,
            self._output.tokenizer,
            stored_report,
            stored_masks,
            packed=packed,
            quantized=plan.source.settings if plan.as_stored else {},
        )
        self._source.require_unchanged()
        install(
            self._journal.folder, self._output.folder, self._output.overwrite, self._source.folder
        )
        return stored_report

    def _collect_records(self, report: PruningReport) -> dict[int, KeptLayer]:
        """Replace the records of decoder layers in the report by those of all processes and of earlier starts.

        They are read from `self._journal`, which is on disk. Returns the finished layers, by index. Raises RankError if
        a layer of the model (`self._plan`) is missing.
        """
        # The shards are not read and compared with their digests again: they were just written, or checked by `share`.
        layers = self._journal.finished(check_shards=False)
        if len(layers) < len(self._plan.layers):
            raise RankError(
                "decoder layers that other ranks finished are not here: pass a folder that all nodes share"
            )
        # These are all fields that `report.add` adds to.
        report.operators = []
        report.layers = []
        report.left_dense = {}
        report.carried = []
        report.lost_masks = []
        report.zeros_filled = 0
        report.zeros_uncovered = 0
        report.prediction_mixtures = []
        for layer in layers.values():
            report.add(layer.record)
        return layers


def _with_states(
    calibration: Calibration, states: HiddenStates, report: PruningReport
) -> Calibration:
    """Join the batches of a run to the hidden states that an earlier start kept: a new `Calibration`.

    `calibration` has the batches as the user passed them, and is not changed. If the earlier start ran out of memory,
    it cut its batches into smaller ones. Then these batches are cut in the same way, and `report` gets a warning.

    The result has no arguments of the decoder layers: these were not kept, and the caller records them again.
    """
    batches = calibration.batches
    # `to_prune_on` are the hidden states of the pruned network, or of the dense one if only those are kept.
    sizes = [len(hidden) for hidden in states.to_prune_on]  # sequences in each batch
    if sizes != [batch.input_ids.shape[0] for batch in batches]:
        batches = cut_batches(batches, sizes)
        report.warnings.append(
            f"continues with the batches of the last run, {max(sizes)} sequences at most"
        )
    return Calibration(batches, states)


def _delete_all_but(folder: Path, shards: set[Path]) -> None:
    """Delete all files and folders in `folder` but `shards`: a killed process, or a run of more layers, left them."""
    for path in list(folder.iterdir()):
        if path in shards:
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
