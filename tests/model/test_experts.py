"""Every matrix of every expert of a mixture is an operator: read, written, called and pruned."""

from copy import deepcopy
from functools import partial

import pytest
import torch
from recording import batches, calibration, prune, require_problem
from tiny_models import MOE_FAMILIES, tiny_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from optimum_fista.model import UnsupportedArchitectureError
from optimum_fista.model.calibration import read_batches
from optimum_fista.model.choice import find_operators
from optimum_fista.model.experts import split_experts
from optimum_fista.model.groups import trace_groups
from optimum_fista.model.inputs import record_inputs
from optimum_fista.model.layers import find_decoder_layers
from optimum_fista.model.operators import LinearOperator

pytestmark = pytest.mark.usefixtures("enough_tokens")
CONCATENATED = ("mixtral", "qwen3_moe", "deepseek_v3")


def operators_of(model: PreTrainedModel) -> dict[str, LinearOperator]:
    """The operators of all decoder layers, by name."""
    operators = {}
    for name, layer in find_decoder_layers(model):
        operators |= find_operators(name, layer)
    return operators


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(**calibration(), use_cache=False).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_split_experts_compute_what_the_model_computes(family, dtype):
    model = tiny_model(family).to(dtype)
    expected = logits(model)
    operators = operators_of(model)
    called = []
    for name, operator in operators.items():
        operator.module.register_forward_hook(lambda *_, name=name: called.append(name))

    with split_experts(operators.values()):
        split_logits = logits(model)

    assert sorted(called) == sorted(operators), "every matrix is called once"
    real = calibration()["attention_mask"].bool()
    distance = (split_logits - expected)[real].float().norm() / expected[real].float().norm()
    # in bfloat16 rounding may change a token's experts
    assert distance <= (1e-5 if dtype == torch.float32 else 0.3)


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_a_mixture_computes_as_ever_after_its_experts_were_split(family):
    model = tiny_model(family)
    expected = logits(model)
    operators = operators_of(model)
    called = []
    for name, operator in operators.items():
        operator.module.register_forward_hook(lambda *_, name=name: called.append(name))

    with split_experts(operators.values()):
        pass

    assert torch.equal(logits(model), expected)
    assert not any(".experts." in name for name in called)
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_matrices_are_views_of_the_fused_parameters(family):
    model = tiny_model(family)
    experts = [o for name, o in operators_of(model).items() if ".experts." in name]
    fused = [
        parameter
        for name, parameter in model.named_parameters()
        if parameter.ndim == 3 and (".experts." in name or "_linear" in name)
    ]

    for number, operator in enumerate(experts, start=1):
        operator.write(torch.full(operator.shape, float(number)))

    for number, operator in enumerate(experts, start=1):
        assert torch.equal(operator.read(), torch.full(operator.shape, float(number)))
    assert sum(o.read().numel() for o in experts) == sum(p.numel() for p in fused)
    assert all(float(parameter.detach().min()) >= 1 for parameter in fused), "all are written"


def expert_inputs(model: PreTrainedModel) -> dict[str, dict[int, Tensor]]:
    """Inputs of every matrix of every expert by token, from the router's choice in one pass of the whole model."""
    arguments_of: dict[str, tuple[Tensor, ...]] = {}  # of each mixture

    def keep(name: str, _: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        """Keep the arguments of a mixture; a forward pre-hook."""
        arguments_of[name] = arguments

    handles = [
        module.register_forward_pre_hook(partial(keep, name))
        for name, module in model.named_modules()
        if name.endswith(".experts")
    ]
    with torch.no_grad():
        model(**calibration(), use_cache=False)
    for handle in handles:
        handle.remove()

    real = calibration()["attention_mask"].reshape(-1).bool()
    inputs: dict[str, dict[int, Tensor]] = {}
    for name, (hidden, chosen, _) in arguments_of.items():
        module = model.get_submodule(name)
        for expert in range(4):
            gate, up = module.gate_up_proj[expert].detach().chunk(2)
            gets_token = (chosen == expert).any(dim=1).logical_and(real)
            tokens = gets_token.nonzero()[:, 0].tolist()
            if not tokens:
                continue
            hidden_of = {token: hidden[token] for token in tokens}
            inputs[f"{name}.{expert}.gate_proj"] = hidden_of
            inputs[f"{name}.{expert}.up_proj"] = hidden_of
            inputs[f"{name}.{expert}.down_proj"] = {
                token: nn.functional.silu(gate @ x) * (up @ x) for token, x in hidden_of.items()
            }
    return inputs


@pytest.mark.parametrize("error_correction", ["none", "intra", "full", 0.25])
@pytest.mark.parametrize("family", CONCATENATED)
def test_experts_are_pruned_on_the_tokens_that_the_router_sends_them(family, error_correction):
    dense = tiny_model(family)
    model = deepcopy(dense)
    progressive = deepcopy(dense)  # is pruned group by group below

    recorder = prune(model, error_correction, batches(3, 2, 3))

    dense_operators = operators_of(dense)
    progressive_operators = operators_of(progressive)
    dense_inputs = expert_inputs(dense)
    layer = "0"
    num_new_tokens = 0  # that the router sends to an expert in the pruned network only
    for group in recorder.groups:
        name = group[0].name
        is_next_layer = name.split(".")[2] != layer
        layer = name.split(".")[2]
        if is_next_layer and error_correction == "intra":
            # Errors of earlier layers are not seen: the hidden states that enter a layer are dense.
            progressive.load_state_dict(dense.state_dict())
        if ".experts." in name:
            kinds = [record.name.rpartition(".")[2] for record in group]
            assert kinds in (["gate_proj", "up_proj"], ["down_proj"])
            # Inputs of the expert by token: X* in the network that is pruned so far, X in the dense one.
            inputs = expert_inputs(progressive)[name]
            inputs_before = dense_inputs[name]
            X_star = torch.stack(list(inputs.values()))
            rows_of_X = []
            for token, value in inputs.items():
                is_new = token not in inputs_before
                num_new_tokens += is_new
                rows_of_X.append(value if is_new else inputs_before[token])
            X = torch.stack(rows_of_X)
            for record in group:
                W = dense_operators[record.name].read()
                require_problem(record, W, X, X_star, error_correction)
        if error_correction != "none":
            for record in group:
                progressive_operators[record.name].write(record.pruned)

    if error_correction != "none":
        assert num_new_tokens, "the pruned network sends some tokens elsewhere"
    for record in recorder.records:
        assert torch.equal(operators_of(model)[record.name].read(), record.pruned)


def test_an_expert_without_a_token_is_called_and_has_no_error():
    model = tiny_model("mixtral")
    for layer in model.model.layers:  # the router never chooses expert 2
        layer.mlp.gate.register_forward_hook(
            lambda _, __, output: (output[0], output[1], torch.where(output[2] == 2, 3, output[2]))
        )

    recorder = prune(model, 0.5, batches(4, 4))

    under_calibrated = [record for record in recorder.records if ".experts.2." in record.name]
    assert len(under_calibrated) == 6
    assert all(record.num_tokens == 0 and record.fit_error == 0 for record in under_calibrated)
    # in each of two layers, each of four experts has two groups: gate and up, and down
    assert len([group for group in recorder.groups if ".experts." in group[0].name]) == 2 * 2 * 4


def test_experts_that_return_something_else_than_their_matrices_give_are_refused():
    model = tiny_model("mixtral")
    module = model.model.layers[0].mlp.experts
    original = module.forward
    module.forward = lambda *args: 2 * original(*args)

    with (
        split_experts(operators_of(model).values()),
        pytest.raises(
            UnsupportedArchitectureError,
            match=r"layers\.0\.mlp\.experts \(MixtralExperts\) .* exclude=\['\*\.experts'\]",
        ),
    ):
        logits(model)


def test_forward_passes_leave_nothing_in_the_operators():
    model = tiny_model("mixtral")
    layers = find_decoder_layers(model)
    operators = operators_of(model)
    before = {name: dict(vars(operator)) for name, operator in operators.items()}

    with split_experts(operators.values()), torch.no_grad():
        recorded = record_inputs(layers, read_batches([calibration()], 64))
        for calls, (name, layer) in zip(recorded.calls, layers, strict=True):
            own = {key: o for key, o in operators.items() if key.startswith(f"{name}.")}
            trace_groups(layer, own, calls[0], recorded.hidden_states[0])
        logits(model)

    for name, operator in operators.items():
        assert vars(operator).keys() == before[name].keys()
        assert all(value is before[name][key] for key, value in vars(operator).items()), name
