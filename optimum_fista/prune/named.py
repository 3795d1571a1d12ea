"""The entry for a model given by name: from the files of a model to the files of the pruned one.

`prune_named` checks the output, reads the model so that its weights stay in their files, finds out whether an earlier
start of the same run left something, and calls `run.run` with a `FileSink`. Processes that were launched together all
call it; `ranks.each` does a step in each of them, and `ranks.first` lets rank 0 do it for all. Terms: the unfinished
folder is `output_dir` + ".unfinished", which holds the `Journal` of what is finished and the files of the new model; a
`Plan` says what is pruned and how; the fingerprint of a run is all that its result depends on.
"""

import tempfile
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from optimum_fista.config import FistaPruningConfig
from optimum_fista.devices import storage_place, usable_device
from optimum_fista.folder.output import JOURNAL, locked_output, require_output
from optimum_fista.folder.packed_folder import require_packable
from optimum_fista.model.calibration import count_texts
from optimum_fista.model.layers import prunable_layers
from optimum_fista.model.offload import execution_device
from optimum_fista.prune.batches import read_calibration
from optimum_fista.prune.callback import PruningCallback, tell_begin
from optimum_fista.prune.files import FileSink, Output
from optimum_fista.prune.identity import join_run, run_fingerprint
from optimum_fista.prune.journal import Journal
from optimum_fista.prune.plan import Plan, plan_run, prediction_layers_of
from optimum_fista.prune.ranks import (
    RankError,
    Ranks,
    joined_ranks,
    require_independent_layers,
)
from optimum_fista.prune.run import run
from optimum_fista.prune.source_files import shared_files
from optimum_fista.removal.planning import plan_removal, require_zeros_to_pack
from optimum_fista.removal.tokens import remove_tokens
from optimum_fista.report import PruningReport
from optimum_fista.source.inventory import source_tensors
from optimum_fista.source.loading import load_lazily, reading
from optimum_fista.source.names import stored_names


def prune_named(
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
    to_measure: Sequence[str],
) -> PruningReport:
    """Prune a model from its files to the files of `output_dir`, and return the report.

    Until the end, all files are in the unfinished folder, from which the same call resumes. At the end, `output_dir` is
    replaced by the folder of the result. A Hub id is downloaded into the cache. A run that removes tokens is left to
    `remove_tokens`: it counts the tokens of the calibration text, and no decoder layer is pruned.

    Args:
        name: A Hub id, a model folder, or a folder with one GGUF file.
        calib_dataloader: Calibration batches of token ids, as the user of `FistaPruner.prune` passes them; read once. A
            run that removes tokens also takes texts (strings).
        output_dir: Where the pruned model goes.
        config: What to prune and how, as the user passed it.
        calibration_source: The name of the calibration text, for the report.
        device: Where to compute; `None`: the accelerator if there is one.
        dtype: Of the result; `"auto"` keeps those of the files.
        overwrite: Replace a model in `output_dir`, and an unfinished run of other settings.
        packed: Store the weights without their zeros.
        progress: Show bars; only rank 0 does.
        storage_device: Where to keep activations between passes: a device, a folder, `"disk"` (the unfinished folder),
            or `None` (the disk on a CPU, otherwise the device).
        callbacks: Called as operators and decoder layers are pruned, but not at the end of the run.
        to_measure: Names of texts that are measured after the run (`measure_folder`). Until then the report says that
            they are not: somebody may find the folder after this process was killed.
    """
    started = time.perf_counter()
    # Cheap checks come before the model is read: of a model or other files in the output, and of `packed`.
    require_output(output_dir, overwrite, source=name)
    require_zeros_to_pack(config, packed)
    if config.tokens_removal is not None:
        if storage_device is not None:
            raise ValueError(
                f"storage_device={str(storage_device)!r} has no meaning for pattern={config.pattern!r}, which removes "
                "tokens: no activations wait. Leave it out."
            )
        return remove_tokens(
            name,
            calib_dataloader,
            output_dir,
            config,
            text_name=calibration_source,
            device=device,
            dtype=dtype,
            overwrite=overwrite,
            progress=progress,
            # In all other runs, `run` calls `tell_begin` itself.
            on_begin=partial(tell_begin, callbacks),
            to_measure=to_measure,
        )
    # Only for their errors, before the model is read.
    usable_device(device)
    storage_place(storage_device)
    num_texts = 1
    if config.may_refit_experts:
        calib_dataloader, num_texts = count_texts(calib_dataloader)
    request = _Request(
        name=name,
        output_dir=output_dir,
        config=config,
        num_texts=num_texts,
        calibration_source=calibration_source,
        dtype=dtype,
        overwrite=overwrite,
        packed=packed,
        progress=progress,
        storage_device=storage_device,
        callbacks=callbacks,
        to_measure=to_measure,
    )

    # If the run fails, these are closed from the last to the first. `offloaded` deletes the folder of weights that
    # can't be read from the files in parts; each rank has one. `locked` then unlocks the unfinished folder: only rank 0
    # holds the lock. At last this process leaves the `ranks`.
    with joined_ranks(device) as ranks, ExitStack() as locked, ExitStack() as offloaded:
        unfinished = ranks.first(lambda: locked.enter_context(locked_output(output_dir)))
        # Another run may just have ended.
        ranks.first(lambda: require_output(output_dir, overwrite))
        report = _prune_to_files(request, calib_dataloader, ranks, unfinished, offloaded, started)

        # The run is done, and `offloaded` is closed early, in all ranks before rank 0 goes on: they offload to the
        # unfinished folder, which rank 0 tidies when it leaves the lock. The model is in its place, so a rank that
        # fails now can do no harm.
        offloaded.close()
        with suppress(RankError):
            ranks.gather(None)  # only to wait for all
    return report


@dataclass(frozen=True, kw_only=True)
class _Request:
    """What the user asks for: arguments of `prune_named`, and the number of texts that the calibration is of."""

    name: str
    output_dir: Path
    config: FistaPruningConfig
    num_texts: int  # matters only if experts are removed
    calibration_source: str | None
    dtype: str | torch.dtype
    overwrite: bool
    packed: bool
    progress: bool
    storage_device: str | torch.device | Path | None
    callbacks: Sequence[PruningCallback]
    to_measure: Sequence[str]


def _prune_to_files(
    request: _Request,
    calib_dataloader: Iterable[Any],
    ranks: Ranks,
    unfinished: Path,
    offloaded: ExitStack,
    started: float,
) -> PruningReport:
    """Prune a model from its files to the files of `request.output_dir`, in all `ranks`, and return the report.

    An earlier start of the same run in `unfinished` is resumed.

    Args:
        request: What the user asks for.
        calib_dataloader: Calibration batches of token ids; read once.
        ranks: The processes of the run, with the device where this one computes.
        unfinished: The locked folder beside the output, which rank 0 has made.
        offloaded: Gets a folder in the unfinished one, which is deleted when the stack is closed.
        started: When the run began, by `time.perf_counter`.
    """
    model = ranks.each(lambda: _read_model(request, ranks, unfinished, offloaded))
    plan = model.plan
    # The batches as the run needs them, what measures the perplexity (or `None`), and a new report.
    calibration, held_out, report = ranks.each(
        lambda: read_calibration(plan, calib_dataloader, request.calibration_source)
    )
    report.texts_not_measured = list(request.to_measure)
    # With hashes of all files: a change of the model's files ends the run.
    source = shared_files(model.files, unfinished, ranks, plan.progress)
    fingerprint = run_fingerprint(source, plan, calibration.batches, report, request.packed)
    join_run(unfinished, fingerprint, request.overwrite, ranks)
    sink = FileSink(
        plan,
        source=source,
        journal=ranks.each(lambda: Journal(unfinished, fingerprint)),
        ranks=ranks,
        output=Output(
            folder=request.output_dir,
            overwrite=request.overwrite,
            packed=request.packed,
            tokenizer=model.tokenizer,
        ),
    )
    return run(plan, calibration, held_out, report, sink, started)


@dataclass(frozen=True, kw_only=True)
class _ReadModel:
    """A model whose weights stay in its files.

    Attributes:
        plan: The plan of its run.
        tokenizer: That of a GGUF file; otherwise `None`, because it is among the files.
        files: The folder of its files, or of one GGUF file.
    """

    plan: Plan
    tokenizer: PreTrainedTokenizerBase | None
    files: Path


def _read_model(
    request: _Request, ranks: Ranks, unfinished: Path, offloaded: ExitStack
) -> _ReadModel:
    """Read a model so that its weights stay in its files, and plan its run; refuse what can't be pruned or written.

    A Hub id is downloaded into the cache; nothing else is written, except into the folder for offloaded weights.

    Args:
        request: What the user asks for; rank 0 shows bars, if the user wants any.
        ranks: The processes of the run, with the device where this one computes.
        unfinished: The locked folder beside the output, which rank 0 has made.
        offloaded: Gets a folder in the unfinished one, which is deleted at the end of the run. In it are copies of
            weights that can't be read from the files in parts, and of layers that predict more tokens and lose experts.
    """
    config = request.config
    journal_folder = unfinished / JOURNAL
    # Rank 0 has made this folder; another rank may run on another machine.
    if not journal_folder.exists():
        raise ValueError(
            f"output: rank 0 began {str(unfinished)!r}, and it isn't here: pass a shared folder."
        )
    # Several processes can't share decoder layers of which each waits for the one before.
    require_independent_layers(config, ranks.count)
    offload_folder = Path(
        offloaded.enter_context(tempfile.TemporaryDirectory(prefix="offload-", dir=journal_folder))
    )

    # `files` is the folder of the model's files; the tokenizer is `None` unless it is that of a GGUF file.
    model, tokenizer, files = load_lazily(
        request.name, offload_folder, device=ranks.device, dtype=request.dtype
    )
    files_dtypes = request.dtype == "auto"  # the result keeps the dtypes of the files
    removal = plan_removal(prunable_layers(model), config, num_texts=request.num_texts)
    with reading(str(files)):  # errors on damaged files name the folder
        source = source_tensors(
            model,
            files,
            removal.part_of,  # by the name of a tensor: the part that it belongs to and that becomes smaller
            # If no value changes, quantized tensors may stay as they are.
            quantized=files_dtypes and removal.keeps_values,
            layers_name=removal.layers.name,
        )
    source, prediction_layers = prediction_layers_of(
        removal, source, offload_folder / "prediction layers"
    )
    computes_on_cpu = execution_device(model.get_input_embeddings()).type == "cpu"
    plan = plan_run(
        removal,
        source,
        prediction_layers=prediction_layers,
        files_dtypes=files_dtypes,
        storage=_storage(request.storage_device, journal_folder, computes_on_cpu),
        progress=request.progress and ranks.index == 0,
        callbacks=request.callbacks,
    )
    if request.packed:
        names = stored_names(model, plan.operators.values(), layers_name=plan.layers.name)
        require_packable(stored.name for stored in names.values())
        if removal.earlier_masks is not None:
            # Weights that stay packed with the zeros of an earlier run.
            require_packable(stored.name for stored in removal.earlier_masks.names.values())
    return _ReadModel(plan=plan, tokenizer=tokenizer, files=files)


def _storage(
    option: str | torch.device | Path | None, journal_folder: Path, computes_on_cpu: bool
) -> torch.device | Path | None:
    """Return where activations wait between passes; `None`: on the device where the run computes.

    `option` is what the user passed. "disk" stands for the journal, and so does `None` on a CPU.
    """
    if option == "disk" or (option is None and computes_on_cpu):
        return journal_folder
    return storage_place(option)
