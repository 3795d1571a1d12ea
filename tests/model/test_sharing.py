import pytest
import torch
from torch import Tensor, nn
from toy_layer import toy_layer

from optimum_fista.model import UnsupportedArchitectureError
from optimum_fista.model.forward import LayerCall
from optimum_fista.model.groups import trace_groups
from optimum_fista.model.operator import LinearOperator

CALL = LayerCall((), {})


def trace(layer: nn.Module, *names: str) -> list[list[str]]:
    operators = {name: LinearOperator(name, layer.get_submodule(name)) for name in names}
    with torch.no_grad():
        groups, _ = trace_groups(layer, operators, CALL, torch.randn(2, 3, 8))
    assert all(operator is operators[operator.name] for group in groups for operator in group)
    return [[operator.name for operator in group] for group in groups]


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


def test_parallel_branches_join_the_group_of_their_input():
    def forward(layer, x):
        attended = layer.b(layer.a(x))
        return attended + layer.c(x)

    assert trace(Calls(forward), "a", "b", "c") == [["a", "c"], ["b"]]


def test_a_view_of_all_tokens_is_the_same_input():
    layer = Calls(lambda layer, x: layer.a(x).view(-1, 8) + layer.b(x.view(-1, 8)) + layer.c(input=x).view(-1, 8))
    assert trace(layer, "a", "b", "c") == [["a", "b", "c"]]


def test_equal_values_in_another_tensor_are_another_input():
    layer = Calls(lambda layer, x: layer.a(x) + layer.b(x.clone()) + layer.c(x * 1))
    assert trace(layer, "a", "b", "c") == [["a"], ["b"], ["c"]]


def test_part_of_the_tokens_is_another_input():
    layer = Calls(lambda layer, x: layer.a(x).sum() + layer.b(x[:1]).sum() + layer.c(x[:, :2]).sum())
    assert trace(layer, "a", "b", "c") == [["a"], ["b"], ["c"]]


def test_memory_that_is_used_again_does_not_join_groups():
    def forward(layer, x):
        for operator in (layer.a, layer.b, layer.c):
            x = operator(x)  # nothing else holds the old x, so that its memory may be given out again
        return x

    assert trace(Calls(forward), "a", "b", "c") == [["a"], ["b"], ["c"]]


def left_dense(layer: nn.Module, *names: str) -> dict[str, str]:
    operators = {name: LinearOperator(name, layer.get_submodule(name)) for name in names}
    with torch.no_grad():
        return trace_groups(layer, operators, CALL, torch.randn(2, 3, 8))[1]


@pytest.mark.parametrize(("times", "reason"), [(0, "not called in a forward pass"), (2, "called 2 times in a forward")])
def test_operator_that_is_not_called_exactly_once_is_in_no_group_but_has_a_reason(times, reason):
    def forward(layer, x):
        for _ in range(times):
            x = layer.b(x)
        return layer.c(layer.a(x))

    assert trace(Calls(forward), "a", "b", "c") == [["a"], ["c"]]
    found = left_dense(Calls(forward), "a", "b", "c")
    assert list(found) == ["b"]
    assert found["b"].startswith(reason)


class Router(nn.Linear):
    """A linear module that returns scores as well."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = super().forward(x)
        return logits.softmax(-1), logits


class Halved(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 2


class Written(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + self.bias


def test_module_with_a_forward_of_its_own_is_an_operator_only_if_it_multiplies():
    layer = Calls(lambda layer, x: layer.a(x)[0] + layer.b(x) + layer.c(x))
    layer.a, layer.b, layer.c = Router(8, 8), Halved(8, 8), Written(8, 8)
    assert trace(layer, "a", "b", "c") == [["c"]]
    assert left_dense(layer, "a", "b", "c") == dict.fromkeys("ab", "returns something other than W x + b")


def test_hooks_are_removed():
    layer = toy_layer()
    trace(layer, "left", "up")
    assert trace(Calls(lambda layer, x: x), "a") == []
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in layer.modules())


def test_an_operator_whose_output_is_changed_by_others_is_left_dense():
    layer = Calls(lambda layer, x: layer.a(x) + layer.b(x) + layer.c(x))
    layer.a.register_forward_hook(lambda module, arguments, output: 3 * output)
    layer.b.forward = lambda x: 2 * nn.functional.linear(x, layer.b.weight)
    layer.c.register_forward_hook(lambda module, arguments, output: None)  # only looks on
    assert left_dense(layer, "a", "b", "c") == dict.fromkeys("ab", "returns something other than W x + b")


def test_a_layer_that_overwrites_its_hidden_states_is_refused():
    layer = Calls(lambda layer, x: layer.c(x.add_(layer.b(layer.a(x)))))
    with pytest.raises(UnsupportedArchitectureError, match="Calls overwrites the hidden states"):
        trace(layer, "a", "b", "c")
