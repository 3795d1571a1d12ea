"""`FistaPruner.prune_weight` and the layer problem it forms."""

import pytest
import torch

from optimum_fista import FistaPruner, FistaPruningConfig, PrunedOperator
from optimum_fista.model.gram import single_problem
from optimum_fista.solve.methods import METHODS

generator = torch.Generator().manual_seed(0)
WEIGHT = torch.randn(6, 16, generator=generator)
DENSE_INPUTS = torch.randn(40, 16, generator=generator)
INPUTS = DENSE_INPUTS + 0.2 * torch.randn(40, 16, generator=generator)


def test_problem_is_that_of_the_matrices():
    problem = single_problem(WEIGHT, INPUTS, DENSE_INPUTS)
    wanted = (DENSE_INPUTS @ WEIGHT.T).double()
    trial = WEIGHT * (WEIGHT.abs() > 0.5)
    error = float(((INPUTS @ trial.T).double() - wanted).square().sum())
    assert problem.squared_error(trial) == pytest.approx(error, rel=1e-4)
    assert float(problem.output_energies.sum()) == pytest.approx(float(wanted.square().sum()), rel=1e-5)
    assert torch.allclose(problem.gram, INPUTS.T @ INPUTS, rtol=1e-4, atol=1e-4)
    assert single_problem(WEIGHT, INPUTS).fit_error(WEIGHT) == 0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dense_inputs", [None, DENSE_INPUTS])
def test_record(method, dense_inputs):
    weight, inputs = WEIGHT.clone(), INPUTS.clone()
    result = FistaPruner(FistaPruningConfig(pattern="2:4", method=method)).prune_weight(weight, inputs, dense_inputs)
    assert isinstance(result, PrunedOperator)
    assert result.weight.shape == result.mask.shape == WEIGHT.shape
    assert result.mask.dtype == torch.bool
    assert bool((result.mask.view(6, 4, 4).sum(-1) == 2).all())
    assert bool((result.weight[~result.mask] == 0).all())
    assert result.sparsity == 0.5
    wanted = (INPUTS if dense_inputs is None else dense_inputs) @ WEIGHT.T
    error = float((INPUTS @ result.weight.T - wanted).norm() / wanted.norm())
    assert result.fit_error == pytest.approx(error, rel=1e-3)
    assert result.iterations >= 0
    assert torch.equal(weight, WEIGHT)
    assert torch.equal(inputs, INPUTS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_taken_as_float32(dtype):
    result = FistaPruner(FistaPruningConfig(method="wanda")).prune_weight(WEIGHT.to(dtype), INPUTS.to(dtype))
    assert result.weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((WEIGHT[0], INPUTS), r"weight has shape \(16,\): pass a non-empty \[out, in\]"),
        ((WEIGHT, INPUTS[:, :15]), r"inputs has shape \(40, 15\): .*\[tokens, in\] with in = 16 as in weight"),
        ((WEIGHT, INPUTS[0]), r"inputs has shape \(16,\)"),
        ((WEIGHT, INPUTS[:0]), r"inputs has shape \(0, 16\): pass a non-empty"),
        ((WEIGHT, INPUTS, DENSE_INPUTS[:39]), r"dense_inputs has shape \(39, 16\), inputs \(40, 16\): .*same tokens"),
        ((WEIGHT.log(), INPUTS), "weight holds NaN or Inf"),
        ((WEIGHT, INPUTS / 0), "inputs holds NaN or Inf"),
        ((WEIGHT, INPUTS, DENSE_INPUTS.sqrt()), "dense_inputs holds NaN or Inf"),
        ((WEIGHT, 1e30 * INPUTS), "inputs overflow when squared"),
        ((WEIGHT[:, :15], INPUTS[:, :15]), "weight has rows of 15 inputs, which 2:4 does not divide"),
    ],
)
def test_unusable_matrices(arguments, message):
    with pytest.raises(ValueError, match=message):
        FistaPruner(FistaPruningConfig(pattern="2:4")).prune_weight(*arguments)
