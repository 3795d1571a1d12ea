import pytest
import torch
from families import family_model
from raising import RaiseAt
from tiny_models import tiny_model
from torch import Tensor

from optimum_fista import FistaPruner, FistaPruningConfig
from optimum_fista.model.architecture import find_decoder_layers, find_operators
from optimum_fista.model.calibration import read_batches
from optimum_fista.model.correction import LayerTargets
from optimum_fista.model.groups import is_added_to_output
from optimum_fista.model.layer_inputs import LayerActivations, record_inputs

ADDED = {
    "llama": "mlp.down_proj",
    "opt": "fc2",
    "gpt2": "mlp.c_proj",
    "gpt_neox": "mlp.dense_4h_to_h",
    "falcon": "mlp.dense_4h_to_h",
}


def ids() -> Tensor:
    return torch.randint(1, 64, (12, 24), generator=torch.Generator().manual_seed(0))


def first_output(model) -> Tensor:
    with torch.no_grad():
        return model(ids(), output_hidden_states=True).hidden_states[1]


def prune(model, **options):
    FistaPruner(FistaPruningConfig(method="alps", **options), progress=False).prune(model, ids().split(4))
    return model


@torch.no_grad()
def first_layer(model):
    """The first decoder layer of a model, what enters it, and its operators by their names in it."""
    layers = find_decoder_layers(model)
    name, layer = next(iter(layers))
    recorded = record_inputs(model, layers, read_batches(ids(), 64))
    activations = LayerActivations(layer, recorded.calls[0], recorded.token_masks, torch.device("cpu"))
    operators = {key.removeprefix(f"{name}."): operator for key, operator in find_operators(name, layer).items()}
    return activations, recorded.hidden_states[0], operators


@torch.no_grad()
def added_operators(model, first_token=1.0):
    """Operators whose output is added to that of the first decoder layer; the first token's inputs are multiplied."""
    activations, hidden, operators = first_layer(model)
    hidden[:, 0] *= first_token
    return {name for name, operator in operators.items() if is_added_to_output(activations, operator.module, hidden)}


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
def test_a_scale_before_the_sum_is_seen(dtype):
    """MiniCPM3 multiplies outputs by .99, less than the rounding of the layer's output in bfloat16."""
    assert "mlp.down_proj" not in added_operators(family_model("minicpm3").to(dtype))


@pytest.mark.parametrize(("family", "corrected"), [("llama", 2), ("gemma3_text", 0)])
def test_the_report_says_where_nothing_was_corrected(family, corrected):
    model = tiny_model(family).bfloat16()
    config = FistaPruningConfig(method="wanda", error_correction=0.5, residual_correction=1.0)
    report = FistaPruner(config, progress=False).prune(model, ids().split(4))
    assert sum(operator.residual_corrected for operator in report.operators) == corrected
    said = [warning for warning in report.warnings if "no residual correction in 2 of 2 decoder layers" in warning]
    assert len(said) == (not corrected)


def test_a_trial_that_runs_out_of_memory_leaves_no_hook():
    activations, hidden, operators = first_layer(tiny_model("llama"))
    operator = operators["mlp.down_proj"]
    with torch.no_grad():
        with RaiseAt() as whole:
            assert is_added_to_output(activations, operator.module, hidden)
        for number in range(1, whole.count + 1):
            with RaiseAt(number, torch.OutOfMemoryError()), pytest.raises(torch.OutOfMemoryError):
                is_added_to_output(activations, operator.module, hidden)
            assert not operator.module._forward_hooks, f"operation {number} of {whole.count}"


@pytest.mark.parametrize("family", list(ADDED))
def test_the_layer_output_comes_closer_to_the_dense_one(family):
    dense = first_output(tiny_model(family))
    errors = [
        float((first_output(prune(tiny_model(family), residual_correction=share)) - dense).norm())
        for share in (0.0, 1.0)
    ]
    assert errors[1] < errors[0]


@pytest.mark.parametrize("family", ["llama", "opt", "falcon"])
def test_the_hidden_states_carried_on_are_those_of_the_pruned_model(family, monkeypatch):
    entered: list[list[Tensor]] = []

    class Spy(LayerTargets):
        def __init__(self, activations, groups, correction, entering, experts):
            entered.append(list(entering.pruned))
            super().__init__(activations, groups, correction, entering, experts)

    monkeypatch.setattr("optimum_fista.prune.loop.LayerTargets", Spy)
    model = prune(tiny_model(family), residual_correction=1.0, error_correction="full")
    assert torch.allclose(torch.cat(entered[1]), first_output(model), atol=1e-4)
