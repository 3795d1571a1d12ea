"""How much the loss of a language model feels an error in the outputs of its linear operators, by its gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from optimum_fista.model.activation_store import ActivationStore, Storage
from optimum_fista.model.architecture import DecoderLayers, modules_around
from optimum_fista.model.calibration import CalibrationBatch
from optimum_fista.model.forward import replaced_forwards, run_backward, run_module, watching
from optimum_fista.model.offload import execution_device, onloaded
from optimum_fista.model.operator import LinearOperator

_TYPICAL = 2.0
"""Energies of tokens are cut off at this many medians of their sequence."""


@dataclass(frozen=True)
class DenseLoss:
    """The loss of a dense model, in evaluation mode: the cross-entropy of the next token.

    Sequences of the batches are taken in order until they hold `num_tokens` real tokens. Hidden states wait at
    `storage` between decoder layers; `None`: where each layer computes.
    """

    model: PreTrainedModel
    layers: DecoderLayers
    batches: Sequence[CalibrationBatch]
    num_tokens: int
    progress: bool = False
    storage: Storage | None = None

    def sequences(self) -> Iterator[Tensor]:
        """Ids [1, sequence] of the sequences, without padding; those of a single token have no loss."""
        seen = 0
        for batch in self.batches:
            for ids in batch.rows():
                if len(ids) < 2:
                    continue
                yield ids[None]
                seen += len(ids)
                if seen >= self.num_tokens:
                    return


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
    """Run a model forwards and backwards on the sequences of its loss, one at a time, and see what operators get.

    Decoder layers are recomputed on the way back, so that the activations of one layer are held at a time, and the
    hidden states between layers, at the loss's storage. No weight gets a gradient.

    Returns:
        Sensitivities by operator, with zero gradients if the loss does not depend on an operator, or if that is called
        more than once or is no product with one matrix.
    """
    device = execution_device(loss.model.get_input_embeddings())
    watchers = {name: _Watcher(operator) for name, operator in operators.items()}
    bar = tqdm([*loss.sequences()], desc="Gradients of the loss", unit="sequence", disable=not loss.progress)
    with (
        onloaded(modules_around(loss.model, loss.layers), copy=False),
        _recomputed_layers(loss) as waiting,
        torch.enable_grad(),
    ):
        for ids in bar:
            _run(loss.model, watchers.values(), ids.to(device))
            waiting.clear()
    found = {name: watcher.sums for name, watcher in watchers.items()}
    sums = [sensitivity.gradients.sum(dtype=torch.float64).to(device) for sensitivity in found.values()]
    for (name, sensitivity), total in zip(found.items(), torch.stack(sums).tolist(), strict=True):  # one transfer
        sensitivity.is_felt = total > 0
        if not math.isfinite(total):
            raise ValueError(
                f"the gradients of the loss by the outputs of {name} hold NaN or Inf, so budgets can't be shared by "
                "them: pass allocation='uniform', or a model in float32 or bfloat16."
            )
    return found


def _run(model: PreTrainedModel, watchers: Collection[_Watcher], ids: Tensor) -> None:
    """Show one sequence [1, sequence] to the watchers."""
    for watcher in watchers:
        watcher.calls = 0
        watcher.sums.num_tokens += ids.numel()
    # only on the way forwards: operators run again when their layer is recomputed on the way back
    with watching(
        {watcher.operator.module: watcher.see_input for watcher in watchers},
        {watcher.operator.module: watcher.see_output for watcher in watchers},
    ):
        logits = run_module(model, input_ids=ids, use_cache=False).logits
    # A sum, so that each token's gradient is that of its own loss and those after it, whatever the length.
    run_backward(nn.functional.cross_entropy(logits[0, :-1].float(), ids[0, 1:].to(logits.device), reduction="sum"))


class _Watcher:
    """Adds what one operator gets on one sequence after the other, in float32, to its sensitivity."""

    def __init__(self, operator: LinearOperator) -> None:
        self.operator = operator
        self.calls = 0
        # sum_i w_ij^2 [in], so that the energy e_t of a token is one product with its squared inputs.
        self._columns = operator.read().square().sum(0)
        device = self._columns.device
        gradients, inputs = (torch.zeros(size, device=device) for size in operator.shape)
        self.sums = Sensitivity(gradients, inputs, torch.zeros((), dtype=torch.float64, device=device))
        self._energy = torch.zeros(0)

    def see_input(self, inputs: Tensor) -> None:
        """Add the squares, and keep the energies, cut off, for the gradient that follows."""
        sums, squares = self.sums, inputs.detach().reshape(-1, inputs.shape[-1]).float().square()
        self.calls += 1
        self._energy = squares @ self._columns
        if self._energy.numel():
            self._energy.clamp_(max=_TYPICAL * self._energy.median())
            sums.inputs += squares.sum(0)
            sums.energy += self._energy.double().sum()
            sums.seen += squares.shape[0]

    def see_output(self, output: Tensor) -> None:
        """Ask for the gradient, if it is that of the product with one matrix."""
        if isinstance(output, Tensor) and output.shape[-1] == self.operator.shape[0] and output.requires_grad:
            output.register_hook(self._see_gradient)

    def _see_gradient(self, gradient: Tensor) -> None:
        """Add the squares, weighted by the energies."""
        # Of a second call, the gradient would be taken together with what was seen of the first.
        if self.calls == 1:
            self.sums.gradients += self._energy @ gradient.detach().reshape(-1, gradient.shape[-1]).float().square()


@contextmanager
def _recomputed_layers(loss: DenseLoss) -> Iterator[ActivationStore]:
    """Let gradients flow from the embeddings on, not into weights; decoder layers are recomputed when they flow back.

    Yields:
        What waits at the storage until then: hidden states that enter decoder layers. Clear it between two passes.
    """
    model, layers = loss.model, loss.layers
    device = execution_device(model.get_input_embeddings())
    waiting = ActivationStore(loss.storage or device, device)
    stays = loss.storage is None or loss.storage == device

    def keep(tensor: Tensor) -> int | Tensor:
        if not tensor.requires_grad or tensor.device != device:  # masks, positions: the same in every layer
            return tensor
        # A number takes the place of the hidden states in the graph.
        waiting.append(tensor)
        return len(waiting) - 1

    def hand_out(kept: int | Tensor) -> Tensor:
        return kept if isinstance(kept, Tensor) else waiting[kept]

    def brought(layer: nn.Module, forward: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
        with onloaded(layer.modules(), copy=False):
            return forward(*arguments, **keywords)

    def recomputed(*arguments: Any, **keywords: Any) -> Any:
        with (
            nullcontext() if stays else saved_tensors_hooks(keep, hand_out),
            set_checkpoint_early_stop(False),  # cut short, a layer would keep weights that Accelerate brought
        ):
            return checkpoint(brought, *arguments, use_reentrant=False, **keywords)

    trained = [  # by name: Accelerate makes new parameters whenever it brings or offloads a weight
        (module, name)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.requires_grad
    ]
    try:
        for module, name in trained:
            getattr(module, name).requires_grad_(False)
        with (
            # A tensor with a gradient that may be overwritten in place, as a leaf may not.
            model.get_input_embeddings().register_forward_hook(lambda _, __, out: out.requires_grad_(True).clone()),
            replaced_forwards(layers.modules, [partial(recomputed, each, each.forward) for each in layers.modules]),
        ):
            yield waiting
    finally:
        for module, name in trained:
            getattr(module, name).requires_grad_(True)
