"""The tokens that reach each expert are counted while texts run through a model."""

import pytest
import torch
from tiny_llama import tiny_tokens
from tiny_models import tiny_model

from optimum_fista.model.expert_counts import ExpertCounts, mixture_of
from optimum_fista.model.layers import find_decoder_layers


def tokens_by_router(model, ids):
    """For each decoder layer, how many of the tokens `ids` its own router sends to each of four experts."""
    layers = find_decoder_layers(model).modules
    counts = []

    def note(_, arguments):
        # hidden states, chosen experts and their weights
        counts.append(torch.bincount(arguments[1].flatten(), minlength=4).tolist())

    handles = [mixture_of(layer).module.register_forward_pre_hook(note) for layer in layers]
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    return counts


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_counts_are_those_of_the_routers_choices(family):
    model = tiny_model(family)
    ids = tiny_tokens(2, 12)
    layers = find_decoder_layers(model).modules
    counts = ExpertCounts()

    def run_counted(text, ids):
        with torch.no_grad(), counts.counted(text, 0, mixture_of(layers[0])):
            model(ids)

    run_counted("sea", ids[:1])
    run_counted("sea", ids[1:])
    run_counted("sky", ids[:1])

    assert counts.of("sea") == {0: tuple(tokens_by_router(model, ids)[0])}
    assert counts.of("sky") == {0: tuple(tokens_by_router(model, ids[:1])[0])}
    assert not mixture_of(layers[0]).module._forward_pre_hooks


def test_experts_that_get_zeros_for_other_tokens_are_counted_by_the_rest():
    """Llama 4 gives each expert rows for all tokens, which are zero unless its router has chosen the expert."""
    model = tiny_model("llama4_text")
    ids = tiny_tokens(2, 12)
    layer = find_decoder_layers(model).modules[0]
    counts = ExpertCounts()

    with torch.no_grad(), counts.counted("sea", 0, mixture_of(layer)):
        model(ids)

    (num_tokens,) = counts.of("sea").values()
    assert len(num_tokens) == 4
    assert sum(num_tokens) == ids.numel()  # one expert a token


def test_tokens_of_weight_0_reach_no_expert():
    model = tiny_model("mixtral")
    mixture = mixture_of(find_decoder_layers(model).modules[0])
    # Experts of each token, and their weights.
    chosen = torch.tensor(
        [
            [0, 1],
            [1, 2],
            [1, 3],
        ]
    )
    weights = torch.tensor(
        [
            [0.5, 0.5],
            [1.0, 0.0],
            [0.0, 1.0],
        ]
    )

    assigned = mixture.assigned(torch.randn(3, 32), chosen, weights)

    assert assigned.num_tokens().tolist() == [1, 2, 0, 1]


def test_a_layer_without_experts_has_no_mixture_and_no_counts():
    model = tiny_model("llama")
    counts = ExpertCounts()
    layer = find_decoder_layers(model).modules[0]

    with torch.no_grad(), counts.counted("sea", 0, mixture_of(layer)):
        model(tiny_tokens(2, 12))

    assert mixture_of(layer) is None
    assert counts.of("sea") == {}
