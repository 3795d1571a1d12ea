"""Share a budget of zeros: over many operators (`allocate`), and over the outputs of operators with the same inputs.

The error of every operator is assumed to grow at the same rate with its zeros. So two numbers of an operator are
enough: its size, and the increase of the loss at the average sparsity (`removal_cost`). There is no rule for the
outputs of a group: the method itself chooses, on one problem with scaled rows (`prune_weighted`).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import replace

import torch
from torch import Tensor

from optimum_fista.solve.method import (
    ProblemGroup,
    PrunedOperator,
    PruningMethod,
    errors_unread,
    reported_error,
)
from optimum_fista.solve.problem import LayerProblem
from optimum_fista.solve.selection import kth_smallest_magnitude

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
_HALVINGS = 60  # of an interval of floating-point numbers: more change nothing


def removal_cost(saliency: Tensor, sparsity: float) -> Tensor:
    """Increase of the loss: sum of the smallest saliencies [out, in], a share `sparsity` of all, `0 < sparsity < 1`.

    The saliency of a weight is the increase of the loss if the weight alone is removed. The result is a float64 scalar
    on the device of `saliency`, so that the host need not wait for each operator.
    """
    num_zeros = round(sparsity * saliency.numel())
    # How many saliencies are summed up: at least one, so that no cost is zero by rounding, and at most all.
    count = min(saliency.numel(), max(1, num_zeros))
    # The largest saliency in the sum.
    threshold = kth_smallest_magnitude(saliency, count)

    # Several saliencies may equal the threshold. Only some of these are added, so that `count` are in the sum.
    below = saliency < threshold
    cost_below = (saliency * below).sum(dtype=torch.float64)
    return cost_below + (count - below.sum()) * threshold.double()


def allocate(
    costs: Mapping[str, float], sizes: Mapping[str, int], sparsity: float
) -> dict[str, float]:
    """Choose the sparsity of every operator so that the loss rises least at the same number of zeros.

    The increase of the loss by operator k at the sparsity s is assumed to be

        E_k(s) = cost_k exp(SLOPE (s - sparsity)).

    The sum of all `E_k(s_k)` is least, at a given number of zeros (the sum of `size_k s_k`), if no zero is worth moving
    from one operator to another. With one number `mu` for all operators, that is

        s_k = sparsity + (mu - log(cost_k / size_k)) / SLOPE,

    clipped between a lowest and a highest sparsity: `REACH` below the average, and the one that leaves `LEAST_DENSITY`
    times the average share of kept weights.

    Args:
        costs: By the operator's name, such as "model.layers.3.mlp.down_proj", the increase of the loss by its zeros at
            the average sparsity (`removal_cost`).
        sizes: By the same names, the number of the operator's weights.
        sparsity: The average over all weights, in (0, 1).

    Returns the sparsity by operator: whole numbers of zeros, and `sparsity` on average over all weights.
    """
    lowest = max(0.0, sparsity - REACH)
    highest = 1 - LEAST_DENSITY * (1 - sparsity)
    total_zeros = round(sparsity * sum(sizes[name] for name in costs))
    # log(cost_k / size_k); an operator that costs nothing has no logarithm.
    log_costs = {name: math.log(max(cost, 1e-300) / sizes[name]) for name, cost in costs.items()}

    def zeros_at(mu: float) -> dict[str, int]:
        """Compute the numbers of zeros by operator for a `mu` of the formula above: the larger it is, the more zeros.

        The share of zeros is clipped to `lowest` and `highest`. `log_costs`, `sizes` and `sparsity` are those of the
        formula.
        """
        zeros = {}
        for name, log_cost in log_costs.items():
            share = sparsity + (mu - log_cost) / SLOPE
            clipped = min(highest, max(lowest, share))
            zeros[name] = round(sizes[name] * clipped)
        return zeros

    # The interval goes one unit of sparsity beyond the extremes, so that all operators are clipped at both ends.
    low = min(log_costs.values()) - SLOPE
    high = max(log_costs.values()) + SLOPE
    zeros = _most_within(total_zeros, zeros_at, low, high)
    if zeros is None:  # rounding makes more zeros than the budget has for every mu
        zeros = {name: round(sizes[name] * lowest) for name in costs}

    # The largest operators take the zeros that rounding has left over: one or so each.
    missing = total_zeros - sum(zeros.values())
    for name in sorted(zeros, key=lambda name: sizes[name], reverse=True):
        most_zeros = math.floor(sizes[name] * highest)
        room = max(0, most_zeros - zeros[name])  # rounding may have gone beyond the highest share
        added = min(missing, room)
        zeros[name] += added
        missing -= added
    return {name: num_zeros / sizes[name] for name, num_zeros in zeros.items()}


def _most_within(
    total: int, zeros_at: Callable[[float], dict[str, int]], low: float, high: float
) -> dict[str, int] | None:
    """Find by bisection the largest number in [low, high] for which all `zeros_at(number)` sum up to at most `total`.

    `zeros_at` rises with the number. Returns these zeros; `None` if they are more for every number that was tried.
    """
    zeros = None
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        zeros_at_middle = zeros_at(middle)
        if sum(zeros_at_middle.values()) <= total:
            low = middle
            zeros = zeros_at_middle
        else:
            high = middle
    return zeros


def prune_weighted(
    method: PruningMethod,
    groups: Sequence[ProblemGroup],
    output_weights: Sequence[Sequence[Tensor]],
) -> list[list[PrunedOperator]]:
    """Prune groups of operators, those of each group as one problem with weighted outputs.

    It minimizes `sum_i v_i || row i of (W* X* - Y) ||^2` over the rows of all operators of a group. The rows share only
    the budget of zeros: rows with larger weights `v_i` keep more weights. Each `sqrt(v_i)` counts as at least 0.3 times
    their root mean square.

    The weights and targets of a group's problems move into one matrix each, become views of it, and change by rounding.
    What the method computes from their statistics may stay cached in these.

    Args:
        method: Prunes the problems, one for each group.
        groups: Operators with the same `InputStatistics`, and their patterns: unstructured, with scope `"matrix"`.
        output_weights: `v` of each group, a tensor [out] for each operator, nonnegative: what an error in each output
            costs, in one unit for all operators of the group (`Budgets.output_weights`, from gradients of the loss).

    Returns the pruned operators of each group.
    """
    joined = [
        _JoinedOperators(group, weights)
        for group, weights in zip(groups, output_weights, strict=True)
    ]
    try:
        with errors_unread():  # those of the joined problems are weighted
            results = method.prune_groups(
                [ProblemGroup([operators.problem], [operators.pattern]) for operators in joined]
            )
    finally:  # the matrices of the groups' problems are views of the joined ones
        for operators in joined:
            operators.undo_scales()
    return [
        operators.divided(pruned)  # one problem, one result
        for operators, (pruned,) in zip(joined, results, strict=True)
    ]


class _JoinedOperators:
    """The operators of a group as one problem, in which each row is multiplied by the scale of its output.

    Attributes:
        problem: Has the rows of all operators, one below the other.
        pattern: Leaves as many weights as the patterns of all operators.
    """

    def __init__(self, group: ProblemGroup, output_weights: Sequence[Tensor]) -> None:
        """Join the operators of a group; `output_weights` are `v` of each, [out], as in `prune_weighted`.

        Changes the problems of the group: their weights and targets become views of the joined problem's matrices,
        because there is no memory for two copies. So they are scaled, too, until `undo_scales`.
        """
        problems, patterns = group
        # Row i of W and C times sqrt(v_i) weighs its squared error by v_i; G is that of all rows and stays.
        weights_of_rows = torch.cat([v.to(problems[0].weight) for v in output_weights])
        scales = weights_of_rows.sqrt()
        root_mean_square = scales.square().mean().sqrt()
        # From here on, a scale of 1 is the root mean square. If all `v` are zero, it is zero, too; then the least
        # normal number divides in its place.
        scales /= root_mean_square.clamp_min(torch.finfo(scales.dtype).tiny)
        scales = scales.clamp_min(_LEAST_SCALE)[:, None]  # [all rows, 1]

        num_kept = sum(
            pattern.num_kept(problem.weight.shape)
            for pattern, problem in zip(patterns, problems, strict=True)
        )
        self._problems = problems
        self._scales = scales
        self._rows = [problem.weight.shape[0] for problem in problems]  # of each operator
        self.problem = _join(problems, scales, self._rows)
        # All patterns are alike but for the share of zeros.
        sparsity = 1 - num_kept / self.problem.weight.numel()
        self.pattern = replace(patterns[0], sparsity=sparsity)

    def undo_scales(self) -> None:
        """Divide the rows of `self.problem` by their scales again, in place: those of the operators' problems, too."""
        self.problem.weight.div_(self._scales)
        self.problem.target.div_(self._scales)

    def divided(self, pruned: PrunedOperator) -> list[PrunedOperator]:
        """Divide the result for `self.problem` among the operators; the weight of `pruned` is overwritten.

        Errors are those of the operators' own outputs; that of `pruned` is weighted.
        """
        weights = pruned.weight.div_(self._scales).split(self._rows)
        masks = pruned.mask.split(self._rows)
        return [
            replace(pruned, weight=weight, mask=mask, fit_error=reported_error(problem, weight))
            for problem, weight, mask in zip(self._problems, weights, masks, strict=True)
        ]


def _join(problems: Sequence[LayerProblem], scales: Tensor, rows: Sequence[int]) -> LayerProblem:
    """Make one problem of all rows of `problems`, each times its scale; `rows` are their numbers of rows.

    `scales` are [all rows, 1]. The weights and targets of `problems` become views of the new problem's matrices.
    """
    # A shallow copy: all problems have the same Gram matrix.
    joined = copy(problems[0])
    for key in ("weight", "target"):
        whole = torch.cat([getattr(problem, key) for problem in problems])
        for problem, part in zip(problems, whole.split(rows), strict=True):
            setattr(problem, key, part)
        # In place, so the parts are scaled, too.
        setattr(joined, key, whole.mul_(scales))

    squares = scales[:, 0].double().square()
    joined.output_energies = torch.cat([p.output_energies for p in problems]) * squares
    joined.dense = None  # the sums over W X are those of the first operator only
    joined.name = " and ".join(problem.name for problem in problems)
    return joined
