import pytest
import torch
from torch import Tensor, nn
from toy_layer import toy_layer

from optimum_fista.model.architecture import UnsupportedArchitectureError
from optimum_fista.model.operator import LinearOperator
from optimum_fista.model.replay import LayerCall
from optimum_fista.model.sharing import trace_groups

CALL = LayerCall((), {})


def trace(layer: nn.Module, *names: str) -> list[list[str]]:
    operators = {name: LinearOperator(name, layer.get_submodule(name)) for name in names}
    with torch.no_grad():
        groups = trace_groups(layer, operators, CALL, torch.randn(2, 3, 8))
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


@pytest.mark.parametrize("times", [0, 2])
def test_operator_that_is_not_called_exactly_once_is_refused(times):
    def forward(layer, x):
        for _ in range(times):
            x = layer.b(x)
        return layer.c(layer.a(x))

    with pytest.raises(UnsupportedArchitectureError, match=rf"^b was called {times} times .*exclude=\['b'\]"):
        trace(Calls(forward), "a", "b", "c")
    assert trace(Calls(forward), "a", "c") == [["a"], ["c"]]


def test_hooks_are_removed():
    layer = toy_layer()
    trace(layer, "left", "up")
    with pytest.raises(UnsupportedArchitectureError):
        trace(Calls(lambda layer, x: x), "a")
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in layer.modules())
