import warnings
from pathlib import Path

import pytest
import torch
from pruning import prune, same, weights
from tiny_llama import tiny_llama

from optimum_fista import FistaPruner, FistaPruningConfig
from optimum_fista.folder.checkpoint import read_report
from optimum_fista.solve.methods import METHODS, method_class


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
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
            if method_class(method).defaults.scope == "row":
                assert set(nonzero.sum(1).tolist()) == {columns // 2}
        else:
            kept = int(pattern[0])
            assert set(nonzero.view(rows, -1, 4).sum(-1).unique().tolist()) == {kept}
        assert operator.num_kept == int(nonzero.sum())
        assert operator.sparsity == 1 - operator.num_kept / nonzero.numel()
        assert 0 < operator.fit_error < 1.2
        assert operator.num_tokens == 128
    assert report.totals["num_zeros"] == sum(
        int((parameters[o.name] == 0).sum()) for o in report.operators
    )


def test_everything_but_the_operators_is_bit_identical(llama, tokens):
    dense = weights(llama)
    report = prune(llama, tokens.split(4))
    pruned = weights(llama)

    changed = {name for name in dense if not torch.equal(dense[name], pruned[name])}

    assert changed == {o.name for o in report.operators}


def test_dropout_is_off_while_pruning(tokens):
    results = []

    for training in (False, True):
        model = tiny_llama(attention_dropout=0.5).train(training)
        prune(model, tokens.split(4), method="wanda")
        results.append(weights(model))

    assert same(*results)


def test_the_report_describes_the_run(llama, tokens):
    pruner = FistaPruner(FistaPruningConfig(pattern="2:4", seed=5), progress=False)

    report = pruner.prune(llama, tokens.split(4), calibration_source="pydoc")

    assert report.config == pruner.config.resolved().to_dict()
    wanted = {"class": "LlamaForCausalLM", "model_type": "llama", "dtype": "float32"}
    assert (
        report.model.items()
        >= (wanted | {"num_parameters": sum(p.numel() for p in llama.parameters())}).items()
    )
    assert (
        report.calibration.items()
        >= {"source": "pydoc", "num_sequences": 8, "num_tokens": 128}.items()
    )
    assert 0 < report.totals["solve_seconds"] <= report.seconds["total"]
    names = [o.name for o in report.operators]
    assert names[0] == "model.layers.0.self_attn.q_proj.weight"
    assert names[3] == "model.layers.0.self_attn.o_proj.weight"
    assert names[-1] == "model.layers.1.mlp.down_proj.weight"
    assert all(o.iterations > 0 for o in report.operators)


def test_too_few_tokens_are_warned_about_once(llama, tokens):
    message = r"32 calibration tokens for the 48 inputs of .*down_proj.*rank-deficient"

    with pytest.warns(UserWarning, match=message) as seen:
        report = prune(llama, tokens[:2], method="wanda")

    assert len(seen) == 1
    assert report.warnings == [str(seen[0].message)]


def test_enough_tokens_are_not_warned_about(llama, tokens):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = prune(llama, tokens, method="wanda")

    assert report.warnings == []


def test_a_model_in_memory_is_saved_and_pushed(llama, tokens, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pushed = []
    monkeypatch.setattr(
        "optimum_fista.pruner.push_folder",
        lambda *given, **options: pushed.append((given, options)),
    )
    pruner = FistaPruner(FistaPruningConfig(method="magnitude"), progress=False)

    report = pruner.prune(llama, tokens)

    with pytest.raises(ValueError, match="repo_id='a b' is not a repository name"):
        pruner.push_to_hub(llama, "a b")
    assert not list(tmp_path.iterdir())
    pruner.push_to_hub(llama, "owner/model-50", private=True)
    assert pushed == [((Path("model-50"), "owner/model-50"), {"private": True})]
    assert read_report(Path("model-50")).totals == report.totals
