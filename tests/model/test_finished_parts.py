"""Parts of a decoder layer that need not run again."""

import pytest
import torch
from torch import Tensor, nn

from optimum_fista.model.finished_parts import FinishedParts
from optimum_fista.model.groups import PartEnd, trace_groups
from optimum_fista.model.inputs import LayerActivations, LayerCall
from optimum_fista.model.operators import LinearOperator

pytestmark = pytest.mark.usefixtures("no_gradients")
CPU = torch.device("cpu")
CALL = LayerCall((), {})


class Part(nn.Module):
    """A part with one operator that gives out what `form` makes of its output."""

    def __init__(self, form) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.form = form
        self.runs = 0

    def forward(self, hidden: Tensor, scale: float = 1.0) -> object:
        self.runs += 1
        return self.form(self.inner(hidden) * scale)


class Layer(nn.Module):
    """Overwrites what its first part gives out, as Falcon does."""

    def __init__(self, form=lambda output: output) -> None:
        super().__init__()
        self.first = Part(form)
        self.second = Part(lambda output: output)
        self.last = nn.Linear(4, 4)

    def forward(self, hidden: Tensor) -> Tensor:
        output = self.first(hidden, scale=2.0)
        output = output[0] if isinstance(output, tuple) else output
        output += hidden
        return self.last(self.second(output))

    def groups(self) -> list[list[LinearOperator]]:
        operators = (self.first.inner, self.second.inner, self.last)
        return [[LinearOperator(str(index), module)] for index, module in enumerate(operators)]


BATCHES = [torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(i)) for i in range(3)]


def parts_of(layer: Layer, storage=CPU) -> tuple[FinishedParts, LayerActivations]:
    """The parts of a layer whose operators are pruned in their order, and its activations."""
    activations = LayerActivations(layer, [CALL] * 3, [None] * 3, storage)
    trace = trace_groups(layer, {o.name: o for [o] in layer.groups()}, CALL, BATCHES[0])
    return FinishedParts(activations, trace.groups, trace.ends), activations


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("form", [lambda output: output, lambda output: (output, None)])
def test_finished_parts_run_once_more_for_each_batch_and_then_never_again(form, stored, tmp_path):
    layer = Layer(form)
    parts, activations = parts_of(layer, tmp_path if stored else CPU)
    expected = [layer(batch) for batch in BATCHES]
    layer.first.runs = 0
    layer.second.runs = 0

    for group, runs in ((0, (3, 3)), (1, (6, 6)), (2, (6, 9)), (3, (6, 9)), (3, (6, 9))):
        with parts.skipped(group, keep=True):
            outputs = activations.outputs(BATCHES)

        assert all(map(torch.equal, outputs, expected))
        assert (layer.first.runs, layer.second.runs) == runs, group
    assert not {"forward"} & (vars(layer.first).keys() | vars(layer.second).keys())


def test_parts_that_return_more_than_one_tensor_are_not_skipped():
    layer = Layer(lambda output: (output, {"router": output.sum()}))
    parts, activations = parts_of(layer)
    layer.first.runs = 0
    layer.second.runs = 0

    for _ in range(3):
        with parts.skipped(3, keep=True):
            activations.outputs(BATCHES)

    assert (layer.first.runs, layer.second.runs) == (9, 3)


def test_an_error_leaves_the_parts_as_they_were_and_keeps_nothing():
    layer = Layer()
    parts, activations = parts_of(layer)

    def fail_after_one_batch():
        with parts.skipped(3, keep=True):
            activations.run(0, BATCHES[0])
            raise KeyError("caller")

    with pytest.raises(KeyError, match="caller"):
        fail_after_one_batch()

    assert "forward" not in vars(layer.first)
    with parts.skipped(3, keep=True):
        outputs = activations.outputs(BATCHES)
    assert all(map(torch.equal, outputs, [layer(batch) for batch in BATCHES]))


class EndedByItsOperator(Part):
    """A part that gives out what `form` makes of its last operator's output, without a change."""

    def forward(self, hidden: Tensor, scale: float = 1.0) -> object:
        self.runs += 1
        return self.form(self.inner(torch.tanh(hidden * scale)))


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("form", [lambda output: output, lambda output: (output, None)])
def test_a_part_that_ends_with_an_operator_runs_only_up_to_that(form, stored, tmp_path):
    layer = Layer()
    layer.first = EndedByItsOperator(form)
    parts, activations = parts_of(layer, tmp_path if stored else CPU)
    with parts.skipped(0, keep=True):
        list(activations.arguments_of(layer.first.inner, BATCHES))
    layer.first.inner.weight.mul_(0.5)  # pruned

    for keep in (False, True, True):
        layer.first.runs = 0
        with parts.skipped(1, keep=keep):
            outputs = activations.outputs(BATCHES)

        assert layer.first.runs == 0
        assert all(map(torch.equal, outputs, [layer(batch) for batch in BATCHES]))


def test_a_hook_that_changes_what_an_operator_reads_does_so_once():
    layer = Layer()
    layer.first = EndedByItsOperator(lambda output: output)
    layer.first.inner.register_forward_pre_hook(lambda _, inputs: (2 * inputs[0],))
    parts, activations = parts_of(layer)

    for group in (0, 1, 2):
        with parts.skipped(group, keep=True):
            outputs = activations.outputs(BATCHES)

        assert all(map(torch.equal, outputs, [layer(batch) for batch in BATCHES]))


@pytest.mark.parametrize(
    "form",
    [lambda y: y.mul_(2), lambda y: y + 1, lambda y: (y, y.sum()), lambda y: y.clone()],
    ids=["in place", "sum", "two tensors", "copy"],
)
def test_a_part_that_changes_its_operators_output_does_not_end_with_it(form):
    layer = Layer()
    layer.first = EndedByItsOperator(form)
    layer.forward = lambda hidden: layer.first(hidden)
    operator = LinearOperator("inner", layer.first.inner)
    for made, ends in ((form, {}), (lambda y: (y, None), {"inner": PartEnd(layer.first, (None,))})):
        layer.first.form = made
        assert trace_groups(layer, {"inner": operator}, CALL, BATCHES[0]).ends == ends
