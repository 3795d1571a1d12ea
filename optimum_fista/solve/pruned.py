"""The pruned operator: what a pruning method returns, with its convergence history."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

POINTS = 32
"""Steps that are kept at most."""


@dataclass(frozen=True)
class Convergence:
    """How far a method still moved in its steps.

    Attributes:
        measure: What the residual is.
        steps: Some of the steps, counted from 1: all if there are few, otherwise evenly spread on a logarithmic
            scale, with the first and the last.
        residuals: Residual of each, in three digits.
    """

    measure: str
    steps: tuple[int, ...]
    residuals: tuple[float, ...]

    @classmethod
    def of(cls, measure: str, residuals: Sequence[float], first: int = 1) -> Convergence | None:
        """Keep at most `POINTS` of the residuals of the steps from `first` on; `None` if there are none."""
        count = len(residuals)
        if not count:
            return None
        kept: Sequence[int] = range(count)
        if count > POINTS:
            # Equal steps of the logarithm from 1 to count; among the first few some coincide.
            kept = sorted({round(count ** (i / (POINTS - 1))) - 1 for i in range(POINTS)})
        rounded = tuple(float(f"{residuals[index]:.3g}") for index in kept)
        return cls(measure, tuple(first + index for index in kept), rounded)


@dataclass(frozen=True)
class PrunedOperator:
    """Sparse weights of one linear operator and how they were reached.

    Attributes:
        weight: Pruned weights [out, in], zero where the mask is False.
        mask: Boolean mask [out, in], True = kept.
        fit_error: `|| W* X* - Y ||_F / || Y ||_F` on the calibration tokens, `Y` the outputs that were wanted.
        iterations: Iterations over all trials and stages.
        l1_penalty: Penalty of the solution kept, if the method has one.
        converged: False when an iteration limit or a numerical failure ended the method.
        message: Advice when not converged, or what else a reader of the report should know.
        convergence: Convergence history, if the method knows it without further work.
    """

    weight: Tensor
    mask: Tensor
    fit_error: float
    iterations: int = 0
    l1_penalty: float | None = None
    converged: bool = True
    message: str = ""
    convergence: Convergence | None = None

    @property
    def sparsity(self) -> float:
        """Fraction of weights whose mask is False."""
        return 1 - int(self.mask.sum()) / self.mask.numel()
