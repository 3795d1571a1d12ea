"""The text of a recovery, as sequences of tokens: drawn from a source, or written by the teacher.

The first sequences are *held out*: they are never trained on, and measure the loss. Some tokens may only be read: those
that *count* are the ones whose predictions are asked for, such as the tokens of answers (option `answers_only`).
"""

import itertools
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from optimum_fista.model.calibration import equal_shares
from optimum_fista.public_names import public_name
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


def draw_text(plan: RecoveryPlan, journal: Path | None, progress: bool) -> Sequences:
    """Draw the text; the first `held_out` sequences are never trained on.

    `plan.calibration` has the sources of the text, such as "c4"; with "self", the teacher writes it. Each source gives
    an equal share of the sequences that are held out and of the others, and the sources take turns. `plan.text_model`
    is the folder of the model whose tokenizer reads the text, or which writes it. Text that a model wrote is kept in
    `journal`, the folder of the run, where a later start reads it; or beside the teacher's predictions of it, where
    other runs read it, too. `progress`: whether to show a bar. A text of the Hub is downloaded into its cache.

    With the option `answers_only`, only tokens of answers count; no model writes then, and `journal` may be `None`.
    ValueError if a text is too short, or if the held-out sequences, or those to train on, have no token that counts.
    """
    options = plan.options
    number = len(plan.calibration)
    if plan.num_sequences < number:
        raise ValueError(
            f"tokens={options.tokens} (--tokens) are {plan.num_sequences} sequences, which are too few for {number} "
            "texts: pass more."
        )
    if options.answers_only:
        draw: Callable[[str, int, int], Sequences] = partial(_draw_answers, plan)
    else:
        keep_in = journal if options.teacher_logits is None else Path(options.teacher_logits)
        assert keep_in is not None
        draw = partial(_draw_windows, plan, keep_in, progress)

    held_out = list[Sequences]()  # of each source
    trained_on = list[Sequences]()
    for source, num_trained_on, num_held_out in zip(
        plan.calibration,
        equal_shares(plan.num_sequences, number),
        equal_shares(options.held_out, number),
        strict=True,
    ):
        try:
            drawn = draw(source, num_trained_on + num_held_out, num_held_out)
        except ValueError as error:
            asked = f"tokens={options.tokens} and held_out={options.held_out} ask for this text"
            if number > 1:
                asked += f", of which {source!r} gives {num_trained_on + num_held_out} sequences"
            raise ValueError(f"{asked}: {error}") from error
        # Equal texts give equal windows, and what one holds out would be trained on in the other.
        if any(torch.equal(drawn.tokens[:1], other.tokens[:1]) for other in held_out):
            raise ValueError(
                f"calibration {source!r} (--calibration) has the same text as another one: pass one of the two."
            )
        held_out.append(drawn.part(slice(num_held_out)))
        trained_on.append(drawn.part(slice(num_held_out, None)))

    text = _joined([*_in_turns(held_out), *_in_turns(trained_on)])
    _require_counted(plan, text)
    return text


def _draw_windows(
    plan: RecoveryPlan, keep_in: Path, progress: bool, source: str, number: int, held_out: int
) -> Sequences:
    """Draw `number` sequences of one source, the first `held_out` of them to measure on (`draw_text`).

    Text that the teacher writes is kept in the folder `keep_in`.
    """
    tokens = calibration_tokens_by_name(
        plan.text_model,
        source,
        num_samples=number,
        sequence_length=plan.length,
        seed=plan.options.seed,
        held_out=held_out,
        device=str(plan.device),
        keep_in=keep_in,
        progress=progress,
    )
    return Sequences(tokens)


def _draw_answers(plan: RecoveryPlan, source: str, number: int, held_out: int) -> Sequences:
    """Draw `number` sequences of the conversations of one source, of which only tokens of answers count.

    The first `held_out` sequences are to measure on.
    """
    tokens, answers = windows_with_answers(
        require_tokenizer(plan.text_model),
        load_text(source, split="calibration"),
        num_samples=number,
        sequence_length=plan.length,
        seed=plan.options.seed,
        held_out=held_out,
    )
    return Sequences(tokens, answers)


def _in_turns(parts: Iterable[Sequences]) -> list[Sequences]:
    """Order single sequences of several texts: the first of each text, then the second of each, ..."""
    of_texts = [
        [part.part(slice(row, row + 1)) for row in range(len(part.tokens))] for part in parts
    ]
    turns = itertools.zip_longest(*of_texts)
    return [sequence for turn in turns for sequence in turn if sequence is not None]


def _joined(parts: Iterable[Sequences]) -> Sequences:
    """Join sequences, of which all or none say which tokens count."""
    tokens, counted = zip(*parts, strict=True)
    if counted[0] is None:
        return Sequences(torch.cat(tokens))
    return Sequences(torch.cat(tokens), torch.cat(counted))


def _require_counted(plan: RecoveryPlan, text: Sequences) -> None:
    """Refuse a text of which no held-out token counts, or none to train on (ValueError)."""
    num_held_out = plan.options.held_out
    parts = {
        "held out": text.part(slice(num_held_out)),
        "trained on": text.part(slice(num_held_out, None)),
    }
    for use, part in parts.items():
        if not part.num_counted:
            names = ", ".join(public_name(source) for source in plan.calibration)
            raise ValueError(
                f"answers_only=True: none of the {part.tokens.numel():,} tokens of {names!r} that are {use} is of an "
                'answer: pass conversations with turns of the role "assistant", or more sequences (--tokens, '
                "--held-out)."
            )
