"""Sums over tokens are those of all tokens at once, and errors computed from them are exact."""

import pytest
import torch

from optimum_fista.model.gram import GroupSums
from optimum_fista.model.precision import products_as


# 256 inputs are multiplied at once, more are split in halves of whole multiples of 32.
@pytest.mark.parametrize("size", [1, 257, 640])
def test_sums_over_parts_agree_with_the_product_of_all_tokens(size):
    inputs = torch.randn(17, size, generator=torch.Generator().manual_seed(0)) + 0.5
    sums = GroupSums(size, inputs.device)

    for part in inputs.split([5, 0, 12]):
        sums.add(part)
    statistics = sums.statistics()

    inputs = inputs.double()
    assert torch.allclose(statistics.gram.double(), inputs.T @ inputs, rtol=1e-5, atol=1e-4)
    assert torch.equal(statistics.gram, statistics.gram.T)
    assert statistics.gram.dtype == torch.float32
    assert statistics.num_tokens == 17
    assert torch.allclose(statistics.mean.double(), inputs.mean(0), atol=1e-5)


def test_a_small_error_is_right_although_one_token_is_huge():
    """`||Y - W X||^2 = ||Y||^2 - 2 <W, Y X^T> + <W G, W>`: the three must be over the same rounded numbers."""
    inputs = torch.randn(30, 40)
    weight = torch.randn(20, 40)
    inputs[0] *= 1000
    targets = inputs @ weight.T
    sums = GroupSums(40, inputs.device)

    with products_as("bfloat16"):
        sums.add(inputs, "targets", targets)

    gram = sums.statistics().gram.double()
    cross = sums.cross["targets"].double()
    weight = weight.double()
    energy = sums.energies["targets"].sum()
    error = energy - 2 * (weight * cross).sum() + (weight @ gram * weight).sum()
    expected = (targets.bfloat16().double() - inputs.bfloat16().double() @ weight.T).square().sum()
    assert float(error) == pytest.approx(float(expected), rel=0.1)
