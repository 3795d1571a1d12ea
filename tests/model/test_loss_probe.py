"""Losses before and after are those of the whole model."""

import pytest
import torch
from accelerate import cpu_offload
from families import family_model, family_tokens
from tiny_llama import tiny_llama, tiny_tokens

from optimum_fista.model.architecture import find_decoder_layers
from optimum_fista.model.loss_probe import LossProbe


def probed(model, tokens, harm) -> LossProbe:
    """What a probe finds if `harm` is done to each decoder layer."""
    layers = find_decoder_layers(model)
    probe = LossProbe(model, layers, tokens, None)
    with torch.no_grad():
        assert probe.begin()
        for index, (_, layer) in enumerate(layers):
            probe.run(index, "dense")
            harm(layer)
            probe.run(index, "pruned")
            probe.leave(index)
    return probe


def noisy(layer) -> None:
    """Make a decoder layer say something else."""
    for parameter in layer.parameters():
        if parameter.ndim > 1:
            parameter += (
                0.3 * parameter.std() * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
            )


def test_sequences_longer_than_what_is_held_at_a_time_are_measured_in_parts():
    model, tokens = tiny_llama(max_position_embeddings=2048), tiny_tokens(2, 1030)
    probe = probed(model, tokens, noisy)
    assert list(probe.tokens.shape) == [4, 512]


def test_offloaded_parameters_are_measured_and_stay_where_they_are():
    model, offloaded = tiny_llama(), tiny_llama()
    cpu_offload(offloaded, torch.device("cpu"))
    probes = [probed(each, tiny_tokens(), lambda layer: None) for each in (model, offloaded)]
    assert probes[0].losses == probes[1].losses
    assert offloaded.model.norm.weight.device.type == "meta"


def test_what_was_found_is_kept_and_taken_up_again():
    model, tokens = tiny_llama(), tiny_tokens()
    probe = probed(model, tokens, noisy)
    again = LossProbe(model, find_decoder_layers(model), tokens, None)
    assert again.resume(probe.next, probe.kept())
    assert again.losses == probe.losses


def test_layers_that_share_a_dictionary_have_one_a_network():
    model, tokens = family_model("gemma3n_text"), torch.cat(family_tokens())
    layers = find_decoder_layers(model)
    probe, losses = LossProbe(model, layers, tokens, None), []

    def loss() -> float:
        logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
        return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()))

    with torch.no_grad():
        losses.append(loss())
        assert probe.begin()
        for index, (_, layer) in enumerate(layers):
            probe.run(index, "dense")
            for parameter in layer.parameters():
                parameter.mul_(0.5)
            probe.run(index, "pruned")
            probe.leave(index)
        losses.append(loss())
        assert [probe.losses["dense"], probe.losses["pruned"]] == pytest.approx(losses, rel=1e-4)
        again = LossProbe(model, layers, tokens, None)
        assert again.resume(1, {"tokens": again.tokens})
        assert not again.begin()


def test_no_loss_is_measured_if_layers_hand_on_more_than_hidden_states():
    model = family_model("glm_moe_dsa")
    assert not LossProbe(model, find_decoder_layers(model), family_tokens()[0], None).begin()
