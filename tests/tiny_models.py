"""Tiny random float32 models of real architectures, built from configurations."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCAB_SIZE = 64

_COMMON = {"vocab_size": VOCAB_SIZE, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}

_CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA | {"head_dim": 8},
    "mistral": _LLAMA | {"sliding_window": 6},
    "phi3": _LLAMA,
    "gemma3_text": _LLAMA | {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 6},
    "opt": {
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    },
    "gpt2": {"n_embd": 32, "n_inner": 48, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "gpt_neox": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    },
    "falcon": {"hidden_size": 32, "ffn_hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
    "mixtral": _LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": _LLAMA | _MOE | {"head_dim": 8, "num_experts": 4},
    "deepseek_v3": _LLAMA
    | _MOE
    | {
        "num_key_value_heads": 4,
        "n_routed_experts": 4,
        "first_k_dense_replace": 0,
        "n_group": 1,
        "topk_group": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    },
    "gpt_oss": _LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "sliding_window": 6},
    "granitemoe": _LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "llama4_text": _LLAMA
    | {"num_local_experts": 4, "num_experts_per_tok": 1, "head_dim": 8, "interleave_moe_layer_step": 1},
}

MOE_FAMILIES = ("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "granitemoe", "llama4_text")
FAMILIES = tuple(family for family in _CONFIGS if family not in MOE_FAMILIES)


def tiny_model(family: str, seed: int = 0, **options: Any) -> PreTrainedModel:
    """Build a random float32 causal language model: 2 decoder layers, hidden size 32, vocabulary 64.

    Biases and norms are drawn at random too, so that a test notices when one of them is forgotten.

    Args:
        family: A `model_type` of Transformers, one of `FAMILIES` or `MOE_FAMILIES`.
        seed: Seed of the weights.
        options: Further options of the configuration, such as `num_hidden_layers`.
    """
    config = AutoConfig.for_model(family, **(_COMMON | _CONFIGS[family] | options))
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.add_(noise, alpha=0.1)
            else:
                parameter.copy_(noise).mul_(parameter.shape[-1] ** -0.5)
    return model
