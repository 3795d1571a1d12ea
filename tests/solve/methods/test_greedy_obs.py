import pytest
import torch
from layer_problems import Example, example

from optimum_fista.solve.methods.greedy_obs import GreedyObs
from optimum_fista.solve.patterns import Columns
from optimum_fista.solve.problem import InputStatistics, LayerProblem


def least_error(made: Example, kept: list[int], width: int) -> float:
    """Smallest squared error with the inputs of the groups `kept` only, from the activations."""
    inputs = made.inputs.unflatten(1, (-1, width))[:, kept].flatten(1)
    return float((made.outputs - inputs @ torch.linalg.lstsq(inputs, made.outputs).solution).square().sum())


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize(("width", "groups"), [(1, 14), (2, 9), (5, 4)])
@pytest.mark.parametrize("seed", range(3))
def test_equals_brute_force(width, groups, corrected, seed):
    made = example(5, width * groups, corrected=corrected, correlation=3.0, seed=seed)
    kept = list(range(groups))
    for count in range(groups - 1, 0, -1):
        errors = [least_error(made, [g for g in kept if g != removed], width) for removed in kept]
        kept.pop(errors.index(min(errors)))
        pruned = GreedyObs(damping=1e-12, ridge=1e-12).prune(made.problem, Columns.keeping(count, groups, width))
        assert pruned.mask[0, ::width].nonzero().flatten().tolist() == kept
        assert made.squared_error(pruned.weight) == pytest.approx(min(errors), rel=1e-7)
        assert pruned.iterations == groups - count


def test_what_waits_for_the_next_update_changes_nothing(monkeypatch):
    made = example(20, 200, correlation=3.0, corrected=True)
    found = []
    for pending in (1, 7, 64):
        monkeypatch.setattr("optimum_fista.solve.methods.greedy_obs._PENDING", pending)
        found.append([GreedyObs().prune(made.problem, Columns(0.6, width=width)) for width in (1, 4)])
    for others in found[1:]:
        for one, other in zip(found[0], others, strict=True):
            assert torch.equal(one.mask, other.mask)
            assert torch.allclose(one.weight, other.weight)


def test_float32_keeps_the_columns_of_float64():
    single = example(48, 300, correlation=2.0, dtype=torch.float32)
    statistics = InputStatistics(single.problem.gram.double(), single.problem.statistics.num_tokens)
    exact = LayerProblem(single.weight.double(), statistics)
    pattern = Columns(0.5)
    one, other = GreedyObs().prune(single.problem, pattern), GreedyObs().prune(exact, pattern)
    assert torch.equal(one.mask, other.mask)
    assert one.fit_error == pytest.approx(other.fit_error, rel=1e-5)


@pytest.mark.parametrize("width", [1, 4])
def test_copies_of_columns_are_removed_for_free(width):
    made = example(8, 24, dtype=torch.float32, tokens=400)
    # Groups 1 and 4 become copies of 0 and 3, times numbers: the others can stand for them.
    inputs = made.inputs.unflatten(1, (-1, width)).clone()
    inputs[:, 1], inputs[:, 4] = 2 * inputs[:, 0], -0.5 * inputs[:, 3]
    inputs = inputs.flatten(1)
    groups = 24 // width
    problem = LayerProblem(made.weight, InputStatistics(inputs.T @ inputs, 400))
    pruned = GreedyObs().prune(problem, Columns.keeping(groups - 2, groups, width))
    removed = (~pruned.mask[0, ::width]).nonzero().flatten().tolist()
    assert (removed[0] in (0, 1), removed[1] in (3, 4), len(removed)) == (True, True, 2)
    assert pruned.fit_error < 1e-4


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("tokens", [1, 5, 20])
def test_fewer_tokens_than_inputs(tokens, corrected):
    made = example(24, 64, tokens=tokens, dtype=torch.float32, corrected=corrected)
    pruned = GreedyObs().prune(made.problem, Columns(0.5))
    assert pruned.converged
    assert pruned.weight.abs().max() < 10 * made.weight.abs().max()
    assert pruned.fit_error == pytest.approx(
        (made.squared_error(pruned.weight) / float(made.outputs.double().square().sum())) ** 0.5, rel=1e-2, abs=1e-3
    )


def test_nothing_to_remove_leaves_the_weights():
    made = example(6, 12)
    pruned = GreedyObs().prune(made.problem, Columns(0.0))
    assert pruned.mask.all()
    assert torch.allclose(pruned.weight, made.weight)


def test_a_gram_matrix_of_nan_is_an_error():
    made = example(6, 12)
    made.problem.gram[0, 0] = torch.nan
    with pytest.raises(torch.linalg.LinAlgError):
        GreedyObs().prune(made.problem, Columns(0.5))


@pytest.mark.parametrize("option", ["damping", "ridge"])
def test_options_are_validated(option):
    with pytest.raises(ValueError, match=rf"{option}=-1\.0: pass a positive"):
        GreedyObs(**{option: -1.0})
