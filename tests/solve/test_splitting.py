import pytest
import torch
from layer_problems import example

from optimum_fista.solve.patterns import Unstructured
from optimum_fista.solve.splitting import SplitState, damped_inverse, unit_diagonal


def test_damped_inverse_is_the_inverse():
    gram = example(2, 12).problem.gram
    inverse = damped_inverse(gram.clone(), 0.7)
    assert torch.allclose(inverse @ (gram + 0.7 * torch.eye(12, dtype=gram.dtype)), torch.eye(12, dtype=gram.dtype))


def test_iterations_by_hand():
    made = example(4, 8)
    gram, target = made.problem.gram, made.problem.target
    pattern = Unstructured(0.5)
    state = SplitState(target.__getitem__, made.weight.clone())
    sparse, dual = made.weight.clone(), torch.zeros_like(target)
    for rho in (2.0, 2.0, 5.0, 3.0):
        inverse = damped_inverse(gram.clone(), rho)
        weight = (target - dual + rho * sparse) @ torch.linalg.inv(gram + rho * torch.eye(8, dtype=gram.dtype))
        moved = weight + dual / rho
        mask = pattern.mask(moved.abs())
        sparse, dual = moved * mask, dual + rho * (weight - moved * mask)
        state.iterate(inverse, rho, pattern)
        assert torch.equal(state.mask, mask)
        assert torch.allclose(state.sparse, sparse)
        assert torch.allclose(rho * (state.point - state.sparse), dual)


def test_a_negative_matrix_fails_loudly():
    with pytest.raises(torch.linalg.LinAlgError):
        damped_inverse(-torch.eye(4), 0.5)


def test_the_scaled_problem_has_the_same_minimizer():
    made = example(3, 8, corrected=True)
    gram, target, scale = unit_diagonal(made.problem, 0.05)
    assert torch.allclose(gram.diagonal(), torch.ones(8, dtype=gram.dtype))
    amount = 0.05 * made.problem.gram.diagonal().mean()
    damped = made.problem.gram + amount * torch.eye(8, dtype=gram.dtype)
    expected = torch.linalg.solve(damped, (made.problem.target + amount * made.weight).T).T
    assert torch.allclose(torch.linalg.solve(gram, target.T).T * scale, expected)
