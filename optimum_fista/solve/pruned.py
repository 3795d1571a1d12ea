"""The pruned operator: what a pruning method returns."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


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
    """

    weight: Tensor
    mask: Tensor
    fit_error: float
    iterations: int = 0
    l1_penalty: float | None = None
    converged: bool = True
    message: str = ""

    @property
    def sparsity(self) -> float:
        """Fraction of weights whose mask is False."""
        return 1 - int(self.mask.sum()) / self.mask.numel()
