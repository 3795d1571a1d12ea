"""Divergence: the distance of a model's predictions from a teacher's and from the text, and its gradient.

Only a few positions have logits at a time, because with a large vocabulary logits take more memory than the model.
"""

from collections.abc import Iterator
from contextlib import nullcontext, suppress
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

LOGITS_PER_CHUNK = 2**25  # that the loss has at a time: 134 MB in float32, several times
_POSITIONS_ON_CPU = 16  # of them: as many as the caches of a CPU hold
_ROUNDING = 0.02  # of a product in bfloat16 by another algorithm


class Predictor:
    """A causal language model that is cut before its head, so that only a few positions have logits at a time.

    `logits` is all that the model does after its base model: head, bias, scale, soft-capping. If this gives other
    logits for a few tokens, the model can't be cut; then whole logits take the place of hidden states.
    """

    def __init__(
        self, model: PreTrainedModel, kept: Tensor | None = None, *, whole: bool = False
    ) -> None:
        """`kept` are the tokens [vocabulary of the student] that a student has of this model's; `whole`: don't cut."""
        self._model, self._base, self._output = model, model.get_decoder(), None
        self._kept = None if kept is None else kept.to(model.device)
        if not whole:
            with (
                suppress(Exception),
                torch.no_grad(),
            ):  # code of other people: whatever fails, it can't be cut
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

    def hidden_states(self, ids: Tensor, wrapped: Any = None) -> Tensor:
        """What enters the head at all tokens of `ids` [batch, length] but the last: [batch * (length - 1), hidden].

        `wrapped` is the model in a wrapper that has to be called, such as that of several processes.
        """
        found: list[Tensor] = []

        def keep(_: Any, __: Any, output: Any) -> Any:
            found.append(output.last_hidden_state)
            return type(output)(
                last_hidden_state=output.last_hidden_state[:, :1]
            )  # logits of one token

        ids = ids if self._kept is None else self._kept[ids]
        with self._base.register_forward_hook(keep) if self._output else nullcontext():
            logits = (wrapped or self._model)(input_ids=ids, use_cache=False).logits
        return (found[0] if found else logits)[:, :-1].flatten(0, 1)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [positions, vocabulary] for hidden states [positions, hidden]."""
        if self._output:
            output, ids = (
                self._output(last_hidden_state=hidden[None]),
                torch.zeros(1, len(hidden)).long(),
            )
            with patch.object(self._base, "forward", lambda *_, **__: output):
                hidden = self._model.forward(
                    input_ids=ids.to(hidden.device), use_cache=False
                ).logits[0]
        return hidden if self._kept is None else hidden[:, self._kept]

    def chunks(self, positions: int) -> Iterator[slice]:
        """Divide positions into parts that have logits at the same time."""
        vocabulary = self._model.config.get_text_config(decoder=True).vocab_size
        size = max(_POSITIONS_ON_CPU, LOGITS_PER_CHUNK // vocabulary)
        return (slice(start, start + size) for start in range(0, positions, size))


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        wanted: Tensor,
        student: Predictor,
        teacher: Predictor,
        labels: Tensor,
        share: float,
    ) -> Tensor:
        gradient, total = (
            torch.empty_like(hidden),
            torch.zeros((), dtype=torch.float32, device=hidden.device),
        )
        for rows in student.chunks(len(hidden)):
            part = hidden[rows].detach().requires_grad_()
            with torch.enable_grad():
                logits = student.logits(part)
            loss, slope = _loss_and_slope(
                logits.detach(), teacher.logits(wanted[rows]), labels[rows], share
            )
            total += loss
            gradient[rows] = torch.autograd.grad(logits, part, slope.div_(len(hidden)))[0]
        ctx.save_for_backward(gradient)
        return total / len(hidden)

    @staticmethod
    def backward(ctx: Any, *outward: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        return ctx.saved_tensors[0] * outward[0], None, None, None, None, None


def _loss_and_slope(
    logits: Tensor, teacher: Tensor, labels: Tensor, label_share: float
) -> tuple[Tensor, Tensor]:
    """The sum of the divergence over positions, and its gradient by the logits [positions, vocabulary]."""
    slopes, total = (
        torch.empty_like(logits),
        torch.zeros((), dtype=torch.float32, device=logits.device),
    )
    size = _POSITIONS_ON_CPU if logits.device.type == "cpu" else len(logits)
    for start in range(0, len(logits), size):
        rows = slice(start, start + size)
        log_q, log_p = (
            values[rows].float().log_softmax(-1) for values in (logits, teacher)
        )  # [chunk, vocabulary]
        q, p, following = log_q.exp(), log_p.exp(), labels[rows, None]
        total += (1 - label_share) * log_p.sub_(log_q).mul_(p).sum()
        if label_share:  # the label may be of no probability
            total -= label_share * log_q.gather(1, following).sum()
        # d/d logits = q - (1 - s) p - s [label]: sum p = 1, so that KL and cross-entropy share the q
        slope = q.sub_(p, alpha=1 - label_share)
        slopes[rows] = slope.scatter_add_(1, following, torch.full_like(slope[:, :1], -label_share))
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
    few positions at a time. The head gets no gradient. `ids` [batch, length] are the student's.
    """
    with torch.no_grad():
        wanted = teacher.hidden_states(ids)
    given = (
        student.hidden_states(ids, wrapped),
        wanted,
        student,
        teacher,
        ids[:, 1:].flatten(),
        label_share,
    )
    found: Tensor = _Divergence.apply(*given)
    return found


def text_loss(student: Predictor, ids: Tensor, wrapped: Any = None) -> Tensor:
    """The mean negative log-likelihood of the tokens that `ids` [batch, length] predict."""
    hidden, labels = student.hidden_states(ids, wrapped), ids[:, 1:].flatten()
    parts = (
        (student.logits(hidden[rows]).float(), labels[rows]) for rows in student.chunks(len(labels))
    )
    return torch.stack([cross_entropy(*part, reduction="sum") for part in parts]).sum() / len(
        labels
    )
