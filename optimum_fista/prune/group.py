"""Pruning one group of operators that share their inputs: by which method, together or each alone, how well."""

from __future__ import annotations

import time
from dataclasses import replace

import torch

from optimum_fista.memory import release_memory
from optimum_fista.model.correction import GroupProblems
from optimum_fista.prune.budgets import Budgets
from optimum_fista.prune.sink import ModelSink
from optimum_fista.report import OperatorReport
from optimum_fista.solve.allocation import prune_stacked
from optimum_fista.solve.method import PrunedOperator, PruningMethod
from optimum_fista.solve.methods.magnitude import Magnitude
from optimum_fista.solve.pattern import SparsityPattern
from optimum_fista.solve.problem import LayerProblem
from optimum_fista.solve.refit import refit_columns

UNDER_CALIBRATED_TOKENS = 128
"""An expert to which the router sends fewer calibration tokens is pruned by magnitude."""


def solve_group(
    problems: GroupProblems, method: PruningMethod, budgets: Budgets
) -> tuple[list[PrunedOperator], list[SparsityPattern], str]:
    """Prune the operators of a group; nothing is written. Returns also their patterns, and the name of the method."""
    group, fitted = problems.operators, problems.fitted
    patterns = [budgets.pattern_for(operator.name) for operator in group]
    tokens, name, message = fitted[0].statistics.num_tokens, method.name, ""
    if group[0].tokens is not None and tokens < UNDER_CALIBRATED_TOKENS:
        method, name = Magnitude(), Magnitude.name
        message = f"under-calibrated expert: {tokens} calibration tokens reached it, so magnitude pruned it"
    if all(pattern.whole_columns and not pattern.sparsity for pattern in patterns):
        # All columns stay: the operator repairs its decoder layer, the one before which is removed.
        pruned, name = [_refitted(problem) for problem in fitted], "refit"
    elif not message and all(operator.name in budgets.output_weights for operator in group):
        # rows of all operators compete for the zeros of the group, so shares per operator come out of it
        weights = [budgets.output_weights[operator.name] for operator in group]
        pruned = prune_stacked(method, fitted, patterns, weights)
        patterns = [replace(p, sparsity=q.sparsity) for p, q in zip(patterns, pruned, strict=True)]
    else:
        pruned = [replace(p, message=message or p.message) for p in method.prune_sharing(fitted, patterns)]
    finite = torch.stack([torch.isfinite(result.weight).all() for result in pruned]).tolist()
    for operator, pattern, result, is_finite in zip(group, patterns, pruned, finite, strict=True):
        broken = pattern.violation(result.mask)
        if broken or not is_finite:
            raise RuntimeError(
                f"method {method.name!r} failed on {operator.name}: {broken or 'weights hold NaN or Inf'}."
            )
        result.weight.masked_fill_(~result.mask, 0.0)  # no -0.0
    return pruned, patterns, name


def _refitted(problem: LayerProblem) -> PrunedOperator:
    """The least-squares solution with all weights."""
    mask = torch.ones_like(problem.weight, dtype=torch.bool)
    weight, message = refit_columns(problem, mask[0])
    return PrunedOperator(weight, mask, problem.fit_error(weight), 1, converged=not message, message=message)


def prune_group(
    problems: GroupProblems, method: PruningMethod, budgets: Budgets, sink: ModelSink
) -> list[OperatorReport]:
    """Prune the operators of a group and write them; their reports have the errors of the weights as written."""
    release_memory()  # what capturing left in the allocator is needed by the solver
    started = time.perf_counter()
    pruned_group, patterns, name = solve_group(problems, method, budgets)
    seconds = time.perf_counter() - started  # with the kernels of a device, whose results were read
    for operator, pruned in zip(problems.operators, pruned_group, strict=True):
        sink.write(operator, pruned.weight, pruned.mask)
    reports = []
    parts = zip(problems.operators, problems.fitted, problems.held_out, pruned_group, patterns, strict=True)
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
                pattern=str(pattern),
                target_sparsity=pattern.sparsity,
                scope=pattern.scope,
                num_kept=kept,
                sparsity=1 - kept / pruned.mask.numel(),
                method=name,
                fit_error=fit_error,
                output_error=problems.output_error(problem, written, fit_error),
                l1_penalty=pruned.l1_penalty,
                iterations=pruned.iterations,
                converged=pruned.converged,
                message=pruned.message,
                num_tokens=problem.statistics.num_tokens,
                solve_seconds=seconds / len(problems.operators),
                held_out_fit_error=unseen,
                held_out_output_error=None
                if held_out is None or unseen is None
                else problems.output_error(held_out, written, unseen, held_out=True),
                held_out_tokens=0 if held_out is None else held_out.statistics.num_tokens,
                residual_corrected=problems.last is not None,
            )
        )
    return reports
