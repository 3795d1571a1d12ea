"""What the experts of a mixture compute for the calibration tokens, so that sets of experts are compared quickly.

For a token, the output of a mixture is

    y = sum_e w_e o_e,

where `o_e` [hidden] is the output of expert e, and `w_e` the router's weight, zero if the router does not choose the
expert. Without some experts, the router chooses again, and the weights change by `d`. The squared change of the output
is `d^T G d`, with the Gram matrix `G_ef = o_e . o_f` of the token. So the outputs of *all* experts are computed once
for every token (`MixtureView`), and afterwards each set of experts costs a few small products.

Routers are those of Mixtral and Ernie-4.5-MoE (softmax), and of GLM-4-MoE (sigmoid with a bias that only selects); in
all of them the weights of a token have a fixed sum (`RouterRule`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.ernie4_5_moe.modeling_ernie4_5_moe import Ernie4_5_MoeTopKRouter
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeTopkRouter
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

from optimum_fista.model.calibration import CalibrationBatch
from optimum_fista.model.experts import AssignedTokens, FusedExperts

_ROUTERS = (Ernie4_5_MoeTopKRouter, Glm4MoeTopkRouter, MixtralTopKRouter)
_TOKENS_AT_ONCE = 2048  # whose outputs are in float32 at the same time


class RouterRule:
    """How a router makes weights of its logits.

    Attributes:
        is_sigmoid: Whether the weights are sigmoids of the logits, divided by their sum; otherwise a softmax.
        top_k: Experts that a token gets.
        total: Sum of the weights of a token.
        bias: What is added to the sigmoids or probabilities to choose experts, [experts], or zeros.
    """

    def __init__(self, router: Any) -> None:
        """Read the rule of a router; SystemExit if its weights have no fixed sum, or it first chooses groups."""
        self.is_sigmoid = isinstance(router, Glm4MoeTopkRouter)
        self.top_k: int = router.top_k
        self.total = 1.0
        self.bias = torch.zeros(router.num_experts)
        if isinstance(router, Glm4MoeTopkRouter):
            if router.num_group > 1 or not router.norm_topk_prob:
                raise SystemExit("the router chooses groups first, or its weights have no sum.")
            self.total = float(router.routed_scaling_factor)
            self.bias = router.e_score_correction_bias.float()
        if isinstance(router, Ernie4_5_MoeTopKRouter):
            self.bias = router.moe_statics.e_score_correction_bias.float().squeeze(0)

    def weights(self, logits: Tensor, allowed: Tensor | None = None) -> Tensor:
        """The weights of all experts, float32 [tokens, experts], zero for those that are not chosen.

        `logits` are [tokens, experts]. Only experts in `allowed`, bool [experts], are chosen; `None`: all may be.
        """
        if allowed is None:
            allowed = torch.ones(logits.shape[1], dtype=torch.bool)
        scores = logits.sigmoid()
        if not self.is_sigmoid:
            scores = logits.masked_fill(~allowed, -torch.inf).softmax(dim=1)
        preference = (scores + self.bias).masked_fill(~allowed, -torch.inf)
        chosen = preference.topk(self.top_k, dim=1).indices
        of_chosen = scores.gather(1, chosen)
        of_chosen = of_chosen * (self.total / of_chosen.sum(1, keepdim=True))
        return torch.zeros_like(scores).scatter(1, chosen, of_chosen)


@dataclass
class MixtureView:
    """A mixture on the calibration tokens.

    Attributes:
        rule: How the router makes weights.
        hidden_states: What enters the router and the experts, float32 [tokens, hidden].
        logits: Of the router, float32 [tokens, experts].
        weights: Of the router, float32 [tokens, experts], zero for experts that it does not choose.
        outputs: Of every expert for every token, without the router's weights, [tokens, experts, hidden].
        grams: Products of the outputs of two experts, float32 [tokens, experts, experts].
        slopes: How the loss of the whole text changes with the weight of an expert: the product of the gradient by the
            mixture's output and of the expert's output, float32 [tokens, experts]. `None` if nothing asks for it.
        parts: Which part of the calibration each token is of, int64 [tokens]: its text, or the half of its sequence if
            there is one text only. A repair is tested on parts.
    """

    rule: RouterRule
    hidden_states: Tensor
    logits: Tensor
    weights: Tensor
    outputs: Tensor
    grams: Tensor
    slopes: Tensor | None
    parts: Tensor

    @classmethod
    def of(
        cls,
        experts: FusedExperts,
        router: Any,
        batches: Sequence[AssignedTokens],
        *,
        gradients: Sequence[Tensor] | None,
        parts: Tensor,
    ) -> MixtureView:
        """Run all experts and the router on all tokens.

        Args:
            experts: Those of the mixture.
            router: Its router.
            batches: What enters the experts, by batch.
            gradients: Of the loss by the mixture's output, [tokens, hidden] of each batch.
            parts: Which part of the calibration each token is of.

        Raises:
            SystemExit: If the router's weights are not those of its rule.
        """
        rule = RouterRule(router)
        hidden_states = []
        logits = []
        outputs = []
        grams = []
        slopes = []
        for number, batch in enumerate(batches):
            entering = batch.hidden_states
            tokens = torch.arange(len(entering))
            batch_logits, router_weights, chosen = router(entering)
            batch_logits = batch_logits.float()
            expected = torch.zeros_like(batch_logits).scatter(1, chosen, router_weights.float())
            if not torch.allclose(rule.weights(batch_logits), expected, rtol=2e-2, atol=1e-3):
                raise SystemExit(f"{type(router).__name__} weights experts in an unknown way.")

            of_experts = [
                experts.output_of(expert, entering, tokens) for expert in range(len(experts))
            ]
            batch_outputs = torch.stack(of_experts, dim=1)  # [tokens, experts, hidden]
            for chunk in batch_outputs.split(_TOKENS_AT_ONCE):
                grams.append(chunk.float() @ chunk.float().mT)
            if gradients is not None:
                gradient = gradients[number].float()
                slopes.append((batch_outputs.float() @ gradient[:, :, None]).squeeze(2))
            hidden_states.append(entering.float())
            logits.append(batch_logits)
            outputs.append(batch_outputs)

        all_logits = torch.cat(logits)
        return cls(
            rule=rule,
            hidden_states=torch.cat(hidden_states),
            logits=all_logits,
            weights=rule.weights(all_logits),
            outputs=torch.cat(outputs),
            grams=torch.cat(grams),
            slopes=torch.cat(slopes) if slopes else None,
            parts=parts,
        )

    @property
    def num_experts(self) -> int:
        """How many experts the mixture has."""
        return self.weights.shape[1]

    def weights_without(self, removed: Sequence[int], tokens: Tensor) -> Tensor:
        """The router's weights [tokens, experts] of some tokens (their numbers) if it can't choose some experts."""
        allowed = torch.ones(self.num_experts, dtype=torch.bool)
        allowed[list(removed)] = False
        return self.rule.weights(self.logits[tokens], allowed)


def squared_norms(grams: Tensor, changes: Tensor) -> Tensor:
    """`d^T G d` of each token, [tokens], for changes `d` of weights [tokens, experts] and `grams`."""
    products = (grams @ changes[:, :, None]).squeeze(2)
    return (products * changes).sum(1)


def router_of(layer: nn.Module) -> Any:
    """The router of a decoder layer; SystemExit if it has no known one."""
    for module in layer.modules():
        if isinstance(module, _ROUTERS):
            return module
    raise SystemExit("a decoder layer with experts has no router of a known class.")


def parts_of(batches: Sequence[CalibrationBatch]) -> Tensor:
    """Which part of the calibration each token is of (`MixtureView.parts`); sequences have no padding."""
    sources = list(dict.fromkeys(batch.source for batch in batches))
    parts = []
    for batch in batches:
        num_sequences, length = batch.input_ids.shape
        if len(sources) > 1:
            part = torch.full((num_sequences, length), sources.index(batch.source))
        else:
            is_last_half = torch.arange(length) >= length // 2
            part = is_last_half.long().expand(num_sequences, length)
        parts.append(part.flatten())
    return torch.cat(parts)


def output_gradients(
    model: PreTrainedModel, experts: Sequence[nn.Module], batches: Sequence[CalibrationBatch]
) -> list[list[Tensor]]:
    """Gradients of the loss by the outputs of mixtures: of each mixture, [tokens, hidden] of each batch.

    The loss is the sum over the tokens of a sequence. `experts` are the modules of the mixtures that hold the experts.
    Hooks are on them while the model runs on one sequence after the other; `requires_grad` of its parameters is as
    before at the end.
    """
    gradients: list[list[Tensor]] = [[] for _ in experts]
    of_sequence: dict[int, Tensor] = {}
    hooks = []
    for number, module in enumerate(experts):

        def see_output(_: nn.Module, __: Any, output: Tensor, number: int = number) -> None:
            """Keep the gradient by the output of a mixture in `of_sequence` when it comes."""

            def keep(gradient: Tensor) -> None:
                of_sequence[number] = gradient.reshape(-1, gradient.shape[-1]).clone()

            output.register_hook(keep)

        hooks.append(module.register_forward_hook(see_output))

    def begin_graph(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        """Let gradients reach everything after the embeddings."""
        return output.detach().requires_grad_()

    hooks.append(model.get_input_embeddings().register_forward_hook(begin_graph))
    needed_gradients = [parameter.requires_grad for parameter in model.parameters()]
    model.requires_grad_(False)
    try:
        with torch.enable_grad():
            for batch in batches:
                of_batch: list[list[Tensor]] = [[] for _ in experts]
                for ids in batch.input_ids:
                    loss = model(input_ids=ids[None], labels=ids[None], use_cache=False).loss
                    (loss * (len(ids) - 1)).backward()
                    for number in range(len(experts)):
                        of_batch[number].append(of_sequence[number])
                for number, parts in enumerate(of_batch):
                    gradients[number].append(torch.cat(parts))
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, needed in zip(model.parameters(), needed_gradients, strict=True):
            parameter.requires_grad_(needed)
    return gradients
