"""Every family: operators found, inputs they share, and the statistics that reach the pruning method."""

import re
from copy import deepcopy
from functools import partial

import pytest
import torch
from recording import batches, calibration, prune, require_problem
from tiny_models import FAMILIES, tiny_model
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

LLAMA_GROUPS = [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
NEOX_GROUPS = [["query_key_value"], ["dense"], ["dense_h_to_4h"], ["dense_4h_to_h"]]
GROUPS = {
    "llama": LLAMA_GROUPS,
    "qwen2": LLAMA_GROUPS,
    "qwen3": LLAMA_GROUPS,
    "mistral": LLAMA_GROUPS,
    "gemma3_text": LLAMA_GROUPS,
    "phi3": [["qkv_proj"], ["o_proj"], ["gate_up_proj"], ["down_proj"]],
    "opt": [["q_proj", "k_proj", "v_proj"], ["out_proj"], ["fc1"], ["fc2"]],
    "gpt2": [["c_attn"], ["c_proj"], ["c_fc"], ["c_proj"]],
    "gpt_neox": NEOX_GROUPS,
    # Attention and MLP are parallel and share the output of one layer norm.
    "falcon": [["query_key_value", "dense_h_to_4h"], ["dense"], ["dense_4h_to_h"]],
}
ALL = ["none", "intra", "full", 0.25]
EVERY_WAY = [  # a correction does not ask for the architecture, so most families take two of them
    (family, way)
    for family in FAMILIES
    for way in (ALL if family in ("llama", "gpt2", "falcon") else ["intra", 0.25])
]


def observe(model: PreTrainedModel, names: list[str]) -> dict[str, Tensor]:
    """Inputs of operators, [real tokens, in], from one forward pass of the whole model on all sequences."""
    data = calibration()
    real = data["attention_mask"].bool()
    inputs: dict[str, Tensor] = {}

    def keep(name: str, _: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        """Keep the inputs of an operator; a forward pre-hook."""
        inputs[name] = arguments[0].reshape(8, 10, -1).clone()

    handles = [
        model.get_submodule(name).register_forward_pre_hook(partial(keep, name)) for name in names
    ]
    if model.config.model_type == "gpt2":  # counts padding as well unless it is told the positions
        data["position_ids"] = (data["attention_mask"].cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        model(**data, use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: values[real] for name, values in inputs.items()}


def layer_of(name: str) -> int:
    """Index of the decoder layer of an operator."""
    return int(re.search(r"\.(\d+)\.", name)[1])


def stored(module: nn.Module, weight: Tensor) -> Tensor:
    """A weight [out, in] the way the module stores it, or the other way round."""
    return weight.T if isinstance(module, Conv1D) else weight


@pytest.mark.parametrize("family", FAMILIES)
def test_operators_that_share_an_input_are_pruned_together_in_execution_order(family):
    recorder = prune(tiny_model(family), "intra", batches(8))

    names = [[record.name for record in group] for group in recorder.groups]
    short_names = [[name.rpartition(".")[2] for name in group] for group in names]
    assert short_names == GROUPS[family] * 2
    num_groups = len(GROUPS[family])  # of each of the two decoder layers
    layers_of_groups = [[layer_of(name) for name in group] for group in names]
    assert {layer for group in layers_of_groups[:num_groups] for layer in group} == {0}
    assert {layer for group in layers_of_groups[num_groups:] for layer in group} == {1}
    linear = {
        name
        for name, module in tiny_model(family).named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and "lm_head" not in name
        and "embed_out" not in name
    }
    assert {name for group in names for name in group} == linear


@pytest.mark.parametrize(("family", "error_correction"), EVERY_WAY)
def test_statistics_are_those_of_hooks_on_the_whole_model(family, error_correction):
    dense = tiny_model(family)
    model = deepcopy(dense)
    progressive = deepcopy(dense)  # is pruned group by group below

    # the first three sequences have no padding
    recorder = prune(model, error_correction, batches(3, 2, 3))

    dense_inputs = observe(dense, [record.name for record in recorder.records])
    num_tokens = int(calibration()["attention_mask"].sum())
    layer = 0
    for group in recorder.groups:
        is_next_layer = layer_of(group[0].name) != layer
        layer = layer_of(group[0].name)
        if is_next_layer and error_correction == "intra":
            progressive.load_state_dict(dense.state_dict())  # dense hidden states enter the layer
        X_star = observe(progressive, [group[0].name])[group[0].name]
        for record in group:
            X = dense_inputs[record.name]
            dense_module = dense.get_submodule(record.name)
            W = stored(dense_module, dense_module.weight.detach())
            if error_correction == "none":
                assert torch.equal(X, X_star)
            assert len(X) == num_tokens
            require_problem(record, W, X, X_star, error_correction)
            if error_correction != "none":
                module = progressive.get_submodule(record.name)
                module.weight.data.copy_(stored(module, record.pruned))

    for record in recorder.records:
        module = model.get_submodule(record.name)
        assert torch.equal(module.weight, stored(module, record.pruned))
    if error_correction in ("full", 0.25):
        weights = model.state_dict()
        expected = progressive.state_dict()
        assert all(torch.equal(weights[name], expected[name]) for name in expected)
