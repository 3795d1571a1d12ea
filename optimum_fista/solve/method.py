"""The interface of pruning methods: layer problem in, pruned operator out.

A method is a frozen set of options without state: one object prunes all operators of a model, in any order and in any
process. It returns a mask and weights and changes no tensor, so the caller decides when they are written.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, TypeVar

from torch import Tensor

from optimum_fista.solve.pattern import SparsityPattern
from optimum_fista.solve.problem import LayerProblem

Method = TypeVar("Method", bound="PruningMethod")


@dataclass(frozen=True)
class PrunedOperator:
    """Sparse weights of one linear operator and how they were reached.

    Attributes:
        weight: Pruned weights [out, in], zero where the mask is False.
        mask: Boolean mask [out, in], True = kept.
        fit_error: `|| W* X* - Y ||_F / || Y ||_F` on the calibration tokens, with the target outputs `Y`.
        iterations: Iterations over all trials and stages.
        l1_penalty: Penalty of the solution kept, if the method has one.
        converged: False when an iteration limit or a numerical failure ended the method.
        message: Advice if it did not converge, or another remark for the report.
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


class PruningMethod(ABC):
    """A frozen dataclass whose fields are the method's options; the problem is an argument of the call.

    To add one, write `optimum_fista/solve/methods/NAME.py` with a subclass that has a `name` and the decorator
    `register`. Weights of nearly dead inputs must be removed first (`InputStatistics`). Scores proportional to the
    norms of the inputs do this. Multiply other scores by `statistics.energy_ratios`, or solve `problem.decoupled()`.
    """

    name: ClassVar[str]
    updates_weights: ClassVar[bool] = True  # whether weights that it keeps get other values
    takes_columns: ClassVar[bool] = True  # whether it prunes to patterns with `whole_columns`

    def require_pattern(self, pattern: SparsityPattern) -> None:
        """Check that the method prunes to `pattern`."""
        if pattern.whole_columns and not self.takes_columns:
            fitting = ", ".join(
                repr(name) for name, method in sorted(METHODS.items()) if method.takes_columns
            )
            why = f"can't remove whole columns, as pattern='{pattern}' wants"
            raise ValueError(f"method {self.name!r} {why}: take one of {fitting}.")

    @abstractmethod
    def prune(self, problem: LayerProblem, pattern: SparsityPattern) -> PrunedOperator:
        """Prune one operator to `pattern`; never changes the tensors of `problem`."""

    def prune_sharing(
        self, problems: Sequence[LayerProblem], patterns: Sequence[SparsityPattern]
    ) -> list[PrunedOperator]:
        """Prune operators that share their inputs (and `InputStatistics`); override to share work."""
        return [
            self.prune(problem, pattern)
            for problem, pattern in zip(problems, patterns, strict=True)
        ]


METHODS: dict[
    str, type[PruningMethod]
] = {}  # by name; `optimum_fista.solve.methods` registers the package's own


def register(method: type[Method]) -> type[Method]:
    """Make a method known by its name, so that configurations and reports can name it. A decorator of classes."""
    name = getattr(method, "name", None)
    if not isinstance(name, str) or not name:
        raise ValueError(
            f"{method.__qualname__}.name={name!r}: give the class a name, such as 'wanda'."
        )
    known = METHODS.setdefault(name, method)
    # A notebook cell that runs again defines its class again.
    if (known.__module__, known.__qualname__) != (method.__module__, method.__qualname__):
        raise ValueError(
            f"name={name!r} of {method.__qualname__} is that of {known.__qualname__}: choose another."
        )
    METHODS[name] = method
    return method


def create_method(name: str, **options: Any) -> PruningMethod:
    """Create a method by its name with the given options."""
    if name not in METHODS:
        raise ValueError(f"method={name!r}: pass one of {', '.join(map(repr, sorted(METHODS)))}.")
    known = [field.name for field in fields(METHODS[name])]  # type: ignore[arg-type] # methods are dataclasses
    unknown = sorted(set(options) - set(known))
    if unknown:
        takes = f"it takes {', '.join(known) or 'none'}"
        raise ValueError(f"method {name!r} has no option {', '.join(map(repr, unknown))}: {takes}.")
    return METHODS[name](**options)
