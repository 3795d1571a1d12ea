"""The text of a recovery, as sequences of tokens: drawn from a source, or written by the teacher.

The first sequences are *held out*: they are never trained on, and measure the loss. Some tokens may only be read: those
that *count* are the ones whose predictions are asked for, such as the tokens of answers (option `answers_only`).
"""

from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from optimum_fista.source.loading import require_tokenizer
from optimum_fista.text.calibration_tokens import calibration_tokens_by_name
from optimum_fista.text.sources import load_text
from optimum_fista.text.windows import windows_with_answers
from optimum_fista.train.recovery_plan import RecoveryPlan


class Sequences(NamedTuple):
    """Sequences of a text, on the CPU."""

    tokens: Tensor  # ids, int64 [sequences, length]
    # Which tokens count in the loss when they are predicted, booleans [sequences, length]; None: all.
    counted: Tensor | None = None

    @property
    def num_counted(self) -> int:
        """How many tokens count: the first one of a sequence is not predicted."""
        if self.counted is None:
            return self.tokens[:, 1:].numel()
        return int(self.counted[:, 1:].sum())

    @property
    def counted_in_a_sequence(self) -> float | None:
        """How many tokens of a sequence count, on average; `None` if all do."""
        return None if self.counted is None else self.num_counted / len(self.tokens)

    def part(self, rows: slice) -> "Sequences":
        """Return some of the sequences."""
        return Sequences(self.tokens[rows], None if self.counted is None else self.counted[rows])


def draw_text(plan: RecoveryPlan, journal: Path, progress: bool) -> Sequences:
    """Draw the text; the first `held_out` sequences are never trained on.

    `plan.calibration` is the source of the text, such as "c4"; with "self", the teacher writes it. `plan.text_model` is
    the folder of the model whose tokenizer reads the text, or which writes it. Text that a model wrote is kept in
    `journal`, the folder of the run, where a later start reads it; or beside the teacher's predictions of it, where
    other runs read it, too. `progress`: whether to show a bar. A text of the Hub is downloaded into its cache.

    With the option `answers_only`, only tokens of answers count. ValueError if the held-out sequences, or those to
    train on, have none.
    """
    if plan.options.answers_only:
        return draw_answers(plan)

    held_out = plan.options.held_out
    folder_of_teacher = plan.options.teacher_logits
    try:
        tokens = calibration_tokens_by_name(
            plan.text_model,
            plan.calibration,
            num_samples=plan.num_sequences + held_out,
            sequence_length=plan.length,
            seed=plan.options.seed,
            held_out=held_out,
            device=str(plan.device),
            keep_in=journal if folder_of_teacher is None else Path(folder_of_teacher),
            progress=progress,
        )
    except ValueError as error:
        raise ValueError(
            f"tokens={plan.options.tokens} and held_out={held_out} ask for this text: {error}"
        ) from error
    return Sequences(tokens)


def draw_answers(plan: RecoveryPlan) -> Sequences:
    """Draw conversations of the source `plan.calibration`, of which only tokens of answers count (`draw_text`)."""
    held_out = plan.options.held_out
    text = load_text(plan.calibration, split="calibration")
    try:
        tokens, answers = windows_with_answers(
            require_tokenizer(plan.text_model),
            text,
            num_samples=plan.num_sequences + held_out,
            sequence_length=plan.length,
            seed=plan.options.seed,
            held_out=held_out,
        )
    except ValueError as error:
        raise ValueError(
            f"answers_only=True, tokens={plan.options.tokens} and held_out={held_out} ask for this text: {error}"
        ) from error

    drawn = Sequences(tokens, answers)
    parts = {
        "held out": drawn.part(slice(held_out)),
        "trained on": drawn.part(slice(held_out, None)),
    }
    for use, part in parts.items():
        if not part.num_counted:
            raise ValueError(
                f"answers_only=True: none of the {part.tokens.numel():,} tokens of {text.name!r} that are {use} is of "
                'an answer: pass conversations with turns of the role "assistant", or more sequences (--tokens, '
                "--held-out)."
            )
    return drawn
