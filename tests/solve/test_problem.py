import math

import pytest
import torch
from layer_problems import example

from optimum_fista.solve.problem import LayerProblem, inner, relative
from optimum_fista.solve.statistics import InputStatistics


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("tokens", [3, 40])
def test_error_from_statistics_is_the_error_of_the_activations(corrected, tokens):
    made = example(5, 8, tokens=tokens, corrected=corrected)
    problem = made.problem
    assert problem.corrected is corrected
    for weight in (torch.randn(5, 8).double(), made.weight * (made.weight.abs() > 0.5), torch.zeros(5, 8).double()):
        assert problem.squared_error(weight) == pytest.approx(made.squared_error(weight), rel=1e-9)
        expected = math.sqrt(made.squared_error(weight)) / float(made.outputs.norm())
        assert problem.fit_error(weight) == pytest.approx(expected, rel=1e-9)
    assert float(problem.output_energies.sum()) == pytest.approx(float(made.outputs.square().sum()), rel=1e-9)
    assert torch.allclose(problem.output_energies, made.outputs.square().sum(0))


def test_dense_weights_already_miss_corrected_targets():
    same, corrected = example(5, 8), example(5, 8, corrected=True)
    assert same.problem.squared_error(same.weight) == 0
    missed = corrected.problem.squared_error(corrected.weight)
    assert missed == pytest.approx(corrected.squared_error(corrected.weight), rel=1e-9)
    assert missed > 0


@pytest.mark.parametrize("corrected", [False, True])
def test_gradient_is_that_of_autograd(corrected):
    made = example(4, 7, corrected=corrected, seed=1)
    weight = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    objective = 0.5 * (made.inputs @ weight.T - made.outputs).square().sum()
    objective.backward()
    assert torch.allclose(made.problem.gradient(weight.detach()), weight.grad, rtol=1e-9, atol=1e-9)


def test_small_changes_of_the_weights_keep_their_digits_in_float32():
    made = example(16, 32, dtype=torch.float32)
    change = 1e-5 * torch.randn(16, 32, generator=torch.Generator().manual_seed(3))
    weight = made.weight + change
    exact = float((made.inputs.double() @ (weight.double() - made.weight.double()).T).square().sum())
    # <W* G, W*> - 2 <W*, C> + energy in float32 has an error a thousand times this difference.
    assert made.problem.squared_error(weight) == pytest.approx(exact, rel=1e-3)


def test_seminorm_is_the_norm_of_the_outputs():
    made = example(4, 6, seed=2)
    difference = torch.randn(4, 6, dtype=torch.float64)
    assert made.problem.seminorm(difference) == pytest.approx(float((made.inputs @ difference.T).norm()), rel=1e-9)


@pytest.mark.parametrize("corrected", [False, True])
def test_error_of_damaged_weights_is_not_mistaken_for_zero(corrected):
    made = example(4, 6, corrected=corrected)
    damaged = made.weight.clone()
    damaged[1, 2] = math.nan
    assert math.isnan(made.problem.squared_error(damaged))
    assert math.isnan(made.problem.fit_error(damaged))
    assert math.isnan(made.problem.seminorm(damaged))


def test_statistics_know_their_diagonal_mean_and_lipschitz_constant():
    made = example(2, 6)
    statistics = made.problem.statistics
    assert torch.allclose(statistics.diagonal, made.inputs.square().sum(0))
    assert torch.allclose(statistics.mean, made.inputs.mean(0))
    assert statistics.lipschitz == pytest.approx(float(torch.linalg.eigvalsh(statistics.gram)[-1]), rel=1e-3)
    statistics.diagonal.zero_()
    assert statistics.gram.diagonal().min() > 0, "diagonal must be a copy"


def test_shapes_are_checked_and_named():
    with pytest.raises(ValueError, match=r"gram has shape \(3, 4\)"):
        InputStatistics(torch.zeros(3, 4), 1)
    statistics = InputStatistics(torch.eye(4), 9)
    with pytest.raises(ValueError, match=r"h\.0\.fc has shape \(2, 3\).*\(4, 4\)"):
        LayerProblem(torch.zeros(2, 3), statistics, name="h.0.fc")
    with pytest.raises(ValueError, match=r"h\.0\.fc: target has shape \(4, 2\), not \(2, 4\)"):
        LayerProblem(torch.zeros(2, 4), statistics, torch.zeros(4, 2), torch.ones(2), name="h.0.fc")


@pytest.mark.parametrize("given", [{"target": torch.zeros(2, 4)}, {"output_energies": torch.ones(2)}])
def test_target_and_its_energy_come_together(given):
    with pytest.raises(ValueError, match="target and output_energies together"):
        LayerProblem(torch.zeros(2, 4), InputStatistics(torch.eye(4), 9), **given)


def test_inner_product_sums_rows_in_float64():
    values = torch.ones(2**12, 1)
    values[0] = 2.0**13  # 2^26 + 2^12 - 1 has no float32
    assert inner(values, values) == 2.0**26 + 2**12 - 1
    left, right = torch.randn(4, 5), torch.randn(4, 5)
    assert inner(left, right) == pytest.approx(float((left.double() * right.double()).sum()), rel=1e-5, abs=1e-5)


def test_relative_error_of_outputs_that_vanish():
    assert relative(0.0, 0.0) == 0
    assert relative(1.0, 0.0) == math.inf
    assert relative(1.0, 4.0) == 0.5
