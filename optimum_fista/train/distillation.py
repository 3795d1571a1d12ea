"""Distillation: the Trainer of Transformers with the divergence from a teacher as its loss.

`DistillationTrainer` gives the Trainer its loss, its optimizer and its learning rates (`Schedule`). `Watch`, its
callback, decides when the loss is measured, when a *state* is saved, when the training backs off, and when it ends.

A state is a checkpoint of the Trainer (a folder `checkpoint-STEP` in the *journal*, the folder of the run) from which a
killed run resumes with the same bits. It holds only trained parameters, and a file with the digests of its files is
written last, so that damaged ones are noticed.
`intact_states` finds the states of an earlier start. *Ranks* are processes that train together (`prune.ranks.Ranks`);
rank 0 decides and writes.

The *student* is the pruned model that is trained, and the *teacher* the dense model that it imitates: in memory, or as
its predictions that were stored before (`StoredTeacher`). The *held-out* text is never trained on: the loss is measured
on it.
"""

import errno
import json
import logging
import math
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import fsdp2_prepare_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from optimum_fista.atomic import (
    digest_of,
    errors_of_writing,
    is_whole,
    read_record,
    write_file,
    write_record,
)
from optimum_fista.bars import tqdm
from optimum_fista.memory import size_text
from optimum_fista.model.predictor import Predictor
from optimum_fista.prune.ranks import Ranks
from optimum_fista.train.divergence import (
    LiveTeacher,
    Teacher,
    TextAlone,
    bytes_of_whole_logits,
    divergence,
    text_loss,
)
from optimum_fista.train.sequences import Sequences
from optimum_fista.train.stored_teacher import StoredTeacher
from optimum_fista.train.training import local, plain_parameters

# In the folder of a state: the best step until then, and digests of the state's files.
_STATE_RECORD = "files.json"
_WEIGHTS = "model.safetensors"  # in the folder of a state, by the name that the Trainer looks for
_SAVE_SECONDS = 120.0
_WARM_UP = 0.05  # share of the steps, at least one step
_BACK_OFF = 4  # divides the learning rate
_CHANCE = 0.1  # a held-out loss may rise by this share of the gain until then
# Adam divides the mean of a weight's gradients by the root of the mean of their squares, plus this constant. It is that
# of gradients by weights whose root mean square is 1.
_EPSILON = 1e-10
# Taken for the root mean square of a tensor that is all zeros, such as some biases.
_SIZE_OF_ZEROS = 1e-3
logger = logging.getLogger(__name__)


class Schedule:
    """Shares of the learning rate by step: a linear warm-up, then a cosine to zero.

    They are shares of `RecoveryOptions.relative_step`. The scheduler of PyTorch calls this object, and keeps its
    attributes in a saved state. `DistillationTrainer.back_off` changes `began` (the step at which the schedule starts
    again) and `share` (the largest share).
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.began = 0
        self.share = 1.0

    def __call__(self, step: int) -> float:
        """Return the share of the learning rate at a step, counted from 0.

        The schedule goes from step `self.began` to step `self.steps`, and `self.share` is its largest share. Changes
        nothing.
        """
        total = self.steps - self.began
        number = step - self.began + 1  # from 1 to `total`, and once more after the last step
        warm_up = max(1, round(_WARM_UP * total))
        if number <= warm_up:
            return self.share * number / warm_up

        # The cosine is zero at `total + 1`: the scheduler asks for it after the last step, so no step has a share of 0.
        angle = math.pi * (number - warm_up) / (total + 1 - warm_up)
        return self.share * (1 + math.cos(angle)) / 2


class DistillationTrainer(Trainer):
    """The Trainer with `divergence` as its loss; evaluation gives the cross-entropy of the held-out text.

    Checkpoints hold the trained parameters, under their names in memory, which may differ from those in model files.

    Attributes:
        schedule: The shares of the learning rate; `back_off` changes it.
        warnings: What the user should know, for the report.
    """

    def __init__(
        self,
        *,
        model: PreTrainedModel,
        teacher: PreTrainedModel | StoredTeacher | None,
        kept_tokens: Tensor | None,
        label_share: float,
        steps: int,
        read_start: Callable[[], Mapping[str, Tensor]],
        arguments: TrainingArguments,
        trained_on: Sequences,
        held_out: Sequences,
        callbacks: list[TrainerCallback],
    ) -> None:
        """Make a Trainer that moves `model` to its device, and try whether the models can be cut (`Predictor`).

        Under FSDP2 a teacher in memory is sharded here, and the student when the training begins. If a model can't be
        cut, a warning that this takes more memory is logged, and kept in `self.warnings` for the report.

        Args:
            model: The student in float32; gradients are on for the parameters to train (`mark_trained`).
            teacher: The dense model, on the device of the training; or its stored predictions. `None`: the text alone
                counts (`label_share` is 1).
            kept_tokens: The teacher's token for each of the student's, int64; `None`: both have the same tokens.
            label_share: Share of the text's cross-entropy in the loss.
            steps: Updates of the weights.
            read_start: Reads the student's parameters before the training, by name, for `back_off`.
            arguments: Of the Trainer (`recovery` makes them).
            trained_on: The text to train on.
            held_out: Text that only measures the loss.
            callbacks: Of the Trainer.
        """
        # The root mean square of each trained parameter, by its name. It is computed here, because the weights are
        # whole and those before the training: a resumed training loads its state later. Accelerate may put wrappers
        # around decoder layers later, which change names.
        self._sizes = {
            name: root_mean_square(parameter.detach())
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }
        super().__init__(
            model,
            arguments,
            train_dataset=_dataset(trained_on),
            eval_dataset=_dataset(held_out),
            callbacks=callbacks,
        )
        self.remove_callback(PrinterCallback)
        is_fsdp1 = self.is_fsdp_enabled and not self.accelerator.is_fsdp2
        if self.is_deepspeed_enabled or is_fsdp1:
            raise ValueError(
                "recover does not know the weights that DeepSpeed and FSDP1 keep: pass --fsdp_version 2."
            )

        is_sharded = bool(self.is_fsdp_enabled)
        if is_sharded and isinstance(teacher, PreTrainedModel):
            teacher = fsdp2_prepare_model(self.accelerator, teacher)
        # The head of a sharded model is whole only inside a call of the whole model, which then is not cut (`whole`).
        # Inside autocast, because the student's head may be in 16 bits, and its hidden states are not.
        with self.accelerator.autocast():
            self._student = Predictor(model, whole=is_sharded)
            self._teacher: Teacher
            if teacher is None:
                self._teacher = TextAlone()
            elif isinstance(teacher, StoredTeacher):
                self._teacher = teacher
            else:
                self._teacher = LiveTeacher(teacher, kept_tokens, whole=is_sharded)
        self._label_share = label_share
        # Tokens that count in a sequence, on average; None: all. Losses are divided by it, not by the number of the
        # batch itself. So each of these tokens counts as much, in whatever batch or process it is.
        self._counted_to_train = trained_on.counted_in_a_sequence
        self._counted_to_measure = held_out.counted_in_a_sequence
        self._read_start = read_start
        self.schedule = Schedule(steps)

        self.warnings: list[str] = []
        if not is_sharded:  # the plan counts whole logits of sharded models
            num_bytes = bytes_of_whole_logits(
                self._student,
                self._teacher,
                num_positions=arguments.per_device_train_batch_size * trained_on.tokens.shape[1],
                dtype=torch.bfloat16 if arguments.bf16 else torch.float32,
            )
            if num_bytes:
                warning = whole_logits_warning(model, num_bytes)
                logger.warning("%s", warning)
                self.warnings.append(warning)

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """Make AdamW with a learning rate for each parameter, and note it in `self.optimizer`, as the Trainer expects.

        Adam moves every weight by about the learning rate, whatever the gradient. Weights of some models are ten times
        as large as those of others. So the rate of a parameter is `relative_step` times its root mean square, as in
        Adafactor (arXiv 1804.04235, section 8). Gradients are not clipped, because the size of a gradient also depends
        on that of its weight: the smaller the weight, the larger the gradient. So the training stays the same if
        weights become smaller and the norm before them larger.

        `model` is the student as the Trainer has wrapped it; `None`: `self.model`. `self._sizes` are the root mean
        squares by parameter name. A state that is loaded brings the rates with which its run began.
        """
        student: Any = self.model if model is None else model
        groups = []
        for name, parameter in plain_parameters(student).items():
            if parameter.requires_grad:
                size = self._sizes[name]
                relative_step = self.args.learning_rate  # a share of the root mean square
                # Larger weights have smaller gradients, so Adam's constant beside them becomes smaller, too.
                groups.append(
                    {"params": [parameter], "lr": relative_step * size, "eps": _EPSILON / size}
                )
        betas = (self.args.adam_beta1, self.args.adam_beta2)
        self.optimizer = AdamW(groups, betas=betas, weight_decay=0.0, fused=True)
        return self.optimizer

    def create_scheduler(self, *_: Any, **__: Any) -> LambdaLR:
        """Make the scheduler of the learning rate, and note it in `self.lr_scheduler`, as the Trainer expects.

        It multiplies the rate of each group of `self.optimizer` by the share that `self.schedule` returns for a step. A
        checkpoint that is loaded brings the attributes of `self.schedule`.
        """
        # The cast is for mypy: the Trainer declares `self.optimizer` as perhaps missing.
        scheduler = LambdaLR(cast(Any, self.optimizer), self.schedule)
        self.lr_scheduler = scheduler
        return scheduler

    def back_off(self) -> None:
        """Go on from the best weights until now, with a quarter of the learning rate and a new warm-up.

        The keys of `self._sizes` are the names of the trained parameters.

        Changes the values of the trained parameters, the optimizer's state (to that of a new optimizer), its rates, and
        `self.schedule`.
        """
        model: Any = self.model
        optimizer: Any = self.optimizer
        scheduler: Any = self.lr_scheduler

        best_weights = self._best_weights()
        parameters = plain_parameters(model)
        for name in self._sizes:
            value = best_weights[name]
            parameter = parameters[name]
            if isinstance(parameter, DTensor):  # sharded over the processes
                # Every process has the whole value and takes its own part of it. Nothing is sent (`src_data_rank`).
                value = distribute_tensor(
                    value, parameter.device_mesh, parameter.placements, src_data_rank=None
                )
            local(parameter.data).copy_(local(value))  # the part that this process has

        # Adam has three tensors for each parameter: two means, and its number of steps. The number is set back on
        # purpose, too: by it Adam corrects for means that began with zeros. With another number, the first steps would
        # have a wrong length.
        for state_of_parameter in optimizer.state.values():
            for tensor in state_of_parameter.values():
                tensor.zero_()

        # The scheduler asks `self.schedule` for the share at each later step. It has set the rate of the next step
        # already, so that rate is set here. `base_lrs` are the rates for a share of 1.
        next_step = scheduler.last_epoch
        self.schedule.began = next_step
        self.schedule.share /= _BACK_OFF
        for group, rate in zip(optimizer.param_groups, scheduler.base_lrs, strict=True):
            group["lr"] = rate * self.schedule(next_step)

    def _best_weights(self) -> Mapping[str, Tensor]:
        """Read the trained parameters with the smallest held-out loss until now, by name, to the CPU.

        They are in the saved state that `self.state` of the Trainer names (`best_global_step`). If no step was better
        than the start, `self._read_start` reads those before the training again from the model's files.
        """
        best_step = self.state.best_global_step
        if not best_step:
            return self._read_start()
        journal = Path(str(self.args.output_dir))
        return load_file(journal / f"checkpoint-{best_step}" / _WEIGHTS)

    def compute_loss(self, model: Any, inputs: dict[str, Any], *_: Any, **__: Any) -> Tensor:
        """Return the divergence from the teacher and the text, with its gradient, on a batch of text.

        The Trainer calls it. `inputs["input_ids"]` are token ids, int64 [batch, length]. `model` is the student as the
        Trainer has wrapped it, for several processes for instance. `self._student` is the student as `Predictor` cuts
        it before its head, `self._teacher` predicts the tokens of the batch, and `self._label_share` is the share of
        the text's cross-entropy. If only some tokens count, `inputs["counted"]` are booleans [batch, length], and
        `self._counted_to_train` is their number in a sequence, on average.
        """
        ids = inputs["input_ids"]
        return divergence(
            self._student,
            self._teacher,
            ids,
            label_share=self._label_share,
            wrapped=model,
            counted=inputs.get("counted"),
            divisor=_divisor(ids, self._counted_to_train),
        )

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], *_: Any, **__: Any
    ) -> tuple[Tensor, None, None]:
        """Return the mean negative log-likelihood of a token of held-out sequences; NaN counts as infinity.

        The Trainer calls it with the wrapped student (`model`) and `inputs["input_ids"]`, token ids [batch, length]. It
        expects a loss, logits and labels, of which it does not need the last two here. `self._student` is the student
        as `Predictor` cuts it before its head. If only some tokens count, `inputs["counted"]` are booleans [batch,
        length], and `self._counted_to_measure` is their number in a sequence, on average. Changes nothing.
        """
        inputs = self._prepare_inputs(inputs)  # moves them to the device of the model
        ids = inputs["input_ids"]
        with torch.no_grad():
            loss = text_loss(
                self._student,
                ids,
                model,
                counted=inputs.get("counted"),
                divisor=_divisor(ids, self._counted_to_measure),
            )
        return loss.nan_to_num(nan=math.inf, posinf=math.inf), None, None

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the trained parameters of a state into its folder `output_dir`, which is made first.

        The Trainer calls it, and its own method then calls `_save`. With FSDP2 the Trainer would make the folder too
        late for it to count as that of the best weights.
        """
        Path(str(output_dir)).mkdir(parents=True, exist_ok=True)
        super().save_model(output_dir, _internal_call)

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None
    ) -> None:
        """Write the trained parameters into the folder of a state (`output_dir`), in the process that saves.

        The Trainer calls it. If parameters are sharded, `state_dict` has them put together, by name; otherwise it is
        missing, and those of the model are written. The keys of `self._sizes` are the names of the trained parameters.
        Wrappers of modules have no part in the names of a `state_dict`.
        """
        if not self.args.should_save:
            return
        if not state_dict:
            model: Any = self.model
            state_dict = model.state_dict()
        trained = {name: state_dict[name].contiguous() for name in self._sizes}
        write_file(Path(str(output_dir)) / _WEIGHTS, trained)

    def _save_checkpoint(self, *given: Any) -> None:
        """Save a state into the folder `checkpoint-STEP` of the journal, as the Trainer does, which calls this.

        A full disk is an error that says how much a state takes, and the incomplete state is deleted. `given` are the
        Trainer's own arguments (model and trial). The keys of `self._sizes` are the names of the trained parameters.
        """
        model: Any = self.model
        journal = Path(str(self.args.output_dir))
        # A state holds only these parameters. Their names have no part of Accelerate's wrappers (`plain_parameters`).
        bytes_of_weights = sum(
            parameter.numel() * parameter.element_size()
            for name, parameter in plain_parameters(model).items()
            if name in self._sizes
        )
        # The weights and Adam's two moments, which have the same size.
        num_bytes = 3 * bytes_of_weights
        unfinished_state = journal / f"checkpoint-{self.state.global_step}"
        with explaining_full_disk(
            journal, "a state of the training", num_bytes, discard=unfinished_state
        ):
            super()._save_checkpoint(*given)

    def _issue_warnings_after_load(self, _: Any) -> None:
        """Give no warning: a checkpoint holds only the trained parameters on purpose."""


def whole_logits_warning(model: PreTrainedModel, num_bytes: int) -> str:
    """Return a warning that logits take `num_bytes` more than the plan counts, because a model can't be cut.

    The student `model` or its teacher can't be run without its head, so all positions have logits at the same time.
    """
    return (
        f"{type(model).__name__} or its teacher can't be run without its head, so the logits of whole sequences are in "
        f"memory: about {size_text(num_bytes)} more than the plan says. A smaller batch_size (--batch-size) or shorter "
        "sequences (--sequence-length) need less."
    )


def root_mean_square(weights: Tensor) -> float:
    """Return the root mean square of the weights that are not zero, by which the step of a parameter is measured.

    If all are zero, it is a small number, so that they can be trained. `weights` may have any shape and dtype. Zeros
    are left out, because pruned weights do not move.
    """
    num_not_zero = int(torch.count_nonzero(weights))
    if not num_not_zero:
        return _SIZE_OF_ZEROS
    return float(torch.linalg.vector_norm(weights, dtype=torch.float64)) / math.sqrt(num_not_zero)


def _dataset(text: Sequences) -> Any:
    """Make of a text what the Trainer takes: a dictionary for each sequence."""
    if text.counted is None:
        return [{"input_ids": row} for row in text.tokens]
    return [
        {"input_ids": row, "counted": counted}
        for row, counted in zip(text.tokens, text.counted, strict=True)
    ]


def _divisor(ids: Tensor, counted_in_a_sequence: float | None) -> float | None:
    """Return by what the loss of a batch, `ids` [batch, length], is divided; `None`: by the number of its tokens."""
    return None if counted_in_a_sequence is None else len(ids) * counted_in_a_sequence


@contextmanager
def explaining_full_disk(
    folder: Path, subject: str, num_bytes: int, *, discard: Path
) -> Iterator[None]:
    """Turn what a full disk raises inside into one OSError that says what to do.

    The half-written folder `discard` is deleted, so that its space is free again. Other errors of writing become an
    OSError that names the file.

    Args:
        folder: A folder on the disk that is written to.
        subject: What is written, for the message, such as "a state of the training".
        num_bytes: How many bytes the subject takes.
        discard: The folder of the subject, which is incomplete after an error.
    """
    try:
        with errors_of_writing(folder):
            yield
    except OSError as error:
        # `torch.save` does not say why it can't write, so the free space decides, too.
        is_full = error.errno == errno.ENOSPC or shutil.disk_usage(folder).free < num_bytes
        if not is_full:
            raise
        shutil.rmtree(discard, ignore_errors=True)
        raise OSError(
            errno.ENOSPC,
            f"the disk is full: {subject} takes about {size_text(num_bytes)}, and "
            f"{size_text(shutil.disk_usage(folder).free)} are free. What was saved before is still there: free some "
            "space, and start again with the same settings to resume",
            str(folder),
        ) from error


class Watch(TrainerCallback):
    """Shows a training, saves its state every two minutes, backs off if a loss rises, and ends it early if asked.

    Weights only count as the best if their loss is smaller than that before the training. The Trainer calls the methods
    `on_...` with its arguments, its state and its control; what they set in the control, it does next.

    Attributes:
        back_off: `DistillationTrainer.back_off` of the trainer, which is set after the trainer is made.
        stopped: Whether Ctrl-C was pressed in some process, and so all are stopped.
    """

    def __init__(self, ranks: Ranks, *, progress: bool, first_check: int) -> None:
        """Begin to count seconds. `ranks` train together; `progress`: whether rank 0 shows a bar.

        `first_check` is a step after which the held-out loss is measured, before those of the Trainer's arguments.
        """
        # Does nothing until the caller sets `DistillationTrainer.back_off` of the trainer here.
        self.back_off: Callable[[], None] = lambda: None
        self.stopped = False  # whether a Ctrl-C in some process has stopped the training
        self._asked_to_stop = False  # whether a Ctrl-C in this process asks for it
        self._first_check = first_check
        self._ranks = ranks
        self._progress = progress and ranks.index == 0
        # Seconds are counted from these moments: the begin of the training, the latest saved state, the current step.
        self._began = time.perf_counter()
        self._saved = self._began
        self._step_began = self._began
        self._is_step_timed = False  # True once this start has said how long a step takes
        self._bar: Any = None  # made when the training begins

    @contextmanager
    def stopping_at_a_step(self) -> Iterator[None]:
        """Inside, the first Ctrl-C ends the training after the current step; a second one ends it at once.

        The first one sets `self._asked_to_stop`, which `on_step_end` reads. Replaces Python's own handler of the signal
        until the block ends. A handler of the caller stays, and then Ctrl-C does what that handler does. Python lets
        only the main thread set handlers: in another thread nothing is replaced.
        """

        def stop(*_: object) -> None:
            """Note the first Ctrl-C in `self._asked_to_stop` and log it; raise KeyboardInterrupt at the second one.

            Python calls it at the signal.
            """
            if self._asked_to_stop:
                raise KeyboardInterrupt
            self._asked_to_stop = True
            logger.warning(
                "stopping: this step is finished and saved first; Ctrl-C again stops at once"
            )

        handler = signal.getsignal(signal.SIGINT)
        is_main_thread = threading.current_thread() is threading.main_thread()
        can_replace = is_main_thread and handler is signal.default_int_handler
        if can_replace:
            signal.signal(signal.SIGINT, stop)
        try:
            yield
        finally:
            if can_replace:
                signal.signal(signal.SIGINT, handler)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Continue the count of seconds of earlier starts, find their best state in the journal, and show the bar.

        Sets `state.best_model_checkpoint`, because the journal (`args.output_dir`) may have been moved since the state
        was written. Sets `self._began`, the moment from which `on_log` counts, `self._saved`, that of the latest saved
        state, and `self._bar`. `self._progress` decides whether the bar is visible.
        """
        # `on_log` has written the seconds into the history of earlier starts; at the first start there is none.
        seconds_before = max(
            (entry.get("seconds", 0.0) for entry in state.log_history), default=0.0
        )
        if state.best_global_step:
            state.best_model_checkpoint = f"{args.output_dir}/checkpoint-{state.best_global_step}"

        now = time.perf_counter()
        self._began = now - seconds_before
        self._saved = now
        self._bar = tqdm(
            total=state.max_steps,
            desc="Training",
            initial=state.global_step,
            unit="step",
            disable=not self._progress,
        )

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Note when the step begins."""
        self._step_began = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Ask for a saved state, an evaluation or the end of the training, in all processes at once.

        After the first step of this start it says how long the others will take (`self._is_step_timed` is True then).
        Sets `control`, which the Trainer obeys, and `self.stopped` (whether some process was asked to stop), and moves
        the bar.

        `self._saved` is the moment of the last saved state. `self._asked_to_stop` is True after Ctrl-C in this process.
        `self._first_check` is the number of an early step after which the loss is measured, before the Trainer would do
        so.
        """
        self._bar.update()
        if not self._is_step_timed:
            self._is_step_timed = True
            self._log_duration(state)

        # The clocks of processes differ: that of rank 0 decides when a state is saved. Ctrl-C in any process stops all.
        is_due = time.perf_counter() - self._saved > _SAVE_SECONDS
        of_all_ranks = self._ranks.gather((is_due, self._asked_to_stop))  # a pair for each rank
        is_due_in_rank_0 = of_all_ranks[0][0]
        self.stopped = any(asked for _, asked in of_all_ranks)

        # With `|=`, what the Trainer itself has decided stays.
        control.should_save |= is_due_in_rank_0
        control.should_evaluate |= state.global_step == self._first_check
        control.should_training_stop |= self.stopped

    def _log_duration(self, state: TrainerState) -> None:
        """Log how long the step took that began at `self._step_began`, and how long all later steps will take."""
        seconds = time.perf_counter() - self._step_began
        interval = tqdm.format_interval((state.max_steps - state.global_step) * seconds)
        logger.info("one step takes %.1f seconds: about %s for the others", seconds, interval)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Ask for the last state if the training was stopped; earlier, an evaluation might cancel the save."""
        control.should_save |= self.stopped

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Finish the state that the Trainer has written, after all processes have written their files of it.

        `args.output_dir` is the journal. Rank 0 writes the digests and deletes states that are replaced
        (`_finish_state`). Notes the time in `self._saved`.
        """
        self._ranks.gather(None)  # nothing is gathered: this waits for all processes
        self._ranks.first(lambda: _finish_state(Path(str(args.output_dir)), state))
        self._saved = time.perf_counter()

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Add the seconds of training to the last entry of the Trainer's history."""
        state.log_history[-1]["seconds"] = round(time.perf_counter() - self._began, 1)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Log the held-out loss, and back off if it has risen (`_has_risen`) before the last step.

        `self.back_off` is that of the trainer, which changes weights and learning rates. At step 0, the loss is noted
        as the best one in `state.best_metric`, and a loss that is not finite is an error. The bar (`self._bar`) shows
        the loss. Without a bar the training is over, and nothing is done.

        `given["metrics"]` has the loss. The Trainer has added it to `state.log_history` already.
        """
        loss = given["metrics"]["eval_loss"]
        is_after_training = self._bar is None
        if is_after_training:  # `recovery` compares this loss itself
            return

        self._bar.set_postfix({"held-out loss": f"{loss:.4f}"})
        logger.info(
            "held-out loss %.4f after step %d of %d", loss, state.global_step, state.max_steps
        )
        if state.global_step == 0:
            state.best_metric = loss
            if not math.isfinite(loss):
                raise ValueError(
                    f"the pruned model's held-out loss is {loss}: look for NaN in its weights."
                )
            return

        is_last_step = state.global_step >= state.max_steps
        if _has_risen(loss, state) and not is_last_step:
            best_step = state.best_global_step
            weights = f"after step {best_step}" if best_step else "before the training"
            logger.warning(
                "held-out loss %.4f after step %d, %.4f %s: "
                "back to the weights %s, with a quarter of the steps' size",
                loss,
                state.global_step,
                state.best_metric,
                weights,
                weights,
            )
            self.back_off()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Take the progress bar away (`self._bar` becomes None); `recover` calls it after an error, too."""
        if self._bar is not None:
            self._bar.close()
        self._bar = None


def _has_risen(loss: float, state: TrainerState) -> bool:
    """Tell whether a held-out loss is above the smallest one until now by more than chance, or is not finite.

    A rise by less than a tenth of what was gained is chance. `state.best_metric` is the smallest loss until now; the
    Trainer compares `loss` with it later. `state.log_history` has all losses, the one before the training first.
    """
    losses = [row["eval_loss"] for row in state.log_history if "eval_loss" in row]
    smallest_loss = cast(float, state.best_metric)
    gain = losses[0] - smallest_loss
    return not loss <= smallest_loss + _CHANCE * gain  # so that NaN counts, too


def _finish_state(journal: Path, state: TrainerState) -> None:
    """Write the digests of a state's files, and only then delete the states that it replaces.

    The state is that of step `state.global_step`, in the folder of the run (`journal`). This state and the best one
    until now (`state.best_global_step`) stay. Changes the state's file `trainer_state.json`, too: its path of the best
    state is removed. The object `state` is only read.
    """
    folder = journal / f"checkpoint-{state.global_step}"
    best_folder = journal / f"checkpoint-{state.best_global_step}"

    # A path of the best state would be wrong after the folder was moved: `Watch.on_train_begin` finds it by its number.
    state_file = folder / "trainer_state.json"
    values = json.loads(state_file.read_text()) | {"best_model_checkpoint": None}
    write_file(state_file, json.dumps(values))

    # by the names of the files in the folder
    digests = {
        file.relative_to(folder).as_posix(): digest_of(file)
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != _STATE_RECORD
    }
    write_record(folder / _STATE_RECORD, {"best": state.best_global_step, "files": digests})

    for replaced in list(journal.glob("checkpoint-*")):
        if replaced not in (folder, best_folder):
            # First: if the process is killed here, what is left has no record, so it is no state.
            (replaced / _STATE_RECORD).unlink(missing_ok=True)
            shutil.rmtree(replaced, ignore_errors=True)


def intact_states(journal: Path) -> dict[int, Path]:
    """Find the states from which an unfinished training can resume, and delete all other ones.

    Returns their folders by the number of steps done. A state counts if its files are as they were written, and so are
    those of the best state until then, to which the training may go back. `journal` is the folder of the run, in which
    states have the names `checkpoint-STEP`.
    """
    whole: dict[int, Path] = {}  # folders of undamaged states, by step
    best_steps: dict[int, int | None] = {}  # the best step until then, by step
    for folder in journal.glob("checkpoint-*"):
        record = read_record(folder / _STATE_RECORD)
        if record is None:
            continue
        if all(is_whole(folder / name, digest) for name, digest in record["files"].items()):
            step = int(folder.name.rpartition("-")[2])
            whole[step] = folder.resolve()
            best_steps[step] = record["best"]

    states = {}
    for step, folder in whole.items():
        best_step = best_steps[step]
        start_is_best = not best_step  # 0 or None: no step was better than the start
        if start_is_best or best_step in whole:
            states[step] = folder
    for folder in journal.glob("checkpoint-*"):
        if folder.resolve() not in states.values():
            shutil.rmtree(folder)
    return states
