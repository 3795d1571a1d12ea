"""What a recovery trains, and how, by the memory that is there."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from optimum_fista.model.architecture import find_decoder_layers, find_operators
from optimum_fista.model.operator import LinearOperator
from optimum_fista.run.reports.report import WORDS_OF_TRAIN

logger = logging.getLogger(__name__)

RANK = 16
"""Rank of the adapters."""
_MARGIN = 0.9  # of the memory that is free


def choose(
    model: PreTrainedModel,
    dense_parameters: int | None,
    asked: str,
    shape: tuple[int, int],
    device: torch.device,
    compute: torch.dtype,
    free_bytes: Sequence[int | None],
    cached: bool,
) -> dict[str, Any]:
    """What is trained, whether activations are computed twice, and whether the teacher is read from disk.

    It is one choice for all processes, by what the one with the least memory has.

    Args:
        model: The pruned model, float32, before anything else is in memory.
        dense_parameters: Parameters of the teacher; `None`: as many.
        asked: `"auto"`, or what has to be trained.
        shape: Sequences a pass, and tokens a sequence.
        device: Where it is trained.
        compute: The dtype of products.
        free_bytes: Free memory of each process; `None` if it is not known.
        cached: Whether the teacher is read from disk in any case.

    Returns:
        `train`, one of `WORDS_OF_TRAIN`, `checkpointed` and `cached`.
    """
    count = len(free_bytes)
    known = [free for free in free_bytes if free is not None]
    free = min(known) if known else None
    if free is not None and count > 1 and device.type == "cpu":
        free //= int(os.environ.get("LOCAL_WORLD_SIZE", count))  # they share it
    size = sum(parameter.numel() for parameter in model.parameters())
    gathered = 0  # parameters that are whole at a time: all outside of decoder layers, two of these, and gradients
    if count > 1:
        layers = [sum(p.numel() for p in layer.parameters()) for _, layer in find_decoder_layers(model)]
        gathered = size - sum(layers) + 3 * max(layers)
    teacher = ((dense_parameters or size) // count + gathered) * compute.itemsize
    small = sum(parameter.numel() for parameter in model.parameters() if parameter.ndim == 1)
    adapters = sum(RANK * sum(operator.shape) for operator in linear_operators(model))
    each = 12 + (4 if device.type == "cpu" else 0)  # gradient, two moments; the best weights are on the CPU
    trained = {"all": size, "lora": small + adapters, "norms": small}
    tried = []
    usual = tuple(trained) if count == 1 else ("all", "norms")
    for kind in usual if asked == "auto" else (asked,):
        for checkpointed in (False, True):
            needed = each * trained[kind] // count + 4 * gathered + _activation_bytes(model, shape, checkpointed)
            needed += size // count if kind != "norms" else 0  # masks
            if count > 1 and not checkpointed and compute != torch.float32:
                needed += size * compute.itemsize  # the backward pass keeps the rounded weights, whole
            tried.append(f"{kind}{' with checkpointing' if checkpointed else ''} {needed / 1e9:.1f} GB")
            if free is None or needed <= _MARGIN * free or (kind == "norms" and checkpointed):
                beside = free is None or needed + teacher <= _MARGIN * free
                if asked == "auto":
                    logger.info("%s are trained: %s", WORDS_OF_TRAIN[kind], "; ".join(tried))
                return {"train": kind, "checkpointed": checkpointed, "cached": cached or not beside}
    return {"train": asked, "checkpointed": True, "cached": True}


def linear_operators(model: PreTrainedModel) -> list[LinearOperator]:
    """The linear operators of the decoder layers, fused experts aside."""
    return [o for name, layer in find_decoder_layers(model) for o in find_operators(name, layer, ["*"]).values()]


def _activation_bytes(model: PreTrainedModel, shape: tuple[int, int], checkpointed: bool) -> int:
    """About the bytes that a forward pass keeps for its backward pass: inputs and outputs of operators, and logits."""
    config = model.config.get_text_config(decoder=True)
    layers = len(find_decoder_layers(model))
    inside = 8 * sum(sum(operator.shape) for operator in linear_operators(model))
    if checkpointed:
        inside = inside // layers + 4 * layers * config.hidden_size
    return shape[0] * shape[1] * (inside + 10 * config.vocab_size)
