"""A run asks each question about its model and its configuration once."""

import sys
from collections import Counter

import pytest
from tiny_llama import tiny_llama, tiny_tokens
from transformers import AutoModelForCausalLM

from optimum_fista import FistaPruner, FistaPruningConfig

PATTERNS = ["unstructured", "2:4", "channels:0.25", "heads:0.5+layers:0.5"]


@pytest.fixture
def calls(monkeypatch) -> Counter:
    """How often each watched function was called, wherever the package imports it."""
    counts: Counter = Counter()
    for module in list(sys.modules.values()):
        if not getattr(module, "__name__", "").startswith("optimum_fista"):
            continue
        for name in ("find_decoder_layers", "parse_pattern"):
            function = vars(module).get(name)
            if function is None:
                continue

            def counted(*arguments, _function=function, _name=name, **options):
                counts[_name] += 1
                return _function(*arguments, **options)

            monkeypatch.setattr(module, name, counted)
    return counts


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_model_in_memory_is_searched_for_decoder_layers_once(calls, pattern):
    model = tiny_llama(num_hidden_layers=4)
    pruner = FistaPruner(FistaPruningConfig(pattern=pattern), progress=False)

    pruner.prune(model, tiny_tokens().split(4))

    assert calls["find_decoder_layers"] == 1


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_model_by_name_is_searched_for_decoder_layers_once(calls, pattern, tmp_path):
    tiny_llama(num_hidden_layers=4).save_pretrained(tmp_path / "dense")
    pruner = FistaPruner(FistaPruningConfig(pattern=pattern), progress=False)

    pruner.prune(tmp_path / "dense", tiny_tokens().split(4), output_dir=tmp_path / "pruned")

    assert calls["find_decoder_layers"] == 1


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("is_loaded", [False, True])
def test_a_model_of_an_earlier_run_is_searched_for_decoder_layers_once(
    calls, pattern, is_loaded, tmp_path
):
    tiny_llama(num_hidden_layers=4).save_pretrained(tmp_path / "dense")
    sparse = tmp_path / "sparse"
    batches = tiny_tokens().split(4)
    earlier = FistaPruner(FistaPruningConfig(pattern="2:4", method="magnitude"), progress=False)
    earlier.prune(tmp_path / "dense", batches, output_dir=sparse)
    calls.clear()
    pruner = FistaPruner(FistaPruningConfig(pattern=pattern), progress=False)

    if is_loaded:
        pruner.prune(AutoModelForCausalLM.from_pretrained(sparse), batches)
    else:
        pruner.prune(sparse, batches, output_dir=tmp_path / "pruned")

    assert calls["find_decoder_layers"] == 1


@pytest.mark.parametrize("overrides", [{}, {"*.q_proj": 0.25, "*.down_proj": "2:4"}])
def test_patterns_are_parsed_at_most_once_an_operator(calls, overrides):
    model = tiny_llama(num_hidden_layers=4)
    config = FistaPruningConfig(overrides=overrides)

    report = FistaPruner(config, progress=False).prune(model, tiny_tokens().split(4))

    assert len(report.operators) == 28  # seven of each of four layers
    assert calls["parse_pattern"] <= len(report.operators)
