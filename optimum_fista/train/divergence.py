"""Divergence: the distance of a model's predictions from a teacher's and from the text, and its gradient.

With a large vocabulary, logits take more memory than the model. So a model is cut before its head
(`model.predictor.Predictor`): the hidden states of all positions are computed at once, and their logits for a few
positions (a chunk) at a time. `divergence` is the loss of a training, and `text_loss` that of an evaluation.

The *student* is the model that is trained, and the *teacher* the one that it imitates. Token ids are the student's. A
teacher may have more tokens; then its `Predictor` translates the ids, and gives the logits of the student's tokens.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from optimum_fista.model.predictor import POSITIONS_ON_CPU, Predictor


class _Divergence(torch.autograd.Function):
    """The divergence as a function of the student's hidden states, whose gradient is computed with the value."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        teachers_hidden: Tensor,
        student: Predictor,
        teacher: Predictor,
        labels: Tensor,
        label_share: float,
    ) -> Tensor:
        """Return the mean divergence over positions, and save its gradient by `hidden` in `ctx`, for `backward`.

        The student's head gets no gradient. During the call, forward passes of both models are replaced (`Predictor`).

        Args:
            ctx: Context of autograd.
            hidden: Hidden states of the student at all positions, [positions, hidden], as `Predictor.hidden_states`
                returns them.
            teachers_hidden: Those of the teacher, whose hidden size may be another one.
            student: Gives the logits of hidden states (`logits`), and divides positions into `chunks`.
            teacher: Gives the teacher's logits.
            labels: The tokens that follow in the text, int64 [positions].
            label_share: The share of the text's own cross-entropy in the loss, from 0 to 1.
        """
        gradient = torch.empty_like(hidden)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for rows in student.chunks(len(hidden)):  # slices of positions
            part = hidden[rows].detach().requires_grad_()
            # Inside `forward`, autograd records nothing by itself: only the head of this chunk is recorded.
            with torch.enable_grad():
                logits = student.logits(part)
            teachers_logits = teacher.logits(teachers_hidden[rows])
            loss, slope = _loss_and_slope(
                logits.detach(), teachers_logits, labels[rows], label_share
            )
            del teachers_logits  # its memory is needed for the gradient
            total += loss
            slope.div_(len(hidden))  # the gradient of the mean, not of the sum
            gradient[rows] = torch.autograd.grad(logits, part, slope)[0]  # through the head
        ctx.save_for_backward(gradient)
        return total / len(hidden)

    @staticmethod
    def backward(ctx: Any, *outward: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        """Return the gradient by `hidden`, the first argument of `forward`; the other five arguments have none.

        It is what `forward` has saved, times the gradient of the loss by the divergence, the only entry of `outward`.
        """
        (gradient,) = ctx.saved_tensors
        (gradient_of_loss,) = outward
        return gradient * gradient_of_loss, None, None, None, None, None


def _loss_and_slope(
    logits: Tensor, teachers_logits: Tensor, labels: Tensor, label_share: float
) -> tuple[Tensor, Tensor]:
    """Return the sum of the divergence over positions, and its gradient by the student's logits.

    `logits` are the student's, [positions, vocabulary of the student], and `teachers_logits` have the same shape.
    `labels`, int64 [positions], are the tokens that follow in the text. With p of the teacher, q of the student and
    s = `label_share`, the loss of a position is (1 - s) sum_i p_i (log p_i - log q_i) - s log q_label.

    Logits may have any dtype; sums are float32, and the gradient has the shape and dtype of `logits`. No argument is
    changed.
    """
    slopes = torch.empty_like(logits)
    total = torch.zeros((), dtype=torch.float32, device=logits.device)
    # On a CPU, so few positions at a time that the caches hold their logits.
    size = POSITIONS_ON_CPU if logits.device.type == "cpu" else len(logits)
    for start in range(0, len(logits), size):
        rows = slice(start, start + size)
        log_q = logits[rows].float().log_softmax(-1)  # [chunk, vocabulary]
        log_p = teachers_logits[rows].float().log_softmax(-1)
        q = log_q.exp()
        p = log_p.exp()
        following = labels[rows, None]  # [chunk, 1]

        # sum p (log p - log q), in the memory of log_p
        total += (1 - label_share) * log_p.sub_(log_q).mul_(p).sum()
        if label_share:  # with 0, a label without probability would give 0 times infinity
            total -= label_share * log_q.gather(1, following).sum()

        # The gradient by logits is q - (1 - s) p - s [label]. Both terms of the loss have a q in theirs, and the shares
        # of the terms add up to 1.
        slope = q.sub_(p, alpha=1 - label_share)  # in the memory of q
        at_label = torch.full_like(slope[:, :1], -label_share)
        slopes[rows] = slope.scatter_add_(1, following, at_label)
    return total, slopes


def divergence(
    student: Predictor,
    teacher: Predictor,
    ids: Tensor,
    label_share: float = 0.0,
    wrapped: Any = None,
) -> Tensor:
    """Distance of predictions from a teacher's and from the text, on average over the tokens that `ids` predict.

    The distance is `(1 - s) KL(p || q) - s log q(label)`, with `p` of the teacher, `q` of the student, `label` the
    token that follows in the text, and `s = label_share`. The gradient by hidden states is computed with the value, a
    few positions at a time. The head gets no gradient.

    During the call, both models have hooks and replaced forward passes (`Predictor`).

    Args:
        student: The model that is trained; the result has a gradient by its parameters before the head.
        teacher: The model to imitate, which gets no gradient.
        ids: Token ids of the student, [batch, length]; the teacher's `Predictor` translates them if need be.
        label_share: Share of the text's own cross-entropy, in [0, 1].
        wrapped: The student in a wrapper such as DistributedDataParallel, which is then called instead of the student.
    """
    with torch.no_grad():
        teachers_hidden = teacher.hidden_states(ids)
    hidden = student.hidden_states(ids, wrapped)  # [batch * (length - 1), hidden]
    labels = ids[:, 1:].flatten()  # the token that follows each of these positions
    loss: Tensor = _Divergence.apply(hidden, teachers_hidden, student, teacher, labels, label_share)
    return loss


def bytes_of_whole_logits(
    student: Predictor, teacher: Predictor, num_positions: int, dtype: torch.dtype
) -> int:
    """Count the bytes that `divergence` takes more than for chunks if a model can't be cut; 0 if both are cut.

    `num_positions` is the number of tokens of a batch, and logits are in `dtype`. Changes nothing.
    """
    # the student's logits and their gradient
    of_student = student.bytes_beyond_a_chunk(num_positions, 2 * dtype.itemsize)
    of_teacher = teacher.bytes_beyond_a_chunk(num_positions, dtype.itemsize)
    return of_student + of_teacher


def text_loss(student: Predictor, ids: Tensor, wrapped: Any = None) -> Tensor:
    """Return the mean negative log-likelihood of the tokens that `ids` predict, a scalar in float32.

    `student` is the model, and `ids` are its token ids, int64 [batch, length].

    `wrapped` is the student in a wrapper such as DistributedDataParallel, which is then called instead of the student.
    During the call, the student has a hook and a replaced forward pass (`Predictor`).
    """
    hidden = student.hidden_states(ids, wrapped)  # [batch * (length - 1), hidden]
    labels = ids[:, 1:].flatten()  # the token that follows each of these positions
    sums = [
        cross_entropy(student.logits(hidden[rows]).float(), labels[rows], reduction="sum")
        for rows in student.chunks(len(labels))
    ]
    return torch.stack(sums).sum() / len(labels)
