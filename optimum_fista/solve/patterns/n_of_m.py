"""n:m sparsity, such as 2:4: n weights kept of every m consecutive inputs of a row, one by one or in pairs."""

import re
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from optimum_fista.solve.pattern import Scope, SparsityPattern

_SWEEPS = 4  # of `best_order` over every place; further ones gain less than a hundredth of what these gained


@dataclass(frozen=True)
class NOfM(SparsityPattern):
    """Exactly n weights kept of every m consecutive inputs of a row, `span` of them.

    `"4:8-pairs"` keeps two whole pairs of four. It is the pattern of Blackwell's sparse FP4 tensor cores (PTX ISA,
    `mma.sp` with `.e2m1`). The score of a pair is the sum of two squared saliencies: magnitudes `w_j^2`, Wanda's
    `w_j^2 ||x_j||^2` and those of optimal brain surgeon, `w_j^2 / [H^-1]_jj`, all add up, without the product of the
    two weights. Their roots do not.
    """

    @classmethod
    def read(cls, text: str, sparsity: float | None, scope: Scope) -> Self | None:  # noqa: ARG003, it is 1 - n / m
        """Read `"2:4"` or `"4:8-pairs"`; `None` if the text is a pattern of another kind, ValueError for "4:2".

        The text says the sparsity, so `sparsity` is not read. `scope` ("matrix" or "row") is only kept: groups compete
        within m inputs.
        """
        if text == "4:8-pairs":
            return cls(0.5, scope, width=2, span=8)
        match = re.fullmatch(r"(\d+):(\d+)", text)
        if match is None:
            return None
        n = int(match[1])
        m = int(match[2])
        if not 0 < n < m:
            raise ValueError(
                f"pattern={text!r} keeps {n} of every {m} weights: pass 0 < n < m, such as '2:4'."
            )
        return cls(1 - n / m, scope, span=m)

    def __str__(self) -> str:
        m = 1 if self.span is None else self.span
        n = self.num_kept((1, m))
        return f"{n}:{m}-pairs" if self.width == 2 else f"{n}:{m}"


def best_order(scores: Tensor, pattern: SparsityPattern) -> Tensor:
    """Find an order of inputs, int64 [in], in which a pattern n:m keeps close to the largest sum of scores [out, in].

    Each of the m places is treated in turn, for all groups. With another input in this place, a group keeps the n
    largest scores of its other inputs, plus the amount by which the new one exceeds the n-th of them. Pairs of groups
    swap their inputs there if the two then keep more together (channel permutations of arXiv 2106.14642, with all
    swaps of a place at once). `pattern` has to be an `NOfM`.
    """
    assert pattern.span is not None
    pattern.require_shape(scores.shape, "scores")
    m = pattern.span
    n = pattern.num_kept((1, m))
    # Inputs of similar size are apart in the beginning: every group has one of each m-th part of them.
    by_size = scores.sum(0).argsort(descending=True, stable=True)
    order = by_size.view(m, -1).T.contiguous()  # [in] -> [groups, m]
    for _ in range(_SWEEPS):
        for place in range(m):
            # Changes `order`. The gains have no name, so that they are freed before the next ones are made.
            _swap_at_place(order, _gain_of_swaps(scores, order, place, n), place)
    return order.flatten()


def _gain_of_swaps(scores: Tensor, order: Tensor, place: int, n: int) -> Tensor:
    """Twice the score that two groups gain together, [groups, groups], if they swap their inputs at a place.

    `scores` are [out, in]. `order` [groups, m] are the numbers of the inputs in each group, and n of them are kept.
    `place` is a column of `order`. Changes nothing.
    """
    others = [other for other in range(order.shape[1]) if other != place]
    # The n-th largest of the other inputs of each group.
    threshold = scores[:, order[:, others]].topk(n, -1).values[..., -1]  # [out, groups]
    own = scores[:, order[:, place]]  # [out, groups]
    # gain[i, j]: twice what exceeds the threshold of group j by the input of group i. It is the sum over rows of
    # 2 max(own - threshold, 0) = |own - threshold| + own - threshold, and `cdist` sums the absolute values.
    gain = torch.cdist(own.T, threshold.T, p=1.0) + own.sum(0)[:, None] - threshold.sum(0)
    gain_without_swap = gain.diagonal()  # each group has its own input at the place
    return gain + gain.T - gain_without_swap - gain_without_swap[:, None]


def _swap_at_place(order: Tensor, gain: Tensor, place: int) -> None:
    """Swap inputs of pairs of groups at a place, until no pair that is left gains; changes that column of `order`.

    `order` [groups, m] are the numbers of the inputs in each group, and `gain` [groups, groups] is what pairs gain by a
    swap (`_gain_of_swaps`). A group swaps once at most.
    """
    groups = torch.arange(len(order), device=gain.device)
    is_free = torch.ones_like(groups, dtype=torch.bool)  # groups that have not swapped
    while True:
        both_free = is_free & is_free[:, None]
        # of each group: the largest gain by a swap, and the group to swap with
        best, partner = gain.masked_fill(~both_free, 0).max(1)
        # Only groups that want each other swap; the pair is counted once.
        want_each_other = partner[partner] == groups
        first = groups[(best > 0) & want_each_other & (partner > groups)]
        if not len(first):
            return
        second = partner[first]
        inputs_of_first = order[first, place]  # a copy, because the index is a tensor
        order[first, place] = order[second, place]
        order[second, place] = inputs_of_first
        is_free[first] = False
        is_free[second] = False
