import pytest
import torch
from layer_problems import example

from optimum_fista.solve.methods.flap import Flap
from optimum_fista.solve.patterns import Columns, Unstructured
from optimum_fista.solve.problem import InputStatistics, LayerProblem


def test_flap_keeps_the_columns_with_the_largest_squared_weights_times_variances():
    made = example(6, 16)
    scores = made.weight.square().sum(0) * made.inputs.var(0, correction=0)

    kept = Flap().prune(made.problem, Columns(0.5)).mask[0]

    assert sorted(kept.nonzero().flatten().tolist()) == sorted(scores.argsort()[8:].tolist())


@pytest.mark.parametrize(
    "pattern", [Columns(0.5), Columns(0.25, width=4), Unstructured(0.5), Unstructured(0.6, "row")]
)
def test_kept_weights_of_flap_make_up_for_the_mean_of_what_was_removed(pattern):
    made = example(6, 16, correlation=0.0, tokens=2000)

    pruned = Flap().prune(made.problem, pattern)

    plain = made.problem.fit_error(made.weight * pruned.mask)
    mean = made.inputs.mean(0)
    variance = made.inputs.var(0, correction=0)
    # Each row is the ridge regression of b on one token, the mean, with the variances as penalty.
    for row, kept in enumerate(pruned.mask):
        missing = (made.weight[row] * ~kept) @ mean
        matrix = torch.outer(mean[kept], mean[kept]) + torch.diag(variance[kept])
        change = torch.linalg.solve(matrix, missing * mean[kept])
        assert torch.allclose(pruned.weight[row, kept], made.weight[row, kept] + change)

    assert pruned.fit_error < plain


def test_flap_removes_a_constant_input_nearly_without_an_error():
    made = example(6, 16, tokens=500)
    inputs = made.inputs.clone()
    inputs[:, 3] = 40.0
    inputs[:, 5] = 2.0
    problem = LayerProblem(made.weight, InputStatistics(inputs.T @ inputs, 500, inputs.mean(0)))

    pruned = Flap().prune(problem, Columns.keeping(15, 16))

    assert not pruned.mask[:, 5].any(), "of two constants the smaller one: the other one takes over"
    assert pruned.fit_error < 1e-3
    assert problem.fit_error(problem.weight * pruned.mask) > 0.01
