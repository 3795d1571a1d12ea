"""What stays of a matrix is the problem of its rows or columns alone, with the same outputs wanted."""

import pytest
import torch

from optimum_fista.model.gram import single_problem
from optimum_fista.solve.methods import create_method
from optimum_fista.solve.narrowing import Narrowing
from optimum_fista.solve.patterns import parse_pattern


@pytest.fixture
def problem():
    generator = torch.Generator().manual_seed(0)
    weight, inputs = torch.randn(6, 12, generator=generator), torch.randn(64, 12, generator=generator)
    return single_problem(weight, inputs, inputs + 0.1 * torch.randn(64, 12, generator=generator))


def test_rows_are_solved_as_if_there_were_no_others(problem):
    rows, method = torch.tensor([0, 2, 5]), create_method("magnitude")
    narrowing, pattern = Narrowing(rows=rows), parse_pattern("2:4")
    pruned, whole = method.prune(narrowing.problem(problem), pattern), method.prune(problem, pattern)
    widened = narrowing.widened(pruned, (6, 12))
    assert narrowing.shape((6, 12)) == (3, 12)
    assert torch.equal(widened.mask[rows], whole.mask[rows])
    assert torch.equal(widened.weight[rows], whole.weight[rows])
    assert not bool(widened.mask[[1, 3, 4]].any())
    assert not bool(widened.weight[[1, 3, 4]].any())


@pytest.mark.parametrize("method", ["magnitude", "obs_admm"])
def test_the_error_without_columns_is_that_of_zeros_in_them(problem, method):
    columns = torch.tensor([0, 1, 2, 3, 6, 7, 9, 11])
    start = problem.weight[:, columns] * 1.1
    narrowing = Narrowing(columns=columns, weight=start)
    pruned = create_method(method).prune(narrowing.problem(problem), parse_pattern("2:4"))
    widened = narrowing.widened(pruned, (6, 12))
    assert widened.weight.shape == widened.mask.shape == (6, 12)
    assert problem.fit_error(widened.weight) == pytest.approx(pruned.fit_error, rel=1e-4)
    assert bool((widened.mask[:, columns].view(6, 2, 4).sum(-1) == 2).all())  # counted along what stays
    assert int(widened.mask.sum()) == 6 * 4


def test_statistics_are_those_of_the_inputs_that_stay(problem):
    columns = torch.tensor([1, 4, 5])
    found = Narrowing(columns=columns, weight=problem.weight[:, columns]).problem(problem)
    assert torch.equal(found.gram, problem.gram[columns][:, columns])
    assert torch.equal(found.target, problem.target[:, columns])
    assert found.statistics.num_tokens == problem.statistics.num_tokens
