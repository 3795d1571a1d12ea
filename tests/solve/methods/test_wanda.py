import pytest
import torch
from layer_problems import example

from optimum_fista.solve.methods.wanda import Wanda
from optimum_fista.solve.patterns import Unstructured


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize(
    ("rows", "columns", "sparsity"), [(4, 8, 0.5), (5, 9, 0.5), (3, 7, 0.3), (6, 11, 0.85)]
)
def test_wanda_keeps_the_largest_scores_of_every_row(rows, columns, sparsity, corrected):
    made = example(rows, columns, corrected=corrected)
    zeros = round(sparsity * columns)
    norms = torch.linalg.vector_norm(made.inputs, dim=0)  # from the activations
    order = (made.weight.abs() * norms).argsort(dim=1)

    pruned = Wanda().prune(made.problem, Unstructured(sparsity, "row"))

    expected = torch.ones(rows, columns, dtype=torch.bool).scatter(1, order[:, :zeros], False)
    assert torch.equal(pruned.mask, expected)
    assert torch.equal(pruned.weight, torch.where(expected, made.weight, 0.0))
