"""Random images and sounds in the forms that models take, with as many placeholder tokens as they have features."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from shrunken_config import VOCAB_SIZE
from torch import Tensor
from transformers import PreTrainedModel

_MOST_TOKENS = 1000


def multimodal_inputs(model: PreTrainedModel) -> dict[str, dict[str, Tensor]]:
    """Inputs of one sequence with an image, and of one with a sound; without those that can't be made generically."""
    found: dict[str, dict[str, Tensor]] = {}
    takes = inspect.signature(model.forward).parameters
    for kind, form in _forms(model.config):
        if (
            kind not in found
            and form.keys() <= takes.keys()
            and (inputs := _with_tokens(model, kind, form))
        ):
            found[kind] = inputs
    return found


def _forms(config: Any) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """What the common processors make of an image of 4 x 4 patches, and of a sound."""
    vision = getattr(config, "vision_config", config)
    patch = getattr(vision, "patch_size", None) or 14
    patch = patch if isinstance(patch, int) else patch[0]
    size = getattr(vision, "image_size", None) or getattr(vision, "resolution", None) or 4 * patch
    size = size if isinstance(size, int) else size[0]
    image, flat = torch.rand(1, 3, size, size), 3 * patch * patch
    grid, sizes = torch.tensor([[1, 4, 4]]), torch.tensor([[size, size]])
    times = getattr(vision, "temporal_patch_size", None) or 1
    for channels in dict.fromkeys((flat * times, flat, 2 * flat)):
        yield "image", {"pixel_values": torch.rand(16, channels), "image_grid_thw": grid}
    yield "image", {"pixel_values": torch.rand(16, 3, patch, patch), "image_grid_thw": grid}
    yield "image", {"pixel_values": image, "image_sizes": sizes}
    yield "image", {"pixel_values": image.expand(1, 2, -1, -1, -1).clone(), "image_sizes": sizes}
    yield (
        "image",
        {"pixel_values": image.expand(1, 5, -1, -1, -1).clone(), "image_sizes": 2 * sizes},
    )
    mask = torch.ones(1, 16, dtype=torch.int64)
    patches = {"pixel_values": torch.rand(1, 16, flat), "spatial_shapes": torch.tensor([[4, 4]])}
    yield "image", patches | {"pixel_attention_mask": mask}
    yield "image", patches
    yield (
        "image",
        {"pixel_values": image[None], "pixel_attention_mask": torch.ones(1, 1, size, size).bool()},
    )
    flattened = {"pixel_values": torch.rand(16, flat)}
    yield "image", flattened | {"image_grid_thw": grid, "image_merge_sizes": torch.tensor([2])}
    yield "image", flattened | {"image_grid_hw": grid[:, 1:]}
    yield (
        "image",
        {"pixel_values": torch.rand(1, 3, patch, 16 * patch), "target_sizes": grid[:, 1:]},
    )
    yield "image", {"pixel_values": image}
    yield "image", {"pixel_values": image[None]}
    yield "video", {"pixel_values": torch.rand(1, 2, 3, size, size)}
    audio = getattr(config, "audio_config", None) or getattr(config, "encoder_config", config)
    bins = next(
        (
            v
            for n in ("num_mel_bins", "input_dim", "feature_size")
            if (v := getattr(audio, n, None))
        ),
        80,
    )
    for length in (64, 3000):
        for shape in ((1, bins, length), (1, length, bins)):
            features = {"input_features": torch.rand(shape)}
            for name in ("feature_attention_mask", "input_features_mask", "attention_mask_audio"):
                yield "audio", features | {name: torch.ones(1, length, dtype=torch.int64)}
            yield "audio", features
    yield "audio", {"input_values": torch.rand(1, 3200)}


def _with_tokens(
    model: PreTrainedModel, kind: str, form: dict[str, Tensor]
) -> dict[str, Tensor] | None:
    """The form with token ids, if the model runs on it and other values change its logits."""
    name = f"get_{kind}_features"
    features = getattr(model, name, None) or getattr(getattr(model, "model", None), name, None)
    if features is None:
        return None
    takes = inspect.signature(features).parameters
    takes = form if "args" in takes else takes
    if "qformer_input_ids" in takes:
        form = form | {"qformer_input_ids": torch.tensor([[5, 6, 7]])}
    hidden = model.get_input_embeddings().weight.shape[1]
    values = next(iter(form))
    try:
        with torch.no_grad():
            output = features(**{name: tensor for name, tensor in form.items() if name in takes})
            output = getattr(output, "pooler_output", output)
            count = (
                sum(t.numel() for t in (output if isinstance(output, list | tuple) else [output]))
                // hidden
            )
            if count > _MOST_TOKENS:  # not in the model's own width
                return None
            ids = torch.tensor([[5, 6, 7, *[VOCAB_SIZE - 1] * count, 8, 9, 10]])
            inputs = form | {"input_ids": ids}
            for marks in ("token_type_ids", "mm_token_type_ids", "image_embeds_position_mask"):
                if marks in inspect.signature(model.forward).parameters:
                    inputs[marks] = (ids == VOCAB_SIZE - 1).long()
            one, other = (
                model(**inputs | {values: tensor}, use_cache=False).logits
                for tensor in (form[values], form[values].flip(-1).square())
            )
    except Exception:  # whatever a model raises on a form that it does not take
        return None
    return inputs if bool(one.isfinite().all()) and not torch.equal(one, other) else None
