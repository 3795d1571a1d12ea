"""Tiny random models of images and audio, and batches for them as their processors make them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny_llama import tiny_tokenizer
from tiny_models import randomize
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    AutoModelForMultimodalLM,
    CLIPImageProcessorPil,
    LlavaProcessor,
    PreTrainedModel,
)

VOCAB_SIZE, IMAGE = 64, 60
_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
_TEXT = _SIZES | {"num_hidden_layers": 4, "num_key_value_heads": 2, "head_dim": 8}
_TEXT |= {"vocab_size": VOCAB_SIZE, "max_position_embeddings": 64, "pad_token_id": 0}
_VISION = _SIZES | {"image_size": 8, "patch_size": 4}
_QWEN = {
    "depth": 3,
    "num_heads": 2,
    "patch_size": 2,
    "temporal_patch_size": 1,
    "out_hidden_size": 32,
    **_SIZES,
}
_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
_TOKENS = {"video_token_id": 61, "vision_start_token_id": 62, "vision_end_token_id": 63}
_SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2}
_AUDIO = {
    "d_model": 16,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "num_mel_bins": 4,
}
# settings of the text model and of the vision encoder, and others
_CONFIGS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "qwen2_5_vl": (_ROPE, _QWEN | {"fullatt_block_indexes": [1]}, _TOKENS),
    "qwen3_vl": (_ROPE, _QWEN | {"deepstack_visual_indexes": [0, 1]}, _TOKENS),
    "llava": (
        {"model_type": "llama"},
        _VISION | {"model_type": "clip_vision_model"},
        {"vision_feature_layer": -1},
    ),
    "smolvlm": ({"model_type": "llama"}, _VISION, {"scale_factor": 2}),
    "gemma3": (_SLIDING, _VISION, {"mm_tokens_per_image": 4}),
    "mistral3": (
        {"model_type": "mistral"},
        _VISION | {"model_type": "pixtral", "head_dim": 8},
        {"spatial_merge_size": 1, "vision_feature_layer": -1},
    ),
    "internvl": (
        {"model_type": "qwen2"},
        _VISION | {"image_size": [8, 8], "patch_size": [4, 4]},
        {},
    ),
    "qwen2_audio": (
        {},
        {},
        {"audio_config": _AUDIO | {"max_source_positions": 8}, "audio_token_index": IMAGE},
    ),
}
MEDIA_FAMILIES = tuple(_CONFIGS)
MARK = tiny_tokenizer().convert_ids_to_tokens(IMAGE)
_TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}{{ '"
    + MARK
    + "' if part.type == 'image' else "
    "part.text }}{% endfor %}{% endfor %}"  # of strings it makes nothing, as that of LLaVA
)
_TOKENS_OF_IMAGE = {"smolvlm": 1, "internvl": 1}  # all others have 4


def media_model(family: str, seed: int = 0) -> PreTrainedModel:
    """A random tiny float32 model that takes images, or audio if it is Qwen2-Audio."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        text, vision, others = _CONFIGS[family]
        settings: dict[str, Any] = {
            "text_config": _TEXT | text,
            "image_token_id": IMAGE,
            "tie_word_embeddings": False,
            **others,
        }
        if vision:
            settings["vision_config"] = vision
        config = CONFIG_MAPPING[family](**settings)
        model = AutoModelForMultimodalLM.from_config(config, dtype=torch.float32).eval()
        randomize(model, torch.default_generator)
    return model


def save_llava_folder(folder: Path) -> Path:
    """Save a LLaVA and its processor, whose image token is a character (`MARK`) of its tokenizer."""
    media_model("llava").save_pretrained(folder)
    size: Any = {"height": 8, "width": 8}
    images = CLIPImageProcessorPil(size=size, crop_size=size)
    names: Any = {
        "image_token": MARK,
        "num_additional_image_tokens": 0,
        "vision_feature_select_strategy": "full",
    }
    LlavaProcessor(
        images, tiny_tokenizer(), patch_size=4, chat_template=_TEMPLATE, **names
    ).save_pretrained(folder)
    return folder


def media_batch(
    family: str, images: tuple[int, ...] = (1,), *, seed: int = 0, padding: int = 0
) -> dict[str, Tensor]:
    """A batch as the family's processor makes it: a sequence for each entry of `images`, with so many images.

    The first sequence has `padding` tokens fewer than the others, and that much padding on its left.
    """
    random = torch.Generator().manual_seed(seed)
    count = sum(images)
    size = _TOKENS_OF_IMAGE.get(family, 4)
    length = 12 + max(images) * (size + 1)
    rows = []
    for row, number in enumerate(images):
        num_padding = padding if row == 0 else 0
        real = torch.randint(3, 59, (length - num_padding,), generator=random)
        for image in range(number):
            start = 2 + image * (size + 1)
            real[start : start + size] = IMAGE
        rows.append(torch.cat([torch.zeros(num_padding, dtype=torch.int64), real]))
    ids = torch.stack(rows)
    types = (ids == IMAGE).long()
    batch = {"input_ids": ids, "attention_mask": (ids != 0).long()}

    if family == "qwen2_audio":
        sounds = torch.randn(count, 4, 16, generator=random)  # [sounds, mel bins, frames]
        mask = torch.ones(count, 16).long()
        return batch | {"input_features": sounds, "feature_attention_mask": mask}
    if family.startswith("qwen"):
        grid = torch.tensor([[1, 4, 4]] * count)
        patches = torch.randn(16 * count, 12, generator=random)
        return batch | {"pixel_values": patches, "image_grid_thw": grid, "mm_token_type_ids": types}
    pixels = torch.randn(count, 3, 8, 8, generator=random)
    if family == "smolvlm":  # [batch, images, ...], with images of zeros after those of a row
        padded = torch.zeros(len(images), max(images), 3, 8, 8)
        for row, own in enumerate(pixels.split(images)):
            padded[row, : len(own)] = own
        mask = torch.ones(*padded.shape[:2], 8, 8).long()
        return batch | {"pixel_values": padded, "pixel_attention_mask": mask}
    if family == "gemma3":
        batch["token_type_ids"] = types
    if family == "mistral3":
        batch["image_sizes"] = torch.tensor([[8, 8]] * count)
    return batch | {"pixel_values": pixels}
