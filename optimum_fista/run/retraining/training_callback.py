"""Masked training under the Trainer of Transformers."""

# ruff: noqa: ARG002

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from optimum_fista.run.retraining.masks import MaskSource
from optimum_fista.run.retraining.training import MaskedTraining, masked_training


class MaskedTrainingCallback(TrainerCallback):
    """Keeps the zeros of a pruned model zero during `Trainer.train`, resumed runs included.

    Args:
        masks: Where the masks come from, as in `masked_training`.
    """

    def __init__(self, masks: MaskSource = None) -> None:
        self.masks = masks
        self._training: MaskedTraining | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start.

        Raises:
            ValueError: As `masked_training`, and if the trainer shards the weights.
        """
        if args.fsdp or args.deepspeed:
            raise ValueError("MaskedTrainingCallback does not know sharded weights: train without fsdp and deepspeed.")
        self._stop()  # what a training run that failed has left
        self._training = masked_training(kwargs["model"], self.masks)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop; the weights are masked once more, because the trainer may have loaded its best checkpoint."""
        self._stop()

    def _stop(self) -> None:
        if self._training is not None:
            self._training.remove()
            self._training = None
