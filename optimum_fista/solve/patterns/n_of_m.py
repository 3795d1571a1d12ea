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
        """The pattern of a text such as `"2:4"`."""
        if text == "4:8-pairs":
            return cls(0.5, scope, width=2, span=8)
        found = re.fullmatch(r"(\d+):(\d+)", text)
        if found is None:
            return None
        n, m = int(found[1]), int(found[2])
        if not 0 < n < m:
            raise ValueError(
                f"pattern={text!r} keeps {n} of every {m} weights: pass 0 < n < m, such as '2:4'."
            )
        return cls(1 - n / m, scope, span=m)

    def __str__(self) -> str:
        return (
            f"{self.num_kept((1, self.span or 1))}:{self.span}{'-pairs' if self.width == 2 else ''}"
        )


def best_order(scores: Tensor, pattern: SparsityPattern) -> Tensor:
    """Find an order of inputs, int64 [in], in which a pattern n:m keeps close to the largest sum of scores [out, in].

    Each of the m places is treated in turn, for all groups. With another input in this place, a group keeps the n
    largest scores of its other inputs, plus the amount by which the new one exceeds the n-th of them. Pairs of groups
    swap their inputs there if the two then keep more together (channel permutations of arXiv 2106.14642, with all
    swaps of a place at once).
    """
    assert pattern.span is not None
    pattern.require_shape(scores.shape, "scores")
    n, m = pattern.num_kept((1, pattern.span)), pattern.span
    # Inputs of similar size are apart in the beginning: every group has one of each m-th part of them.
    order = (
        scores.sum(0).argsort(descending=True, stable=True).view(m, -1).T.contiguous()
    )  # [in] -> [groups, m]
    groups = torch.arange(len(order), device=scores.device)
    for place in [*range(m)] * _SWEEPS:
        others = [other for other in range(m) if other != place]
        threshold = scores[:, order[:, others]].topk(n, -1).values[..., -1]  # [out, groups]
        # gain[i, j]: twice what exceeds the threshold of group j by the input of group i, [groups, groups]
        own = scores[:, order[:, place]]
        gain = torch.cdist(own.T, threshold.T, p=1.0) + own.sum(0)[:, None] - threshold.sum(0)
        stay = gain.diagonal()
        swap = gain + gain.T - stay - stay[:, None]  # what both groups together gain
        free = torch.ones_like(
            groups, dtype=torch.bool
        )  # groups that have not swapped at this place
        while True:
            best, partner = swap.masked_fill(~(free & free[:, None]), 0).max(1)
            # Only groups that want each other swap; the pair is counted once.
            first = groups[(best > 0) & (partner[partner] == groups) & (partner > groups)]
            if not len(first):
                break
            second = partner[first]
            order[first, place], order[second, place] = order[second, place], order[first, place]
            free[first] = free[second] = False
    return order.flatten()
