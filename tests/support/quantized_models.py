"""Tiny models in folders as quantized models are published: values are random, formats and names are the real ones."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from media_models import media_model
from safetensors.torch import load_file, save_file
from tiny_llama import tiny_llama, tiny_tokenizer
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
_MOST_IN_FP8 = torch.finfo(torch.float8_e4m3fn).max
_BLOCK = 16  # rows and columns that share a scale
_FINE_GRAINED_FP8 = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [_BLOCK, _BLOCK],
}


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
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": rotated,
        "qk_nope_head_dim": nope,
        "v_head_dim": 16,
        "first_k_dense_replace": 1,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "num_nextn_predict_layers": 0,
        "vocab_size": VOCAB_SIZE,
        "initializer_range": 0.2,
    }
    config = DeepseekV3Config(**(sizes | larger))
    return _save(folder, _random_model(config), _in_fine_grained_fp8, _FINE_GRAINED_FP8)


def fp8_llama(folder: Path) -> Path:
    """The tiny Llama in fine-grained FP8, with its tokenizer."""
    _save(folder, tiny_llama().bfloat16(), _in_fine_grained_fp8, _FINE_GRAINED_FP8)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def gguf_llama(folder: Path) -> Path:
    """A folder with one GGUF file as llama.cpp quantizes it: matrices in Q8_0, the head tied, a tokenizer of bytes.

    It needs the package `gguf`.
    """
    import gguf

    folder.mkdir(parents=True, exist_ok=True)
    model = tiny_llama(tie_word_embeddings=True, intermediate_size=64)
    writer = gguf.GGUFWriter(folder / "tiny.Q8_0.gguf", "llama")
    tokens = ["<unk>", "<s>", "<|endoftext|>"]
    tokens += [chr(code) for code in range(ord("@"), ord("z") + 1)]
    tokens += ["th", "he"]
    values = {
        "context_length": 64,
        "block_count": 2,
        "feed_forward_length": 64,
        "embedding_length": 32,
        "head_count": 4,
        "head_count_kv": 2,
        "layer_norm_rms_eps": 1e-6,
        "rope_dimension_count": 8,
        "vocab_size": 64,
        "tokenizer_model": "gpt2",
        "token_list": tokens,
        "token_types": [3, 3, 3] + 61 * [1],
        "token_merges": ["t h", "h e"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unk_token_id": 0,
    }
    for name, value in values.items():
        getattr(writer, f"add_{name}")(value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for name, parameter in model.named_parameters():
        new_name = names.get_name(name, try_suffixes=(".weight",))
        values = parameter.detach().numpy()
        if parameter.ndim == 1:
            writer.add_tensor(new_name, values)
        else:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(new_name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder


def fp8_llava(folder: Path) -> Path:
    """LLaVA whose text decoder is in fine-grained FP8."""
    settings = _FINE_GRAINED_FP8 | {
        "modules_to_not_convert": ["lm_head", "vision_tower", "multi_modal_projector"]
    }
    return _save(folder, media_model("llava").bfloat16(), _in_fine_grained_fp8, settings)


def with_experts_in_fp8(folder: Path, model: PreTrainedModel) -> Path:
    """A model in bfloat16 of which only the experts are in fine-grained FP8."""

    def quantize(name: str, weight: Tensor) -> dict[str, Tensor]:
        return _in_fine_grained_fp8(name, weight) if ".experts." in name else {name: weight}

    return _save(folder, model.bfloat16(), quantize, _FINE_GRAINED_FP8)


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
        scale = weight.float().abs().max() / _MOST_IN_FP8
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
    return _save(folder, _random_model(config), quantize, settings)


def mxfp4_gpt_oss(folder: Path) -> Path:
    """gpt-oss with experts in MXFP4: 32 values of 4 bits have a scale, two of them a byte."""
    config = GptOssConfig(
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=2,
        head_dim=16,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        vocab_size=VOCAB_SIZE,
        layer_types=["full_attention"] * 2,
        pad_token_id=0,
    )

    def quantize(name: str, weight: Tensor) -> dict[str, Tensor]:
        is_of_experts = name.endswith("_proj") and weight.ndim == 3
        if not is_of_experts:
            return {name: weight}
        experts, inputs, outputs = weight.shape
        shape = (experts, outputs, inputs // 32, 16)
        blocks = torch.randint(0, 256, shape, dtype=torch.uint8)
        scales = torch.randint(118, 124, shape[:3]).byte()
        return {f"{name}_blocks": blocks, f"{name}_scales": scales}

    dense_modules = [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ]
    settings = {"quant_method": "mxfp4", "modules_to_not_convert": dense_modules}
    return _save(folder, _random_model(config), quantize, settings)


def compressed_qwen3_moe(folder: Path, preset: str) -> Path:
    """Qwen3-MoE, quantized by compressed-tensors in one of its presets, without routers and head."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.compressors.format import infer_module_format
    from compressed_tensors.quantization import QuantizationConfig, preset_name_to_scheme
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    config = Qwen3MoeConfig(
        hidden_size=64,
        intermediate_size=32,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        vocab_size=VOCAB_SIZE,
        initializer_range=0.2,
    )
    scheme = preset_name_to_scheme(preset, ["Linear"])
    if scheme.weights.group_size == 128:  # more than the model has columns
        scheme.weights.group_size = 32
    scheme.format = infer_module_format(torch.nn.Linear, scheme)
    compressor = BaseCompressor.get_value_from_registry(scheme.format)

    def quantize(name: str, weight: Tensor) -> dict[str, Tensor]:
        if not name.endswith("_proj.weight"):
            return {name: weight}
        group_size = scheme.weights.group_size or weight.shape[1]
        groups = weight.unflatten(1, (-1, group_size))  # [out, groups, inputs]
        parts = {"weight": weight}
        if scheme.weights.scale_dtype is not None:
            parts["weight_global_scale"] = generate_gparam(weight.min(), weight.max())
        parts["weight_scale"], _ = calculate_qparams(
            groups.amin(2), groups.amax(2), scheme.weights, parts.get("weight_global_scale")
        )
        module = name.removesuffix("weight")
        compressed = compressor.compress(parts, scheme)
        return {f"{module}{part}": tensor.contiguous() for part, tensor in compressed.items()}

    settings = QuantizationConfig(
        config_groups={"group_0": scheme},
        ignore=["lm_head"],
        format=scheme.format,
        quantization_status="compressed",
    )
    return _save(folder, _random_model(config), quantize, settings.model_dump(mode="json"))


def _random_model(config: PreTrainedConfig) -> PreTrainedModel:
    """A model in bfloat16 with the same random weights in every call."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def _save(
    folder: Path,
    model: PreTrainedModel,
    quantize: Callable[[str, Tensor], dict[str, Tensor]],
    settings: dict[str, Any],
) -> Path:
    """Save a model with `settings` as its quantization settings; `quantize` returns what is stored for a tensor."""
    model.save_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(1)
        stored = {}
        for name, tensor in load_file(folder / "model.safetensors").items():
            stored |= quantize(name, tensor)
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    config_file = folder / "config.json"
    config = json.loads(config_file.read_text()) | {"quantization_config": settings}
    config_file.write_text(json.dumps(config))
    return folder


def _in_fine_grained_fp8(name: str, weight: Tensor) -> dict[str, Tensor]:
    """What is stored for a tensor: values and scales of matrices in decoder layers, except routers."""
    is_in_layers = "layers" in name and "vision" not in name
    if weight.ndim < 2 or not is_in_layers or name.endswith("gate.weight"):
        return {name: weight}
    values, scales = in_blocks(weight.float(), _BLOCK)
    return {name: values, f"{name}_scale_inv": scales}


def in_blocks(weight: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """A matrix in FP8 and the scales of its blocks, of which the last ones may be smaller."""
    rows, columns = weight.shape
    block_rows = math.ceil(rows / block)
    block_columns = math.ceil(columns / block)
    padded = torch.zeros(block_rows * block, block_columns * block)
    padded[:rows, :columns] = weight
    blocks = padded.view(block_rows, block, block_columns, block)
    scales = blocks.abs().amax((1, 3)) / _MOST_IN_FP8  # [block rows, block columns]
    values = (blocks / scales[:, None, :, None]).view(padded.shape)[:rows, :columns]
    return values.to(torch.float8_e4m3fn).contiguous(), scales
