"""Operators that were pruned together, and what the report says of each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from optimum_fista.model.layer_sums import Group, LayerSums
from optimum_fista.run.reports.report import OperatorReport
from optimum_fista.solve.pattern import SparsityPattern
from optimum_fista.solve.problem import LayerProblem
from optimum_fista.solve.pruned import PrunedOperator


@dataclass
class PrunedGroup:
    """Operators that share an input, their problems and what became of them, in patterns of their own.

    `held_out` are sums over held-out tokens; `None` where none is held out. `residual_corrected` as in the report.
    """

    operators: Group
    problems: Sequence[LayerProblem]
    pruned: Sequence[PrunedOperator]
    patterns: Sequence[SparsityPattern]
    method: str
    solve_seconds: float
    held_out: LayerSums | None = None
    residual_corrected: bool = False


def report_group(group: PrunedGroup) -> list[OperatorReport]:
    """Reports of the operators of a group, with the errors of the weights as they were written."""
    reports = []
    parts = zip(group.operators, group.problems, group.pruned, group.patterns, _held_out_problems(group), strict=True)
    for operator, problem, pruned, pattern, held_out in parts:
        exact = operator.parameter.dtype == problem.weight.dtype
        written = pruned.weight if exact else operator.read()
        kept = pattern.num_kept(operator.shape)  # the mask was counted when it was checked against the pattern
        reports.append(
            OperatorReport(
                name=f"{operator.name}.weight",
                shape=operator.shape,
                stored_transposed=operator.transposed,
                pattern=pattern.text,
                target_sparsity=pattern.sparsity,
                scope=pattern.scope,
                num_kept=kept,
                sparsity=1 - kept / pruned.mask.numel(),
                method=group.method,
                relative_error=pruned.relative_error if exact else problem.relative_error(written),
                l1_penalty=pruned.l1_penalty,
                iterations=pruned.iterations,
                converged=pruned.converged,
                message=pruned.message,
                num_tokens=problem.statistics.num_tokens,
                solve_seconds=group.solve_seconds / len(group.operators),
                held_out_error=None if held_out is None else held_out.relative_error(written),
                held_out_tokens=0 if held_out is None else held_out.statistics.num_tokens,
                convergence=pruned.convergence,
                residual_corrected=group.residual_corrected,
            )
        )
    return reports


def _held_out_problems(group: PrunedGroup) -> Iterable[LayerProblem | None]:
    """The problem of every operator on held-out tokens; `None` where it has seen none."""
    if group.held_out is None or not group.held_out.gram.num_tokens:
        return [None for _ in group.operators]
    return group.held_out.problems(group.operators, [problem.weight for problem in group.problems])
