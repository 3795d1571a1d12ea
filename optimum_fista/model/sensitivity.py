"""How much the loss of a language model feels an error in the outputs of its linear operators."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from optimum_fista.model.activation_store import Storage
from optimum_fista.model.architecture import DecoderLayers, modules_around
from optimum_fista.model.calibration import CalibrationBatch
from optimum_fista.model.offload import execution_device, onloaded
from optimum_fista.model.operator import LinearOperator
from optimum_fista.model.recomputation import recomputed_layers
from optimum_fista.model.replay import watching

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


def measure_sensitivities(
    model: PreTrainedModel,
    layers: DecoderLayers,
    operators: Mapping[str, LinearOperator],
    batches: Sequence[CalibrationBatch],
    num_tokens: int,
    progress: bool = False,
    storage: Storage | None = None,
) -> dict[str, Sensitivity]:
    """Run the model forwards and backwards on the first sequences, one at a time.

    The loss is the cross-entropy of the next token. Decoder layers are recomputed on the way back, so that the
    activations of one layer are held at a time, and the hidden states between layers, at `storage`. No weight gets a
    gradient.

    Args:
        model: The dense model.
        layers: Its decoder layers.
        operators: The operators to measure, by name.
        batches: Calibration batches.
        num_tokens: Sequences are taken in order until they hold as many real tokens.
        progress: Whether to show a progress bar.
        storage: Where the hidden states between decoder layers wait; `None`: on the device.

    Returns:
        Sensitivities by operator, with zero gradients if the loss does not feel an operator, or it is called more
        than once.

    Raises:
        ValueError: If a gradient is not finite.
    """
    device = execution_device(model.get_input_embeddings())
    found = {name: _nothing(*operator.shape, operator.device) for name, operator in operators.items()}
    # sum_i w_ij^2 [in], so that the energy e_t of a token is one product with its squared inputs.
    columns = {name: operator.read().square().sum(0) for name, operator in operators.items()}
    sequences = list(first_sequences(batches, num_tokens))
    bar = tqdm(sequences, desc="Gradients of the loss", unit="sequence", disable=not progress)
    with (
        onloaded(modules_around(model, layers), copy=False),
        recomputed_layers(model, layers, storage) as waiting,
        torch.enable_grad(),
    ):
        for ids in bar:
            _run(model, operators, found, columns, ids.to(device))
            waiting.clear()
    sums = [sensitivity.gradients.sum(dtype=torch.float64).to(device) for sensitivity in found.values()]
    for (name, sensitivity), total in zip(found.items(), torch.stack(sums).tolist(), strict=True):  # one transfer
        sensitivity.is_felt = total > 0
        if not math.isfinite(total):
            raise ValueError(
                f"the gradients of the loss by the outputs of {name} hold NaN or Inf, so budgets can't be shared by "
                "them: pass allocation='uniform', or a model in float32 or bfloat16."
            )
    return found


def _nothing(rows: int, columns: int, device: torch.device) -> Sensitivity:
    """The sums before any token."""
    energy = torch.zeros((), dtype=torch.float64, device=device)
    return Sensitivity(torch.zeros(rows, device=device), torch.zeros(columns, device=device), energy)


def _run(
    model: PreTrainedModel,
    operators: Mapping[str, LinearOperator],
    found: Mapping[str, Sensitivity],
    columns: Mapping[str, Tensor],
    ids: Tensor,
) -> None:
    """Add what one sequence [1, sequence] shows; `columns` are the squared norms of the columns of the weights."""
    forwards = True
    energies: dict[str, Tensor] = {}
    calls: Counter[str] = Counter()

    def rows(values: Tensor) -> Tensor:
        return values.detach().reshape(-1, values.shape[-1]).float()

    def see_input(operator: LinearOperator, inputs: Tensor) -> None:
        if forwards:  # not when a layer is recomputed
            calls[operator.name] += 1
            squares = rows(inputs).square()
            sums = found[operator.name]
            sums.num_tokens += ids.numel()
            energy = squares @ columns[operator.name]
            if energy.numel():
                energy.clamp_(max=_TYPICAL * energy.median())
                sums.inputs += squares.sum(0)
                sums.energy += energy.double().sum()
                sums.seen += squares.shape[0]
            energies[operator.name] = energy

    def see_output(operator: LinearOperator, output: Tensor) -> None:
        def see_gradient(gradient: Tensor) -> None:
            # The gradient of a second call would be added to another energy.
            if calls[operator.name] == 1:
                found[operator.name].gradients += energies.pop(operator.name) @ rows(gradient).square()

        is_matrix_product = isinstance(output, Tensor) and output.shape[-1] == operator.shape[0]
        if forwards and is_matrix_product and output.requires_grad:
            output.register_hook(see_gradient)

    inputs = {o.module: (lambda x, o=o: see_input(o, x)) for o in operators.values()}
    outputs = {o.module: (lambda y, o=o: see_output(o, y)) for o in operators.values()}
    with watching(inputs, outputs):
        logits = model(input_ids=ids, use_cache=False).logits
        # A sum, so that each token's gradient is that of its own loss and those after it, whatever the length.
        loss = nn.functional.cross_entropy(logits[0, :-1].float(), ids[0, 1:].to(logits.device), reduction="sum")
        # Watchers see a layer again when it is recomputed on the way back.
        forwards = False
        loss.backward()


def first_sequences(batches: Sequence[CalibrationBatch], num_tokens: int) -> Iterator[Tensor]:
    """Ids [1, sequence] without padding, in order, until they hold `num_tokens` tokens."""
    seen = 0
    for batch in batches:
        for row, ids in enumerate(batch.input_ids):
            ids = ids if batch.attention_mask is None else ids[batch.attention_mask[row]]
            if len(ids) < 2:
                continue
            yield ids[None]
            seen += len(ids)
            if seen >= num_tokens:
                return
