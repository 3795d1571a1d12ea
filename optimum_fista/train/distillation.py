"""Distillation: the distance of predictions from a teacher's, and the Trainer that makes this distance smaller.

The Trainer of Transformers does the training; this file gives it the loss. It also changes its checkpoints, so that a
killed run resumes with the same bits: they hold only trained parameters, and their digests are written last.
"""

import json
import logging
import math
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import torch
from accelerate.utils import fsdp2_prepare_model
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.utils import ModelOutput

from optimum_fista.folder.output import digest_of, errors_of_writing, is_whole, read_record, write_file, write_record
from optimum_fista.prune.ranks import Ranks
from optimum_fista.train.training import local

_STATE_RECORD = "files.json"  # in the folder of a state: the best step until then, and digests of the state's files
LOGITS_PER_CHUNK = 2**25  # that the loss has at a time: 134 MB in float32, several times
_POSITIONS_ON_CPU = 16  # of them: as many as the caches of a CPU hold
_ROUNDING = 0.02  # of a product in bfloat16 by another algorithm
_SAVE_SECONDS = 120.0
# A share of the steps, and steps; at most half of them. The first step of Adam moves every weight by the whole rate.
_WARM_UP, _LEAST_WARM_UP = 0.05, 10
_BACK_OFF = 4  # divides the learning rate
logger = logging.getLogger(__name__)


class Predictor:
    """A causal language model that is cut before its head, so that only a few positions have logits at a time.

    `logits` is all that the model does after its base model: head, bias, scale, soft-capping. If this gives other
    logits for a few tokens, the model can't be cut; then whole logits take the place of hidden states.
    """

    def __init__(self, model: PreTrainedModel, kept: Tensor | None = None, *, whole: bool = False) -> None:
        """`kept` are the tokens [vocabulary of the student] that a student has of this model's; `whole`: don't cut."""
        self._model, self._base, self._output = model, model.get_decoder(), None
        self._kept = None if kept is None else kept.to(model.device)
        if not whole:
            with suppress(Exception), torch.no_grad():  # code of other people: whatever fails, it can't be cut
                self._output = self._output_if_cut(torch.arange(4, device=model.device)[None])

    def _output_if_cut(self, ids: Tensor) -> type[ModelOutput] | None:
        expected = self.hidden_states(ids)[1:3]
        self._output = type(self._base(input_ids=ids, use_cache=False))
        try:
            difference = self.logits(self.hidden_states(ids)[1:3]) - expected
            same = difference.abs().max() <= _ROUNDING * expected.abs().max()
            return self._output if same else None
        finally:
            self._output = None

    @property
    def is_cut(self) -> bool:
        """Whether only a few positions have logits at a time."""
        return self._output is not None

    def hidden_states(self, ids: Tensor, wrapped: Any = None) -> Tensor:
        """What enters the head at all tokens of `ids` [batch, length] but the last: [batch * (length - 1), hidden].

        `wrapped` is the model in a wrapper that has to be called, such as that of several processes.
        """
        found: list[Tensor] = []

        def keep(_: Any, __: Any, output: Any) -> Any:
            found.append(output.last_hidden_state)
            return type(output)(last_hidden_state=output.last_hidden_state[:, :1])  # logits of one token

        ids = ids if self._kept is None else self._kept[ids]
        with self._base.register_forward_hook(keep) if self._output else nullcontext():
            logits = (wrapped or self._model)(input_ids=ids, use_cache=False).logits
        return (found[0] if found else logits)[:, :-1].flatten(0, 1)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [positions, vocabulary] for hidden states [positions, hidden]."""
        if self._output:
            output, ids = self._output(last_hidden_state=hidden[None]), torch.zeros(1, len(hidden)).long()
            with patch.object(self._base, "forward", lambda *_, **__: output):
                hidden = self._model.forward(input_ids=ids.to(hidden.device), use_cache=False).logits[0]
        return hidden if self._kept is None else hidden[:, self._kept]

    def chunks(self, positions: int) -> Iterator[slice]:
        """Divide positions into parts that have logits at the same time."""
        vocabulary = self._model.config.get_text_config(decoder=True).vocab_size
        size = max(_POSITIONS_ON_CPU, LOGITS_PER_CHUNK // vocabulary)
        return (slice(start, start + size) for start in range(0, positions, size))


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, wanted: Tensor, student: Predictor, teacher: Predictor, labels: Tensor, share: float
    ) -> Tensor:
        gradient, total = torch.empty_like(hidden), torch.zeros((), dtype=torch.float32, device=hidden.device)
        for rows in student.chunks(len(hidden)):
            part = hidden[rows].detach().requires_grad_()
            with torch.enable_grad():
                logits = student.logits(part)
            loss, slope = _loss_and_slope(logits.detach(), teacher.logits(wanted[rows]), labels[rows], share)
            total += loss
            gradient[rows] = torch.autograd.grad(logits, part, slope.div_(len(hidden)))[0]
        ctx.save_for_backward(gradient)
        return total / len(hidden)

    @staticmethod
    def backward(ctx: Any, *outward: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        return ctx.saved_tensors[0] * outward[0], None, None, None, None, None


def _loss_and_slope(logits: Tensor, teacher: Tensor, labels: Tensor, label_share: float) -> tuple[Tensor, Tensor]:
    """The sum of the divergence over positions, and its gradient by the logits [positions, vocabulary]."""
    slopes, total = torch.empty_like(logits), torch.zeros((), dtype=torch.float32, device=logits.device)
    size = _POSITIONS_ON_CPU if logits.device.type == "cpu" else len(logits)
    for start in range(0, len(logits), size):
        rows = slice(start, start + size)
        log_q, log_p = (values[rows].float().log_softmax(-1) for values in (logits, teacher))  # [chunk, vocabulary]
        q, p, following = log_q.exp(), log_p.exp(), labels[rows, None]
        total += (1 - label_share) * log_p.sub_(log_q).mul_(p).sum()
        if label_share:  # the label may be of no probability
            total -= label_share * log_q.gather(1, following).sum()
        # d/d logits = q - (1 - s) p - s [label]: sum p = 1, so that KL and cross-entropy share the q
        slope = q.sub_(p, alpha=1 - label_share)
        slopes[rows] = slope.scatter_add_(1, following, torch.full_like(slope[:, :1], -label_share))
    return total, slopes


def divergence(
    student: Predictor, teacher: Predictor, ids: Tensor, label_share: float = 0.0, wrapped: Any = None
) -> Tensor:
    """Distance of predictions from a teacher's and from the text, on average over the tokens that `ids` predict.

    The distance is `(1 - s) KL(p || q) - s log q(label)`, with `p` of the teacher, `q` of the student, `label` the
    token that follows in the text, and `s = label_share`. The gradient by hidden states is computed with the value, a
    few positions at a time. The head gets no gradient. `ids` [batch, length] are the student's.
    """
    with torch.no_grad():
        wanted = teacher.hidden_states(ids)
    given = student.hidden_states(ids, wrapped), wanted, student, teacher, ids[:, 1:].flatten(), label_share
    found: Tensor = _Divergence.apply(*given)
    return found


def text_loss(student: Predictor, ids: Tensor, wrapped: Any = None) -> Tensor:
    """The mean negative log-likelihood of the tokens that `ids` [batch, length] predict."""
    hidden, labels = student.hidden_states(ids, wrapped), ids[:, 1:].flatten()
    parts = ((student.logits(hidden[rows]).float(), labels[rows]) for rows in student.chunks(len(labels)))
    return torch.stack([cross_entropy(*part, reduction="sum") for part in parts]).sum() / len(labels)


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
        # the scheduler also asks for the step after the last one
        return self.share * (1 + math.cos(math.pi * (done - warm_up) / max(1, left - warm_up))) / 2


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
        self._trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        super().__init__(model, arguments, train_dataset=texts[0], eval_dataset=texts[1], callbacks=callbacks)
        self.remove_callback(PrinterCallback)
        if self.is_deepspeed_enabled or (self.is_fsdp_enabled and not self.accelerator.is_fsdp2):
            raise ValueError("recover does not know the weights that DeepSpeed and FSDP1 keep: pass --fsdp_version 2.")
        sharded = bool(self.is_fsdp_enabled)  # then the head is whole only inside a call of the wrapper
        teacher = fsdp2_prepare_model(self.accelerator, teacher) if sharded else teacher
        self._student, self._teacher = Predictor(model, whole=sharded), Predictor(teacher, kept, whole=sharded)
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
                value = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
            local(parameter.data).copy_(local(value))
        for moments in optimizer.state.values():
            for value in moments.values():
                value.zero_()
        self.schedule.began, self.schedule.share = scheduler.last_epoch, self.schedule.share / _BACK_OFF
        for group, rate in zip(optimizer.param_groups, scheduler.base_lrs, strict=True):
            group["lr"] = rate * self.schedule(scheduler.last_epoch)

    def compute_loss(self, model: Any, inputs: dict[str, Any], *_: Any, **__: Any) -> Tensor:
        """The divergence from the teacher and the text."""
        return divergence(self._student, self._teacher, inputs["input_ids"], self._label_share, model)

    def prediction_step(self, model: Any, inputs: dict[str, Any], *_: Any, **__: Any) -> tuple[Tensor, None, None]:
        """The mean negative log-likelihood of a token of held-out sequences."""
        ids = self._prepare_inputs(inputs)["input_ids"]
        with torch.no_grad():
            loss = text_loss(self._student, ids, model)
        return loss.nan_to_num(math.inf, math.inf), None, None

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save a state; with FSDP2 its folder would come too late to count as that of the best weights."""
        Path(str(output_dir)).mkdir(parents=True, exist_ok=True)
        super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
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
        self.back_off: Callable[[], None] = lambda: None  # of the trainer, which is made with its callbacks
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
            logger.warning("stopping: this step is finished and saved first; Ctrl-C again stops at once")

        handler = signal.getsignal(signal.SIGINT)
        ours = threading.current_thread() is threading.main_thread() and handler is signal.default_int_handler
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
            state.best_model_checkpoint = f"{arguments.output_dir}/checkpoint-{state.best_global_step}"
        self._began, self._saved = time.perf_counter() - before, time.perf_counter()
        shown: dict[str, Any] = {"initial": state.global_step, "unit": "step", "disable": not self._progress}
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
        logger.info("held-out loss %.4f after step %d of %d", loss, state.global_step, state.max_steps)
        if not state.global_step:
            state.best_metric = loss
            if not math.isfinite(loss):
                raise ValueError(f"the pruned model's held-out loss is {loss}: look for NaN in its weights.")
        before = next(row["eval_loss"] for row in state.log_history if "eval_loss" in row)
        if not loss <= before and state.global_step < state.max_steps:
            step = f"held-out loss {loss:.4f} after step {state.global_step}, {before:.4f} before the training"
            logger.warning("%s: back to the weights before, with a quarter of the learning rate", step)
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
    write_file(file, json.dumps(json.loads(file.read_text()) | {"best_model_checkpoint": None}))  # folders may be moved
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and file.name != _STATE_RECORD]
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
        if record is not None and all(is_whole(folder / name, digest) for name, digest in record["files"].items()):
            step = int(folder.name.rpartition("-")[2])
            found[step], best[step] = folder.resolve(), record["best"]
    found = {step: folder for step, folder in found.items() if not best[step] or best[step] in found}
    for folder in journal.glob("checkpoint-*"):
        if folder.resolve() not in found.values():
            shutil.rmtree(folder)
    return found
