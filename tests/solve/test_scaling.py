import torch
from layer_problems import example

from optimum_fista.solve.scaling import unit_diagonal


def test_the_scaled_problem_has_the_same_minimizer():
    made = example(3, 8, corrected=True)
    gram, target, scale = unit_diagonal(made.problem, 0.05)
    assert torch.allclose(gram.diagonal(), torch.ones(8, dtype=gram.dtype))
    amount = 0.05 * made.problem.gram.diagonal().mean()
    damped = made.problem.gram + amount * torch.eye(8, dtype=gram.dtype)
    expected = torch.linalg.solve(damped, (made.problem.target + amount * made.weight).T).T
    assert torch.allclose(torch.linalg.solve(gram, target.T).T * scale, expected)


def test_inputs_that_are_all_zero_do_not_divide_by_zero():
    made = example(3, 8)
    made.problem.statistics.gram.zero_()
    gram, target, scale = unit_diagonal(made.problem, 0.01)
    assert all(bool(torch.isfinite(t).all()) for t in (gram, target, scale))
