import math

import pytest
import torch
from pruning import prune
from tiny_models import tiny_model
from torch import Tensor
from toy_layer import ToyLayer, toy_layer

from optimum_fista.model.correction import Correction, LayerTargets
from optimum_fista.model.inputs import HiddenStates, LayerActivations, LayerCall

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
        (("full",), Correction("full")),
        ((1, 0.0), Correction("full")),
        ((0.25, 1.0), Correction("full", 0.25, 1.0)),
    ],
)
def test_words_and_numbers_are_read_once(given, expected):
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


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("correction", ["none", "intra", "full", 0.0, 0.25])
@pytest.mark.parametrize("held_out", [False, True])
def test_problems_and_errors_are_those_of_the_activations(correction, in_place, bias, held_out):
    made = Correction.parse(correction)
    dense, layer = (toy_layer(bias=bias, in_place=in_place) for _ in range(2))
    chosen = [0, 2] if held_out else [0, 1, 2]
    flags = (False, True, False) if held_out else ()
    entering = hidden_states(0.7 if made.carry == "full" else 1.0)
    targets = targets_of(layer, made, held_out=flags)
    for index, group in enumerate(layer.groups()):
        name = group[0].name.removeprefix("layer.")
        X_all = reference(dense, name, hidden_states())
        X_star_all = X_all if correction == "none" else reference(layer, name, entering)
        problems = targets.problems(index)
        held_out_problems = list(problems.held_out)
        assert len({id(problem.statistics) for problem in problems.fitted}) == 1
        for kind, batches in (
            (problems.fitted, chosen),
            (held_out_problems, [1] if held_out else []),
        ):
            X, X_star = (
                torch.cat([x[i] for i in batches] or [x[0][:0]]) for x in (X_all, X_star_all)
            )
            for operator, problem in zip(group, kind, strict=True):
                if not batches:
                    assert problem is None
                    continue
                W = dense.get_submodule(operator.name.removeprefix("layer.")).weight
                Y = (made.dense_share * X + (1 - made.dense_share) * X_star) @ W.T
                assert problem.name == operator.name
                assert problem.statistics.num_tokens == len(X)
                assert torch.allclose(problem.weight, W, atol=1e-6)
                assert torch.allclose(problem.gram, X_star.T @ X_star, rtol=1e-4, atol=1e-4)
                assert torch.allclose(problem.target, Y.T @ X_star, rtol=1e-4, atol=1e-4)
                assert float(problem.output_energies.sum()) == pytest.approx(norm(Y) ** 2, rel=1e-4)
                pruned = problem.weight * (problem.weight.abs() > 0.1)
                assert problem.fit_error(pruned) == pytest.approx(
                    norm(X_star @ pruned.T - Y) / norm(Y), rel=1e-3
                )
                wanted = X @ W.T
                if made.needs_dense:
                    expected = norm(X_star @ pruned.T - wanted) / norm(wanted)
                    assert problem.output_error(pruned) == pytest.approx(expected, rel=1e-3)
                else:
                    assert problem.output_error(pruned) is None
        for operator in group:  # what comes after them gets other inputs
            operator.parameter.mul_(operator.parameter.abs() > 0.1)
    left = targets.leave()
    assert (left.dense is not None) is made.needs_dense
    assert (left.pruned is not None) is (made.carry == "full")
    if left.dense is not None:
        assert all(
            torch.equal(ours, dense(state))
            for ours, state in zip(left.dense, hidden_states(), strict=True)
        )
    if left.pruned is not None:
        assert all(
            torch.equal(ours, layer(state))
            for ours, state in zip(left.pruned, entering, strict=True)
        )
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in layer.modules())


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
def test_output_errors_with_a_small_share_of_the_dense_inputs(share):
    """The share divides the difference of the two targets: rounding must not be magnified by it."""
    layer = toy_layer()
    problem = targets_of(layer, Correction("full", share)).problems(0).fitted[0]
    X, X_star = (
        torch.cat(reference(layer, "left", hidden_states(scale))).double() for scale in (1.0, 0.7)
    )
    W, pruned = problem.weight.double(), problem.weight * (problem.weight.abs() > 0.1)
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
    activations, operator = targets_of(layer, Correction("none")).activations, layer.groups()[1][0]
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
    said = [
        warning
        for warning in report.warnings
        if "no residual correction in 2 of 2 decoder layers" in warning
    ]
    assert len(said) == (not corrected)


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
        model = tiny_model(family)
        if options:
            prune(model, IDS.split(4), method="alps", error_correction="full", **options)
        return model(IDS, output_hidden_states=True).hidden_states[1]

    monkeypatch.setattr("optimum_fista.prune.loop.LayerTargets", Spy)
    dense, plain = first_output(), first_output(residual_correction=0.0)
    corrected = first_output(residual_correction=1.0)
    assert norm(corrected - dense) < norm(plain - dense)
    assert torch.allclose(torch.cat(entered[-1]), corrected, atol=1e-4)
