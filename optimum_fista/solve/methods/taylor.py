"""First-order Taylor pruning of whole columns by the gradients of the model's loss (LLM-Pruner, arXiv 2305.11627)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from optimum_fista.solve.method import PruningMethod, register
from optimum_fista.solve.pattern import SparsityPattern
from optimum_fista.solve.problem import LayerProblem
from optimum_fista.solve.pruned import PrunedOperator


@register
@dataclass(frozen=True)
class Taylor(PruningMethod):
    """Keep the groups of columns without which the loss would change most, to first order; no weight is updated.

    A column is scored `|sum_i w_ij dL/dw_ij|` (LLM-Pruner, eq. 3, vector-wise, without its second-order term). The
    score of a group is the sum over its columns and over the rows of other operators that go with them (its importance
    aggregation by summation), all with the gradients of the dense model.
    """

    name: ClassVar[str] = "taylor"
    takes_weights: ClassVar[bool] = False
    needs_gradients: ClassVar[bool] = True

    def prune(self, problem: LayerProblem, pattern: SparsityPattern) -> PrunedOperator:
        """Prune one operator to `pattern`. The target is not looked at.

        Raises:
            ValueError: If the problem holds no changes of the loss.
        """
        if problem.loss_changes is None:
            raise ValueError(
                f"{problem.name}: method 'taylor' needs gradients of a model's loss, and none are known of a matrix "
                "alone: prune a model, or pass another method."
            )
        changes = problem.loss_changes.to(problem.weight.device)
        felt = bool(changes.any())
        mask = pattern.mask(changes.expand_as(problem.weight))
        weight = problem.weight * mask
        message = "" if felt else "the loss does not feel it, so columns were chosen by their position"
        return PrunedOperator(weight, mask, problem.fit_error(weight), converged=felt, message=message)
