"""Removing experts of a mixture: which experts are removed, and how the layer runs without them.

A *mixture* is a module that has several experts, and a router that sends each token to some of them. `remove_experts`
makes the mixture of one decoder layer smaller, after the other operators of the layer are pruned:

1. `score_experts` measures the *saliency* of each expert e: over the tokens that the router sends to it, the mean of

       || p_e E_e(x) ||,

   `E_e(x)` is the output of the expert for a token x, and `p_e` is the weight that the router gives to this output.
   This is the criterion of REAP (arXiv 2510.13999, eq. 9).
2. `experts_to_keep` chooses the most salient experts. If the router reads the experts of a token from a table,
   `choose_substitutes` chooses which of them replace the removed ones there.
3. `smaller_copy` copies the decoder layer without the removed experts. In the copy, the router sends each token to
   experts that stay.
4. `SmallerMixture.refit` refits the experts that stay, so that together they come close to what all experts returned.
   REAP has no such step.

As a `Part`, a mixture is called by the name of the module that holds its experts, such as "model.layers.3.mlp.experts".
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from optimum_fista.model.activations import ActivationStore
from optimum_fista.model.correction import LayerTargets
from optimum_fista.model.experts import AssignedTokens, FusedExperts, split_experts
from optimum_fista.model.inputs import LayerActivations
from optimum_fista.model.operators import LinearOperator
from optimum_fista.records import MixtureReport
from optimum_fista.removal.mixture_refit import Refits, SmallerMixture
from optimum_fista.removal.parts import Part
from optimum_fista.removal.routing_table import KeptExperts
from optimum_fista.removal.shrinking import Shrinking
from optimum_fista.removal.smaller_modules import smaller_copy
from optimum_fista.removal.substitutes import choose_substitutes


class ExpertScores(NamedTuple):
    """What a run of a decoder layer tells of its experts."""

    # By the name of each text of the calibration (`None` if there is one), in the order of the batches: how many of its
    # tokens the router sends to each expert, int64 [experts].
    num_tokens_of_texts: dict[str | None, Tensor]
    # Of each expert, the sum of || p_e E_e(x) || over these tokens; float64 [experts].
    norms: Tensor
    targets: ActivationStore  # for the sum of all experts (`LayerTargets.expert_targets`)

    @property
    def num_tokens(self) -> Tensor:
        """How many tokens of all texts (`self.num_tokens_of_texts`) reach each expert, int64 [experts]."""
        return torch.stack([*self.num_tokens_of_texts.values()]).sum(dim=0)

    @property
    def saliency(self) -> Tensor:
        """Of each expert, the mean of `|| p_e E_e(x) ||` over its tokens; 0 without a token. float64 [experts]."""
        return self.norms / self.num_tokens.clamp_min(1)


def remove_experts(
    part: Part,
    layer_name: str,
    *,
    targets: LayerTargets,
    count: int,
    shrinking: Shrinking,
    write: Callable[[LinearOperator, Tensor], None] | None,
) -> tuple[nn.Module, MixtureReport]:
    """Choose the experts of a decoder layer that stay, and refit them.

    Args:
        part: The mixture, called as the module of its experts, such as "model.layers.3.mlp.experts".
        layer_name: The name of its decoder layer, such as "model.layers.3".
        targets: Has the decoder layer (`targets.activations.layer`), whose other operators are pruned already, the
            hidden states that enter it, and what it should return.
        count: How many experts stay.
        shrinking: The plan of a smaller model that loses experts only.
        write: Overwrites the weight [out, in] of an operator of an expert in the layer (`PrunedWeights.write`). It is
            called for the down projections that are refitted, and changes the layer; nothing else here does. `None`:
            nothing is refitted.

    Returns:
        A copy of the layer without the other experts, and the report of the mixture. The copy shares all tensors that
        stay whole; its experts are tensors of their own, with the refitted weights. The layer itself keeps all experts.
    """
    started = time.perf_counter()
    layer = targets.activations.layer
    experts = experts_of(part, layer_name, layer)
    scores = score_experts(experts, targets)
    numbers = experts_to_keep(
        scores.saliency,
        count,
        num_router_groups=part.num_router_groups,
        num_tokens=scores.num_tokens,
    )
    substitutes: tuple[tuple[int, ...], ...] = ()
    if part.table is not None:
        # The router reads the experts of a token from a table: its entries of removed experts need others.
        substitutes = choose_substitutes(part, layer_name, experts, targets, numbers)
    kept = KeptExperts(numbers, substitutes)

    smaller_layer = smaller_copy(shrinking, layer_name, layer, {part.name: kept})
    # Runs the smaller layer on all tokens, which the router sends to the experts that stay. Weights change only in
    # `refit`.
    mixture = SmallerMixture(
        experts_of(part, layer_name, smaller_layer),
        activations=replace(targets.activations, layer=smaller_layer),
        hidden_states=targets.entering.to_prune_on,  # those that enter the layer in the pruned network
        targets=scores.targets,
    )
    errors_before = mixture.errors()
    errors = errors_before
    refits = Refits(num_refitted=0, num_shrunk=0, message="")
    if write is not None:
        # The refit changes the copy. But the run saves the layer itself, cut in the same way, so it needs the same
        # weights.
        down_projections = [
            operator for operator in experts.operators if operator.kind == "down_proj"
        ]

        def write_expert(number: int, weight: Tensor) -> None:
            """Overwrite the down projection in the layer by `weight` [out, in]; `number` counts the kept experts."""
            write(down_projections[kept[number]], weight)

        refits = mixture.refit(write_expert)
        errors = mixture.errors()

    report = MixtureReport(
        name=part.name,
        groups_kept=tuple(kept),
        saliency=tuple(scores.saliency.tolist()),
        expert_tokens=tuple(scores.num_tokens.tolist()),
        fit_error=errors.fitted,
        fit_error_before=errors_before.fitted,
        num_refitted=refits.num_refitted,
        num_shrunk=refits.num_shrunk,
        solve_seconds=time.perf_counter() - started,
        message=refits.message,
        held_out_fit_error=errors.held_out,
        # whether the targets make up for the error in the rest of the layer
        residual_corrected=targets.corrects_experts,
        substitutes=tuple(tuple(choices) for choices in kept.substitutes),
        tokens_of_sources=_numbers_by_text(scores.num_tokens_of_texts),
    )
    return smaller_layer, report


def _numbers_by_text(
    num_tokens_of_texts: Mapping[str | None, Tensor],
) -> tuple[tuple[int, ...], ...]:
    """Return for each text how many of its tokens reach each expert; empty if there is only one text.

    `num_tokens_of_texts` has them by the name of the text, int64 [experts].
    """
    if len(num_tokens_of_texts) < 2:
        return ()
    return tuple(tuple(numbers.tolist()) for numbers in num_tokens_of_texts.values())


def experts_of(part: Part, layer_name: str, layer: nn.Module) -> FusedExperts:
    """Find the experts of a mixture in `layer`: the decoder layer called `layer_name`, or a copy of it."""
    name_in_layer = part.name.removeprefix(f"{layer_name}.")
    return FusedExperts(part.name, layer.get_submodule(name_in_layer))


def score_experts(experts: FusedExperts, targets: LayerTargets) -> ExpertScores:
    """Run the decoder layer on its inputs, and measure the saliency of its experts on tokens that are not held out.

    `targets` has the layer, and the hidden states that enter it. `experts` are those of its mixture. While the layer
    runs, the forward pass of the mixture is replaced; nothing stays changed. The targets for the sum of all experts are
    kept as well, at the layer's storage (memory, or files).
    """
    sums = _ExpertSums(len(experts), targets.activations)
    expert_targets = targets.activations.store()  # a list of tensors, one for each batch
    # For each target the layer runs on one batch, and calls `add_outputs` for every expert.
    with split_experts(experts.operators, sums.add_outputs):
        for target in targets.expert_targets():
            expert_targets.append(target)
            sums.batch += 1  # the one that runs next
    if not bool(torch.isfinite(sums.norms).all()):
        raise ValueError(
            f"the outputs of {experts.name} hold NaN or Inf: the model is damaged there, or overflows its dtype: load "
            "it in float32 or bfloat16 (--dtype float32)."
        )
    num_tokens_of_texts = {
        text: numbers.cpu() for text, numbers in sums.num_tokens_of_texts.items()
    }
    return ExpertScores(num_tokens_of_texts, sums.norms.cpu(), expert_targets)


class _ExpertSums:
    """Sums over the tokens that reach each expert of a mixture, on the device of its decoder layer.

    Attributes:
        batch: The number of the batch that runs, or runs next.
        norms: Sum of the norms of the weighted outputs, float64 [experts].
        num_tokens_of_texts: Numbers of tokens, int64 [experts], by the name of the text.
    """

    def __init__(self, num_experts: int, activations: LayerActivations) -> None:
        """Begin with sums of zero; `activations` tells which batches are held out, and which tokens are padding."""
        self._activations = activations
        self.batch = 0
        self.norms = torch.zeros(num_experts, dtype=torch.float64, device=activations.device)
        self.num_tokens_of_texts: dict[str | None, Tensor] = {}
        for source, held_out in zip(activations.sources, activations.held_out, strict=True):
            if not held_out and source not in self.num_tokens_of_texts:
                self.num_tokens_of_texts[source] = torch.zeros(
                    num_experts, dtype=torch.int64, device=activations.device
                )

    def add_outputs(self, expert: int, assigned: AssignedTokens, outputs: Tensor) -> None:
        """Add outputs of an expert in the batch that runs; `expert` is its number.

        It is called for every expert while the layer runs. `outputs` [tokens, out] are of `assigned.tokens_of(expert)`,
        weighted by the router. Outputs of held-out batches and of padding are left out.
        """
        if self._activations.held_out[self.batch]:
            return
        counted = assigned.has_weight(expert)
        mask = self._activations.token_masks[self.batch]  # [batch, sequence], True = no padding
        if mask is not None:
            counted = counted & mask.reshape(-1)[assigned.tokens_of(expert)]
        # Norms in float32, their sum over all tokens in float64: only that has many terms. `where`, because Inf * 0 is
        # NaN.
        norms = torch.linalg.vector_norm(outputs.detach().float(), dim=-1)
        self.norms[expert] += torch.where(counted, norms, 0).sum(dtype=torch.float64)
        num_tokens = self.num_tokens_of_texts[self._activations.sources[self.batch]]
        num_tokens[expert] += counted.sum()


def experts_to_keep(
    saliency: Tensor, count: int, num_router_groups: int = 1, *, num_tokens: Tensor | None = None
) -> tuple[int, ...]:
    """Return the numbers of the `count` most salient experts, rising; the first ones if several are equal.

    If the router chooses groups of experts first, equally many experts of each group are kept. The groups are of equal
    size, and their experts are numbered one group after the other.

    Args:
        saliency: [experts].
        count: Of the experts to keep, of all groups together.
        num_router_groups: Groups that the router chooses from; 1: it chooses experts without groups.
        num_tokens: How many tokens reached each expert, int64 [experts]; `None`: every expert got some. Nothing is
            known of an expert without tokens, so it comes after all others.
    """
    if num_tokens is not None:
        saliency = torch.where(num_tokens > 0, saliency, -torch.inf)
    by_group = saliency.view(num_router_groups, -1)  # [experts] -> [groups, experts of a group]
    kept_of_group = count // num_router_groups
    best = by_group.argsort(dim=1, descending=True, stable=True)[:, :kept_of_group]
    # `best` counts the experts of a group from 0, so the number of the first expert of the group is added.
    first_of_group = torch.arange(num_router_groups)[:, None] * by_group.shape[1]
    return tuple(sorted((best + first_of_group).flatten().tolist()))
