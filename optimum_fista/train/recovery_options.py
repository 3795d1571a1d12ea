"""The options of a recovery, each declared once: `recover` checks them, and the command line has a flag for each.

This module loads neither torch nor transformers.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from optimum_fista.options import SEEDS, option, wrong_field

_TRAINING = "training"


@dataclass(frozen=True)
class RecoveryOptions:
    """Options of `recover`, checked when constructed."""

    tokens: int = option(262_144, "tokens to train on", limits=(1, None))
    train: Literal["auto", "all", "norms"] = option(
        "auto",
        "all: kept weights except embeddings and head; norms: norms and biases; auto: all if that fits into memory",
    )
    compute_dtype: Literal["auto", "float32", "bfloat16"] = option(
        "auto",
        "dtype of products; weights are trained in float32; auto: bfloat16 if the device is fast in it",
    )
    sequence_length: int | None = option(
        None,
        "tokens in a sequence (default: 512, at most the model's limit)",
        limits=(2, None),
        advanced=_TRAINING,
    )
    batch_size: int = option(
        2, "sequences in a forward and backward pass", limits=(1, None), advanced=_TRAINING
    )
    accumulate: int | None = option(
        None,
        "passes in one update, of all processes together (default: so many that there are about 256 updates, with at "
        "most 32 sequences each)",
        limits=(1, None),
        advanced=_TRAINING,
    )
    held_out: int = option(
        8,
        "sequences to measure the loss on, never trained on",
        limits=(1, None),
        advanced=_TRAINING,
    )
    relative_step: float | None = option(
        None,
        "about how far a step moves weights, as a share of the root mean square of their tensor (default: 0.001, and "
        "0.01 if norms and biases are trained alone)",
        advanced=_TRAINING,
    )
    label_share: float = option(
        0.5,
        "share of the text's own cross-entropy in the loss; with 1, the training has no teacher",
        limits=(0, 1),
        advanced=_TRAINING,
    )
    seed: int = option(
        0, "seed by which text is drawn and ordered", limits=SEEDS, advanced=_TRAINING
    )
    answers_only: bool = option(
        False,
        "conversations: only tokens of answers (role assistant) count in the loss, the others are read as context",
    )
    other_teacher: bool = option(
        False, "take a teacher that is not the dense model from which the pruned one was made"
    )
    teacher_logits: Path | str | None = option(
        None,
        "folder for the teacher's predictions of the text: they are written there once, and a training that finds them "
        "has no teacher in memory",
    )
    top_k: int = option(
        32,
        "for --teacher-logits: tokens whose probabilities are stored, of each prediction the most likely ones",
        limits=(1, None),
        advanced=_TRAINING,
    )
    fill_zeros: bool = option(
        False, "train zeros that an earlier pruning run has left and no mask covers"
    )

    def __post_init__(self) -> None:
        """Refuse values of other types and beyond the limits of their fields."""
        wrong = wrong_field(self)  # a whole sentence, or nothing
        if wrong:
            raise ValueError(wrong)
        if self.relative_step is not None and not 0 < self.relative_step < math.inf:
            raise ValueError(
                f"relative_step={self.relative_step}: pass a positive share of the weights' root mean square, such as "
                "0.001."
            )
        if self.teacher_logits is not None and self.label_share == 1:
            raise ValueError(
                f"teacher_logits={str(self.teacher_logits)!r} has no meaning with label_share=1, where the text alone "
                "counts: leave out one of them (--teacher-logits, --label-share)."
            )
