import pytest
import torch

from optimum_fista.model.sums import GramAccumulator

CPU = torch.device("cpu")


def random_inputs(tokens: int, size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(tokens, size, generator=torch.Generator().manual_seed(seed)) + 0.5


# 256 inputs are multiplied at once, more are split in halves of whole multiples of 32.
@pytest.mark.parametrize("size", [1, 7, 256, 257, 300, 513, 640])
def test_agrees_with_the_product_of_all_tokens(size):
    parts = [random_inputs(tokens, size, seed=tokens) for tokens in (5, 1, 12)]
    accumulator = GramAccumulator(size, CPU)
    for part in parts:
        accumulator.add(part)
    statistics = accumulator.finish()
    inputs = torch.cat(parts).double()
    assert torch.allclose(statistics.gram.double(), inputs.T @ inputs, rtol=1e-5, atol=1e-4)
    assert torch.equal(statistics.gram, statistics.gram.T)
    assert statistics.gram.dtype == torch.float32
    assert statistics.num_tokens == 18
    assert torch.allclose(statistics.mean.double(), inputs.mean(0), atol=1e-5)


def test_how_tokens_are_split_makes_no_difference():
    inputs = random_inputs(24, 9)
    whole, parts = GramAccumulator(9, CPU), GramAccumulator(9, CPU)
    whole.add(inputs)
    for part in inputs.split(5):
        parts.add(part)
    ours, expected = parts.finish(), whole.finish()
    assert torch.allclose(ours.gram, expected.gram, rtol=1e-5)
    assert torch.allclose(ours.mean, expected.mean, rtol=1e-5)
    assert ours.num_tokens == expected.num_tokens == 24


def test_batches_without_real_tokens_add_nothing():
    accumulator = GramAccumulator(4, CPU)
    accumulator.add(torch.empty(0, 4))
    statistics = accumulator.finish()
    assert statistics.num_tokens == 0
    assert torch.equal(statistics.gram, torch.zeros(4, 4))
    assert torch.equal(statistics.mean, torch.zeros(4))
