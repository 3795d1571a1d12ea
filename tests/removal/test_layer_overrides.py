"""Configurations with overrides for single decoder layers (`per_layer_config`): they shrink and get new numbers."""

import pytest
import torch
from shrunken_config import shrunken_config
from shrunken_models import assert_shrinks, parts_of
from tiny_llama import tiny_tokens
from tiny_models import VOCAB_SIZE, randomize
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedModel,
)

from optimum_fista import FistaPruner, FistaPruningConfig
from optimum_fista.evaluate.verification import verify_checkpoint
from optimum_fista.model import UnsupportedArchitectureError
from optimum_fista.removal.layer_overrides import (
    overrides_of,
    renumbered,
    scaled,
    values_by_layer,
    without_overrides,
)

pytestmark = pytest.mark.skipif(
    not hasattr(LlamaConfig(), "per_layer_config"), reason="this Transformers knows no overrides"
)

_SLIDING_SLIDING_FULL = ["sliding_attention", "sliding_attention", "full_attention"]
_GEMMA4 = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "layer_types": 2 * _SLIDING_SLIDING_FULL,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 8,
    # overrides of the layers with full attention
    "attention_k_eq_v": True,
    "num_global_key_value_heads": 2,
    "global_head_dim": 16,
    "sliding_window": 6,
    "hidden_size_per_layer_input": 0,
    "max_position_embeddings": 64,
}
_DOTS3 = {
    "num_hidden_layers": 4,
    "layer_types": 2 * ["indexed_attention", "sliding_attention"],
    "mlp_layer_types": ["dense", "dense", "sparse", "sparse"],
    "rope_parameters": None,
    # overrides of the layers with sliding windows
    "swa_num_attention_heads": 2,
    "swa_num_key_value_heads": 2,
    "swa_q_lora_rank": 16,
    "swa_kv_lora_rank": 8,
    "swa_head_dim": 16,
    "swa_qk_nope_head_dim": 8,
    "swa_v_head_dim": 8,
}


def model_with_overrides(family: str, **options) -> PreTrainedModel:
    """A random tiny model whose attention has other sizes in some decoder layers."""
    if family == "gemma4_text":
        settings = _GEMMA4 | options
    else:
        whole = shrunken_config(family).to_dict()
        whole = {
            word: whole[word] for word in whole if word not in ("per_layer_config", "model_type")
        }
        settings = whole | _DOTS3 | options
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings)).eval()
    randomize(model, torch.Generator().manual_seed(0))
    return model


def test_overrides_are_read_without_touching_the_configuration():
    config = model_with_overrides("gemma4_text").config

    common = without_overrides(config)

    assert overrides_of(config) == {
        2: {"head_dim": 16, "num_key_value_heads": 2},
        5: {"head_dim": 16, "num_key_value_heads": 2},
    }
    assert (common.head_dim, common.num_key_value_heads) == (8, 4)
    assert values_by_layer(config, "num_key_value_heads") == [4, 4, 2, 4, 4, 2]
    assert values_by_layer(config, "num_attention_heads") == [8]
    assert config.is_heterogeneous
    assert overrides_of(LlamaConfig()) is None


def test_overrides_are_scaled_and_get_new_numbers():
    overrides = {2: {"head_dim": 16, "num_key_value_heads": 2}, 5: {"head_dim": 32}}

    assert scaled(overrides, {"num_key_value_heads"}, new_groups=1, old_groups=2) == {
        2: {"head_dim": 16, "num_key_value_heads": 1},
        5: {"head_dim": 32},
    }
    assert renumbered(overrides, [0, 3, 5]) == {2: {"head_dim": 32}}


def test_a_group_of_heads_is_the_same_share_of_the_heads_of_every_layer():
    parts = parts_of(model_with_overrides("gemma4_text"), "heads").parts
    sliding, full = parts[0], parts[2]

    # of 8 query heads, 4 belong to each of two groups
    assert (sliding.groups, sliding.width) == (2, 4 * 8)
    assert (full.groups, full.width) == (2, 4 * 16)


@pytest.mark.parametrize(
    ("family", "numbers", "overrides"),
    [
        (
            "gemma4_text",
            {"heads": 1},
            {key: {"head_dim": 16, "num_key_value_heads": 1} for key in (2, 5)},
        ),
        (
            "gemma4_text",
            {"channels": 24},
            {key: {"head_dim": 16, "num_key_value_heads": 2} for key in (2, 5)},
        ),
        (
            "gemma4_text",
            {"heads": 1, "layers": [1, 2, 4, 5]},
            {key: {"head_dim": 16, "num_key_value_heads": 1} for key in (1, 3)},
        ),
        (
            "dots3_note_text",
            {"heads": 1},
            {
                key: {"num_attention_heads": 1, "num_key_value_heads": 1, "kv_lora_rank": 8}
                for key in (1, 3)
            },
        ),
        (
            "dots3_note_text",
            {"experts": 3, "layers": [0, 1, 3]},
            {
                key: {"num_attention_heads": 2, "num_key_value_heads": 2, "kv_lora_rank": 8}
                for key in (1, 2)
            },
        ),
    ],
)
def test_a_smaller_model_has_the_overrides_of_its_layers(family, numbers, overrides, tmp_path):
    if family not in CONFIG_MAPPING:
        pytest.skip(f"needs a newer Transformers, which has {family}")

    again = assert_shrinks(model_with_overrides(family), tmp_path, **numbers)

    assert overrides_of(again.config) == overrides


@pytest.mark.parametrize("pattern", ["heads:0.5", "layers:0.17", "layers:0.17+heads:0.5"])
def test_a_run_removes_heads_and_layers_of_a_model_with_overrides(pattern, tmp_path):
    dense, folder = tmp_path / "dense", tmp_path / "smaller"
    model_with_overrides("gemma4_text").save_pretrained(dense)
    pruner = FistaPruner(FistaPruningConfig(pattern=pattern, method="wanda"), progress=False)

    pruner.prune(dense, tiny_tokens().split(4), output_dir=folder)

    assert verify_checkpoint(folder, dense=dense).removed
    again = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        assert again(tiny_tokens()).logits.isfinite().all()


def test_numbers_that_differ_between_layers_are_refused_if_one_share_can_not_remove_them():
    model = model_with_overrides("gemma4_text")
    model.config.per_layer_config = {2: {"intermediate_size": 50}}

    with pytest.raises(
        UnsupportedArchitectureError,
        match=r"can't lose channels: intermediate_size differs between decoder layers \(48, 50\)",
    ):
        parts_of(model, "channels")
