"""From a model's files to the files of the pruned model, one decoder layer in memory at a time."""

from __future__ import annotations

import errno
import json
import shutil
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion

from optimum_fista.model.architecture import find_decoder_layers
from optimum_fista.model.offload import kept_tensor, move_execution, stored_tensor
from optimum_fista.model.operator import LinearOperator
from optimum_fista.run.atomic import write_atomically, write_bytes, write_tensors, write_text
from optimum_fista.run.card import model_card
from optimum_fista.run.checkpoint import MASKS_FILE, MASKS_METADATA, REPORT_FILE, require_free_folder, summary
from optimum_fista.run.config import FistaPruningConfig
from optimum_fista.run.fingerprint import is_of_another_run, run_fingerprint
from optimum_fista.run.free_memory import keep_large_blocks_apart
from optimum_fista.run.journal import FOLDER, FinishedLayer, Journal
from optimum_fista.run.loading import (
    floating_dtype,
    forget_gguf,
    gguf_file,
    load_model,
    load_tokenizer,
    usable_device,
)
from optimum_fista.run.model_pruning import ModelPruning
from optimum_fista.run.perplexity import evaluation_mode
from optimum_fista.run.picture import PICTURE_FILE, error_picture
from optimum_fista.run.planning.batches import FittedBatches
from optimum_fista.run.pruning_callback import PruningCallback
from optimum_fista.run.ranks import RankError, Ranks, joined_ranks, require_independent_layers
from optimum_fista.run.report import LayerReport, PruningReport
from optimum_fista.run.shares import share_layers
from optimum_fista.run.stored_names import as_stored
from optimum_fista.solve.bitmask import pack_mask
from optimum_fista.solve.pruned import PrunedOperator

_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS)


def unfinished_folder(output_dir: Path) -> Path:
    """Where a run keeps what it has finished, until all of it becomes `output_dir`."""
    return output_dir.with_name(f"{output_dir.name}.unfinished")


def prune_files(
    name: str | Path,
    calib_dataloader: Iterable[Any],
    output_dir: Path,
    config: FistaPruningConfig,
    *,
    calibration_source: str | None = None,
    device: str | None = None,
    dtype: str | torch.dtype = "auto",
    overwrite: bool = False,
    progress: bool = True,
    storage_device: str | torch.device | Path | None = None,
    callbacks: Sequence[PruningCallback] = (),
) -> PruningReport:
    """Prune a model from its files to the files of `output_dir`; see `FistaPruner.prune`."""
    started = time.perf_counter()
    folder = unfinished_folder(output_dir)
    keep_large_blocks_apart()
    with (
        joined_ranks(device) as ranks,
        tempfile.TemporaryDirectory(prefix="optimum-fista-") as offload_folder,
    ):

        def begin() -> tuple[_Streaming, dict[str, Any]]:
            require_free_folder(output_dir, overwrite)
            if not ranks.index:
                _require_writable(folder, output_dir)
            require_independent_layers(config, ranks.count)
            model, tokenizer = load_lazily(str(name), Path(offload_folder), device=ranks.device, dtype=dtype)
            shown = progress and not ranks.index
            run = _Streaming(
                model, tokenizer, calib_dataloader, config, calibration_source, shown, storage_device, callbacks
            )
            run.store_beside(folder)
            if ranks.count > 1:
                run.pruning.title = f"Pruning, rank {ranks.index} of {ranks.count}"
            return run, run_fingerprint(str(name), run.pruning)

        run, fingerprint = ranks.each(begin)
        run.open(folder, fingerprint, overwrite, ranks)
        try:
            ranks.each(run.begin)
            run.prune(ranks)
            report = ranks.first(lambda: run.complete(output_dir, started))
        except OSError as error:
            advice = "make it writable" if error.errno in _REFUSED else "make room"
            raise OSError(
                error.errno,
                f"{error.strerror or error}: {run.kept()}; {advice}, and start again with the same output",
                error.filename,
            ) from error
        except RankError as error:
            raise RankError(f"{error}; {run.kept()}; start again with the same output") from error
    for callback in callbacks:
        callback.on_prune_end(report)
    return report


def load_lazily(
    name: str, offload_folder: Path, *, device: str | None = None, dtype: str | torch.dtype = "auto"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """A model whose weights stay in its files until they are needed, and its tokenizer where it has one.

    The weights of a GGUF file are dequantized in memory, because they can't be read one at a time.

    Raises:
        ValueError: If `name` is a folder without a model, or the device or dtype can't be used.
    """
    if gguf_file(name) is not None:
        return load_model(name, device=device, dtype=dtype)
    target = usable_device(device)
    model = AutoModelForCausalLM.from_pretrained(
        name,
        dtype=dtype if dtype == "auto" else floating_dtype(dtype),
        device_map={"": "disk"},
        offload_folder=offload_folder,
    )
    move_execution(model, target)
    return model, load_tokenizer(name)


class _Streaming:
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
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.masks: dict[str, Tensor] = {}
        self.finished: dict[int, FinishedLayer] = {}
        self.pruning = ModelPruning(
            model,
            calib_dataloader,
            config,
            self._write,
            calibration_source=source,
            progress=progress,
            storage_device=storage_device,
            undo=self._undo,
            callbacks=callbacks,
        )
        self._dense: dict[str, Tensor] = {}

    def store_beside(self, folder: Path) -> None:
        """Keep activations in files of the output's disk, where files are asked for or the device is the CPU."""
        on_cpu = self.pruning.storage_device is None and self.pruning.storage == torch.device("cpu")
        if on_cpu or self.pruning.storage_device == "disk":
            self.pruning.storage_device = folder

    def open(self, folder: Path, fingerprint: dict[str, Any], overwrite: bool, ranks: Ranks) -> None:
        """Open the journal, and take up what is finished."""
        num_layers = len(self.pruning.layers)

        def begin() -> dict[str, Any]:
            if overwrite and is_of_another_run(folder, fingerprint):
                shutil.rmtree(folder)
            Journal(folder, fingerprint, num_layers)
            return fingerprint

        def join(begun: dict[str, Any]) -> Journal:
            different = [key for key in fingerprint if fingerprint[key] != begun[key]]
            if different:
                raise ValueError(
                    f"{' and '.join(different)} differ from those of rank 0: start every process with the same "
                    "model, configuration and calibration batches."
                )
            if not (folder / FOLDER).exists():
                raise ValueError(f"output: rank 0 began {str(folder)!r}, and it isn't here: pass a shared folder.")
            return Journal(folder, fingerprint, num_layers)

        begun = ranks.first(begin)
        self.journal = ranks.each(lambda: join(begun))
        fitted = ranks.first(self._fitted_batches)
        ranks.each(lambda: self.pruning.use_batches(fitted))
        self.finished = ranks.first(self._finished)

    def begin(self) -> None:
        """Tell callbacks that the run is about to prune."""
        for callback in self.pruning.callbacks:
            callback.on_prune_begin(self.pruning.report)

    def prune(self, ranks: Ranks) -> None:
        """Prune this process's share of the decoder layers that are left, and write each for good."""
        unfinished = [index for index in range(len(self.pruning.layers)) if index not in self.finished]
        if unfinished:
            with evaluation_mode(self.model), torch.no_grad():
                ranks.first(self._share_budgets)
                todo = share_layers(unfinished, self.pruning.costs(), ranks.count)[ranks.index]
                ranks.each(lambda: self._prune_layers(todo))

    def complete(self, output_dir: Path, started: float) -> PruningReport:
        """Write all that is not a decoder layer, and give the folder its name.

        Raises:
            RankError: If decoder layers are not there.
        """
        report, journal = self.pruning.report, self.journal
        layers = journal.finished(read_shards=False)
        if len(layers) < len(self.pruning.layers):
            raise RankError("decoder layers that other ranks finished are not here: pass a folder that all nodes share")
        report.operators = [operator for _, layer in sorted(layers.items()) for operator in layer.operators]
        report.layers = [
            LayerReport(name, layers[index].hidden_state_error, layers[index].seconds)
            for index, (name, _) in enumerate(self.pruning.layers)
        ]
        report.seconds["total"] = time.perf_counter() - started + sum(o.seconds for o in self.finished.values())
        self.pruning.budgets = journal.budgets(self.pruning.config)
        report.left_dense = {k: why for _, layer in sorted(layers.items()) for k, why in layer.left_dense.items()}
        self.pruning.complete_report()
        masks = {name: mask for index in sorted(layers) for name, mask in journal.masks(index).items()}
        report, masks = as_stored(report, masks, self.pruning.stored_names)
        _complete(self.model, self.tokenizer, report, masks, journal, layers)
        for left in [*journal.folder.glob(".tmp*"), *journal.folder.glob(".*.partial")]:
            left.unlink()  # of a process that was killed while safetensors wrote
        _move(journal.folder, output_dir)
        shutil.rmtree(output_dir / FOLDER)
        return report

    def kept(self) -> str:
        """What is not lost."""
        finished = len(self.journal.finished(read_shards=False))
        total, folder = len(self.pruning.layers), str(self.journal.folder)
        return f"{finished} of {total} decoder layers are finished and kept in {folder!r}"

    def _fitted_batches(self) -> FittedBatches:
        """Batches that fit into the memory, chosen once for all ranks and for the runs that go on with this one."""
        fitted = self.journal.batches()
        if fitted is None:
            fitted = self.pruning.fitted_batches()
            self.journal.keep_batches(fitted)
        return fitted

    def _finished(self) -> dict[int, FinishedLayer]:
        """The decoder layers that need not be pruned again."""
        finished, pruning = self.journal.finished(), self.pruning
        if pruning.config.independent_layers:
            return finished
        first = next(index for index in range(len(pruning.layers) + 1) if index not in finished)
        if 0 < first <= pruning.last_layer:
            pruning.states = self.journal.states(first, pruning.storage)
            if pruning.states is None:
                first = 0  # they can't be made again without the layers before
            else:
                pruning.take_batches_of(pruning.states)
        return {index: finished[index] for index in range(first)}

    def _share_budgets(self) -> None:
        """Share the zeros over the operators, or take up how they were shared."""
        self.pruning.budgets = self.journal.budgets(self.pruning.config)
        if self.pruning.budgets is None:
            self.journal.keep_budgets(self.pruning.shared_budgets())

    def _prune_layers(self, todo: Sequence[int]) -> None:
        pruning, journal = self.pruning, self.journal
        if pruning.budgets is None:
            pruning.budgets = journal.budgets(pruning.config)
        if not todo:
            return
        started = time.perf_counter()
        for index, name, layer in pruning.run(todo):
            tensors = {f"{name}.{key}": tensor for key, tensor in layer.state_dict().items()}
            tensors = _as_saved(self.model, tensors)
            masks, self.masks, self._dense = self.masks, {}, {}
            reports = [o for o in pruning.report.operators if o.name.startswith(f"{name}.")]
            carried = index < pruning.last_layer and not pruning.config.independent_layers
            states = pruning.states if carried else None
            left_dense = {key: why for key, why in pruning.report.left_dense.items() if key.startswith(f"{name}.")}
            seconds, drift = time.perf_counter() - started, pruning.report.layers[-1].hidden_state_error
            journal.keep_layer(index, tensors, masks, reports, left_dense, states, seconds, drift)
            del tensors
            started = time.perf_counter()

    def _write(self, operator: LinearOperator, pruned: PrunedOperator) -> None:
        if not operator.is_offloaded:  # the others can be read again
            self._dense[operator.name] = operator.parameter.detach().to("cpu", copy=True)
        operator.write(pruned.weight)
        self.masks[f"{operator.name}.weight"] = pack_mask(pruned.mask.T if operator.transposed else pruned.mask)

    def _undo(self, operators: Sequence[LinearOperator]) -> None:
        """Put back the weights of operators of the current decoder layer."""
        for operator in operators:
            if operator.is_offloaded:
                kept = kept_tensor(operator.owner, operator.tensor)
                operator.parameter.data.copy_(operator.select(kept))
            elif operator.name in self._dense:
                operator.parameter.data.copy_(self._dense.pop(operator.name))


def _as_saved(model: PreTrainedModel, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under the names of the checkpoint, on the CPU, without those that are tied to others."""
    left_out = set(model.all_tied_weights_keys) | set(model._keys_to_ignore_on_save or ())
    kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items() if name not in left_out}
    return revert_weight_conversion(model, kept)


def _complete(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    report: PruningReport,
    masks: Mapping[str, Tensor],
    journal: Journal,
    layers: dict[int, FinishedLayer],
) -> None:
    """Write all that is not a decoder layer; the configuration, without which nothing loads, comes last."""
    folder, prefix = journal.folder, f"{find_decoder_layers(model).name}."
    modules = dict(model.named_modules())
    rest = {}
    for name in model.state_dict():
        owner, _, leaf = name.rpartition(".")
        if not name.startswith(prefix) and name not in model.all_tied_weights_keys:
            rest[name] = stored_tensor(modules[owner], leaf)
    rest = _as_saved(model, rest)
    last = journal.keep_shard(journal.num_shards - 1, rest)
    weight_map = {name: layer.shard for layer in layers.values() for name in layer.names}
    weight_map |= dict.fromkeys(rest, last.name)
    metadata = {"total_parameters": model.num_parameters(), "total_size": _total_size(folder)}
    index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
    write_text(folder / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")
    (folder / "fista").mkdir(exist_ok=True)
    write_tensors(folder / MASKS_FILE, dict(masks), MASKS_METADATA)
    write_text(folder / REPORT_FILE, report.to_json())
    picture = error_picture(report)
    if picture is not None:
        write_bytes(folder / PICTURE_FILE, picture)
    write_text(folder / "README.md", model_card(report, None if picture is None else PICTURE_FILE))
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    forget_gguf(model)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    model.config.fista_pruning = summary(report)
    model.config.architectures = [type(model).__name__]
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    write_atomically(folder / "config.json", lambda partial: model.config.to_json_file(partial))


def _total_size(folder: Path) -> int:
    """Bytes of the tensors in all shards."""
    total = 0
    for shard in folder.glob("*.safetensors"):
        with shard.open("rb") as file:
            header = int.from_bytes(file.read(8), "little")
        total += shard.stat().st_size - 8 - header
    return total


def _require_writable(folder: Path, output_dir: Path) -> None:
    """Refuse an output that can't be written to before any work is done."""
    existed = folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
        if not existed:
            folder.rmdir()
    except OSError as error:
        raise OSError(
            error.errno,
            f"output_dir={str(output_dir)!r} can't be written to ({error.strerror}), nothing was done: pass another "
            "folder, or make this one writable",
            error.filename,
        ) from error


def _move(folder: Path, output_dir: Path) -> None:
    """Give the finished folder its name; an older model there goes only now."""
    if output_dir.exists():
        old = output_dir.with_name(f"{output_dir.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        output_dir.rename(old)
        folder.rename(output_dir)
        shutil.rmtree(old)
    else:
        folder.rename(output_dir)
