"""The number of parameters of a saved model, from its configuration."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


def count_parameters(folder: Path, model_class: str) -> int | None:
    """Make a model without weights and count its parameters, tied ones once.

    Args:
        folder: The model folder; only `config.json` is read.
        model_class: Name of the model's class in Transformers.

    Returns:
        The number; `None` if Transformers has no such class, or the class can't be made without weights.
    """
    found = getattr(transformers, model_class, None)
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)) or found.config_class is None:
        return None
    try:
        config = found.config_class.from_pretrained(folder)
        with torch.device("meta"):
            return int(found(config).num_parameters())
    except Exception as error:  # anything the code of a family may raise on the meta device
        logger.info("%s could not be made without weights: %s", model_class, error)
        return None
