import pytest
import torch
from pruning import prune, weights
from tiny_llama import tiny_llama
from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

from optimum_fista import FistaPruner, FistaPruningConfig


def test_overrides_by_name(llama, tokens):
    overrides = {"*.down_proj": "1:4", "*.0.*.q_proj": 0, "*.v_proj": 0.25}
    dense = weights(llama)
    report = prune(llama, tokens.split(4), sparsity=0.75, method="wanda", overrides=overrides)
    sparsity = {name: float((p == 0).double().mean()) for name, p in llama.named_parameters() if p.ndim == 2}
    assert sparsity.pop("model.layers.0.self_attn.q_proj.weight") == 0
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        sparsity.pop(name)
    for name, value in sparsity.items():
        assert value == (0.25 if "v_proj" in name else 0.75)
    down = llama.model.layers[1].mlp.down_proj.weight
    assert bool(((down != 0).view(32, -1, 4).sum(-1) == 1).all())
    assert report.left_dense == {"model.layers.0.self_attn.q_proj": "sparsity 0"}
    assert torch.equal(llama.model.layers[0].self_attn.q_proj.weight, dense["model.layers.0.self_attn.q_proj.weight"])


def test_include_and_exclude(llama, tokens):
    report = prune(llama, tokens.split(4), method="wanda", include=("*.mlp.*",), exclude=("*.1.mlp.up_proj",))
    pruned = {name for name, p in llama.named_parameters() if bool((p == 0).any()) and p.ndim == 2}
    pruned.remove("model.embed_tokens.weight")  # its row of the padding token
    assert pruned == {o.name for o in report.operators}
    assert len(pruned) == 5
    assert all(".mlp." in name for name in pruned)
    assert report.left_dense["model.layers.1.mlp.up_proj"] == "exclude"
    assert report.left_dense["model.layers.0.self_attn.q_proj"] == "not in include"
    assert len(report.left_dense) == 9


def test_patterns_that_match_nothing_are_named(llama, tokens):
    with pytest.warns(UserWarning, match=r"exclude: 'lm_head', '\*\.weight' matches no linear operator"):
        report = prune(llama, tokens.split(4), method="wanda", exclude=("*.q_proj", "lm_head", "*.weight"))
    assert len(report.operators) == 12
    assert [message.split(" ")[0] for message in report.warnings] == ["exclude:"]


def test_tied_weights_stay_tied_and_dense(tokens):
    model = tiny_llama(tie_word_embeddings=True)
    dense = model.lm_head.weight.detach().clone()
    prune(model, tokens.split(4), method="wanda")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, dense)


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    settings = {"n_embd": 32, "n_inner": 48, "n_layer": 2, "n_head": 4, "vocab_size": 64, "n_positions": 64}
    return GPT2LMHeadModel(GPT2Config(**settings, initializer_range=0.2, bos_token_id=1, eos_token_id=2))


def test_conv1d_is_pruned_along_its_inputs(tokens):
    model = gpt2()
    report = prune(model, tokens.split(4), method="wanda", pattern="2:4")
    assert len(report.operators) == 8
    parameters = dict(model.named_parameters())
    for operator in report.operators:
        stored = parameters[operator.name]
        assert operator.stored_transposed
        assert operator.shape == tuple(stored.T.shape)
        assert bool(((stored.T != 0).reshape(stored.shape[1], -1, 4).sum(-1) == 2).all())


def test_attention_of_a_model_with_fused_experts_can_be_pruned(tokens):
    torch.manual_seed(0)
    settings = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}
    config = MixtralConfig(**settings, num_attention_heads=4, num_key_value_heads=2, num_local_experts=2)
    model = MixtralForCausalLM(config)
    report = prune(model, tokens.split(4), method="wanda", exclude=("*.experts",))
    assert len(report.operators) == 8
    assert all("self_attn" in o.name for o in report.operators)
    assert report.left_dense == {f"model.layers.{i}.mlp.experts": "exclude" for i in range(2)}


def test_nothing_runs_behind_the_last_layer_with_something_to_prune(llama, tokens, monkeypatch):
    calls = []
    monkeypatch.setattr(llama.model.layers[1].mlp, "forward", lambda *args: calls.append(args))
    config = FistaPruningConfig(method="wanda", include=["*.layers.0.*"])
    assert len(FistaPruner(config, progress=False).prune(llama, tokens.split(4)).operators) == 7
    assert calls == []
