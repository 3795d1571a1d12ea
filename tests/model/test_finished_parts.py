import pytest
import torch
from torch import Tensor, nn

from optimum_fista.model.activations import LayerActivations
from optimum_fista.model.forward import LayerCall
from optimum_fista.model.groups import FinishedParts, trace_groups
from optimum_fista.model.operator import LinearOperator

CPU = torch.device("cpu")


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
        self.first, self.second, self.last = Part(form), Part(lambda output: output), nn.Linear(4, 4)

    def forward(self, hidden: Tensor) -> Tensor:
        output = self.first(hidden, scale=2.0)
        output = output[0] if isinstance(output, tuple) else output
        output += hidden
        return self.last(self.second(output))

    def groups(self) -> list[list[LinearOperator]]:
        operators = (self.first.inner, self.second.inner, self.last)
        return [[LinearOperator(str(index), module)] for index, module in enumerate(operators)]


def parts_of(layer: Layer, storage=CPU) -> tuple[FinishedParts, LayerActivations]:
    activations = LayerActivations(layer, [LayerCall((), {})] * 3, [None] * 3, storage)
    return FinishedParts(activations, layer.groups()), activations


@pytest.fixture(autouse=True)
def _no_gradients():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


BATCHES = [torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(i)) for i in range(3)]


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("form", [lambda output: output, lambda output: (output, None)])
def test_what_is_finished_runs_once_more_and_never_again(form, stored, tmp_path):
    layer = Layer(form)
    parts, activations = parts_of(layer, tmp_path if stored else CPU)
    expected = [layer(batch) for batch in BATCHES]
    layer.first.runs = layer.second.runs = 0
    for group, runs in ((0, (3, 3)), (1, (6, 6)), (2, (6, 9)), (3, (6, 9)), (3, (6, 9))):
        with parts.skipped(group, keep=True):
            found = activations.outputs(BATCHES)
        assert all(map(torch.equal, found, expected))
        assert (layer.first.runs, layer.second.runs) == runs, group
    assert not {"forward"} & (vars(layer.first).keys() | vars(layer.second).keys())


def test_what_is_not_to_be_kept_runs_each_time():
    layer = Layer()
    parts, activations = parts_of(layer)
    for _ in range(2):
        with parts.skipped(3, keep=False):
            activations.outputs(BATCHES)
    assert layer.first.runs == layer.second.runs == 6


def test_parts_that_give_out_more_tensors_run_as_ever():
    layer = Layer(lambda output: (output, {"router": output.sum()}))
    parts, activations = parts_of(layer)
    for _ in range(3):
        with parts.skipped(3, keep=True):
            activations.outputs(BATCHES)
    assert (layer.first.runs, layer.second.runs) == (9, 3)


def test_what_a_part_gives_out_besides_is_that_of_the_batch():
    layer, lengths = Layer(lambda output: (output, output.shape[1])), []
    layer.first.register_forward_hook(lambda _, __, output: lengths.append(output[1]))
    batches = [torch.randn(1, length, 4) for length in (2, 5, 3)]
    parts, activations = parts_of(layer)
    for _ in range(3):
        lengths.clear()
        with parts.skipped(3, keep=True):
            activations.outputs(batches)
        assert lengths == [2, 5, 3]


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
        found = activations.outputs(BATCHES)
    assert all(map(torch.equal, found, [layer(batch) for batch in BATCHES]))


def traced(layer: Layer) -> list[list[LinearOperator]]:
    operators = {operator.name: operator for [operator] in layer.groups()}
    return trace_groups(layer, operators, LayerCall((), {}), BATCHES[0])[0]


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
    activations = LayerActivations(layer, [LayerCall((), {})] * 3, [None] * 3, tmp_path if stored else CPU)
    groups = traced(layer)
    parts = FinishedParts(activations, groups)
    layer.first.runs = 0
    with parts.skipped(0, keep=True):
        list(activations.arguments_of(layer.first.inner, BATCHES))
    layer.first.inner.weight.mul_(0.5)  # pruned
    assert layer.first.runs == 3
    for keep in (False, True, True):
        with parts.skipped(1, keep=keep):
            found = activations.outputs(BATCHES)
        assert layer.first.runs == 3
        assert all(map(torch.equal, found, [layer(batch) for batch in BATCHES]))
        layer.first.runs = 3


def test_a_hook_that_changes_what_an_operator_reads_does_so_once():
    layer = Layer()
    layer.first = EndedByItsOperator(lambda output: output)
    layer.first.inner.register_forward_pre_hook(lambda _, inputs: (2 * inputs[0],))
    activations = LayerActivations(layer, [LayerCall((), {})] * 3, [None] * 3, CPU)
    parts = FinishedParts(activations, traced(layer))
    for group in (0, 1, 2):
        with parts.skipped(group, keep=True):
            found = activations.outputs(BATCHES)
        assert all(map(torch.equal, found, [layer(batch) for batch in BATCHES]))


@pytest.mark.parametrize(
    "form",
    [lambda y: y.mul_(2), lambda y: y + 1, lambda y: (y, y.sum()), lambda y: y.clone()],
    ids=["in place", "sum", "two tensors", "copy"],
)
def test_a_part_that_changes_its_operators_output_does_not_end_with_it(form):
    layer = Layer()
    layer.first = EndedByItsOperator(form)
    layer.forward = lambda hidden: layer.first(hidden)
    assert traced(layer)[0][0].ends is None
    layer.first.form = lambda y: (y, None)
    assert traced(layer)[0][0].ends == (layer.first, (None,))
