"""From a model's files to the files of the pruned model, one decoder layer in memory at a time."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion

from optimum_fista.model.offload import is_offloaded, kept_tensor, move_execution, stored_tensor
from optimum_fista.model.operator import LinearOperator
from optimum_fista.run.atomic import write_atomically, write_tensors, write_text
from optimum_fista.run.card import model_card
from optimum_fista.run.checkpoint import MASKS_FILE, MASKS_METADATA, REPORT_FILE, require_free_folder, summary
from optimum_fista.run.config import FistaPruningConfig
from optimum_fista.run.free_memory import keep_large_blocks_apart
from optimum_fista.run.journal import FOLDER, Journal
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
from optimum_fista.run.report import PruningReport, library_versions
from optimum_fista.solve.bitmask import pack_mask
from optimum_fista.solve.pruned import PrunedOperator

_VERSIONS = ("optimum-fista", "torch", "transformers")
_BLOCKS = 64
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
) -> PruningReport:
    """Prune a model from its files to the files of `output_dir`; see `FistaPruner.prune`."""
    started = time.perf_counter()
    require_free_folder(output_dir, overwrite)
    folder = unfinished_folder(output_dir)
    _require_writable(folder, output_dir)
    keep_large_blocks_apart()
    with tempfile.TemporaryDirectory(prefix="optimum-fista-") as offload_folder:
        model, tokenizer = load_lazily(str(name), Path(offload_folder), device=device, dtype=dtype)
        run = _Streaming(model, calib_dataloader, config, calibration_source, progress, storage_device)
        run.store_beside(folder)
        journal = run.open(folder, _identity(str(name)), overwrite)
        report = run.pruning.report
        try:
            run.prune()
            report.seconds["total"] = time.perf_counter() - started + run.seconds_before
            _complete(model, tokenizer, report, journal, run)
        except OSError as error:
            advice = "make it writable" if error.errno in _REFUSED else "make room"
            raise OSError(
                error.errno,
                f"{error.strerror or error}: {len(journal.finished())} of {len(run.pruning.layers)} decoder layers are "
                f"finished and kept in {str(folder)!r}; {advice}, and start again with the same output",
                error.filename,
            ) from error
    _move(folder, output_dir)
    shutil.rmtree(output_dir / FOLDER)
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
        calib_dataloader: Iterable[Any],
        config: FistaPruningConfig,
        source: str | None,
        progress: bool,
        storage_device: str | torch.device | Path | None,
    ) -> None:
        self.model = model
        self.masks: dict[str, Tensor] = {}
        self.weight_map: dict[str, str] = {}
        self.seconds_before = 0.0
        self.pruning = ModelPruning(
            model,
            calib_dataloader,
            config,
            self._write,
            calibration_source=source,
            progress=progress,
            storage_device=storage_device,
            undo=self._undo,
        )
        self._dense: dict[str, Tensor] = {}

    def store_beside(self, folder: Path) -> None:
        """Keep activations in files of the output's disk, where files are asked for or the device is the CPU."""
        on_cpu = self.pruning.storage_device is None and self.pruning.storage == torch.device("cpu")
        if on_cpu or self.pruning.storage_device == "disk":
            self.pruning.storage_device = folder

    def open(self, folder: Path, identity: Any, overwrite: bool) -> Journal:
        """Open the journal, and take up what is finished."""
        pruning = self.pruning
        versions = library_versions()
        fingerprint = {
            "model": identity | {"dtype": str(self.model.dtype)},
            "config": pruning.config.to_dict(),
            "calibration": pruning.report.calibration["sha256"],
            "batches": [list(batch.input_ids.shape) for batch in pruning.batches],
            "versions": {name: versions[name] for name in _VERSIONS},
        }
        if overwrite and _differs(folder, fingerprint):
            shutil.rmtree(folder)
        self.journal = Journal(folder, fingerprint, len(pruning.layers))
        finished = self.journal.finished()
        if finished and len(finished) <= pruning.last_layer:
            pruning.states = self.journal.states(len(finished), pruning.storage)
            if pruning.states is None:
                finished = []  # they can't be made again without the layers before
            else:
                pruning.take_batches_of(pruning.states)
        for layer in finished:
            pruning.report.operators.extend(layer.operators)
            self.weight_map |= dict.fromkeys(layer.names, layer.shard)
            self.seconds_before += layer.seconds
        self.first = len(finished)
        return self.journal

    def prune(self) -> None:
        """Prune the decoder layers that are left, and write each for good."""
        pruning, journal = self.pruning, self.journal
        if self.first == len(pruning.layers):
            return
        pruning.budgets = journal.budgets(pruning.config)
        with evaluation_mode(self.model), torch.no_grad():
            started = time.perf_counter()
            for index, name, layer in pruning.run(self.first):
                if index == self.first and pruning.budgets is not None:
                    journal.keep_budgets(pruning.budgets)
                tensors = {f"{name}.{key}": tensor for key, tensor in layer.state_dict().items()}
                tensors = _as_saved(self.model, tensors)
                reports = [o for o in pruning.report.operators if o.name.startswith(f"{name}.")]
                states = pruning.states if index < pruning.last_layer else None
                journal.keep_layer(index, tensors, self.masks, reports, states, time.perf_counter() - started)
                self.weight_map |= dict.fromkeys(tensors, self.journal.shard_name(index))
                self.masks, self._dense = {}, {}
                del tensors
                started = time.perf_counter()

    def _write(self, operator: LinearOperator, pruned: PrunedOperator) -> None:
        if not is_offloaded(operator.module):  # the others can be read again
            self._dense[operator.name] = operator.parameter.detach().to("cpu", copy=True)
        operator.write(pruned.weight)
        self.masks[f"{operator.name}.weight"] = pack_mask(pruned.mask.T if operator.transposed else pruned.mask)

    def _undo(self, operators: Sequence[LinearOperator]) -> None:
        """Put back the weights of operators of the current decoder layer."""
        for operator in operators:
            if is_offloaded(operator.module):
                operator.parameter.data.copy_(kept_tensor(operator.module, "weight"))
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
    journal: Journal,
    run: _Streaming,
) -> None:
    """Write all that is not a decoder layer; the configuration, without which nothing loads, comes last."""
    folder, prefix = journal.folder, f"{run.pruning.layers.name}."
    modules = dict(model.named_modules())
    rest = {}
    for name in model.state_dict():
        owner, _, leaf = name.rpartition(".")
        if not name.startswith(prefix) and name not in model.all_tied_weights_keys:
            rest[name] = stored_tensor(modules[owner], leaf)
    rest = _as_saved(model, rest)
    last = journal.keep_shard(journal.num_shards - 1, rest)
    weight_map = run.weight_map | dict.fromkeys(rest, last.name)
    metadata = {"total_parameters": model.num_parameters(), "total_size": _total_size(folder)}
    index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
    write_text(folder / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")
    (folder / "fista").mkdir(exist_ok=True)
    masks = [journal.masks(index) for index in range(len(run.pruning.layers))]
    write_tensors(folder / MASKS_FILE, {name: mask for layer in masks for name, mask in layer.items()}, MASKS_METADATA)
    write_text(folder / REPORT_FILE, report.to_json())
    write_text(folder / "README.md", model_card(report))
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


def _differs(folder: Path, fingerprint: dict[str, Any]) -> bool:
    file = folder / FOLDER / "fingerprint.json"
    return folder.exists() and (
        not file.exists() or json.loads(file.read_text()) != json.loads(json.dumps(fingerprint))
    )


def _identity(name: str) -> dict[str, Any]:
    """What tells one set of weights from another without reading all of them.

    Names and sizes of the weight files, and a digest of blocks spread over each, headers included.
    """
    folder = Path(name) if Path(name).is_dir() else Path(snapshot_download(name, local_files_only=True))
    files = sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".gguf", ".bin"))
    return {"files": {path.name: [path.stat().st_size, _sampled_digest(path)] for path in files}}


def _sampled_digest(path: Path) -> str:
    size, block = path.stat().st_size, 1 << 16
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for place in range(_BLOCKS):
            file.seek(max(0, (size - block) * place // (_BLOCKS - 1)))
            digest.update(file.read(block))
    return digest.hexdigest()
