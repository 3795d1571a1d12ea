"""Outlines: models without weights, built on the meta device from a configuration.

An outline costs no memory and shows the names and shapes of all tensors. `model_outline` compares that of a model with
that of the same model with fewer parts, to find out which tensors shrink. `shrinking` compares it with the outline of
the smaller model. The *settings* here are those of the text model in the configuration, such as
`{"intermediate_size": 24}`.
"""

import copy
import reprlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from optimum_fista.model.offload import describe_ties
from optimum_fista.removal.layer_overrides import Overrides, change_settings


def described_model(
    model: PreTrainedModel, settings: Mapping[str, Any], overrides: Overrides | None = None
) -> PreTrainedModel:
    """Build the model that the configuration of `model` describes with other settings, on the meta device.

    `model` may be on any device; it is only read, as is its configuration. `settings` are by their words in the
    configuration. A number in them replaces a whole list. `overrides` are settings of single decoder layers, by the
    number of the layer, such as `{5: {"head_dim": 512}}`. They replace all that the configuration has; `None` leaves
    those as they are.

    Raises:
        ValueError: If the model can't be built, or if the configuration would lose a setting when it is saved and read
            again.
    """
    config = copy.deepcopy(model.config)
    try:
        # the text model's configuration is a part of `config`, or `config` itself
        change_settings(config.get_text_config(decoder=True), settings, overrides)
        if settings:
            # some configurations forget a setting, or compute it anew, when they are read: written and read again, all
            # settings have to be the same
            written = config.to_dict()
            read = type(config).from_dict(copy.deepcopy(written)).to_dict()
            for word, value in written.items():
                if value != read.get(word):
                    raise ValueError(
                        f"saved and read again, {word} is {read.get(word)} instead of {value}"
                    )
        # changes the copy: it says whether the head is the embedding, as in `model`
        describe_ties(model, config)
        # parameters draw random numbers even on the meta device: those of the caller stay as they are
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            return type(model)(config)
    # configurations and models check what they are given with errors of many kinds
    except Exception as error:
        reason = " ".join(str(error).split()).removesuffix(".")
        raise ValueError(
            f"{type(model).__name__} does not take {as_text(settings)}: {reason}"
        ) from error


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes by name of all tensors that a model stores, and of buffers that it computes when it is built."""
    tensors = model.state_dict() | dict(model.named_buffers())
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def as_text(settings: Mapping[str, Any]) -> str:
    """Write settings for a message; long lists are shortened."""
    return ", ".join(f"{word}={reprlib.repr(value)}" for word, value in settings.items())
