"""Losses and gradients by logits of a few positions at a time are those of whole logits."""

import pytest
import torch
from families import family_model, family_tokens
from killed import interrupted_after
from media_models import MEDIA_FAMILIES, media_batch, media_model

from optimum_fista import FistaPruner, FistaPruningConfig
from optimum_fista.evaluate.perplexity import evaluate_perplexity
from optimum_fista.model import predictor as module
from optimum_fista.model.calibration import read_batches
from optimum_fista.model.choice import find_operators
from optimum_fista.model.layers import find_decoder_layers, token_limits
from optimum_fista.model.media import media_arguments
from optimum_fista.model.predictor import Predictor, positions_per_chunk
from optimum_fista.model.sensitivity import DenseLoss, measure_sensitivities

# a head with a bias, soft-capping, a factor, a divisor, a decoder inside another module, a mixture; one can't be cut
FAMILIES = {
    "llama": True,
    "phi": True,
    "gemma2": True,
    "gemma3_text": True,
    "cohere": True,
    "granite": True,
    "opt": True,
    "qwen2_moe": True,
    "llama4_text": False,
}


def operators_of(model):
    """The operators of all decoder layers, by name."""
    operators = {}
    for name, layer in find_decoder_layers(model):
        operators |= find_operators(name, layer)
    return operators


def sensitivities_of(model, batches):
    """Sensitivities of all operators of a model on all tokens."""
    batches = read_batches(batches, *token_limits(model), media_arguments(model))
    with torch.no_grad():
        loss = DenseLoss(find_decoder_layers(model), batches, num_tokens=10_000)
        sensitivities, _ = measure_sensitivities(loss, operators_of(model))
    return sensitivities


def use_small_chunks(monkeypatch, model, positions):
    """Let few positions have logits at the same time."""
    vocabulary, _ = token_limits(model)
    monkeypatch.setattr(module, "POSITIONS_ON_CPU", 1)
    monkeypatch.setattr(module, "LOGITS_PER_CHUNK", positions * vocabulary)
    assert positions_per_chunk(model) == positions


def require_same(found, expected):
    """Sensitivities are equal but for float32 rounding."""
    assert found.keys() == expected.keys()
    assert any(one.has_gradient for one in expected.values())
    for name, one in expected.items():
        largest = float(one.outputs.max())
        torch.testing.assert_close(found[name].outputs, one.outputs, rtol=1e-3, atol=1e-5 * largest)
        torch.testing.assert_close(found[name].inputs, one.inputs)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_the_allocation_are_those_of_whole_logits(family, monkeypatch):
    model = family_model(family)
    batches = [{"input_ids": ids} for ids in family_tokens()]
    expected = sensitivities_of(model, batches)

    use_small_chunks(monkeypatch, model, 7)
    found = sensitivities_of(model, batches)

    assert Predictor(model).is_cut == FAMILIES[family]
    require_same(found, expected)


@pytest.mark.parametrize("family", ["llama", "llama4_text"])
def test_bytes_of_logits_beyond_a_chunk_are_counted_only_if_a_model_cant_be_cut(
    family, monkeypatch
):
    model = family_model(family)
    vocabulary, _ = token_limits(model)
    use_small_chunks(monkeypatch, model, 7)

    predictor = Predictor(model)

    expected = 0 if FAMILIES[family] else 13 * vocabulary * 4  # 20 positions less 7, 4 bytes each
    assert predictor.bytes_beyond_a_chunk(20, 4) == expected
    assert predictor.bytes_beyond_a_chunk(7, 4) == 0


@pytest.mark.parametrize("family", ["llama", "llama4_text"])
@pytest.mark.filterwarnings("ignore")
def test_a_run_says_that_it_takes_more_memory_if_a_model_cant_be_cut(family, monkeypatch):
    model = family_model(family)
    use_small_chunks(monkeypatch, model, 7)
    config = FistaPruningConfig(method="wanda", allocation="fisher")

    report = FistaPruner(config, progress=False).prune(model, family_tokens())

    warnings = [text for text in report.warnings if "can't be run without its head" in text]
    assert len(warnings) == (0 if FAMILIES[family] else 1)
    assert all("more than the estimate counts" in text for text in warnings)


@pytest.mark.filterwarnings("ignore")
def test_a_run_that_resumes_says_that_it_took_more_memory(tmp_path, monkeypatch):
    model = family_model("llama4_text")
    model.save_pretrained(tmp_path / "source")
    use_small_chunks(monkeypatch, model, 7)
    pruner = FistaPruner(FistaPruningConfig(method="wanda", allocation="fisher"), progress=False)

    def prune():
        return pruner.prune(tmp_path / "source", family_tokens(), output_dir=tmp_path / "pruned")

    with interrupted_after(0), pytest.raises(KeyboardInterrupt):
        prune()
    report = prune()

    warnings = [text for text in report.warnings if "can't be run without its head" in text]
    assert len(warnings) == 1
    assert "more than the estimate counts" in warnings[0]


@pytest.mark.parametrize("family", MEDIA_FAMILIES)
def test_gradients_of_sequences_with_images_are_those_of_whole_logits(family, monkeypatch):
    model = media_model(family)
    expected = sensitivities_of(model, [media_batch(family)])

    use_small_chunks(monkeypatch, model, 7)
    found = sensitivities_of(model, [media_batch(family)])

    require_same(found, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_perplexity_by_chunks_is_that_of_whole_logits(family, monkeypatch):
    model = family_model(family)
    windows = torch.cat(family_tokens())
    expected = evaluate_perplexity(model, windows, batch_size=2, progress=False)

    use_small_chunks(monkeypatch, model, 7)
    found = evaluate_perplexity(model, windows, batch_size=2, progress=False)

    assert found.perplexity == pytest.approx(expected.perplexity, rel=1e-5)
