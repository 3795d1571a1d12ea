"""What a model can lose: the parts that are found, and what refuses a model."""

import pytest
import torch
from families import MIXTURE_OPTIONS, family_model
from shrunken_config import shrunken_config
from shrunken_models import parts_of
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM

from optimum_fista.model import UnsupportedArchitectureError

LLAMA = "model.layers.1."
GPT2 = "transformer.h.1.mlp."


def test_channels_are_columns_of_the_down_projection_and_rows_of_its_feeders():
    channels = parts_of(tiny_model("llama"), "channels")

    assert channels.groups == 48
    assert channels.sizes(24) == {"intermediate_size": 24}
    first, second = channels.parts
    assert first.name == "model.layers.0.mlp.down_proj"
    assert second.name == LLAMA + "mlp.down_proj"
    assert second.groups == 48
    assert second.width == 1
    assert second.tensors == {
        LLAMA + "mlp.down_proj.weight": (1, 1),
        LLAMA + "mlp.gate_proj.weight": (0, 1),
        LLAMA + "mlp.up_proj.weight": (0, 1),
    }


def test_transposed_weights_shrink_on_their_own_axes():
    tensors = parts_of(tiny_model("gpt2"), "channels").parts[1].tensors

    assert tensors == {
        GPT2 + "c_proj.weight": (0, 1),
        GPT2 + "c_fc.weight": (1, 1),
        GPT2 + "c_fc.bias": (0, 1),
    }


def test_projections_in_one_matrix_shrink_together():
    tensors = parts_of(tiny_model("phi3"), "channels").parts[1].tensors

    assert tensors == {
        LLAMA + "mlp.down_proj.weight": (1, 1),
        LLAMA + "mlp.gate_up_proj.weight": (0, 2),
    }


def test_the_smaller_configuration_states_a_size_that_the_dense_one_leaves_open():
    channels = parts_of(tiny_model("gpt2", n_inner=None), "channels")

    assert channels.groups == 4 * 32
    assert channels.sizes(96) == {"n_inner": 96}


def test_a_configured_size_that_is_twice_the_channels_stays_twice_the_channels():
    channels = parts_of(family_model("recurrent_gemma"), "channels")

    assert channels.groups == 24
    assert channels.sizes(20) == {"intermediate_size": 40}


def test_a_group_of_heads_is_a_key_value_head_with_its_query_heads():
    heads = parts_of(tiny_model("qwen2"), "heads")

    part = heads.parts[1]
    assert part.name == LLAMA + "self_attn.o_proj"
    assert part.groups == 2
    assert part.width == 16  # two query heads of 8 columns
    rows = {
        f"{LLAMA}self_attn.{name}_proj.{leaf}": (0, 1)
        for name in "qkv"
        for leaf in ("weight", "bias")
    }
    assert part.tensors == rows | {LLAMA + "self_attn.o_proj.weight": (1, 1)}
    assert heads.sizes(1) == {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}


def test_experts_go_with_their_rows_of_the_router():
    experts = parts_of(tiny_model("qwen3_moe"), "experts")

    assert experts.groups == 4
    assert experts.at_least == 2
    part = experts.parts[0]
    assert part.name == "model.layers.0.mlp.experts"
    names = ("experts.gate_up_proj", "experts.down_proj", "gate.weight")
    assert part.tensors == {f"model.layers.0.mlp.{name}": (0, 1) for name in names}


@pytest.mark.parametrize(
    ("family", "kind", "reason"),
    [
        ("bitnet", "channels", r"mlp.ffn_sub_norm.weight \(BitNetRMSNorm\) works on all inputs"),
        ("mixtral", "channels", r"experts.down_proj changes as well with intermediate_size=24"),
        ("mamba", "channels", r"mixer"),
        ("bloom", "channels", r"states no number of them \(looked for intermediate_size, "),
        (
            "phi3",
            "heads",
            r"only \S*qkv_proj.weight computes the inputs of \S*o_proj, but queries and keys need",
        ),
        ("olmo2", "heads", r"q_norm.weight \(Olmo2RMSNorm\) works on all inputs"),
        ("gpt2", "heads", r"no tensor of a decoder layer changes with num_attention_heads=1"),
        (
            "gpt_bigcode",
            "heads",
            r"there is a single one \(num_attention_heads=4, num_key_value_heads=1\)",
        ),
        (
            "gemma3n_text",
            "heads",
            r"only \S*q_proj.weight computes the inputs of \S*o_proj, but queries and keys need",
        ),
        ("diffllama", "heads", r"requires `num_key_value_heads` to be even"),
        ("llama", "experts", r"states no number of them \(looked for num_local_experts"),
        ("zamba", "channels", r"shares its weight"),
    ],
)
def test_what_can_not_be_lost_is_refused_with_the_reason(family, kind, reason):
    model = family_model(family)

    with pytest.raises(
        UnsupportedArchitectureError,
        match=f"^{type(model).__name__} can't lose {kind}: .*({reason})",
    ):
        parts_of(model, kind)


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("hunyuan_v1_moe", {"moe_topk": [1, 3]}),  # a number for each decoder layer
        ("gemma4_text", MIXTURE_OPTIONS["gemma4_text"] | {"top_k_experts": 3}),
    ],
)
def test_at_least_as_many_experts_stay_as_a_token_is_sent_to(family, settings):
    model = family_model(family, settings=settings)

    assert parts_of(model, "experts").at_least == 3


def test_a_list_of_different_sizes_is_refused_with_its_values():
    config = shrunken_config("gemma3n_text")
    config.intermediate_size = [32, 64] * (config.num_hidden_layers // 2)
    model = AutoModelForCausalLM.from_config(config)

    with pytest.raises(
        UnsupportedArchitectureError,
        match=r"intermediate_size differs between decoder layers \(32, 64\)",
    ):
        parts_of(model, "channels")


def test_layers_of_different_sizes_are_refused():
    config = shrunken_config("gemma4_text")
    config.use_double_wide_mlp = True
    config.num_kv_shared_layers = 2
    config.num_hidden_layers = 4
    config.layer_types = ["sliding_attention", "full_attention"] * 2
    config.per_layer_config = {1: {"head_dim": 16}, 3: {"head_dim": 16}}
    model = AutoModelForCausalLM.from_config(config)

    with pytest.raises(
        UnsupportedArchitectureError,
        match=r"layers.0.mlp.down_proj has 48 channels, and \S*2.mlp.down_proj has 96",
    ):
        parts_of(model, "channels")


def test_a_mask_of_whole_groups_says_which_are_kept():
    part = parts_of(tiny_model("llama"), "heads").parts[0]
    mask_of_all = torch.ones(32, 32, dtype=torch.bool)
    mask_without_first = mask_of_all.clone()
    mask_without_first[:, :16] = False

    assert part.kept_by(mask_of_all) == (0, 1)
    assert part.kept_by(mask_without_first) == (1,)


def test_groups_of_the_router_keep_the_two_experts_that_they_are_compared_by():
    config = tiny_model("deepseek_v3").config
    config.n_routed_experts = 8
    config.n_group = 2
    config.topk_group = 1

    experts = parts_of(AutoModelForCausalLM.from_config(config), "experts")

    assert experts.groups == 8
    assert experts.num_router_groups == 2
    assert experts.at_least == 4
