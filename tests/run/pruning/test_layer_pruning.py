"""The order of the work in one decoder layer."""

import pytest
import torch
from tiny_llama import tiny_llama

from optimum_fista import FistaPruner, FistaPruningConfig
from optimum_fista.model.architecture import find_decoder_layers, find_operators
from optimum_fista.model.calibration import read_batches
from optimum_fista.model.hidden_states import record_inputs
from optimum_fista.model.sharing import trace_groups
from optimum_fista.model.statistics import LayerActivations
from optimum_fista.run.pruning.layer_pruning import LayerPruning
from optimum_fista.run.pruning.pruned_group import report_group
from optimum_fista.solve.methods import METHODS
from optimum_fista.solve.pattern import SparsityPattern
from optimum_fista.solve.patterns import Unstructured

GROUPS = [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
HALF = Unstructured(0.5)


def half(name: str) -> SparsityPattern:
    return HALF


@pytest.fixture
def layer(llama, tokens):
    """The first decoder layer: its activations, its groups, and the hidden states that enter it."""
    layers = find_decoder_layers(llama)
    name, module = next(iter(layers))
    recorded = record_inputs(llama, layers, read_batches(tokens.split(4), 64))
    cpu = torch.device("cpu")
    activations = LayerActivations(module, recorded.calls[0], recorded.token_masks, cpu)
    operators = find_operators(name, module)
    groups, _ = trace_groups(module, operators, recorded.calls[0][0], recorded.hidden_states[0])
    return activations, groups, recorded.hidden_states


@torch.no_grad()
@pytest.mark.parametrize("error_correction", ["none", "intra", "full"])
def test_groups_come_in_execution_order_and_are_written_before_they_are_yielded(layer, error_correction):
    activations, groups, hidden_states = layer
    written = []

    def write(operator, pruned):
        operator.write(pruned.weight)
        written.append(operator.name.rsplit(".", 1)[-1])

    pruning = LayerPruning(METHODS["wanda"](), half, error_correction, write)
    states = pruning.enter(hidden_states)
    names = []
    for group in pruning.prune(activations, groups, states):
        names.append([operator.name.rsplit(".", 1)[-1] for operator in group.operators])
        assert written == [name for group_names in names for name in group_names]
        reports = report_group(group)
        assert [r.num_kept for r in reports] == [o.parameter.numel() // 2 for o in group.operators]
        assert sum(r.solve_seconds for r in reports) == pytest.approx(group.solve_seconds)
    assert names == GROUPS


@torch.no_grad()
@pytest.mark.parametrize(
    ("error_correction", "residual_share", "passes"),
    [("none", 0.0, 1), ("intra", 0.0, 2), ("full", 0.0, 2), (0.5, 0.0, 2), (0.0, 1.0, 2), (0.0, 0.0, 1)],
)
def test_no_stream_runs_that_is_not_needed(layer, error_correction, residual_share, passes):
    activations, groups, hidden_states = layer
    gate = groups[2][0].module
    runs = []
    gate.register_forward_hook(lambda *_: runs.append(1))
    pruning = LayerPruning(
        METHODS["wanda"](), half, error_correction, lambda o, pruned: o.write(pruned.weight), residual_share
    )
    list(pruning.prune(activations, groups, pruning.enter(hidden_states)))
    tried = 2 if residual_share else 0  # whether the last operator is added to the output
    assert len(runs) == passes * len(hidden_states) + tried


@torch.no_grad()
@pytest.mark.parametrize("error_correction", ["none", "intra", "full"])
def test_hidden_states_behind_the_layer(layer, llama, error_correction):
    activations, groups, hidden_states = layer

    def run(module) -> torch.Tensor:
        return torch.cat([call.run(module, h) for call, h in zip(activations.calls, hidden_states, strict=True)])

    expected = run(tiny_llama().model.layers[0])
    pruning = LayerPruning(METHODS["wanda"](), half, error_correction, lambda o, pruned: o.write(pruned.weight))
    states = pruning.enter(hidden_states)
    list(pruning.prune(activations, groups, states))
    assert torch.allclose(torch.cat(list(states.dense)), expected, atol=1e-5)
    if error_correction == "full":
        pruned = torch.cat(list(states.pruned))
        assert torch.allclose(pruned, run(llama.model.layers[0]), atol=1e-5)
        assert not torch.allclose(pruned, expected, atol=1e-2)
    else:
        assert states.pruned is None


def hidden_states_of(model, ids, mask) -> list[torch.Tensor]:
    """Outputs [batch, sequence, hidden] of every decoder layer."""
    seen = []
    handles = [layer.register_forward_hook(lambda *given: seen.append(given[2])) for layer in model.model.layers]
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize(
    "options",
    [{"method": "wanda", "error_correction": "full"}, {"residual_correction": 1.0}, {"exclude": ("*.layers.1.*",)}],
)
def test_hidden_state_errors_are_those_of_the_two_models_on_real_tokens(llama, tokens, options):
    mask = torch.ones_like(tokens)
    mask[5, 10:] = mask[7, 3:] = 0
    dense = hidden_states_of(llama, tokens, mask)
    batches = [{"input_ids": i, "attention_mask": m} for i, m in zip(tokens.split(3), mask.split(3), strict=True)]
    report = FistaPruner(FistaPruningConfig(**options), progress=False).prune(llama, batches)
    assert [layer.name for layer in report.layers] == ["model.layers.0", "model.layers.1"]
    for layer, pruned, wanted in zip(report.layers, hidden_states_of(llama, tokens, mask), dense, strict=True):
        pruned, wanted = pruned[mask.bool()], wanted[mask.bool()]
        if "exclude" in options and layer.name.endswith("1"):
            assert layer.hidden_state_error is None  # after the last operator nothing runs
        else:
            assert layer.hidden_state_error == pytest.approx(float((pruned - wanted).norm() / wanted.norm()), rel=1e-4)


@pytest.mark.parametrize("error_correction", ["none", "intra", 0])
def test_without_both_streams_there_is_no_hidden_state_error(llama, tokens, error_correction):
    config = FistaPruningConfig(method="wanda", error_correction=error_correction)
    report = FistaPruner(config, progress=False).prune(llama, tokens.split(4))
    assert [layer.hidden_state_error for layer in report.layers] == [None, None]
    assert all(layer.seconds > 0 for layer in report.layers)
