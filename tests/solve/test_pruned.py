import pytest

from optimum_fista.solve.pruned import POINTS, Convergence


def test_few_steps_are_all_kept():
    found = Convergence.of("change", [0.5, 0.123456, 1e-9], first=2)
    assert found == Convergence("change", (2, 3, 4), (0.5, 0.123, 1e-9))
    assert Convergence.of("change", []) is None


@pytest.mark.parametrize("count", [POINTS, POINTS + 1, 80, 300, 100_000])
def test_many_are_thinned_with_the_first_and_the_last(count):
    found = Convergence.of("change", [1 / (index + 1) for index in range(count)])
    assert found.steps[0] == 1
    assert found.steps[-1] == count
    assert 20 <= len(found.steps) <= POINTS
    assert list(found.steps) == sorted(set(found.steps))
    assert found.residuals == pytest.approx([1 / step for step in found.steps], rel=5e-3)
    ratios = [after / before for before, after in zip(found.steps[12:], found.steps[13:], strict=False)]
    assert count <= POINTS or max(ratios) < 1.6
