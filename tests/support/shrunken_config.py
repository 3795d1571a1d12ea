"""Configurations of Transformers, made tiny by the names of their attributes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig

VOCAB_SIZE = 64

_LAYERS = r"(num_hidden_layers|n_layers?|num_blocks|num_layers|(num_)?(en|de)coder_layers|num_layers_.*|depth)"

# The first pattern that matches the whole name decides. Sizes are multiples of 4, so that 2:4 fits.
_SIZES: tuple[tuple[str, int], ...] = (
    (r".*vocab.*size.*|.*_vocab|n_words|codebook_size|num_embeddings", VOCAB_SIZE),
    (
        r"(.*max_position_embeddings|n_positions|n_ctx|max_seq_len|max_.*_positions|.*max_length)",
        64,
    ),
    (_LAYERS, 2),
    (r"mamba_n_heads|n_mamba_heads", 8),
    (r"(.*num_key_value_heads|kv_n_heads|num_kv_heads|num_query_groups)", 2),
    (r"(.*(num|n)_(attention_)?heads|n_head|(en|de)coder_attention_heads|.*num_.*_heads)", 4),
    (r".*lora_rank.*|hc_lowrank|adapter_rank|laurel_rank", 16),
    (r"qk_head_dim|mamba_headdim", 16),
    (
        r"(.*head_dim.*|rotary_dim|kv_channels|d_kv|d_head|dim_head|mamba_d_head|qk_.*_dim|v_.*_dim|d_rel)",
        8,
    ),
    (r"(moe_.*intermediate.*|.*experts?_.*(intermediate|ffn|hidden).*size|expert_dim)", 16),
    (r"(.*intermediate_size.*|.*ffn.*(dim|size)|d_ff|dff|dim_ff|n_inner|d_inner)", 48),
    (
        r"(.*experts_per_tok(en)?|moe_top_?k|moe_k|num_selected_experts|top_k_experts|.*experts_topk)",
        2,
    ),
    (r".*shared_experts|first_k_dense_replace|num_dense_layers", 1),
    (
        r"((moe_)?(num|n)_(local_|routed_)?experts|.*num_experts|n_routed_experts|num_.*experts|zero_expert_num)",
        4,
    ),
    (r"(n_group|topk_group|num_expert_group|.*n_?groups)", 1),
    (
        r"(.*hidden_size.*|d_model|n_embd|.*embed(ding)?_(proj_)?(dim|size).*|.*_width|lru_width|dim|d_embed|emb_dim)",
        32,
    ),
    (r"(.*sliding_window.*|.*window_size|.*window_len)", 6),
    (
        r"base_channels|latent_channels|projection_dim|scale|.*_output_dim|adapter_(in_dim|out_dim|input_size)",
        32,
    ),
    (r"(.*state_size|mamba_d_state|.*dt_rank|.*step_rank)", 8),
    (r"(.*chunk_size|block_size|local_chunk_length)", 8),
    (r"(index_topk|index_n_heads|indexer_.*)", 4),
)
_LEFT_AS_IT_IS = re.compile(
    r"chunk_size_feed_forward|.*(multiplier|scal|theta|kernel|factor|dropout|eps|std|range).*"
)
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2} | dict.fromkeys(
    ("image_token_id", "image_token_index", "image_patch_id"), VOCAB_SIZE - 1
)

# Where configurations leave a size open, or sizes depend on others in a way that their names don't tell.
_HYBRID = {
    "num_hidden_layers": 4,
    "layers_block_type": ["linear_attention", "hybrid"] * 2,
    "attention_hidden_size": 64,
    "attention_head_dim": 16,
}
_SHARED_KEYS = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
    "hidden_size_per_layer_input": 8,
}
_IMAGE = {
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 64,
    "patch_size": 16,
}
_WIDTH = {"hidden_size": 32, "num_attention_heads": 4}
_SECTIONS = {"rope_theta": 10000.0, "mrope_section": [16, 24, 24]}
_IMAGE_WORDS = {"<image>": VOCAB_SIZE - 1} | {
    f"IMGIMG{'AB'[i // 10]}{'ABCDEFGHIJ'[i % 10]}Z": 8 + i for i in range(16)
}
_EXCEPTIONS: dict[str, dict[str, Any]] = {
    "apertus1p5": {"image_token_offset": 8, "audio_token_offset": 24},
    "apertus1p5_vision_tokenizer": {"codebook_size": 16},
    "aria": {
        "projector_patch_to_query_dict": {"16": 8},
        "max_value_projector_patch_to_query_dict": 8,
    },
    "bamba": {"attn_layer_indices": [1]},
    **{family: {"image_token_index": VOCAB_SIZE - 1} for family in ("blip-2", "instructblip")},
    "instructblipvideo": {"video_token_index": VOCAB_SIZE - 1, "num_query_tokens": 4},
    "kosmos-2": {"latent_query_num": 8},
    "kosmos_2_text_model": {"layers": 2},
    "chameleon_vqgan": {"num_embeddings": 16},
    "chameleon": {"vocabulary_map": _IMAGE_WORDS},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0, "model_type": ""}
    },
    "dory": {
        "num_hidden_layers": 6,
        "layer_types": [
            "sliding_attention",
            "mlp",
            "full_attention",
            "mlp",
            "sliding_attention",
            "mlp",
        ],
        "n_input_layers": 2,
        "n_recurrent_layers": 2,
        "n_output_layers": 2,
    },
    "dots3_note_audio": {"adapter_(in_dim|out_dim|input_size)": 32},
    "dots3_note_text": {"head_dim": 16},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"]},
    "emu3": {"vocabulary_map": _IMAGE_WORDS},
    "ernie4_5_vl_moe_text": {
        "moe_intermediate_size": [16, 16],
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [1, 1, 2],
        },
    },
    "dots1": {"n_shared_experts": 1, "first_k_dense_replace": 1},
    "falcon_h1": {"mamba_d_ssm": 64},
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2},
    "glm5_next_text": {"index_kpool": 2},
    # full attention has larger heads; the configurations say so for each decoder layer
    **{
        family: {"per_layer_config": {1: {"head_dim": 16}}}
        for family in ("gemma4_text", "gemma4_unified_text")
    },
    "glm4v_moe_text": {"rope_parameters": _SECTIONS | {"partial_rotary_factor": 0.5}},
    "fun_asr_nano": {"adaptor_config": {"num_hidden_layers": 2, "intermediate_size": 8, **_WIDTH}},
    "granite4_vision": {
        "vision_config": {"model_type": "clip_vision_model", "hidden_size": 64, **_IMAGE},
        "downsample_rate": "1/2",
        "deepstack_layer_map": [[0, 0]],
        "spatial_target_layers": [0, 0, 1, 1],
    },
    "hunyuan_vl_text": {"rope_parameters": _SECTIONS | {"rope_type": "default"}},
    "gemma3n_text": _SHARED_KEYS
    | {"intermediate_size": 48, "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"], "full_attn_idxs": [1]},
    "lfm2_moe": {"layer_types": ["full_attention", "conv", "conv"], "num_hidden_layers": 3},
    "mistral4": {"head_dim": 16},
    "molmo2_adapter": {"vision_feature_layer": [-1, -2], "text_hidden_size": 32},
    "nemotron_h": {"layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"]},
    "step3p5": {"sliding_window": 6},
    "wavtokenizer_encoder": {"codebook_dim": 32, "codebook_size": 16},
    "mamba2": {"num_heads": 8},
    "vibevoice_asr": {"acoustic_tokenizer_chunk_size": 32},
    "vibevoice_acoustic_tokenizer_encoder": {
        "num_filters": 2,
        "downsampling_ratios": [2, 2],
        "depths": [1, 1, 1],
    },
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
    },
    "reformer": {"axial_pos_embds_dim": [16, 16], "axial_pos_shape": [8, 8]},
    "xmod": {"default_language": "en_XX"},
    **{
        f"{family}_text": {"rope_parameters": _SECTIONS | {"rope_type": "default"}}
        for family in ("glm4v", "glm_ocr", "paddleocr_vl", "qwen2_vl", "qwen2_5_vl", "qwen2_5_omni")
    },
    "vipllava": {"vision_feature_layers": [-1, -2]},
    "zamba": _HYBRID,
    "zamba2": _HYBRID | {"hybrid_layer_ids": [1, 3], "mamba_headdim": 8},
}


def shrunken_config(family: str) -> PretrainedConfig:
    """The default configuration of a `model_type` of Transformers with every size made tiny.

    Lists with an entry a decoder layer (`layer_types` and the like) are cut so that every kind of layer stays, once.
    Models that can be encoders as well become decoders.
    """
    kind = CONFIG_MAPPING[family]
    shrunk = _shrunk(kind().to_dict())
    return kind.from_dict(shrunk)


def _shrunk(values: Mapping[str, Any]) -> dict[str, Any]:
    layers = next((values[name] for name in values if re.fullmatch(_LAYERS, name)), 0)
    by_layer = {
        name: v for name, v in values.items() if isinstance(v, list) and layers and len(v) == layers
    }
    picked = _one_of_each_kind(by_layer, layers)
    small: dict[str, Any] = {}
    for name, value in values.items():
        if name in ("id2label", "label2id"):
            continue
        if name == "per_layer_config":
            small[name] = {}
        elif name in by_layer:
            small[name] = [_size(name, value[i]) for i in picked]
        elif re.fullmatch(_LAYERS, name) and value == layers:
            small[name] = len(picked)
        elif name == "is_decoder":
            small[name] = True
        elif isinstance(value, Mapping):
            small[name] = (
                dict(value)
                if "rope_" in name or not all(map(str.isidentifier, map(str, value)))
                else _shrunk(value)
            )
        elif name == "image_grid_pinpoints" and value:
            # an image is one tile, as large as the tower's
            small[name] = [[4 * values["vision_config"]["patch_size"]] * 2]
        elif name == "window_size" and "spatial_merge_size" in values:
            small[name] = 4 * values["patch_size"]
        elif name == "image_size" and value and (patch := values.get("patch_size")):  # 16 patches
            size = 4 * (patch if isinstance(patch, int) else patch[0])
            small[name] = size if isinstance(value, int) else [size] * 2
        else:
            small[name] = _size(name, value)
    heads = {
        name: value
        for name, value in values.items()
        if name in ("num_attention_heads", "num_key_value_heads")
    }
    # some families have one key for every query
    if len(heads) == 2 and len(set(heads.values())) == 1:
        small["num_key_value_heads"] = small["num_attention_heads"]
    absent = {
        "head_dim": 8,
        "num_key_value_heads": 2,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
    }
    small |= {name: size for name, size in absent.items() if values.get(name, 0) is None}
    small |= _EXCEPTIONS.get(values.get("model_type", ""), {})
    for rope in [v for v in small.values() if isinstance(v, dict) and "mrope_section" in v]:
        dim = small.get("qk_rope_head_dim") or small.get("head_dim") or 8
        # It is divided among time, height and width.
        half = int(dim * rope.get("partial_rotary_factor", 1)) // 2
        if sum(rope["mrope_section"]) != half:
            rope["mrope_section"] = [half - half // 2, half // 2 - half // 4, half // 4]
    return small


def _one_of_each_kind(by_layer: Mapping[str, list], layers: int) -> list[int]:
    """Indices of decoder layers, the first of every combination of kinds; at least two."""
    kinds: dict[str, int] = {}
    for index in range(layers):
        kind = [values[index] for values in by_layer.values() if isinstance(values[index], str)]
        kinds.setdefault(repr(kind), index)
    picked = sorted(kinds.values())
    return picked if len(picked) > 1 else list(range(min(2, layers)))


def _size(name: str, value: Any) -> Any:
    if (
        isinstance(value, bool)
        or not isinstance(value, int)
        or not value
        or _LEFT_AS_IT_IS.fullmatch(name)
    ):
        return value
    if re.fullmatch(r".*token_(id|index).*", name):
        return _TOKENS.get(name, min(value, VOCAB_SIZE - 1))
    size = next((size for pattern, size in _SIZES if re.fullmatch(pattern, name)), value)
    return min(size, value)
