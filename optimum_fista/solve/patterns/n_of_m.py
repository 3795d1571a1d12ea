"""n:m sparsity, such as 2:4: n weights kept of every m consecutive inputs of a row."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from optimum_fista.solve.pattern import Scope, SparsityPattern
from optimum_fista.solve.selection import keep_largest_in_groups

_SWEEPS = 4
"""How often `best_order` looks at every place; further times gain less than a hundredth of what it gained."""


@dataclass(frozen=True)
class NOfM(SparsityPattern):
    """Exactly `n` weights kept of every `m` consecutive inputs of a row."""

    n: int = 2
    m: int = 4
    orders_inputs: ClassVar[bool] = True

    @classmethod
    def read(cls, text: str, sparsity: float | None, scope: Scope) -> Self | None:  # noqa: ARG003, it is n / m
        """The pattern of a text such as `"2:4"`."""
        found = re.fullmatch(r"(\d+):(\d+)", text)
        if found is None:
            return None
        n, m = int(found[1]), int(found[2])
        if not 0 < n < m:
            raise ValueError(
                f"pattern={text!r} keeps {n} of every {m} weights: n must be positive and smaller than m, "
                "such as '2:4' (2 kept of 4)."
            )
        return cls(1 - n / m, scope, n, m)

    @property
    def text(self) -> str:
        """`"n:m"`."""
        return f"{self.n}:{self.m}"

    @property
    def n_of_m(self) -> tuple[int, int]:
        """`(n, m)`."""
        return self.n, self.m

    def group_size(self, most: int) -> int:  # noqa: ARG002, groups have one size
        """`m`."""
        return self.m

    def require_shape(self, shape: tuple[int, int], name: str = "weight") -> None:
        """Check that m divides the row length."""
        if shape[1] % self.m:
            raise ValueError(
                f"{name} has rows of {shape[1]} inputs, which {self} does not divide: choose a pattern whose "
                f"m divides {shape[1]}, an unstructured sparsity, or exclude this operator."
            )

    def num_kept(self, shape: tuple[int, int]) -> int:
        """Exact number of weights kept in a matrix of `shape` [out, in]."""
        return shape[0] * (shape[1] // self.m) * self.n

    def mask(self, scores: Tensor) -> Tensor:
        """Keep the n largest scores of every group."""
        self.require_shape((scores.shape[0], scores.shape[1]), "scores")
        return keep_largest_in_groups(scores, self.n, self.m)

    def best_order(self, scores: Tensor) -> Tensor:
        """The order of inputs in which the pattern keeps nearly most of the scores, int64 [in].

        In turn each of the m places of all groups is looked at. What a group keeps with another input in that place is
        the n largest scores of its other inputs, plus that by which the new one exceeds the n-th of them. So pairs of
        groups swap their inputs there if both together then keep more (channel permutations of arXiv 2106.14642, with
        all swaps of a place at once).
        """
        self.require_shape((scores.shape[0], scores.shape[1]), "scores")
        # Inputs of similar size are apart in the beginning: every group has one of each m-th part of them.
        order = scores.sum(0).argsort(descending=True, stable=True).view(self.m, -1).T.contiguous()
        groups = torch.arange(len(order), device=scores.device)
        for place in [*range(self.m)] * _SWEEPS:
            others = [other for other in range(self.m) if other != place]
            threshold = scores[:, order[:, others]].topk(self.n, -1).values[..., -1]  # [out, groups]
            # gain[i, j]: twice what exceeds the threshold of group j by the input of group i, [groups, groups]
            own = scores[:, order[:, place]]
            gain = torch.cdist(own.T, threshold.T, p=1.0) + own.sum(0)[:, None] - threshold.sum(0)
            stay = gain.diagonal()
            swap = gain + gain.T - stay - stay[:, None]
            free = torch.ones_like(groups, dtype=torch.bool)
            while True:
                best, partner = swap.masked_fill(~(free & free[:, None]), 0).max(1)
                first = groups[(best > 0) & (partner[partner] == groups) & (partner > groups)]
                if not len(first):
                    break
                second = partner[first]
                order[first, place], order[second, place] = order[second, place], order[first, place]
                free[first] = free[second] = False
        return order.flatten()

    def violation(self, mask: Tensor) -> str | None:
        """Say how `mask` [out, in] (True = kept) breaks the pattern; `None` if it keeps it."""
        broken = super().violation(mask)
        if broken:
            return broken
        counts = mask.view(mask.shape[0], -1, self.m).sum(-1)
        wrong = torch.nonzero(counts != self.n)
        if not len(wrong):
            return None
        row, group = wrong[0].tolist()
        return f"row {row}, group {group} keeps {int(counts[row, group])} of {self.m} weights"
