import pytest
import torch
from layer_problems import example

from optimum_fista.solve.methods.wanda import Wanda
from optimum_fista.solve.patterns import Unstructured, parse_pattern


def published_scores(made) -> torch.Tensor:
    """`|W_ij| * || X_j ||_2` from the activations."""
    return made.weight.abs() * torch.linalg.vector_norm(made.inputs, dim=0)


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize(("rows", "columns", "sparsity"), [(4, 8, 0.5), (5, 9, 0.5), (3, 7, 0.3), (6, 11, 0.85)])
def test_keeps_the_largest_scores_of_every_row(rows, columns, sparsity, corrected):
    made = example(rows, columns, corrected=corrected)
    pruned = Wanda().prune(made.problem, Unstructured(sparsity, "row"))
    zeros = round(sparsity * columns)
    order = published_scores(made).argsort(dim=1)
    expected = torch.ones(rows, columns, dtype=torch.bool).scatter(1, order[:, :zeros], False)
    assert torch.equal(pruned.mask, expected)
    assert torch.equal(pruned.weight, torch.where(expected, made.weight, 0.0))
    assert pruned.fit_error**2 == pytest.approx(
        made.squared_error(pruned.weight) / float(made.outputs.square().sum()), rel=1e-7
    )


def test_two_of_four_keeps_the_best_two_scores_of_a_group():
    made = example(6, 16)
    scores = published_scores(made).view(6, 4, 4)
    order = scores.argsort(dim=-1, descending=True)
    expected = torch.zeros(6, 4, 4, dtype=torch.bool).scatter(-1, order[..., :2], True).view(6, 16)
    assert torch.equal(Wanda().prune(made.problem, parse_pattern("2:4")).mask, expected)
