"""Saving a pruned model again after it was trained."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from optimum_fista.run.checkpoints.checkpoint import CONFIG_KEY, mark_retrained, save_checkpoint, summary
from optimum_fista.run.pruner import FistaPruner
from optimum_fista.run.retraining.masks import find_record


def save_masked(
    model: PreTrainedModel,
    folder: str | Path,
    source: FistaPruner | str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    overwrite: bool = False,
) -> None:
    """Save a pruned model that was trained under its masks, with the masks and the report of its pruning.

    The report, the model card and `config.json` say that it was retrained, so that the relative errors are those
    before it.

    Args:
        model: The model, its zeros still zero.
        folder: Where to write it; it may be `source` with `overwrite`.
        source: The folder or Hub id the pruned model was loaded from, or the `FistaPruner` that pruned it.
        tokenizer: Saved with the model.
        overwrite: Replace a model that the folder already holds.

    Raises:
        ValueError: If a weight outside its mask is no longer zero, or the masks are not those of this model.
        FileNotFoundError: If `source` holds no masks.
        FileExistsError: If the folder already holds a model and `overwrite` is False.
    """
    report, masks = find_record(model, source)
    if getattr(model.config, CONFIG_KEY, None) is None:
        setattr(model.config, CONFIG_KEY, summary(report))
    mark_retrained(model)
    save_checkpoint(model, Path(folder), report, masks, tokenizer, overwrite=overwrite)
