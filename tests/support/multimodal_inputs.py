"""Random images and sounds in the forms that models take, with as many placeholder tokens as they have features."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from shrunken_config import VOCAB_SIZE
from torch import Tensor
from transformers import PreTrainedModel

_MOST_TOKENS = 1000


def multimodal_inputs(model: PreTrainedModel) -> dict[str, dict[str, Tensor]]:
    """Inputs of one sequence with an image, and of one with a sound; without those that can't be made generically.

    The keys are "image", "video" and "audio". The first form that the model takes is used.
    """
    inputs_of: dict[str, dict[str, Tensor]] = {}
    parameters = inspect.signature(model.forward).parameters
    for kind, form in _forms(model.config):
        if kind in inputs_of or not form.keys() <= parameters.keys():
            continue
        inputs = _with_tokens(model, kind, form)
        if inputs is not None:
            inputs_of[kind] = inputs
    return inputs_of


def _forms(config: Any) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """What the common processors make of an image of 4 x 4 patches, and of a sound: the kind, and arguments by name."""
    for form in _forms_of_an_image(getattr(config, "vision_config", config)):
        yield "image", form
    yield "video", {"pixel_values": torch.rand(1, 2, 3, *_image_size(config))}
    for form in _forms_of_a_sound(config):
        yield "audio", form


def _image_size(config: Any) -> tuple[int, int]:
    """Height and width of an image that a model takes."""
    vision = getattr(config, "vision_config", config)
    usual = 4 * _patch_size(vision)
    size = getattr(vision, "image_size", None) or getattr(vision, "resolution", None) or usual
    side = size if isinstance(size, int) else size[0]
    return side, side


def _patch_size(vision: Any) -> int:
    """Height and width of a patch of an image; 14 if the configuration does not say."""
    patch = getattr(vision, "patch_size", None) or 14
    return patch if isinstance(patch, int) else patch[0]


def _forms_of_an_image(vision: Any) -> Iterator[dict[str, Tensor]]:
    """What processors make of an image; `vision` is the configuration of the encoder."""
    patch = _patch_size(vision)
    height, width = _image_size(vision)
    num_values = 3 * patch * patch  # of a patch
    image = torch.rand(1, 3, height, width)
    grid = torch.tensor([[1, 4, 4]])
    sizes = torch.tensor([[height, width]])

    times = getattr(vision, "temporal_patch_size", None) or 1
    for length in dict.fromkeys((num_values * times, num_values, 2 * num_values)):
        yield {"pixel_values": torch.rand(16, length), "image_grid_thw": grid}
    yield {"pixel_values": torch.rand(16, 3, patch, patch), "image_grid_thw": grid}

    yield {"pixel_values": image, "image_sizes": sizes}
    two_tiles = image.expand(1, 2, -1, -1, -1).clone()
    yield {"pixel_values": two_tiles, "image_sizes": sizes}
    five_tiles = image.expand(1, 5, -1, -1, -1).clone()
    yield {"pixel_values": five_tiles, "image_sizes": 2 * sizes}

    patches = torch.rand(1, 16, num_values)
    shapes = torch.tensor([[4, 4]])
    mask = torch.ones(1, 16, dtype=torch.int64)
    yield {"pixel_values": patches, "spatial_shapes": shapes, "pixel_attention_mask": mask}
    yield {"pixel_values": patches, "spatial_shapes": shapes}
    mask_of_pixels = torch.ones(1, 1, height, width).bool()
    yield {"pixel_values": image[None], "pixel_attention_mask": mask_of_pixels}

    flat_patches = torch.rand(16, num_values)
    merge_sizes = torch.tensor([2])
    yield {
        "pixel_values": flat_patches,
        "image_grid_thw": grid,
        "image_merge_sizes": merge_sizes,
    }
    yield {"pixel_values": flat_patches, "image_grid_hw": grid[:, 1:]}
    patches_in_a_row = torch.rand(1, 3, patch, 16 * patch)
    yield {"pixel_values": patches_in_a_row, "target_sizes": grid[:, 1:]}
    yield {"pixel_values": image}
    yield {"pixel_values": image[None]}


def _forms_of_a_sound(config: Any) -> Iterator[dict[str, Tensor]]:
    """What processors make of a sound."""
    audio = getattr(config, "audio_config", None) or getattr(config, "encoder_config", config)
    num_bins = 80
    for name in ("feature_size", "input_dim", "num_mel_bins"):
        num_bins = getattr(audio, name, None) or num_bins
    for length in (64, 3000):
        mask = torch.ones(1, length, dtype=torch.int64)
        for shape in ((1, num_bins, length), (1, length, num_bins)):
            features = torch.rand(shape)
            for name in ("feature_attention_mask", "input_features_mask", "attention_mask_audio"):
                yield {"input_features": features, name: mask}
            yield {"input_features": features}
    yield {"input_values": torch.rand(1, 3200)}


def _with_tokens(
    model: PreTrainedModel, kind: str, form: dict[str, Tensor]
) -> dict[str, Tensor] | None:
    """The form with token ids, if the model runs on it and other values change its logits; otherwise `None`."""
    name = f"get_{kind}_features"
    features = getattr(model, name, None) or getattr(getattr(model, "model", None), name, None)
    if features is None:
        return None
    values = next(iter(form))  # the argument that holds the image or sound
    try:
        with torch.no_grad():
            inputs = _inputs(model, features, form)
            if inputs is None:
                return None
            others = inputs | {values: form[values].flip(-1).square()}
            logits = model(**inputs, use_cache=False).logits
            other_logits = model(**others, use_cache=False).logits
    except Exception:  # whatever a model raises on a form that it does not take
        return None
    sees_values = not torch.equal(logits, other_logits)
    return inputs if sees_values and bool(logits.isfinite().all()) else None


def _inputs(
    model: PreTrainedModel, features: Callable[..., Any], form: dict[str, Tensor]
) -> dict[str, Tensor] | None:
    """A form with as many placeholder tokens as `features` makes embeddings; `None` if these are too many."""
    parameters = inspect.signature(features).parameters
    if "qformer_input_ids" in parameters:
        form = form | {"qformer_input_ids": torch.tensor([[5, 6, 7]])}
    takes_any = "args" in parameters
    arguments = {key: tensor for key, tensor in form.items() if takes_any or key in parameters}
    output = features(**arguments)
    output = getattr(output, "pooler_output", output)
    tensors = output if isinstance(output, list | tuple) else [output]

    hidden_size = model.get_input_embeddings().weight.shape[1]
    num_tokens = sum(tensor.numel() for tensor in tensors) // hidden_size
    if num_tokens > _MOST_TOKENS:  # the embeddings are not in the model's own width
        return None
    placeholder = VOCAB_SIZE - 1
    ids = torch.tensor([[5, 6, 7, *[placeholder] * num_tokens, 8, 9, 10]])
    inputs = form | {"input_ids": ids}
    for marks in ("token_type_ids", "mm_token_type_ids", "image_embeds_position_mask"):
        if marks in inspect.signature(model.forward).parameters:
            inputs[marks] = (ids == placeholder).long()
    return inputs
