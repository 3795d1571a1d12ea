"""Divergence: the distance of a model's predictions from a teacher's and from the text, and its gradient.

With a large vocabulary, logits take more memory than the model. So a model is cut before its head (`Predictor`): the
hidden states of all positions are computed at once, and their logits for a few positions (a chunk) at a time.
`divergence` is the loss of a training, and `text_loss` that of an evaluation.

The *student* is the model that is trained, and the *teacher* the one that it imitates. Token ids are the student's. A
teacher may have more tokens; then its `Predictor` translates the ids, and gives the logits of the student's tokens.
"""

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from optimum_fista.model.hooks import replaced_forwards

LOGITS_PER_CHUNK = 2**25  # that the loss has at a time: 134 MB in float32, several times
_POSITIONS_ON_CPU = 16  # of them: as many as the caches of a CPU hold
_ROUNDING = 0.02  # of a product in bfloat16 by another algorithm, as a share of the largest logit


class Predictor:
    """A causal language model that is cut before its head, so that only a few positions have logits at a time.

    `hidden_states` runs the base model, the part before the head. `logits` is all that the model does after it: head,
    bias, scale, soft-capping. If this gives other logits for a few tokens, the model can't be cut; then the "hidden
    states" are the whole logits, and `logits` returns them as they are.
    """

    def __init__(
        self, model: PreTrainedModel, kept_tokens: Tensor | None = None, *, whole: bool = False
    ) -> None:
        """Run the model on four tokens to find out if it can be cut, unless it has to stay `whole`.

        `kept_tokens`, int64 [vocabulary of the student], are the ids that this model has for the tokens of a student
        with fewer tokens; `None`: both have the same tokens. The model itself is not changed.
        """
        self._model = model
        self._base = model.get_decoder()
        self._kept_tokens = None if kept_tokens is None else kept_tokens.to(model.device)
        # The class of the base model's output; `None` if the model is not cut.
        self._output_class: type[ModelOutput] | None = None
        if whole:
            return
        # A model may be code of other people: whatever fails there, it can't be cut.
        with suppress(Exception), torch.no_grad():
            ids = torch.arange(4, device=model.device)[None]
            self._output_class = self._output_class_if_cut(ids)

    @property
    def _is_cut(self) -> bool:
        """Whether the model is cut before its head."""
        return self._output_class is not None

    def _output_class_if_cut(self, ids: Tensor) -> type[ModelOutput] | None:
        """The class of the base model's output, or `None` if cutting the model changes the logits of `ids` [1, length].

        Changes nothing: `self._output_class`, by which the model is cut, is set for the comparison, and is None after
        it.
        """
        # The model is not cut yet, so these "hidden states" are logits. Two tokens are compared.
        expected = self.hidden_states(ids)[1:3]
        output_class = type(self._base(input_ids=ids, use_cache=False))

        self._output_class = output_class  # from here on the model is cut
        try:
            hidden = self.hidden_states(ids)[1:3]
            difference = self.logits(hidden) - expected
        finally:
            self._output_class = None
        is_same = difference.abs().max() <= _ROUNDING * expected.abs().max()
        return output_class if is_same else None

    def hidden_states(self, ids: Tensor, wrapped: Any = None) -> Tensor:
        """The hidden states that enter the head at all tokens of `ids` [batch, length] but the last.

        Returns [batch * (length - 1), hidden], or whole logits [batch * (length - 1), vocabulary] of a model that can't
        be cut. During the call the base model has a hook.

        Args:
            ids: Token ids of the student. If `self._kept_tokens` is set, the model runs on its own ids for them.
            wrapped: The model in a wrapper such as DistributedDataParallel, which is then called instead of the model.
        """
        states: list[Tensor] = []  # filled by the hook

        def keep(_: Any, __: Any, output: Any) -> Any:
            """Hook of the base model: keep all hidden states, and let the head compute logits for one token."""
            states.append(output.last_hidden_state)
            return type(output)(last_hidden_state=output.last_hidden_state[:, :1])

        own_ids = ids if self._kept_tokens is None else self._kept_tokens[ids]
        model = self._model if wrapped is None else wrapped
        if self._is_cut:
            with self._base.register_forward_hook(keep):
                model(input_ids=own_ids, use_cache=False)
            all_states = states[0]
        else:
            all_states = model(input_ids=own_ids, use_cache=False).logits
        return all_states[:, :-1].flatten(0, 1)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [positions, vocabulary of the student] for `hidden` [positions, hidden], rows of `hidden_states`.

        During the call, the forward pass of the base model is replaced: it returns `hidden`, so that the model runs its
        head alone. Of a model that can't be cut, `hidden` are the logits already.
        """
        if self._output_class is not None:
            output = self._output_class(last_hidden_state=hidden[None])
            any_ids = torch.zeros(1, len(hidden)).long().to(hidden.device)
            with replaced_forwards([self._base], [lambda *_, **__: output]):
                logits = self._model.forward(input_ids=any_ids, use_cache=False).logits[0]
        else:
            logits = hidden
        return logits if self._kept_tokens is None else logits[:, self._kept_tokens]

    @property
    def trained_head(self) -> list[nn.Parameter]:
        """The parameters of the head that need a gradient: none if the head stays, or if the model is not cut.

        A head that is tied to the embedding has the embedding's weight.
        """
        if not self._is_cut:
            return []
        head = self._model.get_output_embeddings()
        return [parameter for parameter in head.parameters() if parameter.requires_grad]

    def chunks(self, positions: int) -> Iterator[slice]:
        """Divide a number of positions into slices (chunks) whose logits are in memory at the same time."""
        vocabulary = self._model.config.get_text_config(decoder=True).vocab_size
        size = max(_POSITIONS_ON_CPU, LOGITS_PER_CHUNK // vocabulary)
        return (slice(start, start + size) for start in range(0, positions, size))


class _Divergence(torch.autograd.Function):
    """The divergence as a function of the student's hidden states and head; gradients are computed with the value."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        teachers_hidden: Tensor,
        student: Predictor,
        teacher: Predictor,
        labels: Tensor,
        label_share: float,
        *head: Tensor,
    ) -> Tensor:
        """Return the mean divergence over positions, and save its gradients in `ctx`, for `backward`.

        `hidden` [positions, hidden] and `teachers_hidden` come from `Predictor.hidden_states`, `labels` [positions] are
        the tokens that follow in the text, and `label_share` is their share of the loss. `head` are the parameters of
        the student's head that are trained (`Predictor.trained_head`).
        """
        gradient = torch.empty_like(hidden)
        gradients_of_head = [torch.zeros_like(parameter) for parameter in head]
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for rows in student.chunks(len(hidden)):
            part = hidden[rows].detach().requires_grad_()
            with torch.enable_grad():
                logits = student.logits(part)
            loss, slope = _loss_and_slope(
                logits.detach(), teacher.logits(teachers_hidden[rows]), labels[rows], label_share
            )
            total += loss
            slope.div_(len(hidden))  # of the mean
            of_hidden, *of_head = torch.autograd.grad(logits, [part, *head], slope)
            gradient[rows] = of_hidden
            for sum_of_chunks, of_chunk in zip(gradients_of_head, of_head, strict=True):
                sum_of_chunks.add_(of_chunk)
        ctx.save_for_backward(gradient, *gradients_of_head)
        return total / len(hidden)

    @staticmethod
    def backward(ctx: Any, *outward: Tensor) -> tuple[Tensor | None, ...]:
        """Scale the gradients that `forward` saved by that of the loss; the inputs between them have none."""
        gradient, *of_head = ctx.saved_tensors
        scaled = [gradient_of_head * outward[0] for gradient_of_head in of_head]
        return gradient * outward[0], None, None, None, None, None, *scaled


def _loss_and_slope(
    logits: Tensor, teachers_logits: Tensor, labels: Tensor, label_share: float
) -> tuple[Tensor, Tensor]:
    """The sum of the divergence over positions, and its gradient by the student's logits [positions, vocabulary].

    With p of the teacher, q of the student and s = `label_share`, the loss of a position is
    (1 - s) sum_i p_i (log p_i - log q_i) - s log q_label. `labels` [positions] are the tokens that follow in the text.
    Logits may have any dtype; sums are float32, and the gradient has the dtype of `logits`. No argument is changed.
    """
    slopes = torch.empty_like(logits)
    total = torch.zeros((), dtype=torch.float32, device=logits.device)
    size = _POSITIONS_ON_CPU if logits.device.type == "cpu" else len(logits)
    for start in range(0, len(logits), size):
        rows = slice(start, start + size)
        log_q = logits[rows].float().log_softmax(-1)  # [chunk, vocabulary]
        log_p = teachers_logits[rows].float().log_softmax(-1)
        q = log_q.exp()
        p = log_p.exp()
        following = labels[rows, None]  # [chunk, 1]

        total += (1 - label_share) * log_p.sub_(log_q).mul_(p).sum()  # log_p is overwritten
        if label_share:  # otherwise 0 times infinity if the label has no probability
            total -= label_share * log_q.gather(1, following).sum()

        # d/d logits = q - (1 - s) p - s [label]: sum p = 1, so that KL and cross-entropy share the q
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
    few positions at a time.

    During the call, both models have hooks and replaced forward passes (`Predictor`).

    Args:
        student: The model that is trained; the result has a gradient by its parameters that need one.
        teacher: The model to imitate, which gets no gradient.
        ids: Token ids of the student, [batch, length]; the teacher's `Predictor` translates them if need be.
        label_share: Share of the text's own cross-entropy, in [0, 1].
        wrapped: The student in a wrapper such as DistributedDataParallel, which is then called instead of the student.
    """
    with torch.no_grad():
        teachers_hidden = teacher.hidden_states(ids)
    hidden = student.hidden_states(ids, wrapped)
    labels = ids[:, 1:].flatten()
    loss: Tensor = _Divergence.apply(
        hidden, teachers_hidden, student, teacher, labels, label_share, *student.trained_head
    )
    return loss


def text_loss(student: Predictor, ids: Tensor, wrapped: Any = None) -> Tensor:
    """The mean negative log-likelihood of the tokens that `ids` [batch, length] predict.

    `wrapped` is the student in a wrapper such as DistributedDataParallel, which is then called instead of the student.
    During the call, the student has a hook and a replaced forward pass (`Predictor`).
    """
    hidden = student.hidden_states(ids, wrapped)
    labels = ids[:, 1:].flatten()
    sums = [
        cross_entropy(student.logits(hidden[rows]).float(), labels[rows], reduction="sum")
        for rows in student.chunks(len(labels))
    ]
    return torch.stack(sums).sum() / len(labels)
