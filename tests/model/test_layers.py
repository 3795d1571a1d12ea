"""Decoder layers are found by structure, and models that have none are refused."""

import pytest
from families import family_model
from tiny_models import FAMILIES, MOE_FAMILIES, tiny_model
from torch import nn
from transformers import (
    AutoModelForMultimodalLM,
    BertConfig,
    BertGenerationConfig,
    BertGenerationDecoder,
    BertLMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

from optimum_fista.model import UnsupportedArchitectureError
from optimum_fista.model.layers import find_decoder_layers

LAYERS = {
    "opt": "model.decoder.layers",
    "gpt2": "transformer.h",
    "gpt_neox": "gpt_neox.layers",
    "falcon": "transformer.h",
}


@pytest.mark.parametrize("family", FAMILIES + MOE_FAMILIES)
def test_decoder_layers_are_found_in_order(family):
    model = tiny_model(family, num_hidden_layers=3)

    layers = find_decoder_layers(model)

    assert layers.name == LAYERS.get(family, "model.layers")
    assert len(layers) == 3
    assert [name for name, _ in layers] == [f"{layers.name}.{i}" for i in range(3)]
    assert all(model.get_submodule(name) is module for name, module in layers)


T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
BERT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (
            lambda: T5ForConditionalGeneration(T5Config(**T5)),
            "T5ForConditionalGeneration can't be pruned: it is an enc",
        ),
        (
            lambda: BertLMHeadModel(BertConfig(**BERT)),
            "BertLMHeadModel can't be pruned: it is an encoder, in which",
        ),
        (lambda: tiny_model("llama").model, "LlamaModel can't be pruned: it can't generate text"),
    ],
)
def test_what_is_not_a_causal_language_model_is_refused_by_its_class(model, reason):
    with pytest.raises(UnsupportedArchitectureError, match=reason):
        find_decoder_layers(model())


def test_encoder_that_runs_as_a_decoder_and_names_no_layers_is_found_by_its_checkpointed_layers():
    model = BertGenerationDecoder(BertGenerationConfig(**BERT, is_decoder=True))
    assert not model._no_split_modules

    assert find_decoder_layers(model).name == "bert.encoder.layer"


def test_text_decoder_is_chosen_beside_a_vision_encoder():
    layers = find_decoder_layers(family_model("gemma3"))

    assert layers.name == "model.language_model.layers"


def test_several_lists_of_decoder_layers_are_refused_with_what_was_found():
    model = tiny_model("llama")
    model.model.more = nn.ModuleList(list(model.model.layers))

    with pytest.raises(UnsupportedArchitectureError) as refused:
        find_decoder_layers(model)

    message = str(refused.value)
    assert (
        "LlamaForCausalLM can't be pruned: looked for one nn.ModuleList of LlamaDecoderLayer and found 2"
        in message
    )
    assert "model.layers (2 x LlamaDecoderLayer), model.more (2 x LlamaDecoderLayer)" in message


def test_weights_that_operators_share_are_named_with_each_other():
    model = tiny_model("llama", num_hidden_layers=3)
    first, _, last = model.model.layers
    last.mlp = first.mlp
    last.self_attn.k_proj.weight = last.self_attn.v_proj.weight

    shared = find_decoder_layers(model).shared

    pairs = [("model.layers.2.self_attn.k_proj", "model.layers.2.self_attn.v_proj")]
    for projection in ("gate_proj", "up_proj", "down_proj"):
        pairs.append((f"model.layers.0.mlp.{projection}", f"model.layers.2.mlp.{projection}"))
    expected = {}
    for one, other in pairs:
        expected[one] = f"shares its weight with {other}"
        expected[other] = f"shares its weight with {one}"
    assert shared == expected


def test_layers_of_a_vision_encoder_alone_are_not_taken_for_decoder_layers():
    # BLIP declares no layers of its text decoder
    layers = find_decoder_layers(family_model("blip", kind=AutoModelForMultimodalLM))

    assert layers.name == "text_decoder.bert.encoder.layer"
