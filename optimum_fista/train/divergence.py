"""Divergence: the distance of a model's predictions from a teacher's and from the text, and its gradient.

With a large vocabulary, logits take more memory than the model. So a model is cut before its head
(`model.predictor.Predictor`): the hidden states of all positions are computed at once, and their logits for a few
positions (a chunk) at a time. `divergence` is the loss of a training, and `text_loss` that of an evaluation.

The *student* is the model that is trained, and the *teacher* the one that it imitates. A *prediction* is what a model
says of the next token at one position. A teacher in memory (`LiveTeacher`) gives logits of all tokens
(`WholePredictions`). A stored one (`stored_teacher.StoredTeacher`) gives the probabilities of a few tokens
(`TopPredictions`).

Both losses may be of some tokens only: those that *count* (`counted`), such as the tokens of answers. The others are
read, and nothing is asked of their predictions.

Token ids are the student's. A teacher in memory may have more tokens; then its `Predictor` translates the ids, and
gives the logits of the student's tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from optimum_fista.model.predictor import POSITIONS_ON_CPU, Predictor


@dataclass(frozen=True)
class WholePredictions:
    """A teacher's predictions at some positions: `logits` [positions, vocabulary of the student], in any dtype."""

    logits: Tensor

    def part(self, rows: slice | Tensor) -> "WholePredictions":
        """Return the predictions at some of the positions."""
        return WholePredictions(self.logits[rows])

    def divergence_and_probabilities(self, log_q: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sum of KL(p || q) over positions, and p, a new tensor in float32 [positions, vocabulary].

        `log_q` and `q` are the student's log-probabilities and probabilities, float32 [positions, vocabulary]; they
        stay as they are.
        """
        log_p = self.logits.float().log_softmax(-1)
        p = log_p.exp()
        # sum p (log p - log q), in the memory of log_p
        distance = log_p.sub_(log_q).mul_(p).sum()
        return distance, p


@dataclass(frozen=True)
class TopPredictions:
    """A teacher's predictions at some positions, of which only the most likely tokens are known, and the other's mass.

    The probabilities of the `tokens` and the rest add up to 1.
    """

    # the k most likely tokens, int64 [positions, k]
    tokens: Tensor
    # logarithms of their probabilities, float32 [positions, k]
    log_of_tokens: Tensor
    # logarithm of the probability of all other tokens together, float32 [positions, 1]
    log_of_rest: Tensor

    def part(self, rows: slice | Tensor) -> "TopPredictions":
        """Return the predictions at some of the positions."""
        return TopPredictions(self.tokens[rows], self.log_of_tokens[rows], self.log_of_rest[rows])

    def divergence_and_probabilities(self, log_q: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sum of KL(p || q) over positions, and p, a new tensor in float32 [positions, vocabulary].

        In p, the other tokens share the rest as the student would share it. `log_q` and `q` are the student's
        log-probabilities and probabilities, float32 [positions, vocabulary]; they stay as they are.

        With T the known tokens, p_i their probabilities and r = 1 - sum_{i in T} p_i the rest, the divergence from p is
        that of distributions in which all other tokens are one:

            sum_{i in T} p_i (log p_i - log q_i) + r (log r - log sum_{j not in T} q_j)

        It is never larger than the divergence from all probabilities (log sum inequality), and equal to it if T has all
        tokens, or if the student is right about the proportions of the others. Its gradient by the student's logits is
        q - p, as that of the whole divergence. DistillKit (github.com/arcee-ai/DistillKit) has the same formula:
        `MissingProbabilityHandling.SYMMETRIC_UNIFORM`.
        """
        # Not 1 - sum_{i in T} q_i, which would lose the digits of a small rest.
        rest_of_student = q.scatter(1, self.tokens, 0.0).sum(-1, keepdim=True)  # [positions, 1]
        # Without other tokens, or with a rest that float32 rounds to zero, the logarithm would be infinite.
        rest_of_student.clamp_(min=torch.finfo(torch.float32).tiny)

        # log r - log sum_{j not in T} q_j; minus infinity if T has all tokens
        log_of_ratio = self.log_of_rest - rest_of_student.log_()

        of_tokens = self.log_of_tokens.exp()
        log_q_of_tokens = log_q.gather(1, self.tokens)
        distance = (of_tokens * (self.log_of_tokens - log_q_of_tokens)).sum()
        rest = self.log_of_rest.exp()
        distance += torch.where(rest > 0, rest * log_of_ratio, 0.0).sum()

        # r q_j / sum_{j not in T} q_j, for all tokens, and then p_i in the places of T
        p = q * log_of_ratio.exp()
        return distance, p.scatter_(1, self.tokens, of_tokens)


# Gives the predictions at some of the positions of a batch: a slice of them, or their numbers, int64. `None`: there are
# none, and the loss is that of the text alone.
Predictions: TypeAlias = Callable[[slice | Tensor], WholePredictions | TopPredictions | None]


class Teacher(Protocol):
    """What a student imitates: a model in memory (`LiveTeacher`), stored predictions, or nobody (`TextAlone`)."""

    def predictions(self, ids: Tensor) -> Predictions:
        """Predict the tokens of `ids`, int64 [batch, length], at all tokens but the last of each sequence.

        Positions are numbered through the sequences: there are batch * (length - 1).
        """

    def bytes_beyond_a_chunk(self, num_positions: int, bytes_per_logit: int) -> int:
        """Count the bytes that predictions at `num_positions` take more than those of one chunk."""


class LiveTeacher(Predictor):
    """A teacher in memory. `Predictor` has its arguments: the model, and its token for each token of the student."""

    def predictions(self, ids: Tensor) -> Callable[[slice | Tensor], WholePredictions]:
        """Run the model without its head on `ids`, int64 [batch, length]; the head runs when a chunk is asked for.

        The model gets no gradient, and has a hook during the call (`hidden_states`).
        """
        with torch.no_grad():
            hidden = self.hidden_states(ids)
        return lambda rows: WholePredictions(self.logits(hidden[rows]))


class TextAlone:
    """Stands for a teacher if the text's own cross-entropy is the whole loss (`label_share` is 1): nothing runs."""

    def predictions(self, ids: Tensor) -> Predictions:
        """Predict nothing (`Teacher`)."""
        return lambda _: None

    def bytes_beyond_a_chunk(self, num_positions: int, bytes_per_logit: int) -> int:
        """Return 0: there are no logits (`Teacher`)."""
        return 0


class _Divergence(torch.autograd.Function):
    """The divergence as a function of the student's hidden states, whose gradient is computed with the value."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        student: Predictor,
        predictions: Predictions,
        labels: Tensor,
        label_share: float,
        divisor: float,
    ) -> Tensor:
        """Return the sum of the divergence over positions, divided by `divisor`.

        Saves the gradient of that by `hidden` in `ctx`, for `backward`. The student's head gets no gradient. During the
        call, forward passes of both models are replaced (`Predictor`).

        Args:
            ctx: Context of autograd.
            hidden: Hidden states of the student at all positions, [positions, hidden], as `Predictor.hidden_states`
                returns them.
            student: Gives the logits of hidden states (`logits`), and divides positions into `chunks`.
            predictions: Gives the teacher's predictions of a chunk.
            labels: The tokens that follow in the text, int64 [positions].
            label_share: The share of the text's own cross-entropy in the loss, from 0 to 1.
            divisor: The number of positions, for their mean; or another number.
        """
        gradient = torch.empty_like(hidden)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for rows in student.chunks(len(hidden)):  # slices of positions
            part = hidden[rows].detach().requires_grad_()
            # Inside `forward`, autograd records nothing by itself: only the head of this chunk is recorded.
            with torch.enable_grad():
                logits = student.logits(part)
            of_teacher = predictions(rows)
            loss, slope = _loss_and_slope(logits.detach(), of_teacher, labels[rows], label_share)
            del of_teacher  # its memory is needed for the gradient
            total += loss
            slope.div_(divisor)  # the gradient of the mean, not of the sum
            gradient[rows] = torch.autograd.grad(logits, part, slope)[0]  # through the head
        ctx.save_for_backward(gradient)
        return total / divisor

    @staticmethod
    def backward(ctx: Any, *outward: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        """Return the gradient by `hidden`, the first argument of `forward`; the other five arguments have none.

        It is what `forward` has saved, times the gradient of the loss by the divergence, the only entry of `outward`.
        """
        (gradient,) = ctx.saved_tensors
        (gradient_of_loss,) = outward
        return gradient * gradient_of_loss, None, None, None, None, None


def _loss_and_slope(
    logits: Tensor,
    of_teacher: WholePredictions | TopPredictions | None,
    labels: Tensor,
    label_share: float,
) -> tuple[Tensor, Tensor]:
    """Return the sum of the divergence over positions, and its gradient by the student's logits.

    `logits` are the student's, [positions, vocabulary of the student], and `of_teacher` are the teacher's predictions
    at these positions; they may be `None` if s is 1. `labels`, int64 [positions], are the tokens that follow in the
    text. With p of the teacher, q of the student and s = `label_share`, the loss of a position is
    (1 - s) sum_i p_i (log p_i - log q_i) - s log q_label.

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
        q = log_q.exp()
        following = labels[rows, None]  # [chunk, 1]

        # The gradient by logits is q - (1 - s) p - s [label]. Both terms of the loss have a q in theirs, and the shares
        # of the terms add up to 1.
        slope = q
        if of_teacher is not None:
            distance, p = of_teacher.part(rows).divergence_and_probabilities(log_q, q)
            total += (1 - label_share) * distance
            slope = q.sub_(p, alpha=1 - label_share)  # in the memory of q
        if label_share:  # with 0, a label without probability would give 0 times infinity
            total -= label_share * log_q.gather(1, following).sum()
        at_label = torch.full_like(slope[:, :1], -label_share)
        slopes[rows] = slope.scatter_add_(1, following, at_label)
    return total, slopes


def divergence(
    student: Predictor,
    teacher: Teacher,
    ids: Tensor,
    label_share: float = 0.0,
    wrapped: Any = None,
    *,
    counted: Tensor | None = None,
    divisor: float | None = None,
) -> Tensor:
    """Distance of predictions from a teacher's and from the text, on average over the tokens that `ids` predict.

    The distance is `(1 - s) KL(p || q) - s log q(label)`, with `p` of the teacher, `q` of the student, `label` the
    token that follows in the text, and `s = label_share`. The gradient by hidden states is computed with the value, a
    few positions at a time. The head gets no gradient.

    During the call, models in memory have hooks and replaced forward passes (`Predictor`).

    Args:
        student: The model that is trained; the result has a gradient by its parameters before the head.
        teacher: What the student imitates; a model in memory gets no gradient. `TextAlone` if `label_share` is 1.
        ids: Token ids of the student, [batch, length].
        label_share: Share of the text's own cross-entropy, in [0, 1].
        wrapped: The student in a wrapper such as DistributedDataParallel, which is then called instead of the student.
        counted: Which tokens of `ids` count when they are predicted, booleans [batch, length]; `None`: all.
        divisor: Divides the sum over tokens that count; `None`: their number. Batches with different numbers of such
            tokens need one divisor, if each token shall count as much.
    """
    predictions = teacher.predictions(ids)
    hidden = student.hidden_states(ids, wrapped)  # [batch * (length - 1), hidden]
    labels = ids[:, 1:].flatten()  # the token that follows each of these positions
    if counted is not None:
        places = _places_of_counted(counted)
        hidden = hidden[places]
        labels = labels[places]
        predictions = _predictions_at(places, predictions)
    if divisor is None:
        divisor = max(1, len(hidden))  # no token may count
    loss: Tensor = _Divergence.apply(hidden, student, predictions, labels, label_share, divisor)
    return loss


def _predictions_at(places: Tensor, predictions: Predictions) -> Predictions:
    """Give predictions at some positions of a batch, whose numbers are `places`, int64; these are numbered anew."""
    return lambda rows: predictions(places[rows])


def _places_of_counted(counted: Tensor) -> Tensor:
    """Return the numbers of the positions whose next token counts, int64 [positions that count].

    `counted` are booleans [batch, length]. Positions are all tokens but the last of each sequence, numbered through the
    sequences.
    """
    return counted[:, 1:].flatten().nonzero()[:, 0]


def bytes_of_whole_logits(
    student: Predictor, teacher: Teacher, num_positions: int, dtype: torch.dtype
) -> int:
    """Count the bytes that `divergence` takes more than for chunks if a model can't be cut; 0 if both are cut.

    `num_positions` is the number of tokens of a batch, and logits are in `dtype`. Changes nothing.
    """
    # the student's logits and their gradient
    of_student = student.bytes_beyond_a_chunk(num_positions, 2 * dtype.itemsize)
    of_teacher = teacher.bytes_beyond_a_chunk(num_positions, dtype.itemsize)
    return of_student + of_teacher


def text_loss(
    student: Predictor,
    ids: Tensor,
    wrapped: Any = None,
    *,
    counted: Tensor | None = None,
    divisor: float | None = None,
) -> Tensor:
    """Return the mean negative log-likelihood of the tokens that `ids` predict, a scalar in float32.

    `student` is the model, and `ids` are its token ids, int64 [batch, length]. `counted` and `divisor` are those of
    `divergence`.

    `wrapped` is the student in a wrapper such as DistributedDataParallel, which is then called instead of the student.
    During the call, the student has a hook and a replaced forward pass (`Predictor`).
    """
    hidden = student.hidden_states(ids, wrapped)  # [batch * (length - 1), hidden]
    labels = ids[:, 1:].flatten()  # the token that follows each of these positions
    if counted is not None:
        places = _places_of_counted(counted)
        hidden = hidden[places]
        labels = labels[places]
    if not len(labels):  # no token counts
        return torch.zeros((), dtype=torch.float32, device=hidden.device)
    sums = [
        cross_entropy(student.logits(hidden[rows]).float(), labels[rows], reduction="sum")
        for rows in student.chunks(len(labels))
    ]
    if divisor is None:
        divisor = len(labels)
    return torch.stack(sums).sum() / divisor
