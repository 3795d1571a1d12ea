"""Random layer problems whose activations are at hand, so that statistics can be checked against them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from optimum_fista.solve.problem import InputStatistics, LayerProblem


@dataclass(frozen=True)
class Example:
    """A layer problem of `W` [out, in], the activations `X*` [tokens, in], and the wanted outputs `Y` [tokens, out]."""

    weight: Tensor
    inputs: Tensor
    outputs: Tensor
    problem: LayerProblem

    def squared_error(self, weight: Tensor) -> float:
        """`|| W* X* - Y ||_F^2` from the activations, in float64."""
        return float(
            (self.inputs.double() @ weight.double().T - self.outputs.double()).square().sum()
        )


def correlated_inputs(
    tokens: int, size: int, generator: torch.Generator, dtype: torch.dtype, correlation: float
) -> Tensor:
    """Inputs [tokens, size] with correlated features, a non-zero mean and norms spread over a factor of ten."""
    mixing = torch.eye(size, dtype=dtype)
    mixing += torch.randn(size, size, generator=generator, dtype=dtype) * correlation * size**-0.5
    scale = torch.logspace(-0.5, 0.5, size, dtype=dtype)[torch.randperm(size, generator=generator)]
    return (torch.randn(tokens, size, generator=generator, dtype=dtype) @ mixing + 0.3) * scale


def example(
    rows: int,
    columns: int,
    *,
    tokens: int = 0,
    corrected: bool = False,
    correlation: float = 1.0,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> Example:
    """Make a problem of a `rows` x `columns` weight; `corrected`: the wanted outputs come from other inputs."""
    generator = torch.Generator().manual_seed(seed)
    tokens = tokens or 4 * columns
    weight = torch.randn(rows, columns, generator=generator, dtype=dtype)
    dense_inputs = correlated_inputs(tokens, columns, generator, dtype, correlation)
    inputs = dense_inputs
    if corrected:
        inputs = dense_inputs + 0.2 * torch.randn(tokens, columns, generator=generator, dtype=dtype)
    outputs = dense_inputs @ weight.T
    statistics = InputStatistics(inputs.T @ inputs, tokens, inputs.mean(0))
    problem = LayerProblem(weight, statistics)
    if corrected:
        problem = LayerProblem(
            weight, statistics, outputs.T @ inputs, outputs.double().square().sum(0)
        )
    return Example(weight, inputs, outputs, problem)
