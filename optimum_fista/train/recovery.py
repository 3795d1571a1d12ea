"""Recovery: train the weights that a pruned model kept, so that it predicts as the dense model does.

Other methods fit only the text after pruning, or train adapters that fill the zeros when they are merged. Here the
dense model is the *teacher*, and all kept weights of the pruned model, the *student*, are trained under their masks. On
the held-out text, the result is never worse than before. This needs memory for both models, and for gradients and two
moments in float32.

`recover` makes a plan (`recovery_plan`), draws the text as windows (sequences of tokens), trains (`distillation`), and
writes the result. Until then, everything is in an *unfinished folder* beside the output (`folder.output`), whose
subfolder `journal` has the states of the training from which a later call resumes. *Ranks* are processes that were
launched together (`prune.ranks.Ranks`): rank 0 reads, chooses and writes, and all of them train.

With the option `teacher_logits`, the teacher's predictions are stored in a folder of the user before the training
(`stored_teacher`), and the teacher is not in memory during it.
"""

import dataclasses
import hashlib
import json
import logging
import math
import os
import random
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate.utils import parse_flag_from_env
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments

from optimum_fista import internals
from optimum_fista.atomic import digest_of, read_record, write_record
from optimum_fista.environment import numerical_environment
from optimum_fista.folder.checkpoint import MASKS_FILE, mark_retrained
from optimum_fista.folder.output import (
    JOURNAL,
    MODEL,
    RUN_FILE,
    install,
    locked_output,
    require_output,
    unfinished_folder,
)
from optimum_fista.folder.writing import write_checkpoint, write_dense
from optimum_fista.memory import available_bytes
from optimum_fista.model.media import media_arguments
from optimum_fista.prune.identity import join_run
from optimum_fista.prune.ranks import Ranks, joined_ranks
from optimum_fista.prune.source_files import SourceFiles, shared_files
from optimum_fista.public_names import public_name
from optimum_fista.recovery_report import RecoveryReport
from optimum_fista.report import lines_of_unplaced
from optimum_fista.source.files import copy_source
from optimum_fista.source.inventory import source_tensors
from optimum_fista.source.loading import (
    gguf_file,
    load_model,
    load_tokenizer,
    read_model,
)
from optimum_fista.source.quantization import quantized_source
from optimum_fista.train.distillation import (
    DistillationTrainer,
    Watch,
    explaining_full_disk,
    intact_states,
)
from optimum_fista.train.recovery_plan import (
    Choice,
    RecoveryPlan,
    choose,
    load_student,
    mark_trained,
    plan_recovery,
    plan_text,
    round_head,
    shards_weights,
)
from optimum_fista.train.sequences import Sequences, draw_text
from optimum_fista.train.stored_teacher import StoredTeacher, require_settings, stored_teacher
from optimum_fista.train.teacher import require_dense_model
from optimum_fista.train.training import (
    MaskedTrainingCallback,
    find_masks,
    find_record,
    local,
    plain_parameters,
    require_dense,
)
from optimum_fista.versions import library_versions

logger = logging.getLogger(__name__)

_FORMAT = 5  # of the fingerprint and the states
CHECKPOINTING = internals.checkpointing_option()
"""The argument of `TrainingArguments` that computes activations twice: its name depends on Transformers' version."""


@numerical_environment()
def recover(
    folder: str | Path,
    teacher: str | Path | None = None,
    output_dir: str | Path | None = None,
    *,
    calibration: str | Path | Sequence[str | Path] = "self",
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
        folder: A folder or Hub id saved by optimum-fista, packed or not; or of a model that was never pruned, which is
            trained in the same way. It is only read.
        teacher: The dense model, a Hub id or a model folder; `None`: the report of `folder` names a Hub id, or `folder`
            was never pruned and is its own teacher. It has to be the model that `folder` was pruned from, by the
            SHA-256 in its report, unless `other_teacher=True`.
        output_dir: Where to write the recovered model; `None`: `folder`'s name + "-recovered".
        calibration: The text: `"self"` (the teacher writes it), a source of `load_text`, or several, each of which
            gives an equal share of the sequences. With the option `answers_only=True`, each text has conversations, and
            only tokens of answers count in the loss; its documents that are no conversations count whole.
        device: Where to compute; `None`: the accelerator if there is one, otherwise the CPU.
        overwrite: Replace a model that `output_dir` already holds, and an unfinished run of other settings.
        progress: Whether to show a progress bar.
        **options: `tokens`, `sequence_length`, `train` and the other fields of `RecoveryOptions`.

    Returns:
        What it did; the report in the folder holds it too, under `recoveries`, after earlier recoveries. The folder of
        a model that was never pruned has `fista/recovery.json` instead, with the same list.

    Raises:
        ValueError: If an option can't be used, the models do not fit together, zeros of an earlier run have no mask, or
            an unfinished run in `output_dir` had other settings or processes.
        FileExistsError: If `output_dir` holds a model and `overwrite` is False, or files of the user.
        OSError: If the disk is full. What was saved stays, and the same call resumes after it.
    """
    # `ranks.first` has rank 0 do something and gives its result to all; `ranks.each` has all do something. Both fail in
    # all ranks if they fail in one.
    with joined_ranks(device) as ranks, ExitStack() as until_the_end:
        plan = ranks.each(
            lambda: plan_recovery(
                folder,
                teacher,
                output_dir,
                calibration=calibration,
                device=ranks.device,
                overwrite=overwrite,
                processes=ranks.count,
                **options,
            )
        )
        unfinished = unfinished_folder(plan.output)

        def lock() -> None:
            """Lock the output of `plan` until the end of the run (`until_the_end`), and check it once more.

            Without `overwrite`, it may not hold a model. Rank 0 does this.
            """
            until_the_end.enter_context(locked_output(plan.output))
            require_output(plan.output, overwrite)  # another run may just have ended

        ranks.first(lock)

        # Hashed now, so that a change of a file during the run is noticed.
        students_files = shared_files(Path(plan.source), unfinished, ranks, progress)
        teachers_files = shared_files(Path(plan.teacher), unfinished, ranks, progress)
        earlier_start = None if overwrite else read_record(unfinished / RUN_FILE)
        ranks.first(lambda: _require_right_models(plan, teachers_files, earlier_start))

        # Stored predictions are checked as far as possible before the text is drawn: it may take hours to write.
        ranks.first(lambda: _require_settings_of_predictions(plan, teachers_files))
        text = ranks.first(lambda: draw_text(plan, unfinished / JOURNAL, progress))

        # A run in `unfinished` with another fingerprint is refused, or deleted if `overwrite`.
        fingerprint = _fingerprint(plan, students_files, teachers_files, text, ranks.count)
        join_run(unfinished, fingerprint, overwrite, ranks)
        # With this file the folder is kept until the run ends.
        ranks.first(lambda: write_record(unfinished / RUN_FILE, fingerprint))

        stored = None  # the teacher is loaded for the training, or has no part in it
        if plan.options.teacher_logits is not None:
            stored = _store_predictions(plan, teachers_files, text, ranks, progress=progress)

        # `exchanging`: if another process ends while tensors are exchanged, the error says so.
        with _process_restored(plan.device), ranks.exchanging():
            model, report = _train(
                plan=plan,
                text=text,
                stored=stored,
                fingerprint=fingerprint,
                journal=unfinished / JOURNAL,
                ranks=ranks,
                progress=progress,
            )

        # Rank 0 has the model.
        files = (students_files, teachers_files)
        ranks.first(lambda: _finish(plan, model, report, files, overwrite=overwrite))
    return report


def _finish(
    plan: RecoveryPlan,
    model: PreTrainedModel | None,
    report: RecoveryReport,
    files: Sequence[SourceFiles],
    *,
    overwrite: bool,
) -> None:
    """Write the trained model and its report into the unfinished folder, and move it to `plan.output`.

    Refuses this if `files`, those of the student and of the teacher, have changed since the run began. `overwrite`: a
    model in the output may be replaced.
    """
    assert model is not None
    for files_of_model in files:
        files_of_model.require_unchanged()
    unfinished = unfinished_folder(plan.output)
    _write(plan, model, report, unfinished)
    install(unfinished, plan.output, overwrite, Path(plan.source))


def _require_right_models(
    plan: RecoveryPlan, teachers_files: SourceFiles, earlier_start: dict[str, Any] | None
) -> None:
    """Refuse a teacher that is not the dense model, and zeros that training would fill, unless the user allows it.

    Both checks read all weights. So they are left out if an earlier start of the run had the same teacher
    (`teachers_files`, by their digests), and the same permission to take another one. `earlier_start` is its
    fingerprint, from the unfinished folder. If that was another run, with another student or other options, it is
    refused later (`join_run`). `None` if there was none, or if the user lets this run overwrite it. Leaves no file.
    """
    options = plan.options
    if (
        earlier_start is not None
        and earlier_start.get("teacher") == teachers_files.digests
        and earlier_start.get("other_teacher") == options.other_teacher
    ):
        return

    # Training would fill zeros that have no mask, unless it trains the norms alone.
    refuses_zeros_without_mask = options.train != "norms" and not options.fill_zeros
    # A student that was never pruned has no masks, and may have any teacher.
    if plan.report is None:
        if refuses_zeros_without_mask:
            require_dense(load_student(plan.source))  # refuses a student with many zeros
        return

    if not options.other_teacher:
        require_dense_model(plan, plan.report, unfinished_folder(plan.output))

    # The steps are the runs before the one that wrote the report. Its masks need not cover the zeros of these runs.
    was_pruned_before = bool(plan.report.first_model.steps)
    if was_pruned_before and refuses_zeros_without_mask:
        find_masks(load_student(plan.source), plan.source)  # which refuses zeros without a mask


def _settings_of_predictions(plan: RecoveryPlan, teachers_files: SourceFiles) -> dict[str, Any]:
    """List all that the teacher's predictions depend on, but the text, as texts and numbers by name. Changes nothing.

    `teachers_files` are the files of the teacher, which `shared_files` has hashed.
    """
    model = json.dumps(teachers_files.digests, sort_keys=True)
    return {
        "format": 1,
        "model": hashlib.sha256(model.encode()).hexdigest(),
        "kept_tokens": _digest_of_kept_tokens(plan),
        "top_k": plan.options.top_k,
        "compute_dtype": str(plan.compute_dtype).removeprefix("torch."),
    }


def _require_settings_of_predictions(plan: RecoveryPlan, teachers_files: SourceFiles) -> None:
    """Refuse a folder of stored predictions (`teacher_logits`) whose settings, but for the text, are other ones."""
    if plan.options.teacher_logits is not None:
        settings = _settings_of_predictions(plan, teachers_files)
        require_settings(Path(plan.options.teacher_logits), settings)


def _store_predictions(
    plan: RecoveryPlan,
    teachers_files: SourceFiles,
    text: Sequences,
    ranks: Ranks,
    *,
    progress: bool,
) -> StoredTeacher:
    """Store the teacher's predictions of the text to train on, as far as they are missing, and return them.

    Predictions of all tokens are stored, also of those that do not count. All processes must call this. `progress`:
    whether to show a bar.
    """
    trained_on = text.tokens[plan.options.held_out :]
    settings = _settings_of_predictions(plan, teachers_files)
    settings["text"] = _digest_of_sequences(trained_on)
    return stored_teacher(plan, settings, trained_on, ranks, progress=progress)


def _digest_of_sequences(sequences: Tensor) -> str:
    """Return the SHA-256 of token ids, int64 [sequences, length] on the CPU, and of their shape."""
    digest = hashlib.sha256(json.dumps(list(sequences.shape)).encode())
    digest.update(sequences.numpy().tobytes())
    return digest.hexdigest()


def _digest_of_kept_tokens(plan: RecoveryPlan) -> str | None:
    """Return the SHA-256 of the teacher's ids of the student's tokens; `None` if both have the same tokens."""
    return None if plan.kept_tokens is None else _digest_of_values(plan.kept_tokens)


def _digest_of_values(tensor: Tensor) -> str:
    """Return the SHA-256 of the values of a tensor on the CPU, without its shape."""
    return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()


def _fingerprint(
    plan: RecoveryPlan,
    students_files: SourceFiles,
    teachers_files: SourceFiles,
    text: Sequences,
    processes: int,
) -> dict[str, Any]:
    """List all that the bytes of the result depend on, as plain values: a resumed run must have the same list.

    The files of both models come from `shared_files`, which has hashed them: `digests` are SHA-256 by file name.
    `text` has all sequences, the held-out ones too, and `processes` is the number of processes that train together. The
    mask file is read; nothing is changed.
    """
    masks_file = Path(plan.source) / MASKS_FILE
    # nothing if all tokens count
    counted = {} if text.counted is None else {"counted": _digest_of_values(text.counted)}
    # The digest of the sequences depends on the order of the texts. With their names, an error can say so.
    names = [public_name(source) for source in plan.calibration]
    texts = {"texts": names} if len(names) > 1 else {}
    versions = library_versions()
    # Fingerprints are compared as text, so the order of the entries counts, too.
    return {
        "recovery": _FORMAT,
        "processes": processes,  # another number of them would round sums differently
        "weights": students_files.digests,
        "masks": digest_of(masks_file) if masks_file.exists() else None,  # a packed folder has none
        "teacher": teachers_files.digests,
        "other_teacher": plan.options.other_teacher,
        "kept": _digest_of_kept_tokens(plan),
        "fill_zeros": plan.options.fill_zeros,
        "shape": [plan.num_sequences, plan.options.held_out, plan.length],
        "windows": _digest_of_values(text.tokens),
        **counted,
        **texts,
        "options": _options_of_result(plan),
        "device": plan.device.type,
        "versions": {name: versions[name] for name in ("optimum-fista", "torch", "transformers")},
    }


def _options_of_result(plan: RecoveryPlan) -> dict[str, Any]:
    """List the options of a recovery on which the bytes of the result depend, for the fingerprint and the report."""
    options: dict[str, Any] = {
        "batch_size": plan.options.batch_size,
        "label_share": plan.options.label_share,
        "seed": plan.options.seed,
        "train": plan.options.train,
        "relative_step": plan.options.relative_step,
        "accumulate": plan.passes_of_step,
    }
    if plan.kept_tokens is not None:  # the teacher's predictions are those of the tokens that stay
        options["kept_tokens"] = len(plan.kept_tokens)
    if plan.options.teacher_logits is not None:
        options["top_k"] = plan.options.top_k
    if plan.options.answers_only:
        options["answers_only"] = True
    options["compute_dtype"] = str(plan.compute_dtype).removeprefix("torch.")
    return options


def _train(
    plan: RecoveryPlan,
    text: Sequences,
    stored: StoredTeacher | None,
    fingerprint: dict[str, Any],
    journal: Path,
    ranks: Ranks,
    progress: bool,
) -> tuple[PreTrainedModel | None, RecoveryReport]:
    """Train from the beginning, or from the last state in `journal`, the folder of the run.

    Returns the model to save (`None` in processes other than rank 0) and the report. After Ctrl-C it raises
    KeyboardInterrupt instead, once a state is saved.

    Writes the choice and the states of the training to `journal`, and deletes states from which no run can resume.
    Changes the states of Accelerate and the random numbers of the process; the caller puts them back.

    Args:
        plan: What to train, on which device, in how many steps.
        text: All sequences; the held-out ones are first.
        stored: The stored predictions of the teacher; `None`: the teacher is loaded, if it has a part in the loss.
        fingerprint: Of the run, from `_fingerprint`; parts of it stand in the report.
        journal: The folder of the run.
        ranks: The processes that train together; all of them call this.
        progress: Whether to show a bar.
    """
    free = ranks.gather(available_bytes(plan.device))  # bytes by rank, `None` if not known
    choice = ranks.first(lambda: _choose_once(plan, journal, free))
    model, teacher = ranks.each(lambda: _load_models(plan, stored, journal))
    # Says, for instance, that a model that takes images is trained on text alone.
    _log_differences(model, plan.source)

    # of the files of the model, in which the trained weights will be saved
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    _prepare_student(model, choice, plan.compute_dtype)

    states = ranks.first(lambda: intact_states(journal))
    last_state = str(states[max(states)]) if states else None
    watch = Watch(ranks, progress=progress, first_check=math.ceil(plan.steps / 20))
    trainer = _make_trainer(
        plan=plan,
        choice=choice,
        model=model,
        teacher=teacher,
        text=text,
        watch=watch,
        arguments=_trainers_arguments(
            plan=plan,
            choice=choice,
            journal=journal,
            processes=ranks.count,
            resumed=last_state is not None,
        ),
    )

    with _callbacks_ended(trainer), watch.stopping_at_a_step():
        trainer.train(last_state)  # `None`: from the beginning
    # Ctrl-C ended the training before its last step. Its state is saved, so the same call resumes there.
    if watch.stopped and trainer.state.global_step < plan.steps:
        raise KeyboardInterrupt

    # Before `_round_best_weights`, which measures once more: the report is made from the history of the training, to
    # which every measurement adds.
    report = _new_report(plan, choice, trainer, fingerprint)
    if trainer.state.best_global_step:  # the Trainer has loaded the weights of this step
        report = _round_best_weights(report, trainer, dtypes)
    trained = cast(nn.Module, trainer.model) if report.best_step else None
    recovered = _model_with_weights(plan, trained, is_saved=ranks.index == 0)
    return recovered, report


def _make_trainer(
    plan: RecoveryPlan,
    choice: Choice,
    model: PreTrainedModel,
    teacher: PreTrainedModel | StoredTeacher | None,
    text: Sequences,
    watch: Watch,
    arguments: TrainingArguments,
) -> DistillationTrainer:
    """Make the Trainer of a run, which trains `model` under its masks and is watched by `watch`.

    `model` moves to the device of the training.

    Args:
        plan: What to train, on which device, in how many steps.
        choice: Says what is trained; masks are kept only if all weights are.
        model: The pruned model in float32, with gradients on for what is trained (`_prepare_student`).
        teacher: From `_load_models`.
        text: All sequences; the held-out ones are first.
        watch: Shows, saves and ends the training.
        arguments: From `_trainers_arguments`.
    """
    callbacks: list[TrainerCallback] = [watch]
    if choice.train == "all" and plan.report is not None:
        callbacks.append(MaskedTrainingCallback(plan.source, fill_zeros=plan.options.fill_zeros))
    held_out = plan.options.held_out
    trainer = DistillationTrainer(
        model=model,
        teacher=teacher,
        kept_tokens=plan.kept_tokens,
        label_share=plan.options.label_share,
        steps=plan.steps,
        read_start=lambda: dict(load_student(plan.source).named_parameters()),
        arguments=arguments,
        trained_on=text.part(slice(held_out, None)),
        held_out=text.part(slice(held_out)),
        callbacks=callbacks,
    )
    watch.back_off = trainer.back_off  # each of the two needs the other
    return trainer


@contextmanager
def _callbacks_ended(trainer: DistillationTrainer) -> Iterator[None]:
    """At the end of a training in the `with` block, end its callbacks, also after an error.

    After an error the Trainer does not end them, and the hook that masks have on all optimizers would stay. Callbacks
    of this package that have ended already do nothing.
    """
    try:
        yield
    finally:
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, Watch | MaskedTrainingCallback):
                callback.on_train_end(trainer.args, trainer.state, trainer.control)


def _prepare_student(model: PreTrainedModel, choice: Choice, compute_dtype: torch.dtype) -> None:
    """Bring the weights of the student into the dtypes of the training, with gradients for those that `choice` trains.

    All weights become float32. Then that of the head is rounded to `compute_dtype`, the dtype of products, unless the
    weights are sharded.
    """
    model.float()  # a step in bfloat16 would often be smaller than the weight's last bit
    mark_trained(model, choice.train)  # gradients on for some parameters, off for the others
    if not shards_weights():  # the head of a sharded model is left as it is
        round_head(model, compute_dtype)


def _log_differences(model: PreTrainedModel, source: str) -> None:
    """Log what is trained otherwise than it is stored or used: media, and quantized weights.

    `model` is the one that is trained, and `source` the folder that it was loaded from.
    """
    if media_arguments(model).names:
        logger.info(
            "%s takes images or sounds, too: it is trained on text alone", type(model).__name__
        )
    is_quantized = gguf_file(source) is not None or quantized_source(model) is not None
    if is_quantized:
        logger.info(
            "%s is quantized: it is trained and saved without quantization, in %s",
            source,
            str(model.dtype).removeprefix("torch."),
        )


def _new_report(
    plan: RecoveryPlan,
    choice: Choice,
    trainer: DistillationTrainer,
    fingerprint: dict[str, Any],
) -> RecoveryReport:
    """Report a training that has ended, as if no step were better than the start (`best_step` is 0).

    `choice` says what was trained, and parts of `fingerprint` (from `_fingerprint`) stand in the report. Changes
    nothing.
    """
    state = trainer.state
    # Step, seconds since the beginning, and held-out loss. The first one is that before the training.
    evaluations = [
        [row["step"], row["seconds"], row["eval_loss"]]
        for row in state.log_history
        if "eval_loss" in row
    ]
    loss_before = evaluations[0][2]

    # `share` is smaller than 1 if the training has backed off.
    relative_step = trainer.args.learning_rate * trainer.schedule.share
    tokens_of_step = plan.num_sequences * plan.length // plan.steps
    return RecoveryReport(
        teacher=public_name(plan.teacher_name),
        train=choice.train,
        num_trained=choice.num_trained,
        num_tokens=tokens_of_step * state.global_step,
        calibration={
            "source": ", ".join(public_name(source) for source in plan.calibration),
            "sha256": fingerprint["windows"],
            "sequence_length": plan.length,
            "held_out": plan.options.held_out,
        },
        options=fingerprint["options"] | {"relative_step": relative_step},
        evaluations=evaluations,
        best_step=0,
        held_out_loss_before=loss_before,
        held_out_loss=loss_before,
        seconds=state.log_history[-1]["seconds"],
        warnings=trainer.warnings,
    )


def _round_best_weights(
    report: RecoveryReport, trainer: DistillationTrainer, dtypes: Mapping[str, torch.dtype]
) -> RecoveryReport:
    """Round the best weights as they will be saved, measure their loss, and report them if they are still better.

    `trainer.model` has the weights of the best step. They stay float32, but their values are rounded in place to those
    of `dtypes` (by parameter name), in which they will be saved. Returns a copy of `report` with this step and its
    loss; if the loss is not smaller than before the training, `report` as it is: no step is better than the start.
    """
    for name, parameter in _trained_parameters(trainer.model):
        weights = local(parameter.data)
        weights.copy_(weights.to(dtypes[name]))

    # Rounding may have cost more than the training has gained.
    loss = trainer.evaluate()["eval_loss"]
    is_better = loss < report.held_out_loss_before  # NaN is not
    if not is_better:
        return report
    best_step = cast(int, trainer.state.best_global_step)
    return dataclasses.replace(report, best_step=best_step, held_out_loss=loss)


def _choose_once(plan: RecoveryPlan, journal: Path, free: Sequence[int | None]) -> Choice:
    """Choose what to train, or read the choice with which the run began: a resumed run keeps it.

    A new choice is written to `journal`, the folder of the run. `free` are the free bytes of the device of each
    process, by rank; `None` if they are not known. Logs the plan of the run. Rank 0 does this.
    """
    file = journal / "choice.json"
    earlier_choice = read_record(file)
    if earlier_choice is None:
        choice = choose(plan, free)
        write_record(file, dataclasses.asdict(choice))
    else:
        choice = Choice(**earlier_choice)
    duration = "said after the first step"  # by `Watch`
    logger.info("%s", plan_text(plan, choice, free[0], duration))
    return choice


def _load_models(
    plan: RecoveryPlan, stored: StoredTeacher | None, journal: Path
) -> tuple[PreTrainedModel, PreTrainedModel | StoredTeacher | None]:
    """Load the pruned model (the first result) to the CPU, and the dense model, if need be, to the device of the plan.

    The pruned model has the dtypes of its files. The dense model has that of products (`plan.compute_dtype`), and gets
    no gradients. If its predictions are `stored`, it is not loaded, and they are the second result. If the text alone
    counts, it is not loaded either, and the second result is `None`. `journal` is the folder of the run, which rank 0
    has made: a process that does not see it raises an error.
    """
    if not journal.exists():
        raise ValueError(
            f"output: rank 0 began {str(journal.parent)!r}, and it isn't here: pass a folder that all nodes share."
        )
    teacher: PreTrainedModel | StoredTeacher | None = stored
    if plan.has_teacher and stored is None:
        dense, _ = load_model(plan.teacher, device=str(plan.device), dtype=plan.compute_dtype)
        teacher = dense.eval().requires_grad_(False)
    return load_student(plan.source), teacher


def _trainers_arguments(
    plan: RecoveryPlan,
    choice: Choice,
    journal: Path,
    processes: int,
    *,
    resumed: bool,
) -> TrainingArguments:
    """Make the arguments of the Trainer, which saves its states to `journal`, the folder of the run.

    `choice` says what is trained (`train`, "all" or "norms") and whether activations are computed twice
    (`checkpointed`). `processes` is the number of processes that share the passes of a step. A training that is
    `resumed` does not evaluate the model before its first step, because its first start has done so.

    Making the arguments sets states that Accelerate shares in the process; the caller puts them back. Nothing else is
    changed.
    """
    # With this variable of its launcher, Accelerate itself makes decoder layers compute their activations twice. The
    # Trainer refuses to be asked for the same.
    is_done_by_accelerate = shards_weights() and parse_flag_from_env(
        "FSDP_ACTIVATION_CHECKPOINTING"
    )
    checkpointed_by_trainer = choice.checkpointed and not is_done_by_accelerate
    steps_between = math.ceil(plan.steps / 10)  # so a loss that rises is noticed soon
    arguments = TrainingArguments(
        output_dir=str(journal.resolve()),
        per_device_train_batch_size=plan.options.batch_size,
        per_device_eval_batch_size=1,
        gradient_accumulation_steps=plan.passes_of_step // processes,
        num_train_epochs=1,
        train_sampling_strategy="sequential",  # the windows are in random order already
        remove_unused_columns=False,  # "counted" is no argument of a model
        # A share: `DistillationTrainer.create_optimizer` multiplies it by the root mean square of each parameter.
        learning_rate=plan.relative_step(choice.train),
        adam_beta2=0.95,
        # No clipping: gradients are as large as their weights are small, and Adam divides by their size.
        max_grad_norm=0.0,
        bf16=plan.compute_dtype == torch.bfloat16,
        # The name of this argument depends on the version of Transformers.
        **{CHECKPOINTING: checkpointed_by_trainer},  # type: ignore[arg-type]
        eval_strategy="steps",
        eval_steps=steps_between,
        eval_on_start=not resumed,  # the loss before the training
        metric_for_best_model="eval_loss",
        load_best_model_at_end=True,
        save_strategy="best",  # a state after each step that is the best until then; `Watch` asks for others
        logging_steps=steps_between,
        logging_nan_inf_filter=False,  # a loss that is not finite is noted as it is
        report_to="none",
        disable_tqdm=True,  # Watch has the bar
        dataloader_pin_memory=False,
        use_cpu=plan.device.type == "cpu",
    )
    # Without this, which changes `arguments`, the Trainer would take the first accelerator, or all of them.
    internals.set_only_device(arguments, plan.device)
    return arguments


def _model_with_weights(
    plan: RecoveryPlan, trained: nn.Module | None, *, is_saved: bool
) -> PreTrainedModel | None:
    """Read the source's model again, in its own dtypes, and give it the trained weights.

    `trained` is the Trainer's model in float32, which stays as it is; `None`: no training was better, and the weights
    are those of the source. Only trained parameters are copied. All others come from the source's files, because the
    training may have rounded its copy of the head. The configuration of the new model then notes that it was retrained.

    `is_saved`: whether this process (rank 0) saves the model. The others return `None`. They call this, because each
    process has a part of sharded weights.
    """
    model = read_model(plan.source, dtype="auto") if is_saved else None
    if trained is None:
        return model

    for name, parameter in _trained_parameters(trained):
        # `full_tensor` puts the parts of all processes together: all of them must call it.
        weight = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        if model is not None:
            model.get_parameter(name).data.copy_(weight.detach())
    if model is not None:
        mark_retrained(model)
    return model


def _trained_parameters(model: Any) -> list[tuple[str, nn.Parameter]]:
    """Return the parameters of a model that are trained (`requires_grad`), with their names.

    `model` is a module, perhaps with wrappers of Accelerate around its layers, which have no part in the names.
    """
    return [
        (name, parameter)
        for name, parameter in plain_parameters(model).items()
        if parameter.requires_grad
    ]


def _write(
    plan: RecoveryPlan, model: PreTrainedModel, report: RecoveryReport, unfinished: Path
) -> None:
    """Write all files of the recovered model into the subfolder `MODEL` of `unfinished`, which is emptied first.

    `model` is that of the source with the trained weights, and `report` that of this training. The report joins the
    pruning report of the source (`plan.report`), or the record of earlier trainings if the model was never pruned
    (`plan.recoveries`). The configuration of `model` is changed as `write_checkpoint` or `write_dense` does. `plan`
    stays as it is.
    """
    # What is known of the files of the source: their dtypes, tensors to copy, and why others are not copied.
    tensors = source_tensors(model, Path(plan.source), quantized=False)
    copied: dict[str, int] = {}  # nothing is said of tensors that are copied
    for line in lines_of_unplaced(copied, tensors.not_copied):
        logger.warning("%s", line)

    folder = unfinished / MODEL
    shutil.rmtree(folder, ignore_errors=True)  # of an earlier start
    num_bytes = sum(parameter.nbytes for parameter in model.parameters())
    with explaining_full_disk(unfinished, "the recovered model", num_bytes, discard=folder):
        folder.mkdir()
        copy_source(Path(plan.source), folder)
        if plan.report is None:  # the model was never pruned
            recoveries = [*plan.recoveries, report]
            write_dense(model, folder, recoveries, load_tokenizer(plan.source), tensors)
        else:
            # read again, because here operators have their names in the model
            pruning_report, masks = find_record(model, plan.source)
            pruning_report = dataclasses.replace(
                pruning_report, recoveries=[*pruning_report.recoveries, report]
            )
            if tensors.not_copied:
                pruning_report.model["lacks"] = dict(tensors.not_copied)
            write_checkpoint(
                model=model,
                folder=folder,
                report=pruning_report,
                masks=masks,
                tokenizer=None,  # its files are copied from the source
                stored_as=tensors,
            )


def _set_environment(variables: Mapping[str, str]) -> None:
    """Give the process these environment variables, and no others."""
    os.environ.clear()
    os.environ.update(variables)


@contextmanager
def _process_restored(device: torch.device) -> Iterator[None]:
    """At the end, put back what the Trainer and Accelerate change in the process inside the `with` block.

    These are their own states, the environment, and the random states of Python, NumPy and PyTorch: on the CPU, and on
    all accelerators if `device` is one. Inside the block, the Trainer computes on `device`: an accelerator is named in
    an environment variable of Accelerate.
    """
    with ExitStack() as stack:  # it runs the callbacks at the end, also after an error
        stack.enter_context(internals.accelerate_states_restored())
        # The arguments of callbacks are the states of now.
        stack.callback(_set_environment, dict(os.environ))
        stack.callback(random.setstate, random.getstate())
        stack.callback(np.random.set_state, np.random.get_state())
        has_accelerator = device.type != "cpu"
        devices = list(range(torch.accelerator.device_count())) if has_accelerator else []
        stack.enter_context(torch.random.fork_rng(devices=devices, device_type=device.type))
        if has_accelerator:
            os.environ["ACCELERATE_TORCH_DEVICE"] = str(device)
        yield
