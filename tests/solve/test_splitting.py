import pytest
import torch
from layer_problems import example

from optimum_fista.solve.pattern import SparsityPattern
from optimum_fista.solve.splitting import SplitState, damped_inverse, split_in_stages


def test_damped_inverse_is_the_inverse():
    gram = example(2, 12).problem.gram
    inverse = damped_inverse(gram, 0.7)
    assert torch.allclose(inverse @ (gram + 0.7 * torch.eye(12, dtype=gram.dtype)), torch.eye(12, dtype=gram.dtype))


def test_one_iteration_by_hand():
    made = example(4, 8)
    gram, target = made.problem.gram, made.problem.target
    rho, pattern = 2.0, SparsityPattern(0.5)
    state = SplitState(target, made.weight.clone(), torch.ones_like(target))
    inverse = damped_inverse(gram, rho)
    weight = (target - 1 + rho * made.weight) @ torch.linalg.inv(gram + rho * torch.eye(8, dtype=gram.dtype))
    moved = weight + 1 / rho
    mask = pattern.mask(moved.abs())
    state.iterate(inverse, rho, pattern)
    assert torch.equal(state.mask, mask)
    assert torch.allclose(state.sparse, moved * mask)
    assert torch.allclose(state.dual, 1 + rho * (weight - moved * mask))


def test_a_large_rho_converges_to_a_point_where_both_sides_agree():
    made = example(4, 8, corrected=True)
    rho, pattern = float(made.problem.gram.diagonal().mean()), SparsityPattern(0.5)
    state = SplitState.start(made.problem.target, made.weight.clone())
    split_in_stages(made.problem.gram, [state], [pattern], [rho], 4000)
    support = [torch.nonzero(row).flatten() for row in state.mask]
    for row, kept in enumerate(support):
        gram = made.problem.gram[kept][:, kept]
        best = torch.linalg.solve(gram, made.problem.target[row, kept])
        assert torch.allclose(state.sparse[row, kept], best, atol=1e-6)


def test_operators_that_share_inputs_are_solved_as_alone():
    made = example(6, 8)
    pattern = SparsityPattern.parse("2:4")

    def run(rows):
        return SplitState.start(made.problem.target[rows].clone(), made.weight[rows].clone())

    both = [run(slice(0, 2)), run(slice(2, 6))]
    alone = run(slice(2, 6))
    split_in_stages(made.problem.gram, both, [pattern, pattern], [1.0, 5.0], 3)
    split_in_stages(made.problem.gram, [alone], [pattern], [1.0, 5.0], 3)
    assert torch.equal(both[1].sparse, alone.sparse)


def test_a_negative_matrix_fails_loudly():
    with pytest.raises(torch.linalg.LinAlgError):
        damped_inverse(-torch.eye(4), 0.5)
