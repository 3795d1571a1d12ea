"""Tiny models in folders as quantized models are published: values are random, formats and names are the real ones."""

import json
import math
from pathlib import Path
from typing import Any

import torch
from media_models import media_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    GptOssConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
)

VOCAB_SIZE = 64


def _save(
    folder: Path,
    config: PreTrainedConfig | PreTrainedModel,
    quantize: Any,
    settings: dict[str, Any],
) -> Path:
    """Save a model, or a random one of a configuration, whose tensors `quantize` has replaced, by name."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        is_model = isinstance(config, PreTrainedModel)
        model = (
            config if is_model else AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        )
        model.save_pretrained(folder)
        tensors = {}
        for name, tensor in load_file(folder / "model.safetensors").items():
            tensors |= quantize(name, tensor)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    values = json.loads((folder / "config.json").read_text()) | {"quantization_config": settings}
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def in_blocks(weight: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """A matrix in FP8 and the scales of its blocks, of which the last ones may be smaller."""
    rows, columns = (math.ceil(size / block) for size in weight.shape)
    whole = torch.zeros(rows * block, columns * block)
    whole[: weight.shape[0], : weight.shape[1]] = weight
    blocks = whole.view(rows, block, columns, block)
    scales = blocks.abs().amax((1, 3)) / torch.finfo(torch.float8_e4m3fn).max
    found = (blocks / scales[:, None, :, None]).view(whole.shape)[
        : weight.shape[0], : weight.shape[1]
    ]
    return found.to(torch.float8_e4m3fn).contiguous(), scales


def fp8_deepseek(folder: Path, rotated: int = 16, nope: int = 8, **larger: int) -> Path:
    """DeepSeek-V3 in fine-grained FP8: routers, embedding and head are not quantized.

    `kv_a_proj_with_mqa` has 16 rows and `rotated` more, which are whole blocks of 16 or not. `kv_b_proj` has `nope`
    rows and 16 more for each head.
    """
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "moe_intermediate_size": 16,
        "num_hidden_layers": 3,
    }
    sizes |= {
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
    }
    sizes |= {
        "qk_rope_head_dim": rotated,
        "qk_nope_head_dim": nope,
        "v_head_dim": 16,
        "first_k_dense_replace": 1,
    }
    sizes |= {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
    config = DeepseekV3Config(
        **(sizes | larger), vocab_size=VOCAB_SIZE, initializer_range=0.2, num_nextn_predict_layers=0
    )

    return _save(folder, config, _fp8, _FP8)


def fp8_llava(folder: Path) -> Path:
    """LLaVA whose text decoder is in fine-grained FP8."""
    settings = _FP8 | {
        "modules_to_not_convert": ["lm_head", "vision_tower", "multi_modal_projector"]
    }
    return _save(folder, media_model("llava").bfloat16(), _fp8, settings)


_FP8 = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [16, 16],
}


def _fp8(name: str, weight: Tensor) -> dict[str, Tensor]:
    if weight.ndim < 2 or "layers" not in name or "vision" in name or name.endswith("gate.weight"):
        return {name: weight}
    return dict(zip((name, f"{name}_scale_inv"), in_blocks(weight.float(), 16), strict=True))


def auto_fp8_qwen3_moe(folder: Path) -> Path:
    """Qwen3-MoE in the layout of AutoFP8: `X.weight` in FP8, with the scalars `X.weight_scale` and `X.input_scale`.

    Routers, embedding and head are not quantized. Values in FP8 are up to 448, those of the model about 1.
    """
    config = Qwen3MoeConfig(
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        vocab_size=VOCAB_SIZE,
        initializer_range=0.2,
    )

    def quantize(name: str, weight: Tensor) -> dict[str, Tensor]:
        if not name.endswith("_proj.weight"):
            return {name: weight}
        module = name.removesuffix(".weight")
        scale = weight.float().abs().max() / torch.finfo(torch.float8_e4m3fn).max
        return {
            name: (weight.float() / scale).to(torch.float8_e4m3fn),
            f"{module}.weight_scale": scale,
            f"{module}.input_scale": torch.tensor(0.5),
        }

    settings = {
        "quant_method": "fp8",
        "activation_scheme": "static",
        "ignored_layers": ["lm_head"],
    }
    return _save(folder, config, quantize, settings)


def mxfp4_gpt_oss(folder: Path) -> Path:
    """gpt-oss with experts in MXFP4: 32 values of 4 bits have a scale, two of them a byte."""
    sizes = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 16}
    sizes |= {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    }
    config = GptOssConfig(
        **sizes, vocab_size=VOCAB_SIZE, layer_types=["full_attention"] * 2, pad_token_id=0
    )

    def quantize(name: str, weight: Tensor) -> dict[str, Tensor]:
        if not name.endswith("_proj") or weight.ndim != 3:
            return {name: weight}
        experts, inputs, outputs = weight.shape
        blocks = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), dtype=torch.uint8)
        return {
            f"{name}_blocks": blocks,
            f"{name}_scales": torch.randint(118, 124, blocks.shape[:3]).byte(),
        }

    kept = [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ]
    return _save(
        folder, config, quantize, {"quant_method": "mxfp4", "modules_to_not_convert": kept}
    )


def compressed_qwen3_moe(folder: Path, preset: str) -> Path:
    """Qwen3-MoE, quantized by compressed-tensors in one of its presets, without routers and head."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.compressors.format import infer_module_format
    from compressed_tensors.quantization import QuantizationConfig, preset_name_to_scheme
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    sizes = {
        "hidden_size": 64,
        "intermediate_size": 32,
        "moe_intermediate_size": 32,
        "num_hidden_layers": 2,
    }
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "num_experts": 4}
    config = Qwen3MoeConfig(
        **sizes, num_experts_per_tok=2, vocab_size=VOCAB_SIZE, initializer_range=0.2
    )
    scheme = preset_name_to_scheme(preset, ["Linear"])
    if scheme.weights.group_size == 128:
        scheme.weights.group_size = 32
    scheme.format = infer_module_format(torch.nn.Linear, scheme)

    def quantize(name: str, weight: Tensor) -> dict[str, Tensor]:
        if not name.endswith("_proj.weight"):
            return {name: weight}
        groups = weight.unflatten(
            1, (-1, scheme.weights.group_size or weight.shape[1])
        )  # [out, groups, inputs]
        parts = {"weight": weight}
        if scheme.weights.scale_dtype is not None:
            parts["weight_global_scale"] = generate_gparam(weight.min(), weight.max())
        scales, _ = calculate_qparams(
            groups.amin(2), groups.amax(2), scheme.weights, parts.get("weight_global_scale")
        )
        found = BaseCompressor.get_value_from_registry(scheme.format).compress(
            parts | {"weight_scale": scales}, scheme
        )
        return {
            f"{name.removesuffix('weight')}{part}": tensor.contiguous()
            for part, tensor in found.items()
        }

    stored = {"format": scheme.format, "quantization_status": "compressed"}
    settings = QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"], **stored)
    return _save(folder, config, quantize, settings.model_dump(mode="json"))
