"""Sensitivity of the loss of a language model to errors in the outputs of its linear operators, by gradients.

One backward pass for each sequence serves all operators. The second derivatives are a diagonal of the empirical Fisher
information for the outputs of an operator: this is cheap, and enough to compare operators.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from optimum_fista.bars import tqdm
from optimum_fista.model.activations import ActivationStore, Storage
from optimum_fista.model.calibration import CalibrationBatch
from optimum_fista.model.hooks import operator_input, replaced_forwards
from optimum_fista.model.layers import DecoderLayers
from optimum_fista.model.media import targets_of
from optimum_fista.model.offload import execution_device, onloaded
from optimum_fista.model.operators import LinearOperator
from optimum_fista.model.precision import in_few_sizes, quick_products

_TYPICAL = 2.0  # energies of tokens are limited to this many medians of their sequence


@dataclass(frozen=True)
class DenseLoss:
    """The loss of a dense model, in evaluation mode: the cross-entropy of the next token."""

    layers: DecoderLayers
    batches: Sequence[CalibrationBatch]
    num_tokens: int  # sequences are taken in order until they have this many real tokens
    progress: bool = False
    storage: Storage | None = (
        None  # of hidden states between decoder layers; None: where each layer computes
    )

    def sequences(self) -> list[CalibrationBatch]:
        """The sequences, one a batch and without padding; those of a single token have no loss."""
        found, count = list[CalibrationBatch](), 0
        for row in (row for batch in self.batches for row in batch.rows() if row.num_tokens > 1):
            found.append(row)
            count += row.num_tokens
            if count >= self.num_tokens:
                break
        return found


@dataclass(frozen=True)
class Sensitivity:
    """Increase of the loss with an error in the outputs of one operator `y = W x`, to second order.

    The error of a pruned operator is about proportional to a token's energy `e = sum_j x_j^2 sum_i w_ij^2`, so the
    gradients `g` of the loss by the outputs are weighted by `e`. Otherwise a few tokens with huge gradients and small
    inputs (attention sinks) would decide.
    """

    outputs: Tensor  # [out], nats per unit of squared error in each output: 1/2 E[e g_i^2] / E[e], float32
    inputs: Tensor  # [in], mean of x_j^2 over all tokens, float32
    seen: int  # tokens that reached the operator: not all for an expert of a mixture
    is_felt: bool  # whether any gradient is not zero

    def saliency(self, weight: Tensor) -> Tensor:
        """Expected increase of the loss per token, in nats, when a weight alone is set to zero, [out, in].

        `1/2 w_ij^2 F_ij` with the Fisher information `F_ij = E[g_i^2 x_j^2]` taken as a product (optimal brain damage,
        LeCun et al. 1989; the diagonal of K-FAC, arXiv 1503.05671).
        """
        return weight.float().square() * self.outputs[:, None] * self.inputs


def measure_sensitivities(
    loss: DenseLoss, operators: Mapping[str, LinearOperator]
) -> dict[str, Sensitivity]:
    """Run a model forwards and backwards on the sequences of its loss, one at a time; sum inputs and gradients.

    Decoder layers are recomputed in the backward pass, so that memory is needed for the activations of one layer, and
    for the hidden states between layers, at the loss's storage. No weight gets a gradient. An operator has zero
    gradients if the loss does not depend on it, if it is called more than once, or if it is not a plain product.
    """
    model, sequences = loss.layers.model, loss.sequences()
    device = execution_device(model.get_input_embeddings())
    passes = (
        2 * len(sequences) * len(loss.layers)
    )  # of single decoder layers: a sequence alone may take minutes
    with (
        onloaded(loss.layers.outside(with_media=any(row.media for row in sequences)), copy=False),
        tqdm(
            total=passes, desc="Gradients of the loss", unit="layer", disable=not loss.progress
        ) as bar,
        _recomputed_layers(loss, bar) as waiting,
        torch.enable_grad(),
        quick_products(),
    ):
        watchers = {name: _Watcher(operator) for name, operator in operators.items()}
        for row in sequences:
            with (
                ExitStack() as handles
            ):  # in the forward pass only: recomputed layers call their operators again
                for watcher in watchers.values():
                    watcher.calls = 0
                    hook = watcher.operator.module.register_forward_hook(
                        watcher.see, with_kwargs=True
                    )
                    handles.enter_context(hook)
                logits = row.run(model).logits
            targets = targets_of(row.input_ids[0, 1:], model.config).to(logits.device)
            # A sum, not a mean: the gradient of a token must not depend on the length of its sequence.
            nn.functional.cross_entropy(logits[0, :-1].float(), targets, reduction="sum").backward()
            del logits  # with its graph, before the next sequence runs
            waiting.clear()
    num_tokens = max(1, sum(row.num_tokens for row in sequences))
    totals = torch.stack(
        [w.gradients.sum(dtype=torch.float64).to(device) for w in watchers.values()]
    )
    found = {}
    for (name, watcher), total in zip(
        watchers.items(), totals.tolist(), strict=True
    ):  # one transfer
        if not math.isfinite(total):
            why = f"the gradients of the loss by the outputs of {name} hold NaN or Inf, so budgets can't be shared"
            raise ValueError(
                f"{why}: pass allocation='uniform', or a model in float32 or bfloat16."
            )
        # 1/2 (sum_t e_t g_ti^2) / (sum_t e_t): the numbers of tokens cancel.
        outputs = watcher.gradients * (0.5 / watcher.energy.clamp_min(1e-30))
        found[name] = Sensitivity(outputs, watcher.inputs / num_tokens, watcher.seen, total > 0)
    return found


class _Watcher:
    """Sums inputs and gradients of one operator over the sequences."""

    def __init__(self, operator: LinearOperator) -> None:
        self.operator = operator
        self.columns = (
            operator.read().square().sum(0)
        )  # sum_i w_ij^2 [in]: e_t is its product with x_t^2
        device = self.columns.device
        # sum_t e_t g_ti^2 [out] and sum_t x_tj^2 [in], float32
        self.gradients, self.inputs = (torch.zeros(size, device=device) for size in operator.shape)
        self.energy = torch.zeros((), dtype=torch.float64, device=device)  # sum_t e_t
        self.seen = self.calls = 0

    def see(
        self, _: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: object
    ) -> None:
        """Add the squares of the inputs, and request the gradient if the output is a product with one matrix."""
        inputs = operator_input(arguments, keywords).detach()
        squares = (
            inputs.reshape(-1, inputs.shape[-1]).float().square()
        )  # [batch, sequence, in] -> [tokens, in]
        energies = (in_few_sizes(squares) @ self.columns)[: len(squares)]  # e_t [tokens]
        self.calls += 1
        if energies.numel():  # an expert may get no token
            energies.clamp_(max=_TYPICAL * energies.median())
            self.inputs += squares.sum(0)
            self.energy += energies.double().sum()
            self.seen += squares.shape[0]
        if (
            isinstance(output, Tensor)
            and output.shape[-1] == self.operator.shape[0]
            and output.requires_grad
        ):
            output.register_hook(partial(self._add_gradient, energies))

    def _add_gradient(self, energies: Tensor, gradient: Tensor) -> None:
        # If an operator was called twice, it is unknown which gradient belongs to which inputs.
        if self.calls == 1:
            squares = gradient.detach().reshape(-1, gradient.shape[-1]).float().square()
            self.gradients += in_few_sizes(energies) @ in_few_sizes(squares)


@contextmanager
def _recomputed_layers(loss: DenseLoss, bar: tqdm) -> Iterator[ActivationStore]:
    """Compute gradients for activations, not for weights; decoder layers are recomputed in the backward pass.

    `bar` counts their runs. Yields the store of the hidden states that enter them: clear it between two passes.
    """
    model, layers = loss.layers.model, loss.layers.modules
    device = execution_device(model.get_input_embeddings())
    waiting = ActivationStore(loss.storage or device, device)
    stays = loss.storage is None or loss.storage == device

    def keep(tensor: Tensor) -> int | Tensor:
        if (
            not tensor.requires_grad or tensor.device != device
        ):  # masks, positions: the same in every layer
            return tensor
        waiting.append(tensor)
        return len(waiting) - 1  # this number replaces the hidden states in the graph

    def hand_out(kept: int | Tensor) -> Tensor:
        return kept if isinstance(kept, Tensor) else waiting[kept]

    def recomputed(forward: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
        with (
            nullcontext() if stays else saved_tensors_hooks(keep, hand_out),
            set_checkpoint_early_stop(
                False
            ),  # stopped early, a layer would keep weights that Accelerate loaded
        ):
            return checkpoint(forward, *arguments, use_reentrant=False, **keywords)

    def run(layer: nn.Module, forward: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
        # for each run: `backward`, in which layers are recomputed, leaves the contexts around it
        with onloaded([*layer.modules()], copy=False), quick_products():
            output = forward(*arguments, **keywords)
        bar.update()
        return output

    brought = [partial(run, layer, layer.forward) for layer in layers]
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
            # A tensor with a gradient that may be overwritten in place; a leaf may not.
            model.get_input_embeddings().register_forward_hook(
                lambda _, __, out: out.requires_grad_(True).clone()
            ),
            replaced_forwards(layers, [partial(recomputed, forward) for forward in brought]),
        ):
            yield waiting
    finally:
        for module, name in trained:
            getattr(module, name).requires_grad_(True)
