"""The operator whose output is added to the rest of the decoder layer's output."""

import pytest
import torch
from families import family_model
from tiny_models import tiny_model

from optimum_fista.model.calibration import read_batches
from optimum_fista.model.choice import find_operators
from optimum_fista.model.inputs import LayerActivations, LayerCall, record_inputs
from optimum_fista.model.last_operator import is_added_to_output
from optimum_fista.model.layers import find_decoder_layers

pytestmark = pytest.mark.usefixtures("no_gradients")
CPU = torch.device("cpu")
CALL = LayerCall((), {})


ADDED = {
    "llama": "mlp.down_proj",
    "opt": "fc2",
    "gpt2": "mlp.c_proj",
    "gpt_neox": "mlp.dense_4h_to_h",
    "falcon": "mlp.dense_4h_to_h",
}


def added_operators(model, first_token=1.0) -> set[str]:
    """Operators whose output is added to that of the first decoder layer; the first token's inputs are multiplied."""
    layers = find_decoder_layers(model)
    layer_name, layer = next(iter(layers))
    recorded = record_inputs(layers, read_batches(torch.arange(1, 49).view(4, 12), 64))
    activations = LayerActivations(layer, recorded.calls[0], recorded.token_masks, CPU)
    hidden = recorded.hidden_states[0]
    hidden[:, 0] *= first_token
    return {
        name.removeprefix(f"{layer_name}.")
        for name, operator in find_operators(layer_name, layer).items()
        if is_added_to_output(activations, operator.module, hidden)
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", [*ADDED, "gemma3_text"])
def test_the_operator_that_is_added_to_the_output_is_found(family, dtype):
    added = added_operators(tiny_model(family).to(dtype))

    if family == "gemma3_text":
        assert added == set(), "its outputs pass a norm first"
    else:
        assert ADDED[family] in added
        assert not any("up" in operator or "q_" in operator for operator in added)


def test_huge_activations_of_one_token_do_not_hide_what_comes_later():
    """In bfloat16 the MLP's answer to the attention is less than what a sum as large as that token's rounds off."""
    assert added_operators(tiny_model("llama").bfloat16(), first_token=1e4) == {"mlp.down_proj"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_operator_whose_output_is_scaled_before_the_sum_is_not_found(dtype):
    """MiniCPM3 multiplies outputs by .99, less than the rounding of the layer's output in bfloat16."""
    assert "mlp.down_proj" not in added_operators(family_model("minicpm3").to(dtype))
