import math

import pytest
import torch
from layer_problems import example

from optimum_fista.solve.problem import (
    InputStatistics,
    LayerProblem,
    inner,
    largest_eigenvalue,
    relative_norm,
)


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("tokens", [3, 40])
def test_error_from_statistics_is_the_error_of_the_activations(corrected, tokens):
    made = example(5, 8, tokens=tokens, corrected=corrected)
    random = torch.randn(5, 8).double()
    pruned = made.weight * (made.weight.abs() > 0.5)

    for weight in (random, pruned, made.weight):
        squared_error = made.problem.squared_error(weight)
        fit_error = made.problem.fit_error(weight)

        expected = made.squared_error(weight)
        assert squared_error == pytest.approx(expected, rel=1e-9, abs=1e-12)
        relative_error = math.sqrt(expected) / float(made.outputs.norm())
        assert fit_error == pytest.approx(relative_error, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("corrected", [False, True])
def test_a_problem_knows_the_energies_of_its_outputs(corrected):
    made = example(5, 8, corrected=corrected)

    assert made.problem.corrected is corrected
    assert torch.allclose(made.problem.output_energies, made.outputs.square().sum(0))


def test_small_changes_of_the_weights_keep_their_digits_in_float32():
    made = example(16, 32, dtype=torch.float32)
    change = 1e-5 * torch.randn(16, 32, generator=torch.Generator().manual_seed(3))
    weight = made.weight + change

    exact = float(
        (made.inputs.double() @ (weight.double() - made.weight.double()).T).square().sum()
    )

    # <W* G, W*> - 2 <W*, C> + energy in float32 has an error a thousand times this difference.
    assert made.problem.squared_error(weight) == pytest.approx(exact, rel=1e-3)


def test_seminorm_is_the_norm_of_the_outputs():
    made = example(4, 6, seed=2)
    difference = torch.randn(4, 6, dtype=torch.float64)

    seminorm = made.problem.seminorm(difference)

    assert seminorm == pytest.approx(float((made.inputs @ difference.T).norm()), rel=1e-9)


@pytest.mark.parametrize("corrected", [False, True])
def test_the_error_of_weights_with_a_nan_is_nan(corrected):
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
    assert statistics.lipschitz == pytest.approx(
        float(torch.linalg.eigvalsh(statistics.gram)[-1]), rel=1e-3
    )
    statistics.diagonal.zero_()
    assert statistics.gram.diagonal().min() > 0, "diagonal must be a copy"


def test_a_weight_that_does_not_fit_the_statistics_is_refused_by_name():
    statistics = InputStatistics(torch.eye(4), 9)

    with pytest.raises(ValueError, match=r"h\.0\.fc has shape \(2, 3\).*\(4, 4\)"):
        LayerProblem(torch.zeros(2, 3), statistics, name="h.0.fc")


def test_inner_products_of_float32_tensors_are_summed_in_float64():
    values = torch.ones(2**12, 1)
    values[0] = 2.0**13

    assert inner(values, values) == 2.0**26 + 2**12 - 1  # which float32 can't hold
    left = torch.randn(4, 5)
    right = torch.randn(4, 5)
    assert inner(left, right) == pytest.approx(
        float((left.double() * right.double()).sum()), rel=1e-5, abs=1e-5
    )


def test_a_relative_norm_to_zero_is_zero_or_infinite():
    assert relative_norm(0.0, 0.0) == 0
    assert relative_norm(1.0, 0.0) == math.inf
    assert relative_norm(1.0, 4.0) == 0.5


def gram_of(spectrum: torch.Tensor) -> torch.Tensor:
    """Symmetric matrix with the given eigenvalues and random eigenvectors."""
    generator = torch.Generator().manual_seed(0)
    size = len(spectrum)
    basis, _ = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    gram = (basis * spectrum.double()) @ basis.T
    return (gram + gram.T) / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", range(2))
def test_the_largest_eigenvalue_agrees_with_eigvalsh_and_is_not_below(dtype, seed):
    inputs = torch.randn(60, 40, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    gram = inputs.T @ inputs

    estimate = largest_eigenvalue(gram.to(dtype))

    exact = float(torch.linalg.eigvalsh(gram)[-1])
    rounding = 1e-14 if dtype == torch.float64 else 1e-6
    assert exact * (1 - rounding) <= estimate <= exact * (1 + 2e-4)


@pytest.mark.parametrize("outlier", [1e2, 1e7])
def test_the_largest_eigenvalue_is_found_beside_a_few_dominant_inputs(outlier):
    inputs = torch.randn(80, 50, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    inputs[:, [7, 31]] *= torch.tensor([outlier, 0.7 * outlier])
    gram = inputs.T @ inputs

    estimate = largest_eigenvalue(gram.float())

    exact = float(torch.linalg.eigvalsh(gram)[-1])
    assert exact * (1 - 1e-6) <= estimate <= exact * (1 + 2e-4)


def test_the_largest_eigenvalue_is_found_away_from_the_largest_diagonal_entry():
    # One isolated input of energy 20 beside forty inputs of energy 1 that all point the same way (eigenvalue 40).
    gram = torch.ones(41, 41, dtype=torch.float64)
    gram[0, :] = gram[:, 0] = 0
    gram[0, 0] = 20

    assert largest_eigenvalue(gram) == pytest.approx(40, rel=2e-4)


@pytest.mark.parametrize("others", [0.9, 0.999])
def test_gradient_steps_by_the_inverse_of_the_largest_eigenvalue_contract_a_crowded_spectrum(
    others,
):
    gram = gram_of(torch.cat([torch.ones(1), torch.full((99,), others)]))

    estimate = largest_eigenvalue(gram)

    assert estimate == pytest.approx(1, rel=1e-2)
    step = torch.eye(100, dtype=torch.float64) - gram / estimate
    assert float(torch.linalg.eigvalsh(step).abs().max()) < 0.2


def test_the_largest_eigenvalue_of_zero_and_rank_one_matrices_is_found():
    assert largest_eigenvalue(torch.zeros(5, 5)) == 0
    vector = torch.arange(1.0, 5.0)
    assert largest_eigenvalue(torch.outer(vector, vector)) == pytest.approx(30, rel=1e-4)
    assert largest_eigenvalue(torch.tensor([[3.0]])) == pytest.approx(3)


def test_mean_that_was_not_recorded_is_refused():
    with pytest.raises(ValueError, match="no mean of the inputs"):
        _ = InputStatistics(torch.eye(2), 3).mean
