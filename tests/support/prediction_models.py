"""Tiny models whose files have layers that predict more tokens, which the models' classes do not load."""

import math
from pathlib import Path
from typing import Any

import torch
from quantized_models import fp8_deepseek, in_blocks
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model
from torch import Tensor

HIDDEN = 32
NUM_LAYERS = 3
_NUMBERED = {"num_hidden_layers": NUM_LAYERS, "num_nextn_predict_layers": 1}
_SIZES: dict[str, dict[str, Any]] = {
    "deepseek_v3": _NUMBERED | {"first_k_dense_replace": 1, "n_routed_experts": 8},
    "glm4_moe": _NUMBERED | {"first_k_dense_replace": 1, "n_routed_experts": 8},
    "qwen3_next": {"num_experts": 8},
}
TEMPLATES = {"deepseek_v3": 2, "glm4_moe": 2, "qwen3_next": 1}
"""The decoder layer like the one that predicts more tokens: in Qwen3-Next the last layer has another attention."""
PREDICTING = tuple(_SIZES)
"""Families of `predicting_folder`: two number the layer after the decoder layers, the last one calls it "mtp"."""


def predicting_folder(folder: Path, family: str, num_predicted: int = 1) -> Path:
    """A model of a family of `PREDICTING`, with `num_predicted` random layers that predict more tokens."""
    options = dict(_SIZES[family])
    if "num_nextn_predict_layers" in options:
        options["num_nextn_predict_layers"] = num_predicted
    tiny_model(family, **options).save_pretrained(folder)
    for number in range(num_predicted):
        _add_prediction_layer(folder, _prefixes(family, number), TEMPLATES[family])
    return folder


def fp8_predicting_folder(folder: Path) -> Path:
    """DeepSeek-V3 in FP8, with a layer that predicts more tokens in FP8; its projection is in FP8, too."""
    fp8_deepseek(folder, n_routed_experts=8, num_nextn_predict_layers=1)
    _add_prediction_layer(folder, ("model.layers.3.", "model.layers.3."), template=2)
    return folder


def _prefixes(family: str, number: int) -> tuple[str, str]:
    """What names of the tensors of a layer begin with, and those of its decoder layer."""
    if family == "qwen3_next":
        return "mtp.", "mtp.layers.0."
    prefix = f"model.layers.{NUM_LAYERS + number}."
    return prefix, prefix


def _add_prediction_layer(folder: Path, prefixes: tuple[str, str], template: int) -> None:
    """Add random tensors like those of the decoder layer `template`, and those of the layer's input and head."""
    prefix, layer_prefix = prefixes
    file = folder / "model.safetensors"
    tensors = load_file(file)
    like_layer = f"model.layers.{template}."
    generator = torch.Generator().manual_seed(len(tensors))
    more: dict[str, Tensor] = {}

    for name, like in tensors.items():
        if not name.startswith(like_layer) or name.endswith("_scale_inv"):
            continue
        value = torch.randn(like.shape, generator=generator)
        value *= 0.1 if like.ndim < 2 else 2 / math.sqrt(like.shape[-1])
        if name.endswith("norm.weight") and prefix != "mtp.":
            value += 1  # Qwen3-Next adds it in its norms
        more |= _stored(layer_prefix + name.removeprefix(like_layer), value, like.dtype)

    norms = ("enorm", "hnorm", "shared_head.norm")
    projection = "eh_proj"
    if prefix == "mtp.":
        norms = ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm")
        projection = "fc"
    plain = tensors["model.norm.weight"].dtype
    for name in norms:
        more[f"{prefix}{name}.weight"] = torch.rand(HIDDEN, generator=generator).to(plain)
    weight = torch.randn(HIDDEN, 2 * HIDDEN, generator=generator) / 8
    of_matrices = tensors[f"{like_layer}input_layernorm.weight"].dtype
    if any(name.endswith("_scale_inv") for name in tensors):
        of_matrices = torch.float8_e4m3fn
    more |= _stored(f"{prefix}{projection}.weight", weight, of_matrices)
    save_file(tensors | more, file, {"format": "pt"})


def _stored(name: str, value: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """What is stored for a tensor: in FP8 with the scales of its blocks."""
    if dtype != torch.float8_e4m3fn:
        return {name: value.to(dtype)}
    values, scales = in_blocks(value, 16)
    return {name: values, f"{name}_scale_inv": scales}
