"""Operators that share their inputs, pruned as one: their outputs share a budget of zeros."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from optimum_fista.solve.method import PruningMethod
from optimum_fista.solve.pattern import SparsityPattern
from optimum_fista.solve.problem import LayerProblem
from optimum_fista.solve.pruned import PrunedOperator

_LEAST = 0.3
"""Smallest scale of an output, in units of their root mean square.

Gradients say little about outputs that saturate: a query head whose attention rests on one token hardly feels a small
change of its queries, and needs them all the same. Without a bound it loses all of its weights.
"""


def prune_stacked(
    method: PruningMethod,
    problems: Sequence[LayerProblem],
    patterns: Sequence[SparsityPattern],
    output_weights: Sequence[Tensor],
) -> list[PrunedOperator]:
    """Prune operators that share their inputs as one problem with weighted outputs.

    It minimizes `sum_i v_i || row i of (W* X* - Y) ||^2` over the rows of all operators. The rows are problems of
    their own but for the budget, which they share: rows whose errors weigh more keep more weights. No `sqrt(v_i)` is
    taken for less than 0.3 times their root mean square. Weights and targets of the problems move into one matrix each
    and change by rounding.

    Args:
        method: The pruning method.
        problems: Their layer problems, with the same statistics.
        patterns: Unstructured, scope `"matrix"`; the zeros of all together are shared.
        output_weights: `v`, [out] by operator, nonnegative, in one unit.

    Returns:
        Pruned operators in the order of the problems.
    """
    scales = torch.cat([weights.to(problems[0].weight) for weights in output_weights]).sqrt()
    scales /= scales.square().mean().sqrt().clamp_min(torch.finfo(scales.dtype).tiny)
    scales = scales.clamp_min(_LEAST)[:, None]
    shapes = [(p.weight.shape[0], p.weight.shape[1]) for p in problems]
    kept = sum(pattern.num_kept(shape) for pattern, shape in zip(patterns, shapes, strict=True))
    stacked = LayerProblem.stack(problems, scales)
    try:
        found = method.prune(stacked, replace(patterns[0], sparsity=1 - kept / stacked.weight.numel()))
    finally:
        stacked.unstack(scales)
    rows = [shape[0] for shape in shapes]
    weights, masks = found.weight.div_(scales).split(rows), found.mask.split(rows)
    return [
        replace(found, weight=w, mask=m, fit_error=p.fit_error(w))
        for p, w, m in zip(problems, weights, masks, strict=True)
    ]
