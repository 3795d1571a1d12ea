"""Operators that share an input, by tracing, and groups that are solved together."""

import pytest
import torch
from tiny_models import tiny_model
from torch import Tensor, nn
from toy_layer import toy_layer

from optimum_fista.model import UnsupportedArchitectureError
from optimum_fista.model import groups as groups_module
from optimum_fista.model.choice import find_operators
from optimum_fista.model.groups import solved_together, trace_groups
from optimum_fista.model.inputs import LayerCall
from optimum_fista.model.layers import find_decoder_layers
from optimum_fista.model.operators import LinearOperator

pytestmark = pytest.mark.usefixtures("no_gradients")
CPU = torch.device("cpu")
CALL = LayerCall((), {})


def trace_both(layer: nn.Module, *names: str) -> tuple[list[list[str]], dict[str, str]]:
    """Names of the operators of a layer in groups, and those that are left dense, with the reason."""
    operators = {name: LinearOperator(name, layer.get_submodule(name)) for name in names}
    trace = trace_groups(layer, operators, CALL, torch.randn(2, 3, 8))
    assert all(operator is operators[operator.name] for group in trace.groups for operator in group)
    return [[operator.name for operator in group] for group in trace.groups], trace.left_dense


def trace(layer: nn.Module, *names: str) -> list[list[str]]:
    """Names of the operators of a layer in groups."""
    groups, _ = trace_both(layer, *names)
    return groups


def test_groups_are_those_called_on_one_tensor_in_execution_order():
    expected = [["left", "right"], ["up"], ["low", "high"]]
    assert trace(toy_layer(), "left", "right", "up", "low", "high") == expected
    assert trace(toy_layer(), "high", "low", "up", "right", "left") == expected
    assert trace(toy_layer(), "right", "low") == [["right"], ["low"]]


class Calls(nn.Module):
    """A layer with three operators whose forward is given."""

    def __init__(self, forward) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(8, 8) for _ in range(3))
        self.call = forward

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.call(self, hidden_states)


@pytest.mark.parametrize(
    ("forward", "expected"),
    [
        (lambda layer, x: layer.b(layer.a(x)) + layer.c(x), [["a", "c"], ["b"]]),
        (
            lambda layer, x: (
                layer.a(x).view(-1, 8) + layer.b(x.view(-1, 8)) + layer.c(input=x).view(-1, 8)
            ),
            [["a", "b", "c"]],
        ),
        (lambda layer, x: layer.a(x) + layer.b(x.clone()) + layer.c(x * 1), [["a"], ["b"], ["c"]]),
        (
            lambda layer, x: layer.a(x).sum() + layer.b(x[:1]).sum() + layer.c(x[:, :2]).sum(),
            [["a"], ["b"], ["c"]],
        ),
    ],
    ids=["parallel branches", "a view of all tokens", "equal values", "part of the tokens"],
)
def test_groups_share_a_tensor_and_not_only_its_values(forward, expected):
    assert trace(Calls(forward), "a", "b", "c") == expected


def test_memory_that_is_used_again_does_not_join_groups():
    def forward(layer, x):
        for operator in (layer.a, layer.b, layer.c):
            # nothing else holds the old x, so that its memory may be given out again
            x = operator(x)
        return x

    assert trace(Calls(forward), "a", "b", "c") == [["a"], ["b"], ["c"]]


@pytest.mark.parametrize(
    ("times", "reason"), [(0, "not called in a forward pass"), (2, "called 2 times in a forward")]
)
def test_operator_that_is_not_called_exactly_once_is_in_no_group_but_has_a_reason(times, reason):
    def forward(layer, x):
        for _ in range(times):
            x = layer.b(x)
        return layer.c(layer.a(x))

    groups, left_dense = trace_both(Calls(forward), "a", "b", "c")

    assert groups == [["a"], ["c"]]
    assert list(left_dense) == ["b"]
    assert left_dense["b"].startswith(reason)


class Router(nn.Linear):
    """A linear module that returns scores as well."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = super().forward(x)
        return logits.softmax(-1), logits


class Halved(nn.Linear):
    """A linear module that returns half of the product."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 2


class Written(nn.Linear):
    """A linear module that computes the product itself."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + self.bias


def test_module_with_a_forward_of_its_own_is_an_operator_only_if_it_multiplies():
    layer = Calls(lambda layer, x: layer.a(x)[0] + layer.b(x) + layer.c(x))
    layer.a = Router(8, 8)
    layer.b = Halved(8, 8)
    layer.c = Written(8, 8)

    groups, left_dense = trace_both(layer, "a", "b", "c")

    reason = "returns something other than W x + b"
    assert groups == [["c"]]
    assert left_dense == {"a": reason, "b": reason}


def test_an_operator_whose_output_is_changed_by_others_is_left_dense():
    layer = Calls(lambda layer, x: layer.a(x) + layer.b(x) + layer.c(x))
    layer.a.register_forward_hook(lambda module, arguments, output: 3 * output)
    layer.b.forward = lambda x: 2 * nn.functional.linear(x, layer.b.weight)
    layer.c.register_forward_hook(lambda module, arguments, output: None)  # only looks on

    _, left_dense = trace_both(layer, "a", "b", "c")

    reason = "returns something other than W x + b"
    assert left_dense == {"a": reason, "b": reason}


def test_a_layer_that_overwrites_its_hidden_states_is_refused():
    layer = Calls(lambda layer, x: layer.c(x.add_(layer.b(layer.a(x)))))

    with pytest.raises(UnsupportedArchitectureError, match="Calls overwrites the hidden states"):
        trace(layer, "a", "b", "c")


def experts_together(family: str, monkeypatch, groups_in_set: int = 100, without: str = "no"):
    """Names in each set of groups of a family's first decoder layer; operators with a word in their name are left."""
    model = tiny_model(family)
    ((name, layer), *_) = find_decoder_layers(model)
    operators = {
        key: operator
        for key, operator in find_operators(name, layer).items()
        if without not in key.split(".")
    }
    groups = [[operator] for key, operator in operators.items() if ".experts." not in key]
    first_of_experts = len(groups)
    by_inputs = {}
    for key, operator in operators.items():
        if ".experts." in key:
            *_, expert, kind = key.split(".")
            by_inputs.setdefault((expert, kind == "down_proj"), []).append(operator)
    groups += by_inputs.values()
    monkeypatch.setattr(groups_module, "matrices_in_stack", lambda _, **__: groups_in_set)
    sets = solved_together(groups, CPU)
    assert sorted(number for numbers in sets for number in numbers) == list(range(len(groups)))
    assert sets[:first_of_experts] == [[number] for number in range(first_of_experts)]
    return [
        ["+".join(o.name.split(".experts.")[-1] for o in groups[number]) for number in numbers]
        for numbers in sets[first_of_experts:]
    ]


def test_gate_and_up_of_all_experts_are_solved_together_and_then_all_down_projections(monkeypatch):
    assert experts_together("qwen3_moe", monkeypatch) == [
        [f"{expert}.gate_proj+{expert}.up_proj" for expert in range(4)],
        [f"{expert}.down_proj" for expert in range(4)],
    ]


def test_no_more_groups_are_solved_together_than_memory_is_for(monkeypatch):
    assert experts_together("mixtral", monkeypatch, groups_in_set=3) == [
        ["0.gate_proj+0.up_proj", "1.gate_proj+1.up_proj", "2.gate_proj+2.up_proj"],
        ["3.gate_proj+3.up_proj"],
        ["0.down_proj", "1.down_proj", "2.down_proj"],
        ["3.down_proj"],
    ]


def test_up_projections_alone_are_solved_together_before_the_down_projections(monkeypatch):
    sets = experts_together("mixtral", monkeypatch, without="gate_proj")

    assert sets == [
        [f"{expert}.up_proj" for expert in range(4)],
        [f"{expert}.down_proj" for expert in range(4)],
    ]


def test_groups_of_no_mixture_are_solved_alone():
    a, b = (LinearOperator(name, nn.Linear(8, 8)) for name in "ab")

    assert solved_together([[a], [b]], CPU) == [[0], [1]]
    assert solved_together([], CPU) == []
