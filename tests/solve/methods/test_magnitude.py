import pytest
import torch
from layer_problems import example

from optimum_fista.solve.methods.magnitude import Magnitude
from optimum_fista.solve.patterns import Unstructured


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.9])
def test_magnitude_keeps_the_largest_weights_as_they_are(sparsity, corrected):
    made = example(5, 9, corrected=corrected)
    zeros = round(sparsity * 5 * 9)

    pruned = Magnitude().prune(made.problem, Unstructured(sparsity))

    magnitudes = made.weight.abs().flatten().sort().values
    assert int((~pruned.mask).sum()) == zeros
    assert pruned.sparsity == pytest.approx(zeros / (5 * 9))
    assert torch.equal(pruned.mask, made.weight.abs() >= magnitudes[zeros])
    assert torch.equal(pruned.weight, torch.where(pruned.mask, made.weight, 0.0))
