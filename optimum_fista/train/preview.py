"""Preview a recovery before it runs: its plan as text, with the time that a step takes.

`preview` loads both models, if they fit into memory, and times a pass of the training on any tokens, of which as many
count in the loss as in the run. Nothing is written.
"""

import math
import time
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from optimum_fista.bars import tqdm
from optimum_fista.environment import numerical_environment
from optimum_fista.memory import available_bytes
from optimum_fista.model.predictor import Predictor
from optimum_fista.source.loading import load_model
from optimum_fista.train.divergence import (
    LiveTeacher,
    Predictions,
    Teacher,
    TextAlone,
    TopPredictions,
    bytes_of_whole_logits,
    divergence,
)
from optimum_fista.train.recovery_plan import (
    Choice,
    RecoveryPlan,
    choose,
    load_student,
    mark_trained,
    plan_text,
    round_head,
)
from optimum_fista.train.sequences import draw_text


@numerical_environment()
def preview(plan: RecoveryPlan) -> str:
    """Say in a few lines what a recovery will do and need.

    If they fit into memory, both models are loaded to time one step. If only answers count in the loss, the text is
    drawn for that, too, with the errors of the run. Nothing is written, and `plan` stays as it is.
    During the call, numerical settings of PyTorch are those of a new process (`numerical_environment`).
    """
    free = available_bytes(plan.device)
    choice = choose(plan, [free])
    duration = "not measured: one step does not fit into the free memory"
    if free is None or choice.num_bytes <= free:
        seconds, num_bytes_not_estimated = _seconds_of_step(plan, choice)
        interval = tqdm.format_interval(plan.steps * seconds)
        duration = f"about {interval}, {seconds:.1f} seconds a step"
        if plan.options.teacher_logits is not None:
            duration += ", beside the time to store predictions that are missing"
        if num_bytes_not_estimated:
            # known now: these models can't be cut before their heads
            choice = replace(choice, num_bytes=choice.num_bytes + num_bytes_not_estimated)
    return plan_text(plan, choice, free, duration)


def _seconds_of_step(plan: RecoveryPlan, choice: Choice) -> tuple[float, int]:
    """Load the models, and time the forward and backward passes of one step, on any tokens.

    Returns the seconds of a step, and the bytes that logits take more than `choice` says: 0 if models can be cut.

    One pass is timed, after another one that fills caches. Its time, multiplied by the number of passes, is that of the
    step. All models are local to this function, so their memory is free when it returns. `plan` and
    `choice` are only read: `choice.train` says what has gradients, `choice.checkpointed` whether activations are
    computed twice.
    """
    counted = _counted_in_batch(plan)  # before the models, because it may raise an error
    student = _student_in_training(plan, choice)
    embedding: Any = student.get_input_embeddings()
    vocabulary: int = embedding.num_embeddings

    in_16_bits = plan.compute_dtype != torch.float32
    products = torch.autocast(plan.device.type, plan.compute_dtype, enabled=in_16_bits)
    with products:  # `Predictor` runs a model on a few tokens, to find out how to cut it
        student_predictor = Predictor(student)
        teacher = _teacher_in_training(plan, vocabulary)

    # Ids 0, 1, 2, ..., which begin again at the end of the vocabulary.
    numbers = torch.arange(plan.options.batch_size * plan.length).remainder(vocabulary)
    ids = numbers.view(plan.options.batch_size, plan.length).to(plan.device)

    seconds_of_pass = 0.0
    for _ in range(2):  # the time of the second pass counts
        started = time.perf_counter()
        with products:
            loss = divergence(
                student_predictor, teacher, ids, plan.options.label_share, counted=counted
            )
            loss.backward()
        torch.get_device_module(plan.device).synchronize()  # waits for the device
        seconds_of_pass = time.perf_counter() - started
    num_bytes_not_estimated = bytes_of_whole_logits(
        student_predictor, teacher, ids.numel(), plan.compute_dtype
    )
    return plan.passes_of_step * seconds_of_pass, num_bytes_not_estimated


def _student_in_training(plan: RecoveryPlan, choice: Choice) -> PreTrainedModel:
    """Load the student as the training has it: weights in float32, with gradients for those that `choice` trains.

    The head is rounded last, because it is not trained: it has the dtype of the products.
    """
    student = load_student(plan.source).float()
    mark_trained(student, choice.train)
    student.to(plan.device)
    if choice.checkpointed:
        student.gradient_checkpointing_enable()
    round_head(student, plan.compute_dtype)
    student.train()
    return student


def _teacher_in_training(plan: RecoveryPlan, vocabulary: int) -> Teacher:
    """Load the teacher as the training has it; `vocabulary` is the number of the student's tokens.

    If the teacher's predictions are stored, others of the same shape take their place. If the text alone counts, there
    is no teacher.
    """
    if not plan.has_teacher:
        return TextAlone()
    if plan.options.teacher_logits is not None:
        return _AnyTeacher(min(plan.options.top_k, vocabulary))
    model, _ = load_model(plan.teacher, device=str(plan.device), dtype=plan.compute_dtype)
    return LiveTeacher(model.eval(), plan.kept_tokens)


def _counted_in_batch(plan: RecoveryPlan) -> Tensor | None:
    """Mark as many tokens of a batch as count in the loss on average, booleans [batch, length]; `None`: all count.

    The head runs only for tokens that count, so the time of a pass depends on their number. It is known when the text
    is drawn as the run draws it; a text of the Hub is downloaded into its cache.
    """
    if not plan.options.answers_only:
        return None
    text = draw_text(plan, journal=None, progress=False)  # no model writes such a text
    trained_on = text.part(slice(plan.options.held_out, None))
    of_sequence = trained_on.counted_in_a_sequence
    assert of_sequence is not None  # with `answers_only`, a text says which tokens count

    batch_size = plan.options.batch_size
    is_counted = torch.zeros(batch_size * (plan.length - 1), dtype=torch.bool)
    is_counted[: round(batch_size * of_sequence)] = True
    # The first token of a sequence is not predicted, so it never counts.
    return pad(is_counted.view(batch_size, -1), (1, 0)).to(plan.device)


class _AnyTeacher:
    """Stands for a stored teacher while a step is timed: it predicts the same at all positions."""

    def __init__(self, top_k: int) -> None:
        """Predict the tokens 0 to `top_k` - 1, equally likely, with one half of the probability."""
        self._top_k = top_k

    def predictions(self, ids: Tensor) -> Predictions:
        """Make predictions of the shape of those that are stored (`divergence.Teacher`)."""
        num_positions = ids.shape[0] * (ids.shape[1] - 1)
        tokens = torch.arange(self._top_k, device=ids.device).expand(num_positions, -1)
        top = TopPredictions(
            tokens=tokens,
            log_of_tokens=torch.full(tokens.shape, -math.log(2 * self._top_k), device=ids.device),
            log_of_rest=torch.full((num_positions, 1), -math.log(2), device=ids.device),
        )
        return top.part

    def bytes_beyond_a_chunk(self, num_positions: int, bytes_per_logit: int) -> int:
        """Return 0, as of a stored teacher."""
        return 0
