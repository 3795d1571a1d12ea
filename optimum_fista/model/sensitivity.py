"""How much the loss of a language model feels an error in the outputs of its linear operators."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from optimum_fista.model.loss_gradients import DenseLoss, Watcher, watch_gradients
from optimum_fista.model.offload import execution_device
from optimum_fista.model.operator import LinearOperator

_TYPICAL = 2.0
"""Energies of tokens are cut off at this many medians of their sequence."""


@dataclass
class Sensitivity:
    """How the loss of a language model feels errors in the outputs of one operator `y = W x`.

    Sums over tokens t with the gradients `g_t` of the loss by the outputs, in nats:

    Attributes:
        gradients: `sum_t e_t g_ti^2` [out], with the energy `e_t = sum_j x_tj^2 sum_i w_ij^2` that a token has in the
            operator, float32.
        inputs: `sum_t x_tj^2` [in], float32.
        energy: `sum_t e_t`, float64, no dimensions.
        num_tokens: Tokens the loss was summed over.
        seen: Those of them that the operator saw: fewer than all for an expert of a mixture.
        is_felt: Whether any gradient is other than zero.
    """

    gradients: Tensor
    inputs: Tensor
    energy: Tensor
    num_tokens: int = 0
    seen: int = 0
    is_felt: bool = False

    @property
    def outputs(self) -> Tensor:
        """Loss per unit of squared error in each output, [out], nats: `1/2 E[e g_i^2] / E[e]`.

        The error of a pruned operator is about in proportion to the energy `e` that a token has in it. Without this
        weighting, the few tokens whose gradients are huge and whose inputs are small (attention sinks) decide.
        """
        # 1/2 (sum_t e_t g_ti^2) / (sum_t e_t): the numbers of tokens cancel.
        return self.gradients * (0.5 / self.energy.clamp_min(1e-30))

    def saliency(self, weight: Tensor) -> Tensor:
        """Expected increase of the loss per token, in nats, when a weight alone is set to zero, [out, in].

        `1/2 w_ij^2 F_ij` with the Fisher information `F_ij = E[g_i^2 x_j^2]` taken as a product (optimal brain damage,
        LeCun et al. 1989; the diagonal of K-FAC, arXiv 1503.05671).
        """
        return weight.float().square() * self.outputs[:, None] * (self.inputs / max(1, self.num_tokens))


def measure_sensitivities(loss: DenseLoss, operators: Mapping[str, LinearOperator]) -> dict[str, Sensitivity]:
    """Sum over the sequences of a loss what the inputs and the gradients of operators, by name, show.

    Returns:
        Sensitivities by operator, with zero gradients if the loss does not feel an operator, or it is called more
        than once.
    """
    device = execution_device(loss.model.get_input_embeddings())
    watchers = {operator: SensitivitySums(operator) for operator in operators.values()}
    watch_gradients(loss, watchers)
    found = {name: watchers[operator].sums for name, operator in operators.items()}
    sums = [sensitivity.gradients.sum(dtype=torch.float64).to(device) for sensitivity in found.values()]
    for (name, sensitivity), total in zip(found.items(), torch.stack(sums).tolist(), strict=True):  # one transfer
        sensitivity.is_felt = total > 0
        if not math.isfinite(total):
            raise ValueError(
                f"the gradients of the loss by the outputs of {name} hold NaN or Inf, so budgets can't be shared by "
                "them: pass allocation='uniform', or a model in float32 or bfloat16."
            )
    return found


class SensitivitySums(Watcher):
    """Adds what is seen of an operator.

    Attributes:
        sums: The sums so far.
        energy: What each token of the current sequence has in the operator, [tokens], cut off.
    """

    def __init__(self, operator: LinearOperator) -> None:
        device = operator.device
        gradients, inputs = (torch.zeros(size, device=device) for size in operator.shape)
        self.sums = Sensitivity(gradients, inputs, torch.zeros((), dtype=torch.float64, device=device))
        # sum_i w_ij^2 [in], so that the energy e_t of a token is one product with its squared inputs.
        self._columns = operator.read().square().sum(0)
        self.energy = torch.zeros(0)

    def see_input(self, inputs: Tensor, num_tokens: int) -> None:
        """Adds the squares, and keeps the energies for the gradient that follows."""
        sums, squares = self.sums, inputs.square()
        sums.num_tokens += num_tokens
        self.energy = squares @ self._columns
        if self.energy.numel():
            self.energy.clamp_(max=_TYPICAL * self.energy.median())
            sums.inputs += squares.sum(0)
            sums.energy += self.energy.double().sum()
            sums.seen += squares.shape[0]

    def see_gradient(self, gradient: Tensor) -> None:
        """Adds the squares, weighted by the energies."""
        self.sums.gradients += self.energy @ gradient.square()
