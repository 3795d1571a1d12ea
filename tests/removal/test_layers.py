"""Decoder layers to remove are those that trying all of them, one model after another, would find."""

import pytest
import torch
from accelerate import cpu_offload
from families import family_model, family_tokens
from shrunken_models import plan_for
from tiny_llama import tiny_llama, tiny_tokens
from tiny_models import tiny_model
from transformers.models.llama.modeling_llama import LlamaAttention
from untouched import Untouched

from optimum_fista.model import UnsupportedArchitectureError
from optimum_fista.model.calibration import CalibrationBatch
from optimum_fista.model.layers import find_decoder_layers
from optimum_fista.model.sensitivity import DenseLoss
from optimum_fista.removal import layers as module
from optimum_fista.removal.layers import layers_with_least_loss
from optimum_fista.removal.model_outline import ModelOutline
from optimum_fista.removal.shrinking import plan_shrinking
from optimum_fista.removal.smaller_modules import shrink_model


def chosen(model, tokens, count, num_tokens=10**6, **options):
    """Choose `count` layers to remove: their numbers, with the loss after each. `tokens` are ids or a batch."""
    batches = [tokens]
    if not isinstance(tokens, CalibrationBatch):
        batches = [CalibrationBatch(ids) for ids in tokens.split(4)]
    with torch.no_grad():
        layers = find_decoder_layers(model)
        loss = DenseLoss(layers, batches, num_tokens, **options)
        return layers_with_least_loss(loss, ModelOutline(layers), count)


def loss_with(make, tokens, remaining) -> float:
    """Cross-entropy of the next token of a new model that keeps only the layers `remaining`."""
    model = make()
    shrink_model(model, plan_for(model, layers=remaining), {})
    with torch.no_grad():
        logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
    return float(
        torch.nn.functional.cross_entropy(logits.flatten(0, 1).double(), tokens[:, 1:].flatten())
    )


def by_brute_force(make, tokens, total, count):
    """Choose `count` of `total` layers by the loss of a new model for every candidate."""
    remaining = list(range(total))
    removed = []
    for _ in range(count):
        losses = {}
        for candidate in remaining:
            others = [index for index in remaining if index != candidate]
            losses[candidate] = loss_with(make, tokens, others)
        cheapest = min(losses, key=losses.get)
        removed.append((cheapest, losses[cheapest]))
        remaining.remove(cheapest)
    return removed


@pytest.mark.parametrize(
    "make",
    [
        lambda: tiny_llama(num_hidden_layers=5),
        lambda: tiny_model("gpt2", n_layer=4),
        # projections beside the layers
        lambda: tiny_model("opt", num_hidden_layers=4, word_embed_proj_dim=16),
        lambda: tiny_model("gemma3_text", num_hidden_layers=4, final_logit_softcapping=2.0),
        lambda: tiny_model("qwen3_moe", num_hidden_layers=4, mlp_only_layers=[1]),
    ],
    ids=["llama", "gpt2", "opt", "gemma3", "qwen3_moe"],
)
def test_the_layers_chosen_are_those_found_by_trying_every_smaller_model(make):
    model = make()
    tokens = tiny_tokens(6, 12)
    total = len(find_decoder_layers(model))
    expected = by_brute_force(make, tokens, total, total - 2)

    with Untouched(model):
        removed = chosen(model, tokens, total - 2)

    assert [index for index, _ in removed] == [index for index, _ in expected]
    assert [loss for _, loss in removed] == pytest.approx([loss for _, loss in expected], rel=1e-5)
    assert len(find_decoder_layers(model)) == total


def test_padding_does_not_change_the_choice_or_the_losses():
    model = tiny_llama(num_hidden_layers=4)
    tokens = tiny_tokens(4, 12)
    padded = torch.cat([tokens, torch.full((4, 3), 3)], dim=1)
    mask = torch.ones_like(padded, dtype=torch.bool)
    mask[:, 12:] = False

    removed = chosen(model, CalibrationBatch(padded, mask), 2)

    assert removed == chosen(model, tokens, 2)


def test_sequences_beyond_the_number_of_tokens_do_not_change_the_choice():
    model = tiny_llama(num_hidden_layers=4)
    tokens = tiny_tokens(4, 12)

    removed = chosen(model, tokens, 2, num_tokens=24)

    assert removed == chosen(model, tokens[:2], 2)


def test_the_choice_is_the_same_with_offloaded_weights_and_hidden_states_in_files(tmp_path):
    expected = chosen(tiny_llama(num_hidden_layers=4), tiny_tokens(), 2)
    offloaded = cpu_offload(tiny_llama(num_hidden_layers=4))

    removed = chosen(offloaded, tiny_tokens(), 2, storage=tmp_path)

    assert removed == expected


def test_a_layer_that_no_configuration_can_do_without_is_passed_over(monkeypatch):
    model = tiny_llama(num_hidden_layers=4)
    tokens = tiny_tokens()
    (first, _), _ = chosen(model, tokens, 2)

    def plan(outline, *, layers):
        if first not in layers:
            raise ValueError("it can't be said")
        return plan_shrinking(outline, layers=layers)

    monkeypatch.setattr(module, "plan_shrinking", plan)

    removed = chosen(model, tokens, 2)

    assert first not in dict(removed)
    with pytest.raises(
        ValueError,
        match=rf"none of the decoder layers \[{first}\] can be removed: it can't be said",
    ):
        chosen(model, tokens, 4)


def test_a_model_whose_loss_is_not_finite_is_refused():
    model = tiny_llama(num_hidden_layers=3)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")

    with pytest.raises(
        ValueError, match="the loss of the model on the calibration tokens is NaN or Inf"
    ):
        chosen(model, tiny_tokens(), 1)


def test_layers_that_depend_on_their_number_are_refused(monkeypatch):
    model = tiny_llama(num_hidden_layers=5)
    attend = LlamaAttention.forward
    assert chosen(model, tiny_tokens(), 1)[0][0] == 0  # so that all others get another number

    def forward(self, *arguments, **keywords):
        output, weights = attend(self, *arguments, **keywords)
        return output * (1 + self.layer_idx), weights

    monkeypatch.setattr(LlamaAttention, "forward", forward)

    with pytest.raises(
        UnsupportedArchitectureError,
        match=r"layers.1 does not .* on the number of the decoder layer",
    ):
        chosen(model, tiny_tokens(), 1)


def test_layers_that_hand_on_more_than_hidden_states_are_refused():
    # some of its decoder layers attend to the tokens that the layer before has chosen
    model = family_model("glm_moe_dsa")

    message = "pass more than hidden states to the next one, so none can"
    with pytest.raises(UnsupportedArchitectureError, match=message):
        chosen(model, family_tokens()[0], 1)


def test_calibration_with_sequences_of_one_token_only_is_refused():
    with pytest.raises(ValueError, match="no sequence of two tokens"):
        chosen(tiny_llama(), torch.ones(4, 1, dtype=torch.int64), 1)
