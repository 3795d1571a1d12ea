"""Pruning one group of operators that share their inputs: by which method, together or each alone, how well."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import torch

from optimum_fista.model.correction import GroupProblems
from optimum_fista.run.config import FistaPruningConfig
from optimum_fista.run.memory import release_free_memory
from optimum_fista.run.pruning.budgets import Budgets
from optimum_fista.run.reports.report import OperatorReport
from optimum_fista.solve.allocation import prune_stacked
from optimum_fista.solve.method import PrunedOperator, PruningMethod
from optimum_fista.solve.methods.magnitude import Magnitude
from optimum_fista.solve.pattern import SparsityPattern
from optimum_fista.solve.problem import LayerProblem
from optimum_fista.solve.refit import refit_columns

UNDER_CALIBRATED_TOKENS = 128
"""An expert to which the router sends fewer calibration tokens is pruned by magnitude."""


@dataclass
class SolvedGroup:
    """Pruned operators of a group, in its order, in which patterns, and how that was done."""

    pruned: list[PrunedOperator]
    patterns: list[SparsityPattern]
    method: str
    seconds: float


class GroupSolver:
    """Prunes groups of operators as a configuration, resolved, asks for, in the patterns of the budgets."""

    def __init__(self, config: FistaPruningConfig, model_type: str, budgets: Budgets) -> None:
        self._budgets = budgets
        self._output_weights = budgets.output_weights if config.scope == "matrix" else {}
        self._method = config.create_method(model_type)

    def solve(self, problems: GroupProblems) -> SolvedGroup:
        """Prune the operators of a group; nothing is written."""
        group, fitted = problems.operators, problems.fitted
        patterns = [self._budgets.pattern_for(operator.name) for operator in group]
        method, message = self._method_for(problems)
        release_free_memory()  # what capturing left in the allocator is needed by the solver
        started, name = time.perf_counter(), method.name
        if all(pattern.column_width and not pattern.sparsity for pattern in patterns):
            # All columns stay: the operator repairs its decoder layer, the one before which is removed.
            pruned, name = [_refitted(problem) for problem in fitted], "refit"
        elif not message and all(operator.name in self._output_weights for operator in group):
            # rows of all operators compete for the zeros of the group, so shares per operator come out of it
            weights = [self._output_weights[operator.name] for operator in group]
            pruned = prune_stacked(method, fitted, patterns, weights)
            patterns = [replace(p, sparsity=q.sparsity) for p, q in zip(patterns, pruned, strict=True)]
        else:
            pruned = method.prune_sharing(fitted, patterns)
            pruned = [replace(p, message=message or p.message) for p in pruned]
        if fitted[0].weight.device.type != "cpu":  # kernels are only queued: without this, the time is that of queueing
            torch.accelerator.synchronize(fitted[0].weight.device)
        seconds = time.perf_counter() - started
        finite = torch.stack([torch.isfinite(result.weight).all() for result in pruned]).tolist()
        for operator, pattern, result, is_finite in zip(group, patterns, pruned, finite, strict=True):
            broken = pattern.violation(result.mask)
            if broken or not is_finite:
                raise RuntimeError(
                    f"method {method.name!r} failed on {operator.name}: {broken or 'weights hold NaN or Inf'}."
                )
            result.weight.masked_fill_(~result.mask, 0.0)  # no -0.0
        return SolvedGroup(pruned, patterns, name, seconds)

    def _method_for(self, problems: GroupProblems) -> tuple[PruningMethod, str]:
        """The method for a group, and what to say if it is not the usual one."""
        tokens = problems.fitted[0].statistics.num_tokens
        if problems.operators[0].tokens is None or tokens >= UNDER_CALIBRATED_TOKENS:
            return self._method, ""
        return Magnitude(), f"under-calibrated expert: {tokens} calibration tokens reached it, so magnitude pruned it"


def _refitted(problem: LayerProblem) -> PrunedOperator:
    """The least-squares solution with all weights."""
    mask = torch.ones_like(problem.weight, dtype=torch.bool)
    weight, message = refit_columns(problem, mask[0])
    return PrunedOperator(weight, mask, problem.fit_error(weight), 1, converged=not message, message=message)


def report_group(problems: GroupProblems, solved: SolvedGroup) -> list[OperatorReport]:
    """Reports of the operators of a group, with the errors of the weights as they were written."""
    reports = []
    parts = zip(
        problems.operators,
        problems.fitted,
        problems.held_out_problems(),
        solved.pruned,
        solved.patterns,
        strict=True,
    )
    for operator, problem, held_out, pruned, pattern in parts:
        exact = operator.parameter.dtype == problem.weight.dtype  # otherwise rounding changed what was solved for
        written = pruned.weight if exact else operator.read()
        fit_error = pruned.fit_error if exact else problem.fit_error(written)
        unseen = None if held_out is None else held_out.fit_error(written)
        kept = pattern.num_kept(operator.shape)  # the mask was counted when the pattern was checked
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
                method=solved.method,
                fit_error=fit_error,
                output_error=problems.output_error(problem, written, fit_error),
                l1_penalty=pruned.l1_penalty,
                iterations=pruned.iterations,
                converged=pruned.converged,
                message=pruned.message,
                num_tokens=problem.statistics.num_tokens,
                solve_seconds=solved.seconds / len(problems.operators),
                held_out_fit_error=unseen,
                held_out_output_error=None
                if held_out is None or unseen is None
                else problems.output_error(held_out, written, unseen, held_out=True),
                held_out_tokens=0 if held_out is None else held_out.statistics.num_tokens,
                residual_corrected=problems.last is not None,
            )
        )
    return reports
