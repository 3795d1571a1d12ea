"""The interface of pruning methods: layer problem in, pruned operator out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from optimum_fista.solve.cost import SolveCost
from optimum_fista.solve.pattern import Scope, SparsityPattern
from optimum_fista.solve.problem import LayerProblem
from optimum_fista.solve.pruned import PrunedOperator

ErrorCorrection = Literal["none", "intra", "full"] | float
Allocation = Literal["uniform", "fisher"]


@dataclass(frozen=True)
class MethodDefaults:
    """How a method is run where the caller does not choose: as its source does. Options of `FistaPruningConfig`."""

    scope: Scope = "matrix"
    error_correction: ErrorCorrection = 0.0
    residual_correction: float = 0.0
    allocation: Allocation = "uniform"


class PruningMethod(ABC):
    """A frozen dataclass whose fields are the method's options; the problem is an argument of the call.

    To add one, write `optimum_fista/solve/methods/NAME.py` with a subclass that has a `name`: it is found
    by its presence there.
    """

    name: ClassVar[str]
    defaults: ClassVar[MethodDefaults] = MethodDefaults()

    @abstractmethod
    def prune(self, problem: LayerProblem, pattern: SparsityPattern) -> PrunedOperator:
        """Prune one operator to `pattern`; never changes the tensors of `problem`."""

    def prune_sharing(
        self, problems: Sequence[LayerProblem], patterns: Sequence[SparsityPattern]
    ) -> list[PrunedOperator]:
        """Prune operators that share their inputs (and `InputStatistics`); override to share work."""
        return [self.prune(problem, pattern) for problem, pattern in zip(problems, patterns, strict=True)]

    def cost(self) -> SolveCost:
        """What pruning one operator costs, for plans; the default scores the weights once and measures the error."""
        return SolveCost()
