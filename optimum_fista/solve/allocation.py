"""Share one budget of zeros: over many operators, and over the outputs of operators that share their inputs.

The error of every operator is assumed to grow at the same rate with its zeros. So two numbers of an operator are
enough: its size, and the increase of the loss at the average sparsity. There is no rule for the outputs of a group: the
method itself chooses, on one problem with scaled rows.
"""

import math
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import replace

import torch
from torch import Tensor

from optimum_fista.solve.method import PrunedOperator, PruningMethod
from optimum_fista.solve.pattern import SparsityPattern
from optimum_fista.solve.problem import LayerProblem
from optimum_fista.solve.selection import kth_smallest

SLOPE = 7.0  # growth of the logarithm of a squared error per unit of sparsity, about 0.5 (docs/solver.md)
REACH = 0.45  # the budget of an operator is lower than the average sparsity by no more than this
# The budget of an operator leaves it at least this share of the average density. Gradients at the dense weights don't
# show what it costs to lose nearly all of an operator (docs/ablations.md, "A second model"). Operators that share their
# inputs pool their budgets, so one of them may keep less than its own.
LEAST_DENSITY = 0.5
# Smallest scale of an output, in units of their root mean square. Gradients say little about outputs that saturate: to
# a query head that attends to only one token, a small change of its queries makes no difference, but it needs them.
# Without this limit it would lose all of its weights.
_LEAST_SCALE = 0.3


def removal_cost(saliency: Tensor, sparsity: float) -> float:
    """Increase of the loss: sum of the smallest saliencies [out, in], a share `sparsity` of all, `0 < sparsity < 1`."""
    count = min(saliency.numel(), max(1, round(sparsity * saliency.numel())))
    threshold = kth_smallest(saliency, count)
    # Of the saliencies that equal the threshold, only so many are added that `count` are in the sum.
    below = saliency < threshold
    sums = (saliency * below).sum(dtype=torch.float64), below.sum().double(), threshold.double()
    cost, smaller, largest = torch.stack(sums).tolist()  # one transfer
    return cost + (count - smaller) * largest


def allocate(
    costs: Mapping[str, float], sizes: Mapping[str, int], sparsity: float
) -> dict[str, float]:
    """Choose the sparsity of every operator so that the loss rises least at the same number of zeros.

    With `E_k(s) = cost_k exp(SLOPE (s - sparsity))` the sum of all `E_k(s_k)` is least, at a given sum of
    `size_k s_k`, where no zero is worth moving from one operator to another:
    `s_k = sparsity + (mu - log(cost_k / size_k)) / SLOPE`, clipped. The costs are the increase of the loss by the zeros
    of each operator at the average sparsity (`removal_cost`), and the sizes are numbers of weights. The results are
    whole numbers of zeros, and `sparsity` on average over all weights.
    """
    lowest, highest = max(0.0, sparsity - REACH), 1 - LEAST_DENSITY * (1 - sparsity)
    # log(cost_k / size_k); an operator that costs nothing has no logarithm.
    densities = {name: math.log(max(cost, 1e-300) / sizes[name]) for name, cost in costs.items()}
    wanted = round(sparsity * sum(sizes[name] for name in costs))
    zeros = {name: round(sizes[name] * lowest) for name in costs}
    # One unit of sparsity beyond the extremes, so that all operators are clipped at both ends of the interval.
    below, above = min(densities.values()) - SLOPE, max(densities.values()) + SLOPE
    for _ in range(60):
        middle = (below + above) / 2  # mu of the docstring
        wishes = {
            name: sparsity + (middle - density) / SLOPE for name, density in densities.items()
        }
        found = {
            name: round(sizes[name] * min(highest, max(lowest, wish)))
            for name, wish in wishes.items()
        }
        if sum(found.values()) <= wanted:
            below, zeros = middle, found
        else:
            above = middle
    missing = wanted - sum(zeros.values())
    for name in sorted(zeros, key=sizes.__getitem__, reverse=True):  # a zero or so each
        moved = min(missing, max(0, math.floor(sizes[name] * highest) - zeros[name]))
        zeros[name] += moved
        missing -= moved
    return {name: count / sizes[name] for name, count in zeros.items()}


def prune_stacked(
    method: PruningMethod,
    problems: Sequence[LayerProblem],
    patterns: Sequence[SparsityPattern],
    output_weights: Sequence[Tensor],
) -> list[PrunedOperator]:
    """Prune operators that share their inputs as one problem with weighted outputs.

    It minimizes `sum_i v_i || row i of (W* X* - Y) ||^2` over the rows of all operators. The rows share only the budget
    of zeros: rows with larger weights `v_i` keep more weights. Each `sqrt(v_i)` counts as at least 0.3 times their root
    mean square. Weights and targets of the problems move into one matrix each, and change by rounding. The patterns are
    unstructured, with scope `"matrix"`; `output_weights` are `v`, [out] by operator, nonnegative, in one unit.
    """
    # Row i of W and C times sqrt(v_i) weighs its squared error by v_i; G is that of all rows and stays.
    scales = torch.cat([weights.to(problems[0].weight) for weights in output_weights]).sqrt()
    scales /= scales.square().mean().sqrt().clamp_min(torch.finfo(scales.dtype).tiny)
    scales = scales.clamp_min(_LEAST_SCALE)[:, None]
    kept = sum(
        pattern.num_kept(p.weight.shape) for pattern, p in zip(patterns, problems, strict=True)
    )
    rows = [p.weight.shape[0] for p in problems]
    stacked = copy(problems[0])
    for key in ("weight", "target"):
        whole = torch.cat([getattr(problem, key) for problem in problems])
        # The only copy: the problems' own become views of it, and are scaled too until `finally` below.
        for problem, part in zip(problems, whole.split(rows), strict=True):
            setattr(problem, key, part)
        setattr(stacked, key, whole.mul_(scales))
    squares = scales[:, 0].double().square()
    stacked.output_energies = torch.cat([p.output_energies for p in problems]) * squares
    stacked.unpruned_errors = torch.cat([p.unpruned_errors for p in problems]) * squares
    stacked.dense = None  # the sums over W X are those of the first operator only
    stacked.name = " and ".join(p.name for p in problems)
    try:
        pattern = replace(patterns[0], sparsity=1 - kept / stacked.weight.numel())
        found = method.prune_sharing([stacked], [pattern])[0]
    finally:
        stacked.weight.div_(scales)
        stacked.target.div_(scales)
    # Errors are those of the operators' own outputs; that of `found` is weighted.
    weights, masks = found.weight.div_(scales).split(rows), found.mask.split(rows)
    return [
        replace(found, weight=w, mask=m, fit_error=p.fit_error(w))
        for p, w, m in zip(problems, weights, masks, strict=True)
    ]
