import random

import numpy as np
import pytest
import torch
from layer_problems import WEIGHT_METHODS
from pruning import prune, same, weights
from tiny_llama import tiny_llama

from optimum_fista import FistaPruner, FistaPruningConfig
from optimum_fista.run.config import method_defaults


@pytest.mark.parametrize("method", WEIGHT_METHODS)
@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "1:4"])
def test_every_method_makes_exactly_the_zeros_of_the_pattern(llama, tokens, method, pattern):
    report = prune(llama, tokens.split(4), method=method, pattern=pattern, allocation="uniform")
    parameters = dict(llama.named_parameters())
    assert len(report.operators) == 14
    for operator in report.operators:
        nonzero = parameters[operator.name] != 0
        rows, columns = operator.shape
        assert operator.shape == nonzero.shape
        if pattern == "unstructured":
            assert int(nonzero.sum()) == rows * columns // 2
            if method_defaults(method).scope == "row":
                assert set(nonzero.sum(1).tolist()) == {columns // 2}
        else:
            kept = int(pattern[0])
            assert set(nonzero.view(rows, -1, 4).sum(-1).unique().tolist()) == {kept}
        assert operator.num_kept == int(nonzero.sum())
        assert operator.sparsity == 1 - operator.num_kept / nonzero.numel()
        assert 0 < operator.fit_error < 1.2
        assert operator.num_tokens == 128
    assert report.totals["num_zeros"] == sum(int((parameters[o.name] == 0).sum()) for o in report.operators)


def test_everything_but_the_operators_is_bit_identical(llama, tokens):
    dense = weights(llama)
    report = prune(llama, tokens.split(4))
    pruned = weights(llama)
    changed = {name for name in dense if not torch.equal(dense[name], pruned[name])}
    assert changed == {o.name for o in report.operators}


def test_same_input_same_bits(tokens):
    results = []
    for _ in range(2):
        model = tiny_llama()
        report = prune(model, tokens.split(4))
        results.append((weights(model), [o.fit_error for o in report.operators]))
    assert same(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]


def test_modes_of_all_modules_are_kept(llama, tokens):
    llama.train()
    llama.model.layers[1].mlp.eval()
    before = {name: module.training for name, module in llama.named_modules()}
    prune(llama, tokens.split(4), method="wanda")
    assert {name: module.training for name, module in llama.named_modules()} == before
    llama.eval()
    prune(llama, tokens.split(4), method="wanda")
    assert not any(module.training for module in llama.modules())


def test_dropout_is_off_while_pruning(tokens):
    results = []
    for training in (False, True):
        model = tiny_llama(attention_dropout=0.5).train(training)
        prune(model, tokens.split(4), method="wanda")
        results.append(weights(model))
    assert same(*results)


def test_model_is_left_without_hooks_and_gradients(llama, tokens):
    forwards = {name: module.forward for name, module in llama.named_modules()}
    prune(llama, tokens.split(4), error_correction="full")
    for name, module in llama.named_modules():
        assert not module._forward_hooks, name
        assert not module._forward_pre_hooks, name
        assert module.forward == forwards[name], name
    assert all(p.requires_grad and p.grad is None for p in llama.parameters())
    llama(input_ids=tokens[:1], labels=tokens[:1]).loss.backward()


@pytest.mark.parametrize("method", WEIGHT_METHODS)
def test_global_random_states_are_untouched(llama, tokens, method):
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()
    prune(llama, tokens.split(4), method=method)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), before[1], strict=True))
    assert random.getstate() == before[2]


def test_report_describes_the_run(llama, tokens):
    pruner = FistaPruner(FistaPruningConfig(pattern="2:4", seed=5), progress=False)
    report = pruner.prune(llama, tokens.split(4), calibration_source="pydoc")
    assert report.config == pruner.config.resolved().to_dict()
    assert report.model["class"] == "LlamaForCausalLM"
    assert report.model["model_type"] == "llama"
    assert report.model["dtype"] == "float32"
    assert report.model["num_parameters"] == sum(p.numel() for p in llama.parameters())
    assert report.calibration["source"] == "pydoc"
    assert report.calibration["num_sequences"] == 8
    assert report.calibration["num_tokens"] == 128
    assert 0 < report.totals["solve_seconds"] <= report.seconds["total"]
    names = [o.name for o in report.operators]
    assert names[0] == "model.layers.0.self_attn.q_proj.weight"
    assert names[3] == "model.layers.0.self_attn.o_proj.weight"
    assert names[-1] == "model.layers.1.mlp.down_proj.weight"
    assert all(o.iterations > 0 for o in report.operators)


def test_progress_bar_can_be_switched_off(llama, tokens, capsys):
    prune(llama, tokens.split(4), method="wanda")
    assert capsys.readouterr().err == ""
    FistaPruner(FistaPruningConfig(method="wanda")).prune(tiny_llama(), tokens.split(4))
    shown = capsys.readouterr().err
    assert "2/2" in shown
    assert "layer 2/2 mlp.down_proj" in shown
