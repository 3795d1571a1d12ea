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
    """What is found if the weights of every decoder layer are halved."""
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
    with torch.no_grad():
        logits = [model(input_ids=row[None], use_cache=False).logits[0, :-1] for row in rows]
    targets = torch.cat([row[1:] for row in rows])
    return float(torch.nn.functional.cross_entropy(torch.cat(logits), targets))


@pytest.mark.parametrize(
    "family", ["llama", "gemma3n_text"]
)  # the second shares a dictionary between its layers
def test_losses_are_those_of_the_whole_model(family, monkeypatch):
    monkeypatch.setattr(module, "LOGITS_TOGETHER", 5)
    model, ids = family_model(family), torch.cat(family_tokens())
    mask = torch.ones_like(ids)
    mask[1, 20:] = 0
    rows, before = [ids[0], ids[1, :20]], loss_of(model, [ids[0], ids[1, :20]])
    found = measured(model, [{"input_ids": ids, "attention_mask": mask}])
    assert [found.losses["dense"], found.losses["pruned"]] == pytest.approx(
        [before, loss_of(model, rows)], rel=1e-4
    )
    assert found.perplexity()["num_tokens"] == 52


def test_sequences_are_taken_until_there_are_enough(monkeypatch):
    monkeypatch.setattr(module, "LEAST_TOKENS", 25)
    held_out = HeldOut(
        find_decoder_layers(tiny_llama()), read_batches(tiny_tokens(8, 12), 64), None
    )
    assert [list(batch.input_ids.shape) for batch in held_out.sequences] == [[3, 12]]


def test_offloaded_parameters_are_measured_and_stay_where_they_are():
    model, offloaded = tiny_llama(), tiny_llama()
    cpu_offload(offloaded, torch.device("cpu"))
    layers = find_decoder_layers(offloaded)
    held_out = HeldOut(layers, read_batches(tiny_tokens(), 64), None)
    with torch.no_grad():
        assert held_out.begin()
        for index in range(len(layers)):
            for network in ("dense", "pruned"):
                held_out.run(index, network)
        held_out.measure()
    assert held_out.losses["dense"] == pytest.approx(loss_of(model, tiny_tokens()), rel=1e-5)
    assert offloaded.model.norm.weight.device.type == "meta"


def test_what_can_not_be_measured_is_not():
    model = family_model("glm_moe_dsa")  # its layers hand on more than hidden states
    assert not HeldOut(find_decoder_layers(model), read_batches(family_tokens(), 64), None).begin()
    model = family_model("gemma3n_text")
    again = HeldOut(find_decoder_layers(model), read_batches(family_tokens(), 64), None)
    assert again.resume(
        {key: [torch.zeros(4, 2, 32, 16)] for key in ("held_out_dense", "held_out_pruned")}
    )
    assert not again.begin()
