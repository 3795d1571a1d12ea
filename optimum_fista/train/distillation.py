"""Distillation: the Trainer of Transformers with the divergence from a teacher as its loss.

This file gives the Trainer its loss and its learning rates. It also changes its checkpoints, so that a killed run
resumes with the same bits: they hold only trained parameters, and their digests are written last.
"""

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
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)

from optimum_fista.folder.atomic import (
    digest_of,
    errors_of_writing,
    is_whole,
    read_record,
    write_file,
    write_record,
)
from optimum_fista.prune.ranks import Ranks
from optimum_fista.train.divergence import Predictor, divergence, text_loss
from optimum_fista.train.training import local

_STATE_RECORD = "files.json"  # in the folder of a state: the best step until then, and digests of the state's files
_SAVE_SECONDS = 120.0
# A share of the steps, and steps; at most half of them. The first step of Adam moves every weight by the whole rate.
_WARM_UP, _LEAST_WARM_UP = 0.05, 10
_BACK_OFF = 4  # divides the learning rate
logger = logging.getLogger(__name__)


class Schedule:
    """Shares of the learning rate by step: warm-up and cosine. The scheduler keeps the attributes in a saved state."""

    def __init__(self, steps: int) -> None:
        self.steps, self.began, self.share = steps, 0, 1.0

    def __call__(self, step: int) -> float:
        """The share at a step, counted from 0."""
        left, done = self.steps - self.began, step - self.began + 1
        warm_up = min(max(_LEAST_WARM_UP, round(_WARM_UP * left)), (left + 1) // 2)
        if done <= warm_up:
            return self.share * done / warm_up
        # zero is the share of the step after the last one, for which the scheduler asks too: no step is wasted
        return self.share * (1 + math.cos(math.pi * (done - warm_up) / (left + 1 - warm_up))) / 2


class DistillationTrainer(Trainer):
    """The Trainer with `divergence` as its loss; evaluation gives the cross-entropy of the held-out text.

    Checkpoints hold the trained parameters, under their names in memory, which may differ from those in model files.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        teacher: PreTrainedModel,
        kept: Tensor | None,
        label_share: float,
        steps: int,
        start: Callable[[], Mapping[str, Tensor]],
        arguments: TrainingArguments,
        trained_on: Tensor,
        held_out: Tensor,
        callbacks: list[TrainerCallback],
    ) -> None:
        texts: Any = [[{"input_ids": row} for row in windows] for windows in (trained_on, held_out)]
        self._trained = [
            name for name, parameter in model.named_parameters() if parameter.requires_grad
        ]
        super().__init__(
            model, arguments, train_dataset=texts[0], eval_dataset=texts[1], callbacks=callbacks
        )
        self.remove_callback(PrinterCallback)
        if self.is_deepspeed_enabled or (self.is_fsdp_enabled and not self.accelerator.is_fsdp2):
            raise ValueError(
                "recover does not know the weights that DeepSpeed and FSDP1 keep: pass --fsdp_version 2."
            )
        sharded = bool(
            self.is_fsdp_enabled
        )  # then the head is whole only inside a call of the wrapper
        teacher = fsdp2_prepare_model(self.accelerator, teacher) if sharded else teacher
        self._student, self._teacher = (
            Predictor(model, whole=sharded),
            Predictor(teacher, kept, whole=sharded),
        )
        self._label_share, self._start, self.schedule = label_share, start, Schedule(steps)

    def create_scheduler(self, *_: Any, **__: Any) -> LambdaLR:
        """Make the scheduler; a checkpoint brings the attributes of the schedule."""
        self.lr_scheduler = scheduler = LambdaLR(cast(Any, self.optimizer), self.schedule)
        return scheduler

    def back_off(self) -> None:
        """Go on from the weights before the training, with a quarter of the learning rate."""
        model, optimizer, scheduler = cast(Any, (self.model, self.optimizer, self.lr_scheduler))
        parameters, start = dict(model.named_parameters()), self._start()
        for name in self._trained:
            value, parameter = start[name], parameters[name]
            if isinstance(parameter, DTensor):  # every process has the whole value: none is sent
                value = distribute_tensor(
                    value, parameter.device_mesh, parameter.placements, src_data_rank=None
                )
            local(parameter.data).copy_(local(value))
        for moments in optimizer.state.values():
            for value in moments.values():
                value.zero_()
        self.schedule.began, self.schedule.share = (
            scheduler.last_epoch,
            self.schedule.share / _BACK_OFF,
        )
        for group, rate in zip(optimizer.param_groups, scheduler.base_lrs, strict=True):
            group["lr"] = rate * self.schedule(scheduler.last_epoch)

    def compute_loss(self, model: Any, inputs: dict[str, Any], *_: Any, **__: Any) -> Tensor:
        """The divergence from the teacher and the text."""
        return divergence(
            self._student, self._teacher, inputs["input_ids"], self._label_share, model
        )

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], *_: Any, **__: Any
    ) -> tuple[Tensor, None, None]:
        """The mean negative log-likelihood of a token of held-out sequences."""
        ids = self._prepare_inputs(inputs)["input_ids"]
        with torch.no_grad():
            loss = text_loss(self._student, ids, model)
        return loss.nan_to_num(math.inf, math.inf), None, None

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save a state; with FSDP2 its folder would come too late to count as that of the best weights."""
        Path(str(output_dir)).mkdir(parents=True, exist_ok=True)
        super().save_model(output_dir, _internal_call)

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None
    ) -> None:
        if self.args.should_save:
            model: Any = self.model
            found = state_dict or model.state_dict()
            file = Path(str(output_dir)) / "model.safetensors"
            write_file(file, {name: found[name].contiguous() for name in self._trained})

    def _save_checkpoint(self, *given: Any) -> None:
        with errors_of_writing(Path(str(self.args.output_dir))):
            super()._save_checkpoint(*given)

    def _issue_warnings_after_load(self, _: Any) -> None:
        """Give no warning: a checkpoint holds only the trained parameters on purpose."""


class Watch(TrainerCallback):
    """Shows a training, saves its state every two minutes, backs off if the loss rises, and ends it early if asked.

    Weights only count as the best if their loss is smaller than that before the training.
    """

    def __init__(self, ranks: Ranks, progress: bool, check: int) -> None:
        """`check` is a step after which the held-out loss is measured, besides those of the Trainer's arguments."""
        self.back_off: Callable[[], None] = lambda: (
            None
        )  # of the trainer, which is made with its callbacks
        self._check = check
        self.stopped = self._asked = False  # by Ctrl-C: in some process, and so in all; in this one
        self._ranks, self._progress = ranks, progress and not ranks.index
        self._began = self._saved = time.perf_counter()
        self._bar: Any = None

    @contextmanager
    def stopping_at_a_step(self) -> Iterator[None]:
        """Inside, the first Ctrl-C ends the training after the current step; a second one ends it at once."""

        def stop(*_: object) -> None:
            if self._asked:
                raise KeyboardInterrupt
            self._asked = True
            logger.warning(
                "stopping: this step is finished and saved first; Ctrl-C again stops at once"
            )

        handler = signal.getsignal(signal.SIGINT)
        ours = (
            threading.current_thread() is threading.main_thread()
            and handler is signal.default_int_handler
        )
        if ours:  # another handler is the caller's
            signal.signal(signal.SIGINT, stop)
        try:
            yield
        finally:
            if ours:
                signal.signal(signal.SIGINT, handler)

    def on_train_begin(self, *given: Any, **_: Any) -> None:
        """Continue the count of seconds of earlier starts, and find their best state in the journal."""
        arguments, state = given[:2]
        before = max((entry.get("seconds", 0.0) for entry in state.log_history), default=0.0)
        if state.best_global_step:
            state.best_model_checkpoint = (
                f"{arguments.output_dir}/checkpoint-{state.best_global_step}"
            )
        self._began, self._saved = time.perf_counter() - before, time.perf_counter()
        shown: dict[str, Any] = {
            "initial": state.global_step,
            "unit": "step",
            "disable": not self._progress,
        }
        self._bar = tqdm(total=state.max_steps, desc="Training", **shown)

    def on_step_end(self, *given: Any, **_: Any) -> None:
        """Save a state or stop the training, in all processes at once; rank 0's clock decides."""
        self._bar.update()
        late = time.perf_counter() - self._saved > _SAVE_SECONDS
        found = self._ranks.gather((late, self._asked))
        self.stopped = any(stopped for _, stopped in found)
        given[2].should_save |= found[0][0]
        given[2].should_evaluate |= given[1].global_step == self._check
        given[2].should_training_stop |= self.stopped

    def on_epoch_end(self, *given: Any, **_: Any) -> None:
        """Save the last state if the training was stopped; earlier, an evaluation might cancel the save."""
        given[2].should_save |= self.stopped

    def on_save(self, *given: Any, **_: Any) -> None:
        """Finish the state once all processes have written their files of it."""
        self._ranks.gather(None)
        self._ranks.first(lambda: _finish_state(Path(given[0].output_dir), given[1]))
        self._saved = time.perf_counter()

    def on_log(self, *given: Any, **_: Any) -> None:
        """Add the seconds of training to what is kept of it."""
        given[1].log_history[-1]["seconds"] = round(time.perf_counter() - self._began, 1)

    def on_evaluate(self, *given: Any, **named: Any) -> None:
        """Say the held-out loss; back off if it is larger than before the training, or not finite."""
        state, loss = given[1], named["metrics"]["eval_loss"]
        if self._bar is None:  # after the training: the caller compares
            return
        self._bar.set_postfix({"held-out loss": f"{loss:.4f}"})
        logger.info(
            "held-out loss %.4f after step %d of %d", loss, state.global_step, state.max_steps
        )
        if not state.global_step:
            state.best_metric = loss
            if not math.isfinite(loss):
                raise ValueError(
                    f"the pruned model's held-out loss is {loss}: look for NaN in its weights."
                )
        before = next(row["eval_loss"] for row in state.log_history if "eval_loss" in row)
        if not loss <= before and state.global_step < state.max_steps:
            step = f"held-out loss {loss:.4f} after step {state.global_step}, {before:.4f} before the training"
            logger.warning(
                "%s: back to the weights before, with a quarter of the learning rate", step
            )
            self.back_off()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Take the bar away, also after an error."""
        if self._bar is not None:
            self._bar.close()
        self._bar = None


def _finish_state(journal: Path, state: TrainerState) -> None:
    """Write the digests of a state's files last, and only then remove the states that it replaces."""
    best, folder = state.best_global_step, journal / f"checkpoint-{state.global_step}"
    file = folder / "trainer_state.json"
    write_file(
        file, json.dumps(json.loads(file.read_text()) | {"best_model_checkpoint": None})
    )  # folders may be moved
    files = [
        file for file in sorted(folder.rglob("*")) if file.is_file() and file.name != _STATE_RECORD
    ]
    digests = {file.relative_to(folder).as_posix(): digest_of(file) for file in files}
    write_record(folder / _STATE_RECORD, {"best": best, "files": digests})
    for other in {*journal.glob("checkpoint-*")} - {folder, journal / f"checkpoint-{best}"}:
        (other / _STATE_RECORD).unlink(missing_ok=True)  # first: what is left of it is no state
        shutil.rmtree(other, ignore_errors=True)


def kept_states(journal: Path) -> dict[int, Path]:
    """States from which an unfinished training can resume, by the number of steps done; incomplete ones are deleted."""
    found, best = {}, {}
    for folder in journal.glob("checkpoint-*"):
        record = read_record(folder / _STATE_RECORD)
        if record is not None and all(
            is_whole(folder / name, digest) for name, digest in record["files"].items()
        ):
            step = int(folder.name.rpartition("-")[2])
            found[step], best[step] = folder.resolve(), record["best"]
    found = {
        step: folder for step, folder in found.items() if not best[step] or best[step] in found
    }
    for folder in journal.glob("checkpoint-*"):
        if folder.resolve() not in found.values():
            shutil.rmtree(folder)
    return found
