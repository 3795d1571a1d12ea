"""SparseGPT: optimal-brain-surgeon pruning column by column (arXiv 2301.00774).

A `LayerProblem` has the dense weights `W` [out, in] of one linear operator, and statistics of the inputs that
calibration tokens give it, such as their Gram matrix. A `SparsityPattern` says how many weights stay, and which of them
compete.

With the Gram matrix `G` of the inputs, `H` is `G + damping * mean(diag G) I`, less for nearly dead inputs
(`InputStatistics`), and `U` the upper Cholesky factor of `H^-1`. Weight j of a row is scored `w_j^2 / U_jj^2`; n:m
groups are decided one by one, unstructured masks a block of columns at a time with one threshold over all rows of the
block (`scope="row"`: over each row). After column j is decided, its error `e = (w_j - w*_j) / U_jj` changes the columns
to the right by `- e U_j,right`.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from optimum_fista.solve.linalg import damped_cholesky, inverse_in_place
from optimum_fista.solve.method import (
    MemoryFactors,
    PrunedOperator,
    PruningMethod,
    register,
    reported_error,
    require_damping,
)
from optimum_fista.solve.pattern import SparsityPattern
from optimum_fista.solve.problem import LayerProblem


@register
@dataclass(frozen=True)
class SparseGPT(PruningMethod):
    """Prune columns from left to right and let the columns on the right compensate for each (Algorithm 1).

    The docstring of the module says how.
    """

    # Fraction of the mean Gram diagonal added to the diagonal.
    damping: float = 0.01
    # Columns whose mask is chosen together.
    block_size: int = 128
    name: ClassVar[str] = "sparsegpt"
    memory_factors: ClassVar[MemoryFactors | None] = MemoryFactors(
        gram_matrices=2.4, weight_matrices=2.0, row_blocks=1.1
    )
    # A block can't know how good the columns to its right are.
    takes_columns: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Refuse options that make no sense (ValueError); the fields of `self` are the options."""
        self.require_at_least({"block_size": 1})
        require_damping(self.damping)

    def prune(self, problem: LayerProblem, pattern: SparsityPattern) -> PrunedOperator:
        """Prune one operator to `pattern`: returns new weights with their mask.

        No tensor of `problem` changes; its statistics keep their decoupled form (`LayerProblem.decoupled`).

        The problem's target is ignored: SparseGPT's target is `W X*`. Symbols are those of the module. The options are
        `self.damping`, a share of the mean of the diagonal of `G`, and `self.block_size`, the columns whose mask is
        chosen together.
        """
        self.require_pattern(pattern)
        pattern.require_shape(problem.weight.shape, problem.name)
        problem = problem.decoupled()
        factor, message = damped_cholesky(
            problem.gram.clone, self.damping, problem.statistics.energy_ratios
        )
        # H^-1 = U^T U: U_jj times row j of U is the first row of the inverse of H without the columns before j.
        upper = torch.linalg.cholesky(inverse_in_place(factor), upper=True)

        weight = problem.weight.clone()
        mask = torch.ones_like(weight, dtype=torch.bool)
        columns = weight.shape[1]
        # Blocks are a whole number of the columns that a pattern decides together.
        columns_together = pattern.width if pattern.span is None else pattern.span
        remainder = self.block_size % columns_together
        block_size = max(columns_together, self.block_size - remainder)
        for left in range(0, columns, block_size):
            right = min(left + block_size, columns)
            errors = self._prune_block(
                weight=weight, mask=mask, upper=upper, left=left, right=right, pattern=pattern
            )
            # The columns to the right wait for the end of the block: one product instead of one a column.
            weight[:, right:] -= errors @ upper[left:right, right:]
        return PrunedOperator(
            weight=weight,
            mask=mask,
            fit_error=reported_error(problem, weight),
            converged=not message,
            message=message,
        )

    def _prune_block(
        self,
        *,
        weight: Tensor,
        mask: Tensor,
        upper: Tensor,
        left: int,
        right: int,
        pattern: SparsityPattern,
    ) -> Tensor:
        """Prune the columns from `left` to `right` (excluded); changes these of `weight` and of `mask`, [out, in].

        A *contest* are the columns whose mask is chosen together: the m of n:m, or the whole block. `weight` has been
        compensated for all columns to the left, and the caller compensates those to the right of the block. `upper` is
        `U` [in, in], and `pattern` chooses the masks.

        Returns the scaled errors `e` of the block's columns, [out, right - left].
        """
        width = right - left
        block = weight[:, left:right].clone()
        block_mask = mask[:, left:right]  # a view
        block_upper = upper[left:right, left:right]
        squares = block_upper.diagonal().square()  # U_jj^2
        columns_in_contest = width if pattern.span is None else pattern.span
        errors = []
        for j in range(width):
            # The mask of a contest is chosen when its first column is reached.
            is_first_of_contest = j % columns_in_contest == 0
            if is_first_of_contest:
                contest = slice(j, j + columns_in_contest)
                scores = block[:, contest].square().div_(squares[contest])  # w_j^2 / U_jj^2
                # The pattern keeps the largest scores, which are squares already. It is told the first column and how
                # many columns there are, so that all blocks together have the zeros of the whole matrix.
                block_mask[:, contest] = pattern.mask(
                    scores, squared=True, within=(left + j, weight.shape[1])
                )

            before = block[:, j].clone()
            block[:, j] *= block_mask[:, j]
            error = (before - block[:, j]) / block_upper[j, j]  # e
            errors.append(error)
            # - e U_j,right within the block
            block[:, j + 1 :].addr_(error, block_upper[j, j + 1 :], alpha=-1)
        weight[:, left:right] = block
        return torch.stack(errors, dim=1)
