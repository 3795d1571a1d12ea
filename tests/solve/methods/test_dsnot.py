import pytest
import torch
from layer_problems import example

from optimum_fista.solve.methods.dsnot import Dsnot
from optimum_fista.solve.methods.wanda import Wanda
from optimum_fista.solve.patterns import Unstructured, parse_pattern


def expected_errors(made, mask):
    """|| of the mean output error of every row, from the activations."""
    pruned = made.weight.masked_fill(mask, 0)
    return (made.inputs @ pruned.T).mean(0).abs()


@pytest.mark.parametrize(
    "pattern", [Unstructured(0.5, "row"), *map(parse_pattern, ("2:4", "4:8-pairs"))]
)
def test_swaps_shrink_the_expected_error_of_rows_and_keep_the_pattern(pattern):
    made = example(16, 24)
    start = Wanda().prune(made.problem, pattern)

    pruned = Dsnot(threshold=0.0).prune(made.problem, pattern)  # swaps while a row gets better

    before = expected_errors(made, start.mask)
    after = expected_errors(made, pruned.mask)
    assert bool((after <= before + 1e-9).all())
    # some swaps were made: without any, the sums would be equal
    assert float(after.sum()) < 0.8 * float(before.sum())
    assert pattern.violation(pruned.mask) is None
    assert torch.equal(pruned.weight, torch.where(pruned.mask, made.weight, 0.0))


def test_with_a_high_threshold_dsnot_swaps_nothing_and_keeps_the_mask_of_wanda():
    made = example(8, 12)
    pattern = Unstructured(0.5, "row")

    pruned = Dsnot(threshold=1e9).prune(made.problem, pattern)

    assert torch.equal(pruned.mask, Wanda().prune(made.problem, pattern).mask)
    assert pruned.iterations == 0
