"""Tiny random float32 models of real architectures, built from configurations."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCAB_SIZE = 64

_COMMON = {"vocab_size": VOCAB_SIZE, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_POSITIONS = {"max_position_embeddings": 64}
_NEOX = _SIZES | _POSITIONS | {"intermediate_size": 48}
_LLAMA = _NEOX | {"num_key_value_heads": 2}
_SLIDING = _LLAMA | {"head_dim": 8, "sliding_window": 6}
_FOUR_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
_LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
_ROUTED = {"n_routed_experts": 4, "first_k_dense_replace": 0, "n_group": 1, "topk_group": 1}

_CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA | {"head_dim": 8},
    "mistral": _LLAMA | {"sliding_window": 6},
    "phi3": _LLAMA,
    "gemma3_text": _SLIDING | {"query_pre_attn_scalar": 8},
    "opt": _SIZES | _POSITIONS | {"word_embed_proj_dim": 32, "ffn_dim": 48},
    "gpt2": {"n_embd": 32, "n_inner": 48, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "gpt_neox": _NEOX,
    "falcon": _SIZES | {"ffn_hidden_size": 48},
    "mixtral": _LLAMA | _FOUR_EXPERTS,
    "qwen3_moe": _LLAMA | _MOE | {"head_dim": 8, "num_experts": 4},
    "deepseek_v3": _LLAMA | _MOE | _LATENT | _ROUTED | {"num_key_value_heads": 4},
    "glm4_moe": _LLAMA | _MOE | _ROUTED | {"head_dim": 8},
    "qwen3_next": _LLAMA
    | _MOE
    | {
        "head_dim": 16,
        "num_experts": 4,
        "shared_expert_intermediate_size": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "num_hidden_layers": 3,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    },
    "gpt_oss": _SLIDING | _FOUR_EXPERTS,
    "granitemoe": _LLAMA | _FOUR_EXPERTS,
    "llama4_text": _LLAMA
    | _FOUR_EXPERTS
    | {"num_experts_per_tok": 1, "head_dim": 8, "interleave_moe_layer_step": 1},
}
MOE_FAMILIES = ("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "granitemoe", "llama4_text")
_OTHER_MOE = ("glm4_moe", "qwen3_next")
FAMILIES = tuple(family for family in _CONFIGS if family not in MOE_FAMILIES + _OTHER_MOE)


def tiny_model(family: str, seed: int = 0, **options: Any) -> PreTrainedModel:
    """A random float32 model of a family of `FAMILIES` or `MOE_FAMILIES`; `options` go to its configuration."""
    settings = _COMMON | _CONFIGS[family] | options
    config = AutoConfig.for_model(family, **settings)
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    randomize(model, generator)
    return model


def randomize(model: PreTrainedModel, generator: torch.Generator) -> None:
    """Overwrite all parameters by random ones, biases and norms too: a test notices if one of them is forgotten.

    Tables with the experts of every token get random experts, too.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim < 2:
                parameter.add_(noise, alpha=0.1)
            else:
                parameter.copy_(noise).mul_(parameter.shape[-1] ** -0.5)
        for module in model.modules():
            if hasattr(module, "tid2eid"):
                module.tid2eid.copy_(
                    random_table(*module.tid2eid.shape, len(module.weight), generator)
                )


def random_table(
    num_tokens: int, num_chosen: int, num_experts: int, generator: torch.Generator
) -> torch.Tensor:
    """A random table of experts for each token, int64 [tokens, chosen]; no row names an expert twice."""
    order = torch.rand(num_tokens, num_experts, generator=generator).argsort(dim=1)
    return order[:, :num_chosen]
