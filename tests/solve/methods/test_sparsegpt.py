import pytest
import torch
from layer_problems import example

from optimum_fista.solve.methods.sparsegpt import SparseGPT
from optimum_fista.solve.pattern import SparsityPattern
from optimum_fista.solve.patterns import Unstructured, parse_pattern
from optimum_fista.solve.problem import LayerProblem

PATTERNS = [Unstructured(0.5), Unstructured(0.5, "row"), *map(parse_pattern, ("2:4", "1:4", "4:8"))]


def naive(
    weight: torch.Tensor, gram: torch.Tensor, pattern: SparsityPattern, damping: float, block: int
):
    """SparseGPT's column loop with an explicit inverse of the remaining Hessian at every column, no Cholesky.

    Returns the pruned weights and the mask; `block` is the number of columns whose mask is chosen together.
    """
    rows, columns = weight.shape
    H = gram + damping * gram.diagonal().mean() * torch.eye(columns, dtype=gram.dtype)
    W = weight.clone()
    mask = torch.ones(rows, columns, dtype=torch.bool)
    columns_in_contest = pattern.span or block
    for j in range(columns):
        if j % columns_in_contest == 0:
            contest = slice(j, min(j + columns_in_contest, columns))
            mask[:, contest] = naive_mask(W, H, pattern, contest)
        inverse = torch.linalg.inv(H[j:, j:])
        error = W[:, j] * ~mask[:, j]
        W[:, j:] -= error[:, None] / inverse[0, 0] * inverse[0]
        W[:, j] *= mask[:, j]
    return W, mask


def naive_mask(
    W: torch.Tensor, H: torch.Tensor, pattern: SparsityPattern, contest: slice
) -> torch.Tensor:
    """The mask of the columns of a contest, by explicit inverses and sorting."""
    curvature = [torch.linalg.inv(H[i:, i:])[0, 0] for i in range(contest.start, contest.stop)]
    scores = W[:, contest].square() / torch.stack(curvature)
    if pattern.span is not None:
        size = pattern.span
    elif pattern.scope == "matrix":
        size = scores.numel()
    else:
        size = scores.shape[1]
    zeros = round(pattern.sparsity * size)
    order = scores.reshape(-1, size).argsort(dim=1)
    mask = torch.ones_like(order, dtype=torch.bool).scatter(1, order[:, :zeros], False)
    return mask.view(len(W), -1)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(("block_size", "damping"), [(8, 0.01), (128, 0.3)])
def test_sparsegpt_agrees_with_explicit_inverses_of_the_hessian(pattern, block_size, damping):
    made = example(6, 16)
    weight, mask = naive(made.weight, made.problem.gram, pattern, damping, block_size)

    pruned = SparseGPT(damping=damping, block_size=block_size).prune(made.problem, pattern)

    assert torch.equal(pruned.mask, mask)
    assert torch.allclose(pruned.weight, weight, rtol=1e-8, atol=1e-9)
    assert pruned.converged
    assert pruned.message == ""


EXACT = [
    ((r, c), Unstructured(0.77, s))
    for r, c in ((1, 1), (5, 7), (7, 30), (4, 33))
    for s in ("matrix", "row")
]
EXACT += [
    ((5, columns), parse_pattern(text)) for text, columns in (("2:4", 20), ("5:8", 24), ("1:2", 10))
]


@pytest.mark.parametrize(("shape", "pattern"), [*EXACT, ((3, 13), Unstructured(0.0))])
@pytest.mark.parametrize("block_size", [1, 3, 8, 128])
def test_sparsegpt_removes_exactly_as_many_weights_with_every_block_size(
    shape, pattern, block_size
):
    made = example(*shape)

    pruned = SparseGPT(block_size=block_size).prune(made.problem, pattern)

    assert pattern.violation(pruned.mask) is None
    assert (pruned.weight[~pruned.mask] == 0).all()


def test_sparsegpt_finds_the_same_weights_with_and_without_a_corrected_target():
    made = example(4, 8, corrected=True)
    plain = LayerProblem(made.weight, made.problem.statistics)

    pruned = SparseGPT().prune(made.problem, Unstructured(0.5))

    expected = SparseGPT().prune(plain, Unstructured(0.5))
    assert torch.equal(pruned.weight, expected.weight)
    assert pruned.fit_error != expected.fit_error, "the error is that of the target"


def test_groups_that_do_not_divide_a_row_are_refused():
    with pytest.raises(ValueError, match="weight has rows of 10 inputs"):
        SparseGPT().prune(example(3, 10).problem, parse_pattern("2:4"))
