"""Distillation: how far predictions are from a teacher's, and the Trainer that makes this smaller."""

from __future__ import annotations

import json
import logging
import math
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import fsdp2_prepare_model
from torch import Tensor
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback, TrainerState, TrainingArguments

from optimum_fista.evaluate.perplexity import POSITIONS_PER_CHUNK
from optimum_fista.folder.output import digest_of, errors_of_writing, write_file
from optimum_fista.prune.journal import write_record
from optimum_fista.prune.ranks import Ranks

STATE_RECORD = "files.json"
"""In the folder of a state: the step of the best state then, and the digests of the files of this one."""
logger = logging.getLogger(__name__)

_POSITIONS_ON_CPU = 16
"""Positions a chunk of the loss on a CPU: as many as its caches hold."""
_SAVE_SECONDS = 120.0


def divergence(logits: Tensor, teacher: Tensor, labels: Tensor, label_share: float = 0.0) -> Tensor:
    """How far predictions are from a teacher's and from the text, on average over positions.

    It is `(1 - s) KL(p || q) - s log q(label)`, with `p` of the teacher and `q` of the logits, both [positions,
    vocabulary], `label` the tokens that follow in the text [positions], and `s = label_share`. The gradient is computed
    with the value, so that no float32 copy of all logits is held.
    """
    found: Tensor = _Divergence.apply(logits, teacher, labels, label_share)
    return found


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, teacher: Tensor, labels: Tensor, label_share: float) -> Tensor:
        gradient, positions = torch.empty_like(logits), logits.shape[0]
        total = torch.zeros((), dtype=torch.float32, device=logits.device)
        chunk = _POSITIONS_ON_CPU if logits.device.type == "cpu" else POSITIONS_PER_CHUNK
        for start in range(0, positions, chunk):
            rows = slice(start, start + chunk)
            log_q, log_p = (values[rows].float().log_softmax(-1) for values in (logits, teacher))
            q, p, following = log_q.exp(), log_p.exp(), labels[rows, None]
            total += (1 - label_share) * log_p.sub_(log_q).mul_(p).sum()
            if label_share:  # the label may be of no probability
                total -= label_share * log_q.gather(1, following).sum()
            slope = q.sub_(p, alpha=1 - label_share)  # in the logits
            slope.scatter_add_(1, following, torch.full_like(slope[:, :1], -label_share))
            gradient[rows] = slope.div_(positions)
        ctx.save_for_backward(gradient)
        return total / positions

    @staticmethod
    def backward(ctx: Any, *outward: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.saved_tensors[0] * outward[0], None, None, None


class DistillationTrainer(Trainer):
    """The Trainer with `divergence` as its loss; evaluation gives the cross-entropy of the held-out text.

    Checkpoints hold the parameters that are trained, under their names in memory: those of adapters too, and of experts
    that the files of a model have one by one.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        teacher: PreTrainedModel,
        label_share: float,
        arguments: TrainingArguments,
        trained_on: Tensor,
        held_out: Tensor,
        callbacks: Sequence[TrainerCallback],
    ) -> None:
        rows: Any = ([{"input_ids": row} for row in windows] for windows in (trained_on, held_out))
        self._trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        data = dict(zip(("train_dataset", "eval_dataset"), rows, strict=True))
        super().__init__(model, arguments, callbacks=list(callbacks), **data)
        self.remove_callback(PrinterCallback)
        if self.is_deepspeed_enabled or (self.is_fsdp_enabled and not self.accelerator.is_fsdp2):
            raise ValueError("recover does not know the weights that DeepSpeed and FSDP1 keep: pass --fsdp_version 2.")
        self._teacher = fsdp2_prepare_model(self.accelerator, teacher) if self.is_fsdp_enabled else teacher
        self._label_share = label_share

    def compute_loss(self, model: Any, inputs: dict[str, Any], *_: Any, **__: Any) -> Tensor:
        """The divergence from the teacher and the text, on average over a batch."""
        ids = inputs["input_ids"]
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
        with torch.no_grad():
            wanted = self._teacher(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
        return divergence(logits, wanted, ids[:, 1:].flatten(), self._label_share)

    def prediction_step(self, model: Any, inputs: dict[str, Any], *_: Any, **__: Any) -> tuple[Tensor, None, None]:
        """The mean negative log-likelihood of a token of held-out sequences."""
        ids = self._prepare_inputs(inputs)["input_ids"]
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
            loss = torch.nn.functional.cross_entropy(logits.float(), ids[:, 1:].flatten())
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
        """Say nothing: of a checkpoint only the trained parameters are asked."""


class Watch(TrainerCallback):
    """Saves a state every two minutes, counts seconds, and ends a training whose held-out loss is no longer finite.

    Weights only count as the best if their loss is smaller than that before the training.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._began = self._saved = time.perf_counter()

    def on_train_begin(self, *given: Any, **_: Any) -> None:
        """Count on from the seconds of earlier starts, and find their best state where the journal is now."""
        arguments, state = given[:2]
        before = max((entry.get("seconds", 0.0) for entry in state.log_history), default=0.0)
        if state.best_global_step:
            state.best_model_checkpoint = f"{arguments.output_dir}/checkpoint-{state.best_global_step}"
        self._began, self._saved = time.perf_counter() - before, time.perf_counter()

    def on_step_end(self, *given: Any, **_: Any) -> None:
        """Have a state saved; rank 0's clock decides for all."""
        if self._ranks.gather(time.perf_counter() - self._saved > _SAVE_SECONDS)[0]:
            given[2].should_save = True

    def on_save(self, *given: Any, **_: Any) -> None:
        """Finish the state once all processes have written their files of it."""
        self._ranks.gather(None)
        self._ranks.first(lambda: _finish_state(Path(given[0].output_dir), given[1]))
        self._saved = time.perf_counter()

    def on_log(self, *given: Any, **_: Any) -> None:
        """Add the seconds of training to what is kept of it."""
        given[1].log_history[-1]["seconds"] = round(time.perf_counter() - self._began, 1)

    def on_evaluate(self, *given: Any, **named: Any) -> None:
        """Look at the held-out loss."""
        (_, state, control), loss = given, named["metrics"]["eval_loss"]
        if not state.global_step:
            state.best_metric = loss
        if math.isfinite(loss):
            return
        if not state.global_step:
            raise ValueError(f"the pruned model's loss on the held-out text is {loss}: look for NaN in its weights.")
        logger.warning("the loss is no longer finite at step %d: the training ends here", state.global_step)
        control.should_training_stop = True


def _finish_state(journal: Path, state: TrainerState) -> None:
    """Write the digests of a state's files last, and only then remove the states that it replaces."""
    best, folder = state.best_global_step, journal / f"checkpoint-{state.global_step}"
    file = folder / "trainer_state.json"
    write_file(file, json.dumps(json.loads(file.read_text()) | {"best_model_checkpoint": None}))  # folders may be moved
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and file.name != STATE_RECORD]
    digests = {file.relative_to(folder).as_posix(): digest_of(file) for file in files}
    write_record(folder / STATE_RECORD, {"best": best, "files": digests})
    for other in {*journal.glob("checkpoint-*")} - {folder, journal / f"checkpoint-{best}"}:
        (other / STATE_RECORD).unlink(missing_ok=True)  # first: what is left of it is no state
        shutil.rmtree(other, ignore_errors=True)
