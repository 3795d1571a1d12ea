"""Losses before and after are those of the whole model."""

import pytest
import torch
from accelerate import cpu_offload
from families import family_model, family_tokens
from tiny_llama import tiny_llama, tiny_tokens

from optimum_fista.model import held_out as module
from optimum_fista.model.calibration import read_batches
from optimum_fista.model.held_out import HeldOut
from optimum_fista.model.layers import find_decoder_layers


def measured(model, batches) -> HeldOut:
    """Held-out text after the weights of every decoder layer of the model were halved."""
    layers = find_decoder_layers(model)
    held_out = HeldOut(layers, read_batches(batches, 64), None)
    with torch.no_grad():
        assert held_out.begin()
        for index, (_, layer) in enumerate(layers):
            held_out.run(index, "dense")
            for parameter in layer.parameters():
                parameter.data.mul_(0.5)
            held_out.run(index, "pruned")
        held_out.measure()
    return held_out


def loss_of(model, rows) -> float:
    """Cross-entropy of the next token in sequences, each of which runs alone."""
    with torch.no_grad():
        logits = [model(input_ids=row[None], use_cache=False).logits[0, :-1] for row in rows]
    targets = torch.cat([row[1:] for row in rows])
    return float(torch.nn.functional.cross_entropy(torch.cat(logits), targets))


# the second shares a dictionary between its layers
@pytest.mark.parametrize("family", ["llama", "gemma3n_text"])
def test_losses_by_single_layers_are_those_of_the_whole_model(family, monkeypatch):
    monkeypatch.setattr(module, "LOGITS_TOGETHER", 5)
    model = family_model(family)
    ids = torch.cat(family_tokens())
    mask = torch.ones_like(ids)
    mask[1, 20:] = 0
    rows = [ids[0], ids[1, :20]]
    loss_before = loss_of(model, rows)

    held_out = measured(model, [{"input_ids": ids, "attention_mask": mask}])

    assert held_out.losses["dense"] == pytest.approx(loss_before, rel=1e-4)
    assert held_out.losses["pruned"] == pytest.approx(loss_of(model, rows), rel=1e-4)
    assert held_out.perplexity()["num_tokens"] == 32 + 20


def test_held_out_sequences_are_taken_until_there_are_enough_tokens(monkeypatch):
    monkeypatch.setattr(module, "LEAST_TOKENS", 25)
    batches = read_batches(tiny_tokens(8, 12), 64)

    held_out = HeldOut(find_decoder_layers(tiny_llama()), batches, None)

    assert [list(batch.input_ids.shape) for batch in held_out.sequences] == [[3, 12]]


def test_offloaded_parameters_are_measured_and_stay_where_they_are():
    offloaded = tiny_llama()
    cpu_offload(offloaded, torch.device("cpu"))
    layers = find_decoder_layers(offloaded)
    held_out = HeldOut(layers, read_batches(tiny_tokens(), 64), None)

    with torch.no_grad():
        assert held_out.begin()
        for index in range(len(layers)):
            for network in ("dense", "pruned"):
                held_out.run(index, network)
        held_out.measure()

    expected = loss_of(tiny_llama(), tiny_tokens())
    assert held_out.losses["dense"] == pytest.approx(expected, rel=1e-5)
    assert offloaded.model.norm.weight.device.type == "meta"


def test_layers_that_pass_on_more_than_hidden_states_are_not_measured():
    layers = find_decoder_layers(family_model("glm_moe_dsa"))

    assert not HeldOut(layers, read_batches(family_tokens(), 64), None).begin()


def test_layers_that_share_a_dictionary_are_not_measured_after_a_resume():
    layers = find_decoder_layers(family_model("gemma3n_text"))
    held_out = HeldOut(layers, read_batches(family_tokens(), 64), None)
    hidden_states = [torch.zeros(4, 2, 32, 16)]

    assert held_out.resume({"held_out_dense": hidden_states, "held_out_pruned": hidden_states})
    assert not held_out.begin()
