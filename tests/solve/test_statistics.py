import pytest
import torch

from optimum_fista.solve.statistics import InputStatistics, largest_eigenvalue


def gram_of(spectrum: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """Symmetric matrix with the given eigenvalues and random eigenvectors."""
    generator = torch.Generator().manual_seed(seed)
    size = len(spectrum)
    basis, _ = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    gram = (basis * spectrum.double()) @ basis.T
    return (gram + gram.T) / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", range(4))
def test_agrees_with_eigvalsh_from_above(dtype, seed):
    inputs = torch.randn(60, 40, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    gram = inputs.T @ inputs
    exact = float(torch.linalg.eigvalsh(gram)[-1])
    estimate = largest_eigenvalue(gram.to(dtype))
    assert exact * (1 - 1e-14 if dtype == torch.float64 else 1 - 1e-6) <= estimate <= exact * (1 + 2e-4)


@pytest.mark.parametrize("outlier", [1e2, 1e4, 1e7])
def test_a_few_dominant_inputs_do_not_mislead_it(outlier):
    inputs = torch.randn(80, 50, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    inputs[:, [7, 31]] *= torch.tensor([outlier, 0.7 * outlier])
    gram = inputs.T @ inputs
    exact = float(torch.linalg.eigvalsh(gram)[-1])
    assert exact * (1 - 1e-6) <= largest_eigenvalue(gram.float()) <= exact * (1 + 2e-4)


def test_largest_direction_away_from_the_largest_diagonal_entry():
    # One isolated input of energy 20 beside forty inputs of energy 1 that all point the same way (eigenvalue 40).
    gram = torch.ones(41, 41, dtype=torch.float64)
    gram[0, :] = gram[:, 0] = 0
    gram[0, 0] = 20
    assert largest_eigenvalue(gram) == pytest.approx(40, rel=2e-4)


@pytest.mark.parametrize("others", [0.9, 0.99, 0.999, 0.9999])
def test_gradient_steps_with_its_inverse_contract_even_where_the_spectrum_is_crowded(others):
    gram = gram_of(torch.cat([torch.ones(1), torch.full((99,), others)]))
    estimate = largest_eigenvalue(gram)
    assert estimate == pytest.approx(1, rel=1e-2)
    step = torch.eye(100, dtype=torch.float64) - gram / estimate
    assert float(torch.linalg.eigvalsh(step).abs().max()) < 0.2


def test_zero_and_rank_one_matrices():
    assert largest_eigenvalue(torch.zeros(5, 5)) == 0
    vector = torch.arange(1.0, 5.0)
    assert largest_eigenvalue(torch.outer(vector, vector)) == pytest.approx(30, rel=1e-4)
    assert largest_eigenvalue(torch.tensor([[3.0]])) == pytest.approx(3)


def test_is_deterministic_and_leaves_the_global_generator_alone():
    gram = gram_of(torch.linspace(2, 0, 10))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    assert largest_eigenvalue(gram) == largest_eigenvalue(gram)
    assert torch.equal(torch.get_rng_state(), before)


def test_mean_that_was_not_recorded_is_refused():
    with pytest.raises(ValueError, match="no mean of the inputs"):
        _ = InputStatistics(torch.eye(2), 3).mean
