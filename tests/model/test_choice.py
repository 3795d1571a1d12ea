"""Which matrices of a decoder layer are operators, and which of them stay dense."""

import pytest
import torch
from tiny_models import MOE_FAMILIES, tiny_model
from torch import nn

from optimum_fista.model import UnsupportedArchitectureError
from optimum_fista.model.choice import find_operators, skipped_modules
from optimum_fista.model.layers import find_decoder_layers


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_matrices_of_fused_experts_are_operators_unless_they_stay_dense(family):
    name, layer = list(find_decoder_layers(tiny_model(family)))[1]
    fused = next(
        key for key, module in layer.named_modules(prefix=name) if key.endswith(".experts")
    )

    operators = find_operators(name, layer)

    of_experts = [key for key in operators if key.startswith(f"{fused}.")]
    assert of_experts == [
        f"{fused}.{expert}.{kind}"
        for expert in range(4)
        for kind in ("gate_proj", "up_proj", "down_proj")
    ]
    rest = operators.keys() - set(of_experts)
    kinds = {key.rpartition(".")[2].replace("q_b_proj", "q_proj") for key in rest}
    assert {"q_proj", "o_proj"} <= kinds
    for pattern in ("*.experts", fused):
        assert set(find_operators(name, layer, [pattern])) == rest
        assert skipped_modules(name, layer, [pattern])[fused] == "exclude"
    assert set(find_operators(name, layer, ["*.q_proj", "model.layers.0.*"])) == set(operators)


def test_fused_experts_of_an_unknown_form_are_refused_unless_they_stay_dense():
    layer = nn.Module()
    layer.experts = nn.Module()
    layer.experts.mixed = nn.Parameter(torch.zeros(2, 4, 4))
    layer.proj = nn.Linear(4, 4)

    with pytest.raises(
        UnsupportedArchitectureError,
        match=r"^layer\.experts \(Module\) keeps .*gate_up_proj.*exclude=\['\*\.experts'\]",
    ):
        find_operators("layer", layer)

    assert list(find_operators("layer", layer, ["*.experts"])) == ["layer.proj"]


def test_routers_beside_fused_experts_stay_dense():
    name, layer = next(iter(find_decoder_layers(tiny_model("qwen3_moe"))))
    layer.mlp.gate = nn.Linear(32, 4)
    layer.mlp.shared_expert_gate = nn.Linear(32, 1)
    layer.mlp.latent = nn.Linear(32, 8)

    operators = find_operators(name, layer)

    assert "model.layers.0.mlp.latent" in operators
    assert "model.layers.0.mlp.gate" not in operators
    assert skipped_modules(name, layer) == {
        "model.layers.0.mlp.gate": "router",
        "model.layers.0.mlp.shared_expert_gate": "router",
    }


def test_convolutions_and_stacked_scales_are_not_taken_for_experts():
    layer = nn.ModuleDict({"conv": nn.Conv1d(4, 4, 3), "linear": nn.Linear(4, 4)})
    layer["linear"].register_parameter("scale", nn.Parameter(torch.ones(1, 1, 4)))

    assert list(find_operators("layer", layer)) == ["layer.linear"]

    layer["conv"].register_module("experts", nn.ParameterList([torch.ones(2, 3, 4)]))
    with pytest.raises(
        UnsupportedArchitectureError, match=r"^layer\.conv\.experts \(ParameterList\)"
    ):
        find_operators("layer", layer)
