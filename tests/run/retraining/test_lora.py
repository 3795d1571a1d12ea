import pytest
import torch
from tiny_llama import tiny_tokens
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM

peft = pytest.importorskip("peft", reason="needs PEFT: pip install 'optimum-fista[peft]'")

from optimum_fista import FistaPruner, FistaPruningConfig, mask_adapters, merge_adapters, save_masked  # noqa: E402
from optimum_fista.run.evaluation.verification import verify_checkpoint  # noqa: E402


def adapted(saved, dtype=torch.float32, **options) -> "peft.PeftModel":
    model = AutoModelForCausalLM.from_pretrained(saved.folder, dtype=dtype)
    torch.manual_seed(0)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    return peft.get_peft_model(model, peft.LoraConfig(**settings | options))


def train(model, steps: int = 6) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2, weight_decay=0.1)
    model.train()
    losses = []
    for _ in range(steps):
        loss = model(tiny_tokens(), labels=tiny_tokens()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(tiny_tokens()).logits


def strays(model, saved) -> int:
    return sum(int(model.get_parameter(o.name)[saved.model.get_parameter(o.name) == 0].count_nonzero())
               for o in saved.report.operators)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["saved", "saved_gpt2"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_merging_changes_no_bit_of_the_outputs_and_no_zero(dropout, name, dtype, request, tmp_path):
    example = request.getfixturevalue(name)
    model = mask_adapters(adapted(example, dtype, lora_dropout=dropout), example.folder)
    losses = train(model)
    assert losses[-1] < losses[0] - 0.1
    trained, unpruned = logits(model), logits(AutoModelForCausalLM.from_pretrained(example.folder, dtype=dtype))
    merged = merge_adapters(model)
    assert torch.equal(logits(merged), trained)
    assert (trained - unpruned).abs().max() > 0.1
    assert strays(merged, example) == 0
    save_masked(merged, tmp_path / "out", example.folder)
    assert verify_checkpoint(tmp_path / "out").num_zeros == example.report.totals["num_zeros"]
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), trained)


def test_merging_changes_no_bit_under_autocast(saved):
    model = mask_adapters(adapted(saved), saved.folder)
    with torch.autocast("cpu", torch.bfloat16):
        train(model)
        trained = logits(model)
        assert torch.equal(logits(merge_adapters(model)), trained)


def test_gradients_are_those_of_the_masked_update(saved):
    model = mask_adapters(adapted(saved, init_lora_weights=False), saved.folder)
    layer = model.get_base_model().model.layers[0].mlp.down_proj
    inputs = torch.randn(5, layer.in_features, requires_grad=True)
    layer(inputs).square().sum().backward()
    a, b = (part["default"].weight for part in (layer.lora_A, layer.lora_B))
    factors = [factor.detach().requires_grad_() for factor in (a, b, inputs)]
    weight = layer.base_layer.weight
    delta = layer.scaling["default"] * factors[1] @ factors[0] * (weight != 0)
    (factors[2] @ (weight + delta).T).square().sum().backward()
    for factor, expected in zip((a, b, inputs), factors, strict=True):
        torch.testing.assert_close(factor.grad, expected.grad, rtol=1e-4, atol=1e-4)


def test_dropout_falls_on_the_adapter_alone(saved):
    model = mask_adapters(adapted(saved, lora_dropout=0.5, init_lora_weights=False), saved.folder).train()
    layer = model.get_base_model().model.layers[0].mlp.down_proj
    inputs = torch.randn(400, layer.in_features)
    with torch.no_grad():
        mean = torch.stack([layer(inputs) for _ in range(300)]).mean(0) - layer.base_layer(inputs)
        expected = inputs @ layer.get_delta_weight("default").T
        assert not torch.equal(layer(inputs), layer(inputs))
    assert torch.linalg.norm(mean - expected) / torch.linalg.norm(expected) < 0.1


def test_adapters_trained_without_masks_are_merged_under_them(saved):
    model = adapted(saved)
    train(model)
    before = logits(model)
    merged = merge_adapters(model, saved.folder)
    assert strays(merged, saved) == 0
    assert not torch.allclose(logits(merged), before, atol=1e-3)
    assert merged.config.fista_pruning["retrained"]


def test_plain_peft_would_fill_the_zeros(saved):
    model = adapted(saved)
    train(model)
    assert strays(model.merge_and_unload(), saved) > 5000


def test_a_saved_adapter_is_loaded_and_goes_on(saved, tmp_path):
    model = mask_adapters(adapted(saved), saved.folder)
    train(model)
    model.save_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(saved.folder)
    again = mask_adapters(peft.PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True)).eval()
    assert torch.equal(logits(again), logits(model))
    assert train(again)[-1] < train(model, steps=1)[0]
    with again.disable_adapter():
        assert torch.equal(logits(again), logits(saved.model))
    again.merge_adapter()
    again.unmerge_adapter()
    assert strays(again.unload(), saved) == 0


def test_norms_and_the_pruner_of_this_model(tmp_path):
    model = tiny_model("opt")
    pruner = FistaPruner(FistaPruningConfig(pattern="2:4", method="wanda"), progress=False)
    pruner.prune(model, tiny_tokens().split(4))
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "fc1"], task_type="CAUSAL_LM")
    wrapped = mask_adapters(peft.get_peft_model(model, config), pruner)
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.requires_grad or parameter.ndim == 1)
    bias = model.model.decoder.layers[0].fc2.bias.clone()
    train(wrapped)
    merged = merge_adapters(wrapped)
    assert merged is model
    assert not torch.equal(bias, merged.model.decoder.layers[0].fc2.bias)
    pruner.save_pretrained(merged, tmp_path / "out")
    verify_checkpoint(tmp_path / "out")


def test_what_cannot_be_masked_is_refused(saved, llama):
    with pytest.raises(ValueError, match=r"q_proj is pruned and has a Linear of a kind that can't be masked"):
        mask_adapters(adapted(saved, use_dora=True), saved.folder)
    with pytest.raises(ValueError, match=r"model is a LlamaForCausalLM: pass a peft\.PeftModel"):
        mask_adapters(llama)
    merged = adapted(saved)
    merged.merge_adapter()
    with pytest.raises(ValueError, match=r"q_proj has merged adapters already: call unmerge_adapter\(\) first"):
        mask_adapters(merged, saved.folder)
    dense = peft.get_peft_model(llama, peft.LoraConfig(r=4, target_modules="all-linear"))
    with pytest.raises(ValueError, match="LlamaForCausalLM is not pruned"):
        mask_adapters(dense)
    model = mask_adapters(adapted(saved), saved.folder).eval()
    with pytest.raises(ValueError, match="can't be mixed within a batch"):
        model(tiny_tokens(), adapter_names=["default"] * 8)


def test_adapters_on_fused_experts_are_refused():
    model = tiny_model("mixtral")
    pruner = FistaPruner(FistaPruningConfig(pattern="2:4", method="wanda", under_calibrated_tokens=0), progress=False)
    pruner.prune(model, tiny_tokens().split(4))
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"])
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.experts is pruned and has a ParamWrapper"):
        mask_adapters(peft.get_peft_model(model, config), pruner)
    attention = peft.get_peft_model(tiny := tiny_model("mixtral"), peft.LoraConfig(r=4, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="was not pruned by this FistaPruner"):
        mask_adapters(attention, pruner)
    assert attention.get_base_model() is tiny
