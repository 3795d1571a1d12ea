import math

import numpy as np
import pytest
import torch
from layer_problems import Example, example
from sklearn.linear_model import Lasso

from optimum_fista.solve.proximal_gradient import FistaSolution, fista

FRACTIONS = [0.5, 0.1, 0.01, 1e-3]


def solved(
    made: Example,
    l1_penalty: float,
    *,
    start: torch.Tensor | None = None,
    tolerance: float = 1e-13,
) -> FistaSolution:
    problem = made.problem
    return fista(
        problem.gram,
        problem.target,
        problem.weight if start is None else start,
        l1_penalty,
        problem.statistics.lipschitz,
        max_iterations=50_000,
        tolerance=tolerance,
    )


def gradient_of(made: Example, weight: torch.Tensor) -> torch.Tensor:
    """That of the squared error, from the activations."""
    return (made.inputs @ weight.T - made.outputs).T @ made.inputs


def critical_penalty(made: Example) -> float:
    """Smallest penalty whose solution is zero."""
    return float(made.problem.target.abs().max())


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("fraction", FRACTIONS)
def test_optimality_conditions_hold_at_convergence(corrected, fraction):
    made = example(6, 10, corrected=corrected)
    l1_penalty = fraction * critical_penalty(made)

    solution = solved(made, l1_penalty)

    weight = solution.weight
    gradient = gradient_of(made, weight)
    support = weight != 0
    slack = 1e-7 * critical_penalty(made)
    assert solution.converged
    assert bool(support.any())
    assert fraction < 0.1 or not bool(support.all())
    assert (gradient + l1_penalty * weight.sign())[support].abs().max() <= slack
    assert support.all() or gradient[~support].abs().max() <= l1_penalty + slack


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("fraction", FRACTIONS)
def test_fista_agrees_with_the_lasso_of_scikit_learn(corrected, fraction):
    made = example(4, 9, corrected=corrected, seed=5)
    l1_penalty = fraction * critical_penalty(made)
    # scikit-learn divides the squared error, ours not the penalty, by the number of tokens.
    lasso = Lasso(l1_penalty / len(made.inputs), fit_intercept=False, tol=1e-13, max_iter=100_000)
    expected = torch.from_numpy(
        np.atleast_2d(lasso.fit(made.inputs.numpy(), made.outputs.numpy()).coef_)
    )

    weight = solved(made, l1_penalty).weight

    assert torch.allclose(weight, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(weight.abs() > 1e-6, expected.abs() > 1e-6)
    assert fraction < 0.1 or bool((expected == 0).any())


def beck_teboulle(gram, target, start, l1_penalty, lipschitz, iterations: int) -> np.ndarray:
    """FISTA as printed in Beck & Teboulle (2009), eqs. 4.1-4.3, `t_1 = 1`."""
    x = y = start
    t = 1.0
    for _ in range(iterations):
        v = y - (y @ gram - target) / lipschitz
        x_next = np.sign(v) * np.maximum(np.abs(v) - l1_penalty / lipschitz, 0)
        t_next = (1 + math.sqrt(1 + 4 * t**2)) / 2
        y = x_next + (t - 1) / t_next * (x_next - x)
        x = x_next
        t = t_next
    return x


def test_every_iterate_of_fista_is_that_of_the_published_algorithm():
    made = example(4, 8, corrected=True, seed=3)
    problem = made.problem
    l1_penalty = 0.02 * critical_penalty(made)
    lipschitz = problem.statistics.lipschitz
    start = torch.randn(4, 8, dtype=torch.float64)

    for steps in range(1, 21):
        solution = fista(
            problem.gram,
            problem.target,
            start,
            l1_penalty,
            lipschitz,
            max_iterations=steps,
            tolerance=0,
        )

        expected = beck_teboulle(
            gram=problem.gram.numpy(),
            target=problem.target.numpy(),
            start=start.numpy(),
            l1_penalty=l1_penalty,
            lipschitz=lipschitz,
            iterations=steps,
        )
        assert solution.iterations == steps
        assert not solution.converged
        assert np.allclose(solution.weight.numpy(), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("start", ["zero", "dense"])
def test_solution_is_zero_from_the_critical_penalty_on(start):
    made = example(5, 7, corrected=True)
    start_weight = torch.zeros(5, 7).double() if start == "zero" else made.weight
    critical = critical_penalty(made)

    at_critical = solved(made, critical, start=start_weight)
    above = solved(made, 1.5 * critical, start=start_weight)
    below = solved(made, 0.99 * critical, start=start_weight)

    for solution in (at_critical, above):
        assert solution.converged
        assert torch.equal(solution.weight, torch.zeros(5, 7).double())
    assert 0 < int((below.weight != 0).sum()) <= 3


def test_zero_gram_matrix_gives_zero_weights():
    solution = fista(torch.zeros(4, 4), torch.zeros(2, 4), torch.ones(2, 4), 0.1, 0.0)

    assert torch.equal(solution.weight, torch.zeros(2, 4))
    assert solution.converged
    assert solution.iterations == 0


def test_fista_stops_sooner_with_a_larger_tolerance():
    made = example(4, 6)
    problem = made.problem

    def solve(max_iterations: int, tolerance: float) -> FistaSolution:
        return fista(
            problem.gram,
            problem.target,
            problem.weight,
            l1_penalty=0.05 * critical_penalty(made),
            lipschitz=problem.statistics.lipschitz,
            max_iterations=max_iterations,
            tolerance=tolerance,
        )

    loose = solve(10_000, tolerance=1e-3)
    tight = solve(10_000, tolerance=1e-9)
    cut_short = solve(tight.iterations - 1, tolerance=1e-9)

    assert loose.converged
    assert tight.converged
    assert 0 < loose.iterations < tight.iterations < 10_000
    assert not cut_short.converged
    assert cut_short.iterations == tight.iterations - 1
