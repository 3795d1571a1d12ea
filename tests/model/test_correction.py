import copy
import math

import pytest
import torch
from families import family_model
from pruning import prune
from tiny_models import tiny_model
from torch import Tensor, nn
from toy_layer import ToyLayer, toy_layer

from optimum_fista.model.calibration import read_batches
from optimum_fista.model.choice import find_operators
from optimum_fista.model.correction import Correction, LayerTargets
from optimum_fista.model.groups import trace_groups
from optimum_fista.model.inputs import HiddenStates, LayerActivations, LayerCall, record_inputs
from optimum_fista.model.layers import find_decoder_layers
from optimum_fista.model.operators import LinearOperator
from optimum_fista.solve.problem import LayerProblem

pytestmark = pytest.mark.usefixtures("no_gradients")
CPU = torch.device("cpu")
MASKS = [None, torch.tensor([[1, 1, 1], [0, 1, 1]]).bool(), torch.tensor([[1, 1, 0]] * 4).bool()]
IDS = torch.randint(1, 64, (12, 24), generator=torch.Generator().manual_seed(0))


def hidden_states(scale: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [scale * torch.randn(rows, 3, 8, generator=generator) for rows in (1, 2, 4)]


def reference(layer: ToyLayer, name: str, states: list[Tensor]) -> list[Tensor]:
    """Inputs [tokens, in] of an operator on the real tokens, a batch each."""
    inputs: list[Tensor] = []
    handle = layer.get_submodule(name).register_forward_pre_hook(
        lambda _, args: inputs.append(args[0].clone())
    )
    for state in states:
        layer(state)
    handle.remove()
    return [
        x.reshape(-1, x.shape[-1]) if mask is None else x[mask]
        for x, mask in zip(inputs, MASKS, strict=True)
    ]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (("none", 1.0), Correction("none")),
        (("intra", 0.5), Correction("intra", 1.0, 0.5)),
        (("after_attention",), Correction("after_attention")),
        (("full",), Correction("full")),
        ((1, 0.0), Correction("full")),
        ((0.25, 1.0), Correction("full", 0.25, 1.0)),
    ],
)
def test_words_and_numbers_are_parsed_to_the_same_corrections(given, expected):
    assert Correction.parse(*given) == expected


def targets_of(
    layer: ToyLayer, correction: Correction, held_out: tuple[bool, ...] = ()
) -> LayerTargets:
    """Of the layer with hidden states that are others in the pruned network than in the dense one."""
    activations = LayerActivations(layer, [LayerCall((), {})] * 3, MASKS, CPU, held_out)
    states = HiddenStates(hidden_states())
    if correction.carry == "full":
        states = HiddenStates(
            hidden_states() if correction.needs_dense else None, hidden_states(0.7)
        )
    return LayerTargets(activations, layer.groups(), correction, states)


def norm(outputs: Tensor) -> float:
    return float(outputs.double().norm())


def weight_of(layer: ToyLayer, operator: LinearOperator) -> Tensor:
    """The weight [out, in] of the module of a layer that has an operator's name."""
    return layer.get_submodule(operator.name.removeprefix("layer.")).weight


def magnitude_pruned(weight: Tensor) -> Tensor:
    """A weight without its small elements."""
    return weight * (weight.abs() > 0.1)


def require_problem(
    problem: LayerProblem, correction: Correction, W: Tensor, X: Tensor, X_star: Tensor
) -> None:
    """A problem of an operator is that of its dense weight `W` [out, in] and its inputs, [tokens, in]."""
    outputs = X @ W.T
    Y = (correction.dense_share * X + (1 - correction.dense_share) * X_star) @ W.T
    assert problem.statistics.num_tokens == len(X)
    assert torch.allclose(problem.weight, W, atol=1e-6)
    assert torch.allclose(problem.gram, X_star.T @ X_star, rtol=1e-4, atol=1e-4)
    assert torch.allclose(problem.target, Y.T @ X_star, rtol=1e-4, atol=1e-4)
    assert float(problem.output_energies.sum()) == pytest.approx(norm(Y) ** 2, rel=1e-4)

    pruned = magnitude_pruned(problem.weight)
    fit_error = norm(X_star @ pruned.T - Y) / norm(Y)
    assert problem.fit_error(pruned) == pytest.approx(fit_error, rel=1e-3)
    if correction.needs_dense:
        output_error = norm(X_star @ pruned.T - outputs) / norm(outputs)
        assert problem.output_error(pruned) == pytest.approx(output_error, rel=1e-3)
    else:
        assert problem.output_error(pruned) is None


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("correction", ["none", "after_attention", "intra", "full", 0.0, 0.25])
@pytest.mark.parametrize("held_out", [False, True])
def test_problems_and_errors_are_those_of_the_activations(correction, in_place, bias, held_out):
    parsed = Correction.parse(correction)
    dense = toy_layer(bias=bias, in_place=in_place)
    layer = toy_layer(bias=bias, in_place=in_place)
    fitted_batches = [0, 2] if held_out else [0, 1, 2]
    held_out_batches = [1] if held_out else []
    flags = (False, True, False) if held_out else ()
    entering = hidden_states(0.7 if parsed.carry == "full" else 1.0)

    targets = targets_of(layer, parsed, held_out=flags)
    for index, group in enumerate(layer.groups()):
        name = group[0].name.removeprefix("layer.")
        inputs_of_dense = reference(dense, name, hidden_states())
        inputs = inputs_of_dense if correction == "none" else reference(layer, name, entering)

        problems = targets.problems(index)

        assert len({id(problem.statistics) for problem in problems.fitted}) == 1
        assert [problem.name for problem in problems.fitted] == [o.name for o in group]
        for operator, problem in zip(group, problems.fitted, strict=True):
            X = torch.cat([inputs_of_dense[i] for i in fitted_batches])
            X_star = torch.cat([inputs[i] for i in fitted_batches])
            require_problem(problem, parsed, weight_of(dense, operator), X, X_star)
        for operator, problem in zip(group, problems.held_out, strict=True):
            if not held_out:
                assert problem is None
                continue
            assert problem.name == operator.name
            X = torch.cat([inputs_of_dense[i] for i in held_out_batches])
            X_star = torch.cat([inputs[i] for i in held_out_batches])
            require_problem(problem, parsed, weight_of(dense, operator), X, X_star)

        for operator in group:  # what comes after them gets other inputs
            operator.parameter.copy_(magnitude_pruned(operator.parameter))


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("correction", ["none", "after_attention", "intra", "full", 0.0, 0.25])
def test_hidden_states_after_the_layer_are_those_of_both_networks(correction, in_place):
    parsed = Correction.parse(correction)
    dense = toy_layer(in_place=in_place)
    layer = toy_layer(in_place=in_place)
    targets = targets_of(layer, parsed)
    for index, group in enumerate(layer.groups()):
        targets.problems(index)
        for operator in group:
            operator.parameter.copy_(magnitude_pruned(operator.parameter))

    leaving = targets.leave()

    assert (leaving.dense is not None) is parsed.needs_dense
    assert (leaving.pruned is not None) is (parsed.carry == "full")
    if leaving.dense is not None:
        expected = [dense(state) for state in hidden_states()]
        assert all(map(torch.equal, leaving.dense, expected))
    if leaving.pruned is not None:
        expected = [layer(state) for state in hidden_states(0.7)]
        assert all(map(torch.equal, leaving.pruned, expected))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in layer.modules())


def inputs_of(layer: nn.Module, operator: nn.Module, activations: LayerActivations, states):
    """Inputs [tokens, in] of an operator of a layer, of all batches."""
    inputs = []
    handle = operator.register_forward_pre_hook(lambda _, args: inputs.append(args[0].clone()))
    for call, state in zip(activations.calls, states, strict=True):
        call.run(layer, state)
    handle.remove()
    rows_by_batch = [tensor.flatten(0, -2) for tensor in inputs]
    return torch.cat(rows_by_batch)


@pytest.mark.parametrize(
    ("family", "attention", "last"),
    [
        ("llama", "self_attn", "o_proj"),
        ("falcon", "self_attention", "dense"),  # attention and MLP side by side
        ("gpt_neox", "attention", "dense"),  # a dropout returns the attention's output once more
        ("phi3", "self_attn", "o_proj"),
        ("jamba", "mamba", "out_proj"),  # no attention, but what stands in its place
    ],
)
def test_the_attention_is_pruned_on_dense_inputs_and_what_follows_sees_errors_of_its_last_operator(
    family, attention, last
):
    model = family_model(family)
    layers = find_decoder_layers(model)
    layer_name, layer = next(iter(layers))
    recorded = record_inputs(layers, read_batches(IDS.split(4), 64))
    states = recorded.hidden_states
    calls = recorded.calls[0]  # of the first layer, one for each batch
    operators = find_operators(layer_name, layer)
    trace = trace_groups(layer, operators, calls[0], states[0])
    activations = LayerActivations(layer, calls, recorded.token_masks, CPU)
    correction = Correction.parse("after_attention")
    dense = copy.deepcopy(layer)
    # The layer as operators after the attention see it: in the attention, only the last operator is pruned.
    seen = copy.deepcopy(layer)

    targets = LayerTargets(
        activations, trace.groups, correction, HiddenStates(states), ends=trace.ends
    )
    runs_of_attention = []
    trace.groups[0][0].module.register_forward_hook(lambda *_: runs_of_attention.append(1))
    num_dense = 0
    for index, group in enumerate(trace.groups):
        names = [operator.name.removeprefix(f"{layer_name}.") for operator in group]
        X = inputs_of(dense, dense.get_submodule(names[0]), activations, states)
        X_star = inputs_of(seen, seen.get_submodule(names[0]), activations, states)
        if names[0].startswith(f"{attention}."):
            num_dense += 1
            X_star = X

        problems = targets.problems(index)

        for operator, name, problem in zip(group, names, problems.fitted, strict=True):
            W = dense.get_submodule(name).weight
            require_problem(problem, correction, W, X, X_star)
            pruned = magnitude_pruned(operator.parameter)
            operator.parameter.copy_(pruned)
            if name == f"{attention}.{last}" or not name.startswith(f"{attention}."):
                seen.get_submodule(name).weight.copy_(pruned)
    assert 1 < num_dense < len(trace.groups)
    assert not runs_of_attention


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("mamba", {}),  # a layer is one part
        ("bloom", {}),  # the attention adds to the output of its last operator
        ("falcon_h1", {}),  # a mixer and an attention side by side
        ("llama", {"exclude": "*.o_proj"}),
        ("llama", {"exclude": "*.self_attn.*"}),  # the MLP does not take the attention's place
    ],
)
def test_without_an_attention_all_errors_in_the_layer_are_corrected(family, options):
    def pruned(correction: str) -> dict[str, Tensor]:
        model = family_model(family)
        prune(model, IDS.split(4), method="alps", error_correction=correction, **options)
        return model.state_dict()

    intra = pruned("intra")
    after_attention = pruned("after_attention")
    none = pruned("none")

    assert all(torch.equal(intra[name], after_attention[name]) for name in intra)
    assert any(not torch.equal(intra[name], none[name]) for name in intra)


class Overwriting(nn.Module):
    """An attention that overwrites what its last operator has read, if it is told to, and an MLP after it."""

    def __init__(self, overwrites: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.Module()
        self.attention.mix = nn.Linear(8, 8)
        self.attention.out = nn.Linear(8, 8)
        self.attention.forward = self.attend
        self.overwrites = overwrites
        self.up = nn.Linear(8, 8)

    def attend(self, hidden: Tensor) -> Tensor:
        mixed = self.attention.mix(hidden).tanh()
        output = self.attention.out(mixed)
        if self.overwrites:
            mixed.zero_()
        return output

    def forward(self, hidden: Tensor) -> Tensor:
        return self.up(hidden + self.attention(hidden))


def test_inputs_that_the_attention_overwrites_are_kept():
    def grams(overwrites: bool) -> list[Tensor]:
        layer = Overwriting(overwrites)
        modules = {"mix": layer.attention.mix, "out": layer.attention.out, "up": layer.up}
        operators = {name: LinearOperator(name, module) for name, module in modules.items()}
        call = LayerCall((), {})
        trace = trace_groups(layer, operators, call, hidden_states()[0])
        activations = LayerActivations(layer, [call] * 3, [None] * 3, CPU)
        correction = Correction.parse("after_attention")
        states = HiddenStates(hidden_states())
        targets = LayerTargets(activations, trace.groups, correction, states, ends=trace.ends)
        assert len(trace.groups) == 3
        found = []
        for index, [operator] in enumerate(trace.groups):
            found.append(targets.problems(index).fitted[0].gram.clone())
            operator.parameter.copy_(magnitude_pruned(operator.parameter))
        return found

    assert all(map(torch.equal, grams(True), grams(False)))


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
@pytest.mark.parametrize("correction", ["none", "intra"])
def test_inputs_that_are_not_finite_are_refused_by_name(value, correction):
    layer = toy_layer()
    layer.up.weight[0, 0] = value
    targets = targets_of(layer, Correction.parse(correction))
    targets.problems(0)
    targets.problems(1)

    with pytest.raises(ValueError, match=r"inputs of layer\.low hold NaN or Inf \(or overflow"):
        targets.problems(2)


@pytest.mark.parametrize("share", [1e-3, 1e-2])
def test_output_errors_stay_exact_with_a_small_share_of_the_dense_inputs(share):
    """The share divides the difference of the two targets: rounding must not be magnified by it."""
    layer = toy_layer()
    X = torch.cat(reference(layer, "left", hidden_states(1.0))).double()
    X_star = torch.cat(reference(layer, "left", hidden_states(0.7))).double()

    problem = targets_of(layer, Correction("full", share)).problems(0).fitted[0]

    W = problem.weight.double()
    pruned = magnitude_pruned(problem.weight)
    expected = norm(X_star @ pruned.double().T - X @ W.T) / norm(X @ W.T)
    assert problem.output_error(pruned) == pytest.approx(expected, rel=1e-3)


def test_a_group_that_is_not_called_any_more_is_named():
    layer = toy_layer()
    targets = targets_of(layer, Correction("intra"))
    layer.forward = lambda hidden: hidden

    with pytest.raises(
        RuntimeError, match="a Linear is not called in every forward pass of its decoder layer"
    ):
        targets.problems(1)


def test_rows_that_do_not_belong_to_tokens_are_refused_only_where_padding_must_be_told_apart():
    layer = toy_layer()
    activations = targets_of(layer, Correction("none")).activations
    operator = layer.groups()[1][0]

    assert activations.rows(torch.zeros(5, 2), 0, operator).shape == (5, 2)
    with pytest.raises(
        ValueError, match=r"layer\.up sees 5 rows for 12 tokens.*exclude=\['layer\.up'\]"
    ):
        activations.rows(torch.zeros(5, 2), 2, operator)


@pytest.mark.parametrize(("family", "corrected"), [("llama", 2), ("gemma3_text", 0)])
def test_the_report_says_where_nothing_was_corrected(family, corrected):
    model = tiny_model(family).bfloat16()

    report = prune(
        model, IDS.split(4), method="wanda", error_correction=0.5, residual_correction=1.0
    )

    assert sum(operator.residual_corrected for operator in report.operators) == corrected
    warnings = [
        warning
        for warning in report.warnings
        if "no residual correction in 2 of 2 decoder layers" in warning
    ]
    assert len(warnings) == (0 if corrected else 1)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "falcon"])
def test_a_residual_correction_brings_the_output_closer_and_carries_on_what_the_pruned_layer_returns(
    family, monkeypatch
):
    entered: list[list[Tensor]] = []

    class Spy(LayerTargets):
        def __init__(self, activations, groups, correction, entering, **options):
            entered.append(list(entering.pruned))
            super().__init__(activations, groups, correction, entering, **options)

    def first_output(**options) -> Tensor:
        """Hidden states after the first decoder layer, of the dense model or of one pruned with options."""
        model = tiny_model(family)
        if options:
            prune(model, IDS.split(4), method="alps", error_correction="full", **options)
        return model(IDS, output_hidden_states=True).hidden_states[1]

    monkeypatch.setattr("optimum_fista.prune.loop.LayerTargets", Spy)

    dense = first_output()
    plain = first_output(residual_correction=0.0)
    corrected = first_output(residual_correction=1.0)

    assert norm(corrected - dense) < norm(plain - dense)
    assert torch.allclose(torch.cat(entered[-1]), corrected, atol=1e-4)
