"""Groups of operators that the default method solves together get the same bits as alone."""

import pytest
import torch
from layer_problems import correlated_inputs

from optimum_fista.solve.method import ProblemGroup, PrunedOperator
from optimum_fista.solve.methods import create_method
from optimum_fista.solve.methods.obs_admm import ObsAdmm
from optimum_fista.solve.patterns import Columns, Unstructured, parse_pattern
from optimum_fista.solve.problem import InputStatistics, LayerProblem


def group_of(
    patterns, *, columns=24, rows=(16, 16), tokens=100, seed=0, dead_input=None
) -> ProblemGroup:
    """Operators that share random inputs, float32; one input may be zero on all tokens."""
    generator = torch.Generator().manual_seed(seed)
    inputs = correlated_inputs(tokens, columns, generator, torch.float32, correlation=2.0)
    if dead_input is not None:
        inputs[:, dead_input] = 0
    statistics = InputStatistics(inputs.T @ inputs, tokens)
    weights = [torch.randn(size, columns, generator=generator) for size in rows]
    return ProblemGroup([LayerProblem(weight, statistics) for weight in weights], patterns)


def require_equal(together: list[PrunedOperator], alone: list[PrunedOperator]) -> None:
    assert len(together) == len(alone)
    for ours, expected in zip(together, alone, strict=True):
        assert torch.equal(ours.weight, expected.weight)
        assert torch.equal(ours.mask, expected.mask)
        assert (ours.fit_error, ours.iterations, ours.converged, ours.message) == (
            expected.fit_error,
            expected.iterations,
            expected.converged,
            expected.message,
        )


@pytest.mark.parametrize(
    "patterns",
    [
        [Unstructured(0.5), Unstructured(0.5)],
        [Unstructured(0.3), parse_pattern("2:4")],
        [parse_pattern("4:8-pairs"), Unstructured(0.6, "row")],
        [Columns(0.5), Columns(0.5)],
        [Columns(0.5, width=4), Columns(0.25, width=4)],
    ],
    ids=lambda patterns: "+".join(map(str, patterns)),
)
def test_groups_of_equal_shapes_get_the_same_bits_together_as_alone(patterns):
    method = create_method("obs_admm")
    # experts that the router sends different numbers of tokens, from fewer than inputs to many
    groups = [group_of(patterns, seed=n, tokens=tokens) for n, tokens in enumerate((9, 60, 700))]

    together = method.prune_groups(groups)

    for group, results in zip(groups, together, strict=True):
        require_equal(results, method.prune_sharing(*group))


def test_groups_of_equal_shapes_may_have_different_shares_of_zeros():
    method = create_method("obs_admm")
    groups = [
        group_of([Unstructured(share), Unstructured(share)], seed=n)
        for n, share in enumerate((0.2, 0.5, 0.9))
    ]

    together = method.prune_groups(groups)

    for group, results in zip(groups, together, strict=True):
        require_equal(results, method.prune_sharing(*group))
        assert [result.sparsity for result in results] == pytest.approx(
            [pattern.sparsity for pattern in group.patterns], abs=0.01
        )


def test_results_are_in_the_order_of_the_groups_whatever_their_shapes(monkeypatch):
    half = Unstructured(0.5)
    groups = [
        group_of([half, half], seed=0),
        group_of([half], columns=8, rows=(24,), seed=1),
        group_of([half, half], seed=2),
        group_of([Columns(0.5), half], seed=3),
        group_of([Columns(0.5), Columns(0.5, width=4)], seed=4),
        group_of([half], columns=8, rows=(24,), seed=5),
    ]
    method = ObsAdmm()
    alone = [method.prune_sharing(*group) for group in groups]
    sizes = []
    prune_alike = ObsAdmm._prune_alike
    monkeypatch.setattr(
        ObsAdmm,
        "_prune_alike",
        lambda self, alike: sizes.append(len(alike)) or prune_alike(self, alike),
    )

    together = method.prune_groups(groups)

    for results, expected in zip(together, alone, strict=True):
        require_equal(results, expected)
    # The operators of the group whose widths differ are alone, and all others with their like.
    assert sorted(sizes) == [1, 1, 1, 2, 2]


def test_a_group_with_a_dead_input_is_solved_with_others():
    half = [Unstructured(0.5), Unstructured(0.5)]
    groups = [group_of(half, seed=0), group_of(half, seed=1, dead_input=3), group_of(half, seed=2)]
    method = create_method("obs_admm")

    together = method.prune_groups(groups)

    for group, results in zip(groups, together, strict=True):
        require_equal(results, method.prune_sharing(*group))
    assert not together[1][0].mask[:, 3].any()


def test_only_the_group_whose_gram_matrix_is_singular_is_damped():
    half = [Unstructured(0.5), Unstructured(0.5)]
    singular = group_of(half, seed=1)
    for problem in singular.problems:
        problem.statistics.gram.fill_(1.0)
    groups = [group_of(half, seed=0), singular, group_of(half, seed=2)]
    method = create_method("obs_admm", ridge=1e-12)

    together = method.prune_groups(groups)

    for group, results in zip(groups, together, strict=True):
        require_equal(results, method.prune_sharing(*group))
    messages = [{result.message for result in results} for results in together]
    assert messages == [{""}, {"the Gram matrix needed damping 0.0001 instead of 0"}, {""}]


def test_no_groups_have_no_results():
    assert create_method("obs_admm").prune_groups([]) == []
    assert create_method("wanda").prune_groups([]) == []


def test_a_method_without_a_way_of_its_own_prunes_groups_one_after_another():
    half = [Unstructured(0.5), Unstructured(0.5)]
    groups = [group_of(half, seed=0), group_of(half, seed=1)]
    method = create_method("sparsegpt")

    together = method.prune_groups(groups)

    for group, results in zip(groups, together, strict=True):
        require_equal(results, method.prune_sharing(*group))
