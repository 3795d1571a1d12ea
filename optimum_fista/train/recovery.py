"""Recovery: train the weights that a pruned model kept, so that it predicts as the dense model does.

Other methods fit only the text after pruning, or train adapters that fill the zeros when they are merged. Here the
dense model is the teacher, and all kept weights are trained under their masks. On the held-out text, the result is
never worse than before. This needs memory for both models, and for gradients and two moments in float32.
"""

import dataclasses
import hashlib
import logging
import math
import os
import random
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import numpy as np
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, TrainingArguments

from optimum_fista.environment import numerical_environment
from optimum_fista.folder.atomic import digest_of, read_record, write_record
from optimum_fista.folder.checkpoint import MASKS_FILE, mark_retrained
from optimum_fista.folder.output import (
    FOLDER,
    MODEL,
    RUN_FILE,
    install,
    locked_output,
    require_output,
    unfinished_folder,
)
from optimum_fista.folder.writing import write_checkpoint
from optimum_fista.memory import available_bytes
from optimum_fista.model.media import media_arguments
from optimum_fista.prune.journal import SourceFiles, join_run, shared_files
from optimum_fista.prune.ranks import Ranks, joined_ranks
from optimum_fista.report import RecoveryReport, library_versions, lines_of_unplaced, public_name
from optimum_fista.source.files import copy_source
from optimum_fista.source.loading import load_model, read_model
from optimum_fista.source.source_tensors import source_tensors
from optimum_fista.text.calibration_tokens import calibration_tokens_by_name
from optimum_fista.train.distillation import DistillationTrainer, Watch, kept_states
from optimum_fista.train.recovery_plan import (
    Choice,
    RecoveryPlan,
    choose,
    load_student,
    mark_trained,
    plan_recovery,
)
from optimum_fista.train.training import MaskedTrainingCallback, find_record, local

logger = logging.getLogger(__name__)

_FORMAT = 4  # of the fingerprint and the states
CHECKPOINTING = "activation_checkpointing"
if not hasattr(TrainingArguments, CHECKPOINTING):  # before Transformers 5.24
    CHECKPOINTING = "gradient_checkpointing"
_RATES = {"all": 2e-4, "norms": 2e-3}  # tuned on SmolLM2-135M
_WIDTH_OF_RATE = 576  # its hidden size: with Adam the rate of "all" goes down as the width goes up
_EVALUATIONS = 4  # after the first, and one after a tenth of the steps


@numerical_environment()
def recover(
    folder: str | Path,
    teacher: str | Path | None = None,
    output_dir: str | Path | None = None,
    *,
    calibration: str = "self",
    device: str | None = None,
    overwrite: bool = False,
    progress: bool = True,
    **options: Any,
) -> RecoveryReport:
    """Train what a pruned model kept, so that it predicts as the dense model does; its zeros stay zero.

    It minimizes the distance of the pruned model's predictions from the dense model's and from the text (`divergence`),
    by `transformers.Trainer` with AdamW, a warm-up and a cosine, on text that is read once. Held-out sequences, which
    are never trained on, measure the loss. The weights with the smallest loss are saved, or those of `folder` if no
    loss is smaller than before. docs/howto/recover.md has the precisions.

    A state is saved every two minutes and at Ctrl-C. After a crash or an interrupt the same call resumes there, and
    gives the same bits on the same machine. Until the end all files are in `output_dir` + ".unfinished". Processes that
    were launched together (docs/ranks.md) share the sequences if all make this call.

    Args:
        folder: A folder or Hub id saved by optimum-fista, packed or not. It is only read.
        teacher: The dense model, a Hub id or a model folder; `None`: the report of `folder` names a Hub id.
        output_dir: Where to write the recovered model; `None`: `folder`'s name + "-recovered".
        calibration: The text: `"self"` (the teacher writes it) or a source of `load_text`.
        device: Where to compute; `None`: the accelerator if there is one, otherwise the CPU.
        overwrite: Replace a model that `output_dir` already holds, and an unfinished run of other settings.
        progress: Whether to show a progress bar.
        **options: `tokens`, `sequence_length`, `train` and the other fields of `RecoveryOptions`.

    Returns:
        What it did; the report in the folder holds it too, under `recoveries`.

    Raises:
        ValueError: If an option can't be used, the models do not fit together, or an unfinished run in `output_dir` had
            other settings or processes.
        FileExistsError: If `output_dir` holds a model and `overwrite` is False, or files of the user.
    """
    with joined_ranks(device) as ranks, ExitStack() as opened:
        asked: dict[str, Any] = {
            "calibration": calibration,
            "device": ranks.device,
            "overwrite": overwrite,
        } | options
        plan = ranks.each(
            lambda: plan_recovery(folder, teacher, output_dir, processes=ranks.count, **asked)
        )
        unfinished = unfinished_folder(plan.output)

        def lock() -> None:
            opened.enter_context(locked_output(plan.output))
            require_output(plan.output, overwrite)  # another run may just have ended

        ranks.first(lock)
        files = [
            shared_files(Path(name), unfinished, ranks, progress)
            for name in (plan.source, plan.teacher)
        ]
        windows = ranks.first(lambda: _draw(plan, unfinished / FOLDER, progress))
        fingerprint = _fingerprint(plan, files, windows, ranks.count)
        join_run(unfinished, fingerprint, overwrite, ranks)
        ranks.first(
            lambda: write_record(unfinished / RUN_FILE, fingerprint)
        )  # the folder is kept until the run ends
        with _trainers_settings(plan.place), ranks.exchanging():
            model, found = _train(plan, windows, fingerprint, unfinished / FOLDER, ranks, progress)

        def finish() -> None:
            assert model is not None  # in rank 0
            for read in files:  # that of the source was read again for what is saved
                read.require_unchanged()
            record, masks = find_record(model, plan.source)
            record = dataclasses.replace(record, recoveries=[*record.recoveries, found])
            shutil.rmtree(unfinished / MODEL, ignore_errors=True)  # of an earlier start
            (unfinished / MODEL).mkdir()
            copy_source(Path(plan.source), unfinished / MODEL)
            tensors = source_tensors(model, Path(plan.source), quantized=False)
            for line in lines_of_unplaced({}, tensors.lost):
                logger.warning("%s", line)
            record.model |= {"lacks": dict(tensors.lost)} if tensors.lost else {}
            write_checkpoint(model, unfinished / MODEL, record, masks, None, tensors)
            install(unfinished, plan.output, overwrite, Path(plan.source))

        ranks.first(finish)
    return found


def _draw(plan: RecoveryPlan, journal: Path, progress: bool) -> Tensor:
    """Draw the text as tokens [sequences, length]; the first sequences are held out."""
    held_out = plan.options.held_out
    numbers = plan.num_sequences + held_out, plan.length, plan.options.seed
    places: dict[str, Any] = {
        "held_out": held_out,
        "device": str(plan.place),
        "keep_in": journal,
        "progress": progress,
    }
    try:
        return calibration_tokens_by_name(plan.text_model, plan.calibration, *numbers, **places)
    except ValueError as error:
        text = f"tokens={plan.options.tokens} and held_out={held_out} ask for this text"
        raise ValueError(f"{text}: {error}") from error


def _fingerprint(
    plan: RecoveryPlan, files: Sequence[SourceFiles], windows: Tensor, processes: int
) -> dict[str, Any]:
    """List all that the bytes of the result depend on."""
    versions, masks_file = library_versions(), Path(plan.source) / MASKS_FILE
    options = {
        name: getattr(plan.options, name) for name in ("batch_size", "label_share", "seed", "train")
    }
    options |= {"learning_rate": plan.options.learning_rate, "accumulate": plan.accumulate}
    kept = plan.kept  # the teacher's predictions are those of the tokens that stay
    options |= {} if kept is None else {"kept_tokens": len(kept)}
    return {
        "recovery": _FORMAT,
        "processes": processes,  # sums are rounded otherwise with others
        "weights": files[0].digests,
        "masks": digest_of(masks_file) if masks_file.exists() else None,  # a packed folder has none
        "teacher": files[1].digests,
        "kept": None if kept is None else hashlib.sha256(kept.numpy().tobytes()).hexdigest(),
        "shape": [plan.num_sequences, plan.options.held_out, plan.length],
        "windows": hashlib.sha256(windows.numpy().tobytes()).hexdigest(),
        "options": options | {"compute_dtype": str(plan.compute).removeprefix("torch.")},
        "device": plan.place.type,
        "versions": {name: versions[name] for name in ("optimum-fista", "torch", "transformers")},
    }


def _train(
    plan: RecoveryPlan,
    windows: Tensor,
    fingerprint: dict[str, Any],
    journal: Path,
    ranks: Ranks,
    progress: bool,
) -> tuple[PreTrainedModel | None, RecoveryReport]:
    """Train or resume; returns the model to save (in rank 0) and the report."""
    free = ranks.gather(available_bytes(plan.place))
    choice = ranks.first(lambda: _choose_once(plan, journal, free))
    model, teacher = ranks.each(lambda: _load(plan, journal))
    if media_arguments(model).names:
        logger.info(
            "%s takes images or sounds, too: it is trained on text alone", type(model).__name__
        )
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    model.float()  # a step in bfloat16 would often be smaller than the weight's last bit
    mark_trained(model, choice.train)
    kept = ranks.first(lambda: kept_states(journal))
    arguments = _arguments(plan, choice, model, journal, ranks.count, resumed=bool(kept))
    watch = Watch(ranks, progress, math.ceil(plan.steps / 10))
    callbacks: list[Any] = [
        watch,
        *([MaskedTrainingCallback(plan.source)] if choice.train == "all" else []),
    ]
    texts = windows[plan.options.held_out :], windows[: plan.options.held_out]

    def start() -> dict[str, Tensor]:
        return dict(load_student(plan.source).named_parameters())

    given = plan.kept, plan.options.label_share, plan.steps, start
    trainer = DistillationTrainer(model, teacher, *given, arguments, *texts, callbacks)
    watch.back_off = trainer.back_off
    try:
        with watch.stopping_at_a_step():
            trainer.train(str(kept[max(kept)]) if kept else None)
    finally:
        for callback in callbacks:  # after an error too: masks have a hook on all optimizers
            callback.on_train_end()
    state, trained = trainer.state, cast(nn.Module, trainer.model)
    if watch.stopped and state.global_step < plan.steps:
        raise KeyboardInterrupt
    measured = [row for row in state.log_history if "eval_loss" in row]
    evaluations = [[row["step"], row["seconds"], row["eval_loss"]] for row in measured]
    seconds, before = state.log_history[-1]["seconds"], evaluations[0][2]
    best_step, loss = state.best_global_step or 0, before
    if best_step:
        for name, parameter in trained.named_parameters():
            part = local(parameter.data)
            part.copy_(part.to(dtypes[name]))  # as it will be saved
        loss = trainer.evaluate()["eval_loss"]  # of what is saved, which has to be better
    if not loss < before:
        best_step, loss = 0, before
    found = RecoveryReport(
        teacher=public_name(plan.teacher_name),
        train=choice.train,
        num_trained=choice.num_trained,
        num_tokens=plan.num_sequences * plan.length // plan.steps * state.global_step,
        calibration={
            "source": public_name(plan.calibration),
            "sha256": fingerprint["windows"],
            "sequence_length": plan.length,
            "held_out": plan.options.held_out,
        },
        options=fingerprint["options"]
        | {"learning_rate": arguments.learning_rate * trainer.schedule.share},
        evaluations=evaluations,
        best_step=best_step,
        held_out_loss_before=before,
        held_out_loss=loss,
        seconds=seconds,
    )
    return _recovered(plan, trained if best_step else None, is_saved=not ranks.index), found


def _choose_once(plan: RecoveryPlan, journal: Path, free: Sequence[int | None]) -> Choice:
    """Choose, or read the choice with which the run began: a resumed run keeps it, whatever memory is free now."""
    noted = read_record(journal / "choice.json")
    choice = choose(plan, free) if noted is None else Choice(**noted)
    logger.info("%s", choice)
    if noted is None:
        write_record(journal / "choice.json", dataclasses.asdict(choice))
    return choice


def _load(plan: RecoveryPlan, journal: Path) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The pruned and the dense model."""
    if not journal.exists():  # rank 0 wrote it
        begun = f"rank 0 began {str(journal.parent)!r}, and it isn't here"
        raise ValueError(f"output: {begun}: pass a folder that all nodes share.")
    teacher, _ = load_model(plan.teacher, device=str(plan.place), dtype=plan.compute)
    return load_student(plan.source), teacher.eval().requires_grad_(False)


def _arguments(
    plan: RecoveryPlan,
    choice: Choice,
    model: PreTrainedModel,
    journal: Path,
    processes: int,
    *,
    resumed: bool,
) -> TrainingArguments:
    width, every = (
        model.config.get_text_config(decoder=True).hidden_size,
        math.ceil(plan.steps / _EVALUATIONS),
    )
    rate = _RATES[choice.train] * (
        min(1.0, _WIDTH_OF_RATE / width) if choice.train == "all" else 1.0
    )
    arguments = TrainingArguments(
        str(journal.resolve()),
        per_device_train_batch_size=plan.options.batch_size,
        per_device_eval_batch_size=1,
        gradient_accumulation_steps=plan.accumulate // processes,
        num_train_epochs=1,
        train_sampling_strategy="sequential",  # the windows are in random order already
        learning_rate=plan.options.learning_rate or rate,
        optim="adamw_torch_fused",
        adam_beta2=0.95,
        bf16=plan.compute == torch.bfloat16,
        **{CHECKPOINTING: choice.checkpointed},  # type: ignore[arg-type]
        eval_strategy="steps",
        eval_steps=every,
        eval_on_start=not resumed,
        metric_for_best_model="eval_loss",
        load_best_model_at_end=True,
        save_strategy="best",  # and every two minutes, by Watch
        logging_steps=every,
        logging_nan_inf_filter=False,  # Watch ends a training whose loss is not finite
        report_to="none",
        disable_tqdm=True,  # Watch has the bar
        dataloader_pin_memory=False,
        use_cpu=plan.place.type == "cpu",
    )
    arguments._setup_devices, arguments._n_gpu = (
        plan.place,
        1,
    )  # the first accelerator or all of them otherwise
    return arguments


def _recovered(
    plan: RecoveryPlan, trained: nn.Module | None, *, is_saved: bool
) -> PreTrainedModel | None:
    """The source's model in its own dtypes, with the trained weights if they are better; only in rank 0."""
    model = read_model(plan.source, dtype="auto") if is_saved else None
    for name, parameter in trained.named_parameters() if trained is not None else ():
        value = (
            parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        )  # all ranks take part
        if model is not None:
            model.get_parameter(name).data.copy_(value.detach())
    if model is not None and trained is not None:
        mark_retrained(model)
    return model


@contextmanager
def _trainers_settings(place: torch.device) -> Iterator[None]:
    """Put back what the Trainer and Accelerate change in the process: states, random numbers, the environment."""
    with ExitStack() as stack:
        for kind in (AcceleratorState, GradientState, PartialState):
            stack.enter_context(
                patch.dict(kind._shared_state)
            )  # as it was at the end, whatever is in it meanwhile
        stack.enter_context(patch.dict(os.environ))
        stack.callback(random.setstate, random.getstate())
        stack.callback(np.random.set_state, np.random.get_state())
        devices = range(torch.accelerator.device_count()) if place.type != "cpu" else ()
        stack.enter_context(torch.random.fork_rng(devices=devices, device_type=place.type))
        if place.type != "cpu":
            os.environ["ACCELERATE_TORCH_DEVICE"] = str(place)
        yield
