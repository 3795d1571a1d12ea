"""Gradients of the loss through a whole model, one decoder layer held at a time, shown to what watches operators."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
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
from optimum_fista.model.offload import execution_device, onloaded
from optimum_fista.model.operator import LinearOperator
from optimum_fista.model.products import quick_products
from optimum_fista.model.replay import replaced_forwards, watching


@dataclass(frozen=True)
class DenseLoss:
    """The loss of a dense model on the first calibration sequences: the cross-entropy of the next token.

    Attributes:
        model: The model, in evaluation mode.
        layers: Its decoder layers.
        batches: Calibration batches.
        num_tokens: Sequences are taken in order until they hold as many real tokens.
        progress: Whether to show a progress bar.
        storage: Where hidden states wait between decoder layers; `None`: where each layer computes.
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


class Watcher:
    """Sees one operator on one sequence after the other. All rows are float32, to be read and not kept."""

    def see_input(self, inputs: Tensor, num_tokens: int) -> None:
        """Its inputs [tokens, in] on the way forwards; an expert sees a part of the `num_tokens` of the sequence."""

    def see_gradient(self, gradient: Tensor) -> None:
        """Gradient of the loss by its outputs, [tokens, out], nats.

        Not called if the loss does not depend on the operator, if that is called more than once, or if it is no
        product with one matrix.
        """


def watch_gradients(loss: DenseLoss, watchers: Mapping[LinearOperator, Watcher]) -> None:
    """Run the model forwards and backwards on the sequences of a loss, one at a time, and show it to `watchers`.

    Decoder layers are recomputed on the way back, so that the activations of one layer are held at a time, and the
    hidden states between layers, at the loss's storage. No weight gets a gradient.
    """
    device = execution_device(loss.model.get_input_embeddings())
    bar = tqdm([*loss.sequences()], desc="Gradients of the loss", unit="sequence", disable=not loss.progress)
    with (
        onloaded(modules_around(loss.model, loss.layers), copy=False),
        _recomputed_layers(loss) as waiting,
        torch.enable_grad(),
    ):
        for ids in bar:
            _run(loss.model, watchers, ids.to(device))
            waiting.clear()


@quick_products()
def _run(model: PreTrainedModel, watchers: Mapping[LinearOperator, Watcher], ids: Tensor) -> None:
    """Show one sequence [1, sequence]."""
    forwards = True
    calls: Counter[LinearOperator] = Counter()

    def rows(values: Tensor) -> Tensor:
        return values.detach().reshape(-1, values.shape[-1]).float()

    def see_input(operator: LinearOperator, inputs: Tensor) -> None:
        if forwards:
            calls[operator] += 1
            watchers[operator].see_input(rows(inputs), ids.numel())

    def see_output(operator: LinearOperator, output: Tensor) -> None:
        product = isinstance(output, Tensor) and output.shape[-1] == operator.shape[0]
        if forwards and product and output.requires_grad:
            # Of a second call, the gradient would be taken together with what was seen of the first.
            output.register_hook(
                lambda gradient: watchers[operator].see_gradient(rows(gradient)) if calls[operator] == 1 else None
            )

    inputs = {o.module: (lambda x, o=o: see_input(o, x)) for o in watchers}
    outputs = {o.module: (lambda y, o=o: see_output(o, y)) for o in watchers}
    with watching(inputs, outputs):
        logits = model(input_ids=ids, use_cache=False).logits
        # A sum, so that each token's gradient is that of its own loss and those after it, whatever the length.
        loss = nn.functional.cross_entropy(logits[0, :-1].float(), ids[0, 1:].to(logits.device), reduction="sum")
        forwards = False  # operators run again when their layer is recomputed on the way back
        loss.backward()


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

    def recomputed(layer: nn.Module) -> Callable[..., Any]:
        forward = layer.forward

        def brought(*arguments: Any, **keywords: Any) -> Any:
            with onloaded(layer.modules(), copy=False):
                return forward(*arguments, **keywords)

        def run(*arguments: Any, **keywords: Any) -> Any:
            with (
                nullcontext() if stays else saved_tensors_hooks(keep, hand_out),
                set_checkpoint_early_stop(False),  # cut short, a layer would keep weights that Accelerate brought
            ):
                return checkpoint(brought, *arguments, use_reentrant=False, **keywords)

        return run

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
            model.get_input_embeddings().register_forward_hook(_with_gradient),
            replaced_forwards(layers.modules, [recomputed(layer) for layer in layers.modules]),
        ):
            yield waiting
    finally:
        for module, name in trained:
            getattr(module, name).requires_grad_(True)


def _with_gradient(_: nn.Module, __: Any, output: Tensor) -> Tensor:
    """The output as a tensor with a gradient that may be overwritten in place, as a leaf may not."""
    return output.requires_grad_(True).clone()
