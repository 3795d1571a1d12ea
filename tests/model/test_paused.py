import weakref

import pytest
import torch
from toy_layer import ToyLayer, toy_layer

from optimum_fista.model.paused import PausedForwards
from optimum_fista.model.replay import LayerCall

CALLS = [LayerCall((shift,), {}) for shift in (0.0, 1.0, -2.0)]


@pytest.fixture
def hidden() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(rows, 3, 8, generator=generator) for rows in (2, 1, 4)]


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def count_calls(layer: ToyLayer) -> dict[str, int]:
    counts = dict.fromkeys(("left", "right", "up", "low", "high"), 0)
    for name in counts:
        layer.get_submodule(name).register_forward_hook(
            lambda *_, name=name: counts.__setitem__(name, counts[name] + 1)
        )
    return counts


def hooks(layer: ToyLayer) -> int:
    return sum(len(module._forward_pre_hooks) for module in layer.modules())


def test_inputs_show_what_was_changed_before_them(hidden):
    layer, changed = toy_layer(), toy_layer()
    counts = count_calls(layer)
    seen: list[list[torch.Tensor]] = []
    with PausedForwards(layer, [layer.left, layer.up, layer.low], CALLS, hidden) as forwards:
        for stop, operators in enumerate([[layer.left, layer.right], [layer.up], [layer.low, layer.high]]):
            seen.append([inputs.clone() for inputs in forwards.inputs(stop)])
            for operator in operators:
                operator.weight.mul_(0.5)
        outputs = list(forwards.outputs())

    expected: dict[str, list[torch.Tensor]] = {"left": [], "up": [], "low": []}
    for name in expected:
        changed.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: expected[name].append(args[0].clone())
        )
    for operator in (changed.left, changed.right, changed.up, changed.low, changed.high):
        operator.weight.mul_(0.5)
    reference = [call.run(changed, states) for call, states in zip(CALLS, hidden, strict=True)]
    for ours, theirs in zip(seen, expected.values(), strict=True):
        assert all(map(torch.equal, ours, theirs))
    assert all(map(torch.equal, outputs, reference))
    assert counts == dict.fromkeys(counts, 3), "every operator runs once a batch"
    assert layer.unwound == 3
    assert hooks(layer) == 0


def test_without_stops_it_only_runs_the_layer(hidden):
    layer = toy_layer()
    with PausedForwards(layer, [], CALLS, hidden) as forwards:
        outputs = list(forwards.outputs())
    expected = [call.run(layer, states) for call, states in zip(CALLS, hidden, strict=True)]
    assert all(map(torch.equal, outputs, expected))


def test_passes_that_were_not_finished_are_unwound(hidden):
    layer = toy_layer()
    counts = count_calls(layer)
    with PausedForwards(layer, [layer.up], CALLS, hidden) as forwards:
        assert len(list(forwards.inputs(0))) == 3
        assert layer.unwound == 0
    assert layer.unwound == 3
    assert counts == {"left": 3, "right": 3, "up": 0, "low": 0, "high": 0}
    assert hooks(layer) == 0


def test_an_error_of_the_caller_unwinds_them_too(hidden):
    layer = toy_layer()

    def fail_after_one_batch():
        with PausedForwards(layer, [layer.up], CALLS, hidden) as forwards:
            for _ in forwards.inputs(0):
                raise KeyError("caller")

    with pytest.raises(KeyError, match="caller"):
        fail_after_one_batch()
    assert layer.unwound == 1, "the others never started"
    assert hooks(layer) == 0
    layer(hidden[0])
    assert layer.unwound == 2


def test_an_error_of_the_layer_reaches_the_caller(hidden):
    layer = toy_layer()
    wrong = [hidden[0], hidden[1][..., :5], hidden[2]]
    with PausedForwards(layer, [layer.up], CALLS, wrong) as forwards:
        inputs = forwards.inputs(0)
        next(inputs)
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            next(inputs)
    assert layer.unwound == 2
    assert hooks(layer) == 0


def test_stops_in_another_order_than_the_calls_are_refused(hidden):
    layer = toy_layer()
    with (
        PausedForwards(layer, [layer.low, layer.up], CALLS, hidden) as forwards,
        pytest.raises(RuntimeError, match="called in another order than when traced"),
    ):
        next(forwards.inputs(0))
    assert layer.unwound == 1


def test_modules_can_be_called_by_others_meanwhile(hidden):
    layer = toy_layer()
    with PausedForwards(layer, [layer.up], CALLS, hidden) as forwards:
        for inputs in forwards.inputs(0):
            assert torch.equal(layer.up(inputs), inputs @ layer.up.weight.T)


def test_gradients_stay_off_and_activations_are_given_back(hidden):
    layer = toy_layer()
    with PausedForwards(layer, [layer.up, layer.low], CALLS, hidden) as forwards:
        waiting = []
        for inputs in forwards.inputs(0):
            assert not inputs.requires_grad
            waiting.append(weakref.ref(inputs))
        del inputs
        assert all(reference() is not None for reference in waiting)
    assert all(reference() is None for reference in waiting)


@pytest.mark.parametrize("in_place", [False, True])
def test_passes_that_wait_elsewhere_see_the_same(hidden, tmp_path, in_place):
    """What they made goes to a file between two stops, whatever refers to it, and comes back."""
    seen: dict[object, list[torch.Tensor]] = {}
    for waiting in (None, tmp_path):
        layer = toy_layer(in_place=in_place)
        with PausedForwards(layer, [layer.left, layer.up, layer.low], CALLS, hidden, waiting) as forwards:
            seen[waiting] = [inputs.clone() for stop in range(3) for inputs in forwards.inputs(stop)]
            seen[waiting] += [output.clone() for output in forwards.outputs()]
        assert not [*tmp_path.iterdir()]
    assert len(seen[None]) == 12
    assert all(map(torch.equal, *seen.values()))


def test_of_the_passes_that_wait_elsewhere_one_is_in_memory(hidden, tmp_path):
    layer, wide = toy_layer(), [torch.randn(4, 50, 8) for _ in range(8)]
    calls, held = [LayerCall((0.0,), {}) for _ in wide], []
    with PausedForwards(layer, [layer.up, layer.low], calls, wide, tmp_path) as forwards:
        for stop in range(2):
            inputs = list(forwards.inputs(stop))
            held.append([i.untyped_storage().nbytes() for i in inputs])
            forwards_alive = [ref() for m in forwards._memories for ref in m._made.values()]
            assert not sum(s.nbytes() for s in forwards_alive if s is not None)
    assert held == [[0] * 8, [0] * 8]


def test_what_a_module_keeps_stays_where_it_is(hidden, tmp_path):
    class Keeps(torch.nn.Module):
        """Makes a table in its first pass and uses it in all."""

        def __init__(self) -> None:
            super().__init__()
            self.up = torch.nn.Linear(8, 8)
            self.table: torch.Tensor | None = None

        def forward(self, states: torch.Tensor, shift: float) -> torch.Tensor:
            if self.table is None:
                self.table = torch.ones(8) * 2
            return self.up(states * self.table) + shift

    layer = Keeps()
    expected = [call.run(layer, states) for call, states in zip(CALLS, hidden, strict=True)]
    layer.table = None
    with PausedForwards(layer, [layer.up], CALLS, hidden, tmp_path) as forwards:
        list(forwards.inputs(0))
        assert all(map(torch.equal, forwards.outputs(), expected))
