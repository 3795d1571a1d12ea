"""A model of a given size: how many channels have to go."""

from __future__ import annotations

import dataclasses
import logging
import math

from transformers import PreTrainedModel

from optimum_fista.model.parts import find_parts
from optimum_fista.run.config import FistaPruningConfig
from optimum_fista.solve.patterns import PartShare

logger = logging.getLogger(__name__)


def with_channels_for_size(model: PreTrainedModel, config: FistaPruningConfig) -> FistaPruningConfig:
    """Replace a pattern such as `bytes:0.75` by the share of the channels that has to go for it.

    All bytes of the weights count, each shared tensor once. Channels go because they cost least of all parts at every
    share that was measured (docs/results.md). Configurations with another pattern are returned as they are.
    """
    pattern = config.whole_parts
    if pattern is None or pattern.size is None:
        return config
    parts = find_parts(model, "channels")
    tensors = dict(model.named_parameters())
    whole = sum(tensor.nbytes for tensor in tensors.values())
    shrinking = [tensors[name] for part in parts.parts for name in part.tensors if name in tensors]
    channel = sum(tensor.nbytes for tensor in shrinking) / parts.groups  # one of every decoder layer
    step = PartShare.usual_step("channels", parts.groups)
    least = -(-parts.at_least // step) * step
    kept = math.floor((parts.groups - (1 - pattern.size) * whole / channel) / step) * step
    kept = min(kept, (parts.groups - 1) // step * step)
    if kept < least:
        smallest = 1 - (parts.groups - least) * channel / whole
        raise ValueError(
            f"pattern={config.pattern!r}: {smallest:.4f} of the model's bytes are left if {least} of {parts.groups} "
            f"channels stay in every decoder layer: pass at least {math.ceil(smallest * 1e4) / 1e4:g}."
        )
    found = str(PartShare.keeping("channels", kept, parts.groups))
    left = 1 - (parts.groups - kept) * channel / whole
    logger.info("pattern %s: %s leaves %.4f of the model's bytes", config.pattern, found, left)
    return dataclasses.replace(config, pattern=found, sparsity=None)
