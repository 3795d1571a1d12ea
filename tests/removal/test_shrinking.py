"""Smaller models: what they compute, that plain Transformers loads them, and what is refused."""

import pytest
import torch
from accelerate import cpu_offload
from families import family_model, logits
from shrunken_models import (
    assert_same,
    assert_shrinks,
    expected_logits,
    generates_alike,
    plan_for,
    some_groups,
)
from tiny_models import tiny_model
from torch import nn
from transformers import AutoModelForCausalLM
from untouched import Untouched

from optimum_fista.model import UnsupportedArchitectureError
from optimum_fista.model.inputs import LayerCall
from optimum_fista.model.layers import find_decoder_layers
from optimum_fista.model.offload import onloaded
from optimum_fista.removal.proof import require_same_outputs
from optimum_fista.removal.smaller_modules import shrink_model


@pytest.mark.parametrize(
    ("family", "numbers"),
    [
        ("llama", {"channels": 31}),
        ("llama", {"channels": 47}),  # exactly one goes
        ("llama", {"heads": 1}),
        ("llama", {"layers": [1]}),
        ("gpt2", {"channels": 40}),
        ("opt", {"channels": 40}),
        ("qwen2", {"channels": 32, "heads": 1, "layers": [0]}),
        ("gemma3_text", {"channels": 24, "heads": 1}),
        ("gpt_oss", {"heads": 1, "experts": 2}),
        ("qwen3_moe", {"experts": 3, "layers": [1]}),
    ],
)
def test_a_shrunken_model_computes_what_the_whole_does_without_the_removed_parts(
    family, numbers, tmp_path
):
    assert generates_alike(assert_shrinks(tiny_model(family), tmp_path, **numbers))


@pytest.mark.parametrize("family", ["deepseek_v4", "inkling_text", "longcat_flash", "zaya"])
def test_other_rows_of_a_router_than_those_of_removed_experts_stay(family, tmp_path):
    """Rows of shared experts, of experts that return their inputs, of none; and a table with the experts of a token."""
    assert_shrinks(family_model(family), tmp_path, experts=3)


def test_tokens_are_routed_as_before_if_router_groups_keep_equally_many_experts(tmp_path):
    config = tiny_model("deepseek_v3").config
    config.n_routed_experts = 8
    config.n_group = 2
    config.topk_group = 1
    model = AutoModelForCausalLM.from_config(config)
    plan = plan_for(model, experts=6)
    kept = {name: [0, 1, 3, 4, 6, 7] for name in plan.parts}  # three of each group of four
    expected = expected_logits(model, plan, kept)

    shrink_model(model, plan, kept)

    assert_same(logits(model), expected)


def test_shrinking_keeps_the_modules_hooks_dtypes_and_untouched_parameters_of_the_caller():
    model = tiny_model("llama", tie_word_embeddings=True).to(torch.bfloat16).train()
    model(input_ids=torch.tensor([[3, 4, 5]])).logits.sum().backward()
    calls = []
    model.model.layers[1].register_forward_hook(lambda *_: calls.append(1))
    objects = {
        name: module
        for name, module in model.named_modules()
        if not name.startswith("model.layers.0")
    }
    parameters = {name: (p, p.data_ptr()) for name, p in model.named_parameters()}
    buffer = model.model.rotary_emb.inv_freq
    config = model.config
    plan = plan_for(model, channels=24, layers=[1])

    shrink_model(model, plan, some_groups(plan))

    assert len(model.model.layers) == 1
    for name, module in model.named_modules():
        assert objects[name.replace("layers.0", "layers.1")] is module
        assert module.training
    for name, parameter in model.named_parameters():
        before, address = parameters[name.replace("layers.0", "layers.1")]
        assert before is parameter
        assert parameter.dtype == torch.bfloat16
        shrunk = ".mlp." in name
        assert (parameter.data_ptr() == address) is not shrunk
        assert (parameter.grad is None) is shrunk
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.model.rotary_emb.inv_freq is buffer
    # the object may belong to other models
    assert (config.intermediate_size, config.num_hidden_layers) == (
        48,
        2,
    )
    assert all(m.config is model.config for m in model.modules() if hasattr(m, "config"))
    assert (model.config.intermediate_size, model.config.num_hidden_layers) == (24, 1)
    assert (
        model.model.layers[0].mlp.down_proj.in_features,
        model.model.layers[0].self_attn.layer_idx,
    ) == (24, 0)
    logits(model)
    assert calls


def second_layer(model):
    """Name of the second decoder layer, the layer, and a function that runs such a layer on what enters it."""
    name, layer = list(find_decoder_layers(model))[1]
    seen = []
    catch = layer.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True
    )
    logits(model)
    catch.remove()
    ((args, kwargs),) = seen
    return name, layer, lambda module: LayerCall(args[1:], kwargs).run(module, args[0])


@pytest.mark.parametrize(
    ("family", "offloaded"), [("llama", False), ("llama", True), ("gpt2", False)]
)
def test_a_decoder_layer_is_proved_on_its_own_and_stays_as_it_is(family, offloaded):
    model = tiny_model(family)
    plan = plan_for(model, channels=30)
    name, layer, run = second_layer(model)
    if offloaded:
        cpu_offload(model, "cpu")
    sizes = []

    def call(module):
        sizes.append(sum(parameter.numel() for parameter in module.parameters()))
        return run(module)

    with Untouched(model), onloaded(layer.modules()):
        require_same_outputs(plan, name, layer, some_groups(plan), call)

    assert sizes[1] < sizes[0]


@pytest.mark.parametrize(
    ("family", "numbers", "reason"),
    [
        (
            "gemma3n_text",
            {"channels": 24},
            "does not return the same .* something in it depends on all groups",
        ),
        ("bitnet", {"heads": 1}, "does not run without the removed groups: The size of tensor"),
    ],
)
def test_parts_that_depend_on_removed_groups_are_refused_by_their_outputs(family, numbers, reason):
    model = family_model(family)
    plan = plan_for(model, **numbers)

    with pytest.raises(UnsupportedArchitectureError, match=reason):
        require_same_outputs(plan, "", model, some_groups(plan), logits)


def test_rows_in_another_order_are_refused_by_their_outputs():
    model = tiny_model("llama")
    plan = plan_for(model, channels=30)
    kept = some_groups(plan)
    require_same_outputs(plan, "", model, kept, logits)

    def call(module):
        if module.config.intermediate_size == 30:
            up = module.model.layers[0].mlp.up_proj
            up.weight = nn.Parameter(up.weight.detach().flip(0))
        return logits(module)

    with pytest.raises(UnsupportedArchitectureError, match="its rows are in another order"):
        require_same_outputs(plan, "", model, kept, call)


def test_a_proof_that_runs_out_of_memory_raises_that_error_and_not_a_refusal():
    model = tiny_model("llama")
    plan = plan_for(model, channels=30)

    def run_out(module):
        if module.config.intermediate_size == 30:
            raise torch.OutOfMemoryError("no room")
        return logits(module)

    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        require_same_outputs(plan, "", model, some_groups(plan), run_out)


def test_a_decoder_layer_that_depends_on_its_number_is_refused():
    model = tiny_model("gpt2", scale_attn_by_inverse_layer_idx=True)

    with pytest.raises(
        ValueError, match=r"transformer.h.1.attn would have scaling=0.35\d* instead of 0.17"
    ):
        plan_for(model, layers=[1])


def test_a_model_that_no_configuration_describes_is_refused():
    message = r"describes MiniCPM3ForCausalLM with 1 decoder layers: .* would have .* instead of"

    with pytest.raises(ValueError, match=message):
        plan_for(family_model("minicpm3"), layers=[0])


def test_a_model_that_is_not_what_its_configuration_says_is_refused():
    model = tiny_model("llama")
    model.model.layers[0].mlp.up_proj = nn.Linear(32, 47, bias=False)

    with pytest.raises(
        ValueError,
        match=r"up_proj.weight has shape \(47, 32\), but LlamaConfig describes \(48, 32\)",
    ):
        plan_for(model, channels=40)
