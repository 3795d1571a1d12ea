"""What a report says of a recovery: a training of kept weights to predict as the dense model does.

The *teacher* is the dense model. `PruningReport.recoveries` has a `RecoveryReport` for each recovery of the result of a
run, in order; a folder with a dense model that was trained so has one, too.
"""

import math
from dataclasses import dataclass, field
from typing import Any

# What a recovery can train.
WORDS_OF_TRAIN = {"all": "all kept weights but embeddings and head", "norms": "norms and biases"}


@dataclass(frozen=True)
class RecoveryReport:
    """A recovery of the pruned model: its kept weights were trained to predict as the dense model does."""

    # Name of the dense model: a Hub id, or the last part of a path.
    teacher: str
    # A key of `WORDS_OF_TRAIN`.
    train: str
    # Number of weights that were trained, zeros aside.
    num_trained: int
    # Tokens that were trained on.
    num_tokens: int
    # The text: `source` and `sha256` of its tokens, `sequence_length`, number of `held_out` sequences.
    calibration: dict[str, Any]
    # Of the training, by name.
    options: dict[str, Any]
    # [step, seconds, held-out loss] of each; the loss is the mean negative log-likelihood of a token that counts.
    evaluations: list[list[float]]
    # The weights after this step were kept; 0: no step was better than the weights before.
    best_step: int
    # Of the pruned model.
    held_out_loss_before: float
    # Of the saved weights.
    held_out_loss: float
    # Of training and evaluation.
    seconds: float
    # What the user should know.
    warnings: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        """Describe the recovery in one line: loss before and after it on its own held-out text, training, teacher.

        `self.calibration` has the number (`held_out`) and the length of the held-out sequences, and the name of the
        text (`source`). A loss is the mean negative log-likelihood of a token, or with the option `answers_only` of a
        token of an answer.
        """
        perplexity_before = math.exp(self.held_out_loss_before)
        perplexity = math.exp(self.held_out_loss)
        sequences = self.calibration["held_out"]
        length = self.calibration["sequence_length"]
        steps = self.evaluations[-1][0]  # an evaluation is [step, seconds, loss]
        of_answers = ", answers alone" if self.options.get("answers_only") else ""
        best = "nothing gained, so the weights stayed"
        if self.best_step:
            best = f"best after step {self.best_step}"
        return (
            f"held-out loss {self.held_out_loss_before:.4f} -> {self.held_out_loss:.4f} "
            f"(perplexity {perplexity_before:.2f} -> {perplexity:.2f}) on {sequences} held-out sequences of {length} "
            f"tokens{of_answers}; {WORDS_OF_TRAIN[self.train]} trained ({self.num_trained:,} weights) on "
            f"{self.num_tokens:,} tokens of {self.calibration['source']} in {steps:.0f} steps and "
            f"{self.seconds / 60:.1f} min, with {self.teacher} as the teacher; {best}"
        )
