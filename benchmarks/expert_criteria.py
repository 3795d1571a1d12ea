"""Criteria by which experts of a mixture are removed, for `experts.py`.

A criterion gives each expert of a mixture a score; those with the highest scores stay. Each reads a `MixtureView`: what
all experts compute for the calibration tokens, and which of them the router chooses.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from expert_view import MixtureView, squared_norms
from torch import Tensor

_TOKENS_TOGETHER = 2048  # on which sets of experts are compared in `together`


def reap(view: MixtureView, _: int) -> Tensor:
    """Mean over the tokens of an expert of the norm of its output times the router's weight (arXiv 2510.13999)."""
    return _mean_of_chosen(view, view.weights * _squares(view).sqrt())


def squared_norm(view: MixtureView, _: int) -> Tensor:
    """Mean over the tokens of an expert of the squared norm of its output, without the weight (arXiv 2606.15716)."""
    return _mean_of_chosen(view, _squares(view))


def frequency(view: MixtureView, _: int) -> Tensor:
    """How many tokens the router sends to an expert."""
    return (view.weights > 0).sum(0).double()


def at_random(view: MixtureView, seed: int) -> Tensor:
    """Random scores."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(view.num_experts, generator=generator, dtype=torch.float64)


def left_out(view: MixtureView, _: int) -> Tensor:
    """Squared change of the mixture's output if one expert is left out and the router chooses again."""
    scores = torch.zeros(view.num_experts, dtype=torch.float64)
    for expert in range(view.num_experts):
        tokens = view.weights[:, expert].nonzero()[:, 0]
        changes = view.weights_without([expert], tokens) - view.weights[tokens]
        scores[expert] = squared_norms(view.grams[tokens], changes).sum(dtype=torch.float64)
    return scores


def gradient(view: MixtureView, _: int) -> Tensor:
    """The same measured in the loss: sum over tokens of `(g . change)^2`, with the gradient g by the output.

    This is the change of the loss to second order, with the Fisher information of each token for the Hessian.
    """
    assert view.slopes is not None
    scores = torch.zeros(view.num_experts, dtype=torch.float64)
    for expert in range(view.num_experts):
        tokens = view.weights[:, expert].nonzero()[:, 0]
        changes = view.weights_without([expert], tokens) - view.weights[tokens]
        change_of_loss = (changes * view.slopes[tokens]).sum(1)
        scores[expert] = change_of_loss.square().sum(dtype=torch.float64)
    return scores


def ranks(view: MixtureView, seed: int) -> Tensor:
    """Mean rank of an expert by four criteria: 0 for the one that would be removed first."""
    total = torch.zeros(view.num_experts, dtype=torch.float64)
    for criterion in (reap, squared_norm, left_out, gradient):
        total += criterion(view, seed).argsort(stable=True).argsort(stable=True)
    return total / 4


def together(view: MixtureView, _: int) -> Tensor:
    """The order in which experts are removed one after the other, each with the least error of all removed so far.

    The error is the squared change of the mixture's output if the router chooses among the experts that stay. Some of
    the tokens are used, evenly spread.
    """
    num_tokens = len(view.weights)
    tokens = torch.linspace(0, num_tokens - 1, min(num_tokens, _TOKENS_TOGETHER)).long()
    dense_weights = view.weights[tokens]
    grams = view.grams[tokens]
    removed: list[int] = []
    scores = torch.full((view.num_experts,), torch.inf, dtype=torch.float64)

    while view.num_experts - len(removed) > view.rule.top_k:
        weights = view.weights_without(removed, tokens)
        errors = squared_norms(grams, weights - dense_weights)
        # What a further expert adds to the error of the tokens that get it now.
        added = torch.full((view.num_experts,), torch.inf, dtype=torch.float64)
        for expert in set(range(view.num_experts)) - set(removed):
            own = weights[:, expert].nonzero()[:, 0]
            changed = view.weights_without([*removed, expert], tokens[own]) - dense_weights[own]
            new_errors = squared_norms(grams[own], changed)
            added[expert] = (new_errors - errors[own]).sum(dtype=torch.float64)
        best = int(added.argmin())
        scores[best] = len(removed)
        removed.append(best)
    return scores


def _squares(view: MixtureView) -> Tensor:
    """Squared norms of the outputs of all experts, [tokens, experts]."""
    return view.grams.diagonal(dim1=1, dim2=2)


def _mean_of_chosen(view: MixtureView, values: Tensor) -> Tensor:
    """Mean of `values` [tokens, experts] over the tokens that the router sends to an expert; 0 without tokens."""
    is_chosen = view.weights > 0
    sums = (values * is_chosen).sum(0, dtype=torch.float64)
    return sums / is_chosen.sum(0).clamp_min(1)


Criterion = Callable[[MixtureView, int], Tensor]

CRITERIA: dict[str, Criterion] = {
    "reap": reap,
    "squared_norm": squared_norm,
    "left_out": left_out,
    "gradient": gradient,
    "ranks": ranks,
    "together": together,
    "frequency": frequency,
    "random": at_random,
}
USE_GRADIENTS = ("gradient", "ranks")  # names of criteria
