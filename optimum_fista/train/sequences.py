"""The text of a recovery, as sequences of tokens: drawn from a source, or written by the teacher.

The first sequences are *held out*: they are never trained on, and measure the loss. Some tokens may only be read: those
that *count* are the ones whose predictions are asked for, such as the tokens of answers (option `answers_only`).
"""

import itertools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from optimum_fista.model.calibration import equal_shares
from optimum_fista.source.loading import require_tokenizer
from optimum_fista.text.calibration_tokens import calibration_tokens_by_name
from optimum_fista.text.one_text import require_different_texts
from optimum_fista.text.sources import load_text
from optimum_fista.text.text_source import TextSource
from optimum_fista.text.windows import calibration_windows, windows_with_answers
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

    `plan.calibration` has the sources of the text, such as "c4". Each gives an equal share of the sequences that are
    held out and of the others, and the sources take turns. A text of the Hub is downloaded into its cache. If the
    source is "self", the teacher writes the text (`_text_of_teacher`), into the folder `journal` of the run. Otherwise
    `journal` is not used, and may be `None`. `progress`: whether to show a bar while the teacher writes.

    With the option `answers_only`, only tokens of answers count. ValueError if a text is too short, if two are the
    same, or if the held-out sequences of a text, or those to train on, have no token that counts.
    """
    if plan.teacher_writes_text:
        assert journal is not None
        return _text_of_teacher(plan, journal, progress)

    options = plan.options
    number = len(plan.calibration)
    texts = [load_text(source, split="calibration") for source in plan.calibration]
    require_different_texts(plan.calibration, texts)
    tokenizer = require_tokenizer(plan.text_model)
    held_out = list[Sequences]()  # of each text
    trained_on = list[Sequences]()
    for text, num_trained_on, num_held_out in zip(
        texts,
        equal_shares(plan.num_sequences, number),
        equal_shares(options.held_out, number),
        strict=True,
    ):
        try:
            drawn = _drawn(
                plan,
                tokenizer,
                text,
                num_samples=num_trained_on + num_held_out,
                held_out=num_held_out,
            )
        except ValueError as error:
            asked = f"tokens={options.tokens} and held_out={options.held_out} ask for this text"
            if options.answers_only:
                asked = f"answers_only=True, {asked}"
            if number > 1:
                asked += f", of which {text.name!r} gives {num_trained_on + num_held_out} sequences"
            raise ValueError(f"{asked}: {error}") from error
        held_out.append(drawn.part(slice(num_held_out)))
        trained_on.append(drawn.part(slice(num_held_out, None)))
        _require_counted(text.name, {"held out": held_out[-1], "trained on": trained_on[-1]})
    return _joined([*_in_turns(held_out), *_in_turns(trained_on)])


def _text_of_teacher(plan: RecoveryPlan, journal: Path, progress: bool) -> Sequences:
    """Let the teacher write the text; the first `held_out` sequences are never trained on.

    The text is kept in `journal`, the folder of the run, where a later start reads it; or beside the teacher's stored
    predictions of it, where other runs read it, too. `progress`: whether to show a bar.
    """
    options = plan.options
    tokens = calibration_tokens_by_name(
        plan.text_model,  # the teacher
        "self",
        num_samples=plan.num_sequences + options.held_out,
        sequence_length=plan.length,
        seed=options.seed,
        held_out=options.held_out,
        device=str(plan.device),
        keep_in=journal if options.teacher_logits is None else Path(options.teacher_logits),
        progress=progress,
    )
    return Sequences(tokens)


def _drawn(
    plan: RecoveryPlan,
    tokenizer: PreTrainedTokenizerBase,
    text: TextSource,
    *,
    num_samples: int,
    held_out: int,
) -> Sequences:
    """Draw `num_samples` sequences of one text, the first `held_out` of them to measure on (`draw_text`)."""
    length = plan.length
    seed = plan.options.seed
    if plan.options.answers_only:
        tokens, answers = windows_with_answers(
            tokenizer, text, num_samples, length, seed, held_out=held_out
        )
        return Sequences(tokens, answers)
    tokens = calibration_windows(tokenizer, text, num_samples, length, seed, held_out=held_out)
    return Sequences(tokens)


def _in_turns(parts: Iterable[Sequences]) -> list[Sequences]:
    """Order the sequences of several texts: the first of each text, then the second of each, ...

    Each result has one sequence, with what it says of its tokens.
    """
    of_texts = []
    for part in parts:
        rows = range(len(part.tokens))
        of_texts.append([part.part(slice(row, row + 1)) for row in rows])
    turns = itertools.zip_longest(*of_texts)
    return [sequence for turn in turns for sequence in turn if sequence is not None]


def _joined(parts: Iterable[Sequences]) -> Sequences:
    """Join sequences, of which all or none say which tokens count."""
    tokens, counted = zip(*parts, strict=True)
    if counted[0] is None:
        return Sequences(torch.cat(tokens))
    return Sequences(torch.cat(tokens), torch.cat(counted))


def _require_counted(name: str, parts: Mapping[str, Sequences]) -> None:
    """Refuse the text called `name` if no token of one of its parts counts (ValueError).

    `parts` has what is "held out" and what is "trained on".
    """
    for use, part in parts.items():
        if not part.num_counted:
            raise ValueError(
                f"answers_only=True: none of the {part.tokens.numel():,} tokens of {name!r} that are {use} is of an "
                'answer: pass conversations with turns of the role "assistant", or more sequences (--tokens, '
                "--held-out)."
            )
