"""How much the loss of a language model feels an error in the outputs of its linear operators."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from optimum_fista.model.activation_store import Storage
from optimum_fista.model.architecture import DecoderLayers
from optimum_fista.model.calibration import CalibrationBatch
from optimum_fista.model.offload import execution_device
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
        energy: `sum_t e_t`.
        num_tokens: Tokens the loss was summed over.
        seen: Those of them that the operator saw: fewer than all for an expert of a mixture.
    """

    gradients: Tensor
    inputs: Tensor
    energy: float = 0.0
    num_tokens: int = 0
    seen: int = 0

    @property
    def outputs(self) -> Tensor:
        """Loss per unit of squared error in each output, [out], nats: `1/2 E[e g_i^2] / E[e]`.

        The error of a pruned operator is about in proportion to the energy `e` that a token has in it. Without this
        weighting, the few tokens whose gradients are huge and whose inputs are small (attention sinks) decide.
        """
        return self.gradients * (0.5 / max(self.energy, 1e-30))

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
        Sensitivities by operator, with zero gradients where the loss does not feel an operator, or it is called more
        than once.

    Raises:
        ValueError: If a gradient is not finite.
    """
    device = execution_device(model.get_input_embeddings())
    found = {
        name: Sensitivity(torch.zeros(o.shape[0], device=device), torch.zeros(o.shape[1], device=device))
        for name, o in operators.items()
    }
    columns = {name: operator.read().square().sum(0) for name, operator in operators.items()}
    sequences = list(_sequences(batches, num_tokens))
    bar = tqdm(sequences, desc="Gradients of the loss", unit="sequence", disable=not progress)
    with recomputed_layers(model, layers, storage) as waiting, torch.enable_grad():
        for ids, mask in bar:
            _run(model, operators, found, columns, ids.to(device), None if mask is None else mask.to(device))
            waiting.clear()
    for name, sensitivity in found.items():
        if not bool(torch.isfinite(sensitivity.gradients).all()):
            raise ValueError(
                f"the gradients of the loss by the outputs of {name} hold NaN or Inf, so budgets can't be shared by "
                "them: pass allocation='uniform', or a model in float32 or bfloat16."
            )
    return found


def _run(
    model: PreTrainedModel,
    operators: Mapping[str, LinearOperator],
    found: Mapping[str, Sensitivity],
    columns: Mapping[str, Tensor],
    ids: Tensor,
    mask: Tensor | None,
) -> None:
    """Add what one sequence [1, sequence] shows; `columns` are the squared norms of the columns of the weights."""
    real = None if mask is None else mask.reshape(-1)
    forwards = True
    energies: dict[str, Tensor] = {}
    calls: Counter[str] = Counter()

    def real_rows(operator: LinearOperator) -> Tensor | None:
        return real if real is None or operator.tokens is None else real[operator.tokens]

    def rows(values: Tensor, wanted: Tensor | None) -> Tensor:
        flat = values.detach().reshape(-1, values.shape[-1]).float()
        return flat[wanted] if wanted is not None and wanted.numel() == flat.shape[0] else flat

    def see_input(operator: LinearOperator, inputs: Tensor) -> None:
        if forwards:  # not when a layer is recomputed
            calls[operator.name] += 1
            squares = rows(inputs, real_rows(operator)).square()
            sums = found[operator.name]
            sums.num_tokens += ids.numel() if real is None else int(real.sum())
            energy = squares @ columns[operator.name].to(squares.device)
            if energy.numel():
                energy.clamp_(max=_TYPICAL * float(energy.median()))
                sums.inputs += squares.sum(0).to(sums.inputs.device)
                sums.energy += float(energy.double().sum())
                sums.seen += squares.shape[0]
            energies[operator.name] = energy

    def see_output(operator: LinearOperator, output: Tensor) -> None:
        wanted = real_rows(operator)

        def see_gradient(gradient: Tensor) -> None:
            if calls[operator.name] > 1:
                return
            sums = found[operator.name]
            sums.gradients += (energies.pop(operator.name) @ rows(gradient, wanted).square()).to(sums.gradients.device)

        is_matrix_product = isinstance(output, Tensor) and output.shape[-1] == operator.shape[0]
        if forwards and is_matrix_product and output.requires_grad:
            output.register_hook(see_gradient)

    inputs = {o.module: (lambda x, o=o: see_input(o, x)) for o in operators.values()}
    outputs = {o.module: (lambda y, o=o: see_output(o, y)) for o in operators.values()}
    with watching(inputs, outputs):
        logits = model(input_ids=ids, attention_mask=None if mask is None else mask.long(), use_cache=False).logits
        labels = ids[0, 1:].to(logits.device)
        if real is not None:
            labels = labels.masked_fill(~(real[1:] & real[:-1]).to(labels.device), -100)
        loss = nn.functional.cross_entropy(logits[0, :-1].float(), labels, reduction="sum")
        forwards = False
        loss.backward()


def _sequences(batches: Sequence[CalibrationBatch], num_tokens: int) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Ids and masks [1, sequence] in order, until they hold `num_tokens` real tokens."""
    seen = 0
    for batch in batches:
        for row in range(batch.input_ids.shape[0]):
            mask = None if batch.attention_mask is None else batch.attention_mask[row : row + 1]
            real = batch.input_ids.shape[1] if mask is None else int(mask.sum())
            if real < 2:
                continue
            yield batch.input_ids[row : row + 1], mask
            seen += real
            if seen >= num_tokens:
                return
