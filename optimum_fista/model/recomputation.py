"""Gradients through a whole model, with the activations of one decoder layer held at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop
from transformers import PreTrainedModel

from optimum_fista.model.activation_store import ActivationStore, Storage
from optimum_fista.model.architecture import DecoderLayers
from optimum_fista.model.offload import execution_device
from optimum_fista.model.replay import replaced_forwards


class WaitingInputs:
    """Hidden states that enter decoder layers, kept elsewhere until the gradients flow back to them."""

    def __init__(self, storage: Storage, device: torch.device) -> None:
        self._store = ActivationStore(storage, device)

    def around(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """`forward`, with what checkpointing saves of its inputs kept at the storage."""

        def waiting(*arguments: Any, **keywords: Any) -> Any:
            with saved_tensors_hooks(self._keep, self._hand_out):
                return forward(*arguments, **keywords)

        return waiting

    def clear(self) -> None:
        """Free all hidden states, once the gradients have been taken."""
        self._store.clear()

    def _keep(self, tensor: Tensor) -> int | Tensor:
        if not tensor.requires_grad or tensor.device != self._store.device:  # masks, positions: the same in every layer
            return tensor
        # A number takes the place of the hidden states in the graph.
        self._store.append(tensor)
        return len(self._store) - 1

    def _hand_out(self, kept: int | Tensor) -> Tensor:
        return kept if isinstance(kept, Tensor) else self._store[kept]


@contextmanager
def recomputed_layers(
    model: PreTrainedModel, layers: DecoderLayers, storage: Storage | None = None
) -> Iterator[WaitingInputs]:
    """Let gradients flow from the embeddings on, not into weights; decoder layers are recomputed when they flow back.

    Args:
        model: The model.
        layers: Its decoder layers.
        storage: Where the hidden states between decoder layers wait, on their way to the gradients; `None`: on the
            device.

    Yields:
        What waits; it is to be cleared between two passes.
    """
    device = execution_device(model.get_input_embeddings())
    waiting = WaitingInputs(storage or device, device)
    stays = storage is None or storage == device

    def recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **keywords: Any) -> Any:
            with set_checkpoint_early_stop(False):  # cut short, a layer would keep weights that Accelerate brought
                return checkpoint(forward, *arguments, use_reentrant=False, **keywords)

        return run if stays else waiting.around(run)

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
            replaced_forwards(layers.modules, [recomputed(layer.forward) for layer in layers.modules]),
        ):
            yield waiting
    finally:
        for module, name in trained:
            getattr(module, name).requires_grad_(True)


def _with_gradient(_: nn.Module, __: Any, output: Tensor) -> Tensor:
    """The output as a tensor with a gradient that may be overwritten in place, as a leaf may not."""
    return output.requires_grad_(True).clone()
