"""Losses before and after, and the temperature, are those of the whole model."""

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from families import family_model, family_tokens
from tiny_llama import tiny_llama, tiny_tokens
from tiny_models import tiny_model
from torch.nn.functional import kl_div

from optimum_fista.model.architecture import UnsupportedArchitectureError, find_decoder_layers
from optimum_fista.model.loss_probe import LossProbe, divided


def logits_of(model, tokens):
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits.double()


def random_norms(model):
    """The model, with other weights and biases in its norms than ones and zeros."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter.data, 0.5, 0.3, generator=torch.Generator().manual_seed(len(name)))
    return model


def with_head_bias(model):
    """The model, with weights in the bias of its head."""
    torch.nn.init.normal_(model.lm_head.bias.data, generator=torch.Generator().manual_seed(0))
    return model


def probed(model, tokens, harm) -> LossProbe:
    """What a probe finds if `harm` is done to each decoder layer."""
    layers = find_decoder_layers(model)
    probe = LossProbe(model, layers, tokens, None, fits_temperature=True)
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


FAMILIES = {
    "llama": lambda: random_norms(tiny_llama()),
    "adds 1 to its weight": lambda: random_norms(tiny_model("gemma3_text")),
    "softcapping": lambda: random_norms(tiny_model("gemma3_text", final_logit_softcapping=5.0)),
    "biases": lambda: random_norms(tiny_model("gpt2")),
    "a head with a bias": lambda: with_head_bias(family_model("phi")),
    "a projection after the norm": lambda: random_norms(tiny_model("opt", word_embed_proj_dim=16)),
    "a norm without weights": lambda: family_model("olmo"),
    "a number after the norm": lambda: family_model("minicpm3"),
}


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_temperature_divides_the_logits_and_diverges_least(kind):
    model, tokens = FAMILIES[kind](), tiny_tokens(8, 16)
    dense = logits_of(model, tokens).log_softmax(-1)
    probe = probed(model, tokens, noisy)
    found, pruned = probe.temperature, logits_of(model, tokens)

    def divergence(temperature):
        cap = getattr(model.config, "final_logit_softcapping", None)
        scaled = pruned / temperature if cap is None else cap * ((pruned / cap).atanh() / temperature).tanh()
        return kl_div(scaled.log_softmax(-1), dense, log_target=True, reduction="sum").item() / tokens.numel()

    assert found.divergence_before == pytest.approx(divergence(1.0), rel=1e-3)
    assert found.divergence == pytest.approx(divergence(found.value), rel=1e-3)
    assert found.divergence < found.divergence_before
    least = min(divergence(0.8 + 0.01 * step) for step in range(71))
    assert found.divergence <= least + 0.02 * (found.divergence_before - least)
    losses = [logits_of(model, tokens)]
    for name, offset in found.tensors.items():
        owner, _, leaf = name.rpartition(".")
        parameter = getattr(model.get_submodule(owner), leaf)
        parameter.data.copy_(divided(parameter.data, offset, found.value))
    losses.append(logits_of(model, tokens))
    after = kl_div(losses[1].log_softmax(-1), dense, log_target=True, reduction="sum").item() / tokens.numel()
    assert after == pytest.approx(found.divergence, rel=1e-3)
    targets = tokens[:, 1:].flatten()
    loss = torch.nn.functional.cross_entropy(losses[1][:, :-1].flatten(0, 1), targets).item()
    assert probe.losses["pruned"] == pytest.approx(loss, rel=1e-4)
    assert torch.equal(losses[0].argmax(-1), losses[1].argmax(-1))


def test_a_model_that_was_put_back_before_stays_so():
    model = tiny_llama()
    context = probed(model, tiny_tokens(), noisy)._scaled.divided(2.0)
    context.__enter__()
    kept = torch.nn.Parameter(torch.empty(32, device="meta"))
    model.model.norm.register_parameter("weight", kept)
    context.__exit__(None, None, None)
    assert model.model.norm.weight is kept


def test_a_model_that_is_as_it_was_keeps_its_logits():
    found = probed(tiny_llama(), tiny_tokens(), lambda layer: None).temperature
    assert (found.value, found.tensors) == (1.0, {})


def test_sequences_longer_than_what_is_held_at_a_time_are_measured_in_parts():
    model, tokens = tiny_llama(max_position_embeddings=2048), tiny_tokens(2, 1030)
    probe = probed(model, tokens, noisy)
    assert list(probe.tokens.shape) == [4, 512]
    assert 1 < probe.temperature.value <= 1.5


def test_offloaded_parameters_are_measured_and_stay_where_they_are():
    model, offloaded = tiny_llama(), tiny_llama()
    cpu_offload(offloaded, torch.device("cpu"))
    probes = [probed(each, tiny_tokens(), lambda layer: None) for each in (model, offloaded)]
    assert probes[0].losses == probes[1].losses
    assert offloaded.model.norm.weight.device.type == "meta"


def test_a_parameter_is_divided_in_the_same_steps_on_every_device():
    weight = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    expected = (weight.numpy() + np.float32(1)) * np.float32(1 / 1.1) - np.float32(1)
    assert np.array_equal(divided(weight, 1.0, 1.1).numpy(), expected)


@pytest.mark.parametrize("declared", [True, False])
def test_a_model_whose_logits_no_parameter_scales_is_refused(declared):
    model = family_model("olmo")
    if declared:
        model.all_tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    else:
        model.lm_head.weight = model.model.embed_tokens.weight
    message = "temperature_scaling=True: no parameter of OlmoForCausalLM scales all logits"
    with pytest.raises(UnsupportedArchitectureError, match=message):
        probed(model, tiny_tokens(), noisy)


def test_logits_that_are_not_finite_are_refused():
    model = tiny_llama()
    model.model.norm.weight.data.fill_(torch.inf)
    with pytest.raises(ValueError, match="the logits of the LlamaForCausalLM are NaN or Inf"):
        probed(model, tiny_tokens(), noisy)


@pytest.mark.parametrize("fits", [True, False])
def test_what_was_found_is_kept_and_taken_up_again(fits):
    model, tokens = tiny_llama(), tiny_tokens()
    probe = probed(model, tokens, noisy)
    if not fits:
        probe.temperature = None
    again = LossProbe(model, find_decoder_layers(model), tokens, None, fits_temperature=fits)
    assert again.resume(probe.next, probe.kept())
    assert (again.losses, again.temperature) == (probe.losses, probe.temperature)


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
