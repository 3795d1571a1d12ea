"""The interface of pruning methods: layer problem in, pruned operator out.

A method is a frozen set of options without state: one object prunes all operators of a model, in any order and in any
process. It takes a `LayerProblem` (the matrices of one linear operator) and a `SparsityPattern`, and returns a
`PrunedOperator`, a mask and weights. It changes no tensor, so the caller decides when they are written. Methods are
known by their names (`register`, `create_method`).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar

from torch import Tensor

from optimum_fista.solve.pattern import Scope, SparsityPattern
from optimum_fista.solve.problem import LayerProblem

Method = TypeVar("Method", bound="PruningMethod")


@dataclass(frozen=True)
class PrunedOperator:
    """Sparse weights of one linear operator and how they were reached.

    Attributes:
        weight: Pruned weights [out, in], zero where the mask is False.
        mask: Boolean mask [out, in], True = kept.
        fit_error: `|| W* X* - Y ||_F / || Y ||_F` on the calibration tokens, with the target outputs `Y`; NaN if it was
            not measured (`errors_unread`).
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


# Whether somebody reads the errors that methods report.
_ERRORS_ARE_READ: ContextVar[bool] = ContextVar("whether errors of methods are read", default=True)


@contextmanager
def errors_unread() -> Iterator[None]:
    """Inside, methods need not measure the errors of their results: `PrunedOperator.fit_error` may be NaN.

    An error takes a product as large as an iteration of a solver. A run measures it once, of the weights as they are
    written. Sets the context variable `_ERRORS_ARE_READ`, and sets it back at the end.
    """
    token = _ERRORS_ARE_READ.set(False)
    try:
        yield
    finally:
        _ERRORS_ARE_READ.reset(token)


def reported_error(problem: LayerProblem, weight: Tensor) -> float:
    """Measure the error of a result, for `PrunedOperator.fit_error`; NaN if nobody reads it (`errors_unread`).

    `weight` [out, in] are the pruned weights of the operator of `problem`. Changes nothing.
    """
    return problem.fit_error(weight) if _ERRORS_ARE_READ.get() else math.nan


class ProblemGroup(NamedTuple):
    """Operators that share their inputs: their problems have the same `InputStatistics`, and each has its pattern."""

    problems: Sequence[LayerProblem]
    patterns: Sequence[SparsityPattern]


@dataclass(frozen=True)
class MethodDefaults:
    """Values that a method uses for options of `FistaPruningConfig` that the caller leaves `None`.

    Without arguments they are those of SparseGPT, as most methods have them.
    """

    scope: Scope = "matrix"  # zeros are shared out among all weights of an operator
    error_correction: Literal["none", "after_attention", "intra", "full"] | float = 0.0
    residual_correction: float = 0.0
    allocation: Literal["uniform", "fisher"] = "uniform"


@dataclass(frozen=True, kw_only=True)
class MemoryFactors:
    """Float32 matrices that a method holds at most besides its problem; `Estimate` multiplies them by their sizes.

    They come from the measured peaks of runs; `benchmarks/estimate.py` sets estimates beside such peaks.
    """

    # As large as the Gram matrix [in, in].
    gram_matrices: float
    # As large as the weights [out, in] of all operators that share the inputs.
    weight_matrices: float
    # As large as the block of rows that `solve.linalg.row_blocks` takes at a time.
    row_blocks: float = 0.0


class PruningMethod(ABC):
    """A frozen dataclass whose fields are the method's options; the problem is an argument of the call.

    To add one, write `optimum_fista/solve/methods/NAME.py` with a subclass that has a `name` and the decorator
    `register`. Give it `defaults` if its paper corrects errors, or counts zeros in each row. Give it `memory_factors`,
    so that `prune --dry-run` can say what it takes; a method outside this package may lack them. CONTRIBUTING.md says
    what else the package needs, and which tests of all methods run.

    Weights of nearly dead inputs must be removed first (`InputStatistics`). Scores proportional to the norms of the
    inputs do this. Multiply other scores by `statistics.energy_ratios`, or solve `problem.decoupled()`.
    """

    name: ClassVar[str]
    updates_weights: ClassVar[bool] = True  # whether weights that it keeps get other values
    takes_columns: ClassVar[bool] = True  # whether it prunes to patterns with `whole_columns`
    defaults: ClassVar[MethodDefaults] = MethodDefaults()
    # For patterns that remove whole parts, such as channels, heads or decoder layers; None: `defaults`.
    defaults_of_parts: ClassVar[MethodDefaults | None] = None
    # For unstructured sparsity of at most 0.5; None: `defaults`.
    defaults_up_to_half: ClassVar[MethodDefaults | None] = None
    # None: not measured. An estimate then takes the largest factors of all methods, and says so.
    memory_factors: ClassVar[MemoryFactors | None] = None

    def require_at_least(self, least_values: Mapping[str, int]) -> None:
        """Refuse an option of this method that is below its least value (ValueError). A subclass calls it when made.

        `least_values` are whole numbers, such as 1 for "max_iterations", by the name of the option.
        """
        for option, least in least_values.items():
            if getattr(self, option) < least:
                raise ValueError(
                    f"{option}={getattr(self, option)!r}: pass a whole number of at least {least}."
                )

    def require_pattern(self, pattern: SparsityPattern) -> None:
        """Refuse a pattern of whole columns (ValueError) if this method can't prune to those. Changes nothing."""
        if pattern.whole_columns and not self.takes_columns:
            methods_for_columns = [
                repr(name) for name, method in sorted(METHODS.items()) if method.takes_columns
            ]
            raise ValueError(
                f"method {self.name!r} can't remove whole columns, as pattern='{pattern}' wants: take one of "
                f"{', '.join(methods_for_columns)}."
            )

    @abstractmethod
    def prune(self, problem: LayerProblem, pattern: SparsityPattern) -> PrunedOperator:
        """Prune one operator to `pattern`; never changes the tensors of `problem`."""

    def prune_sharing(
        self, problems: Sequence[LayerProblem], patterns: Sequence[SparsityPattern]
    ) -> list[PrunedOperator]:
        """Prune operators that share their inputs (and `InputStatistics`), each to its pattern, one after the other.

        A subclass overrides it if operators can share work. Returns one pruned operator for each problem; the tensors
        of the problems stay as they are.
        """
        return [
            self.prune(problem, pattern)
            for problem, pattern in zip(problems, patterns, strict=True)
        ]

    def prune_groups(self, groups: Sequence[ProblemGroup]) -> list[list[PrunedOperator]]:
        """Prune groups of operators, each with inputs of its own, such as the experts of a mixture, one after another.

        The groups do not depend on each other. A subclass overrides this method if groups whose operators have equal
        shapes can be solved together, as `obs_admm` does. So a subclass of `ObsAdmm` that overrides `prune` or
        `prune_sharing` must override this method as well. Returns the pruned operators of each group; the tensors of
        the problems stay as they are.
        """
        return [self.prune_sharing(group.problems, group.patterns) for group in groups]


def require_damping(damping: float) -> None:
    """Refuse a method's option `damping`, a share of the mean of the Gram matrix's diagonal, if it is negative."""
    if not damping >= 0:
        raise ValueError(
            f"damping={damping!r}: pass a share of the mean Gram diagonal of at least 0."
        )


# By name; `optimum_fista.solve.methods` registers the package's own.
METHODS: dict[str, type[PruningMethod]] = {}


def register(method: type[Method]) -> type[Method]:
    """Put a method into `METHODS`, so that configurations and reports can name it. A decorator of classes.

    Returns the class as it is. A class with the same module and class name is replaced; any other class with the same
    `name` is an error.
    """
    name = getattr(method, "name", None)
    if not isinstance(name, str) or not name:
        raise ValueError(
            f"{method.__qualname__}.name={name!r}: give the class a name, such as 'wanda'."
        )
    other = METHODS.get(name)
    if other is not None:
        # A notebook cell that runs again defines its class again.
        has_same_module = other.__module__ == method.__module__
        is_same_class = has_same_module and other.__qualname__ == method.__qualname__
        if not is_same_class:
            raise ValueError(
                f"name={name!r} of {method.__qualname__} is that of {other.__qualname__}: choose another."
            )
    METHODS[name] = method
    return method


def method_class(name: str) -> type[PruningMethod]:
    """The class of the method that is registered under a name, such as "wanda"."""
    if name not in METHODS:
        raise ValueError(f"method={name!r}: pass one of {', '.join(map(repr, sorted(METHODS)))}.")
    return METHODS[name]


def largest_memory_factors() -> MemoryFactors:
    """The largest of each factor among all registered methods (`METHODS`): an estimate for a method without factors.

    A factor counts the float32 matrices that a method holds at most besides its problem. There is one factor for each
    size: that of the Gram matrix, that of the weights, and that of a block of rows. Methods have their factors as
    `memory_factors`; `None`: they were not measured.
    """
    measured = [method.memory_factors for method in METHODS.values() if method.memory_factors]
    return MemoryFactors(
        gram_matrices=max(factors.gram_matrices for factors in measured),
        weight_matrices=max(factors.weight_matrices for factors in measured),
        row_blocks=max(factors.row_blocks for factors in measured),
    )


def create_method(name: str, **options: Any) -> PruningMethod:
    """Create a method by its registered name, such as "wanda"; `options` are values of the fields of its class."""
    method = method_class(name)
    names = [field.name for field in fields(method)]  # type: ignore[arg-type] # methods are dataclasses
    unknown = sorted(set(options) - set(names))
    if unknown:
        options_text = ", ".join(repr(option) for option in unknown)
        raise ValueError(
            f"method {name!r} has no option {options_text}: it takes {', '.join(names) or 'none'}."
        )
    return method(**options)
