"""One decoder layer with all that it is run on: what enters it, its other arguments, and which tokens are real."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from optimum_fista.model.activation_store import ActivationStore, Storage
from optimum_fista.model.forward import LayerCall, StopForward, run_module
from optimum_fista.model.offload import execution_device
from optimum_fista.model.operator import LinearOperator


@dataclass
class HiddenStates:
    """Hidden states that enter a decoder layer, [batch, sequence, hidden], a batch each.

    Attributes:
        dense: From the dense network; `None` if nothing needs them.
        pruned: From the network as pruned so far; `None` if every layer starts from the dense ones.
    """

    dense: Sequence[Tensor] | None
    pruned: Sequence[Tensor] | None = None

    @property
    def entering(self) -> Sequence[Tensor]:
        """Those that the layer is pruned on."""
        found = self.dense if self.pruned is None else self.pruned
        assert found is not None
        return found

    def kept(self) -> dict[str, list[Tensor]]:
        """Both streams where they are kept; none of a stream that is not there."""
        streams = {"dense": self.dense, "pruned": self.pruned}
        return {k: s.kept() if isinstance(s, ActivationStore) else list(s or []) for k, s in streams.items()}

    def move(self, storage: Storage, device: torch.device) -> None:
        """Bring them to another layer's device, and there or to its storage if they were kept on a device before."""
        for stream in (self.dense, self.pruned):
            if isinstance(stream, ActivationStore):
                stream.move(storage, device)


@dataclass
class LayerActivations:
    """One decoder layer with everything needed to run it on the calibration tokens.

    Attributes:
        calls: Its arguments besides the hidden states, a batch each.
        token_masks: bool [batch, sequence] or `None`, a batch each; False tokens count nowhere.
        storage: Where hidden states and recorded activations are kept between passes: a device, or a folder for
            memory-mapped files.
        held_out: Whether nothing is fitted to a batch, a batch each; empty when made: none is held out.
        device: Where the layer computes.
    """

    layer: nn.Module
    calls: Sequence[LayerCall]
    token_masks: Sequence[Tensor | None]
    storage: Storage
    held_out: Sequence[bool] = ()
    device: torch.device = field(init=False)

    def __post_init__(self) -> None:
        """Find the real tokens once, on the layer's device: picking rows by a mask makes the host wait each time."""
        self.held_out = self.held_out or [False] * len(self.calls)
        self.device = execution_device(self.layer)
        self.token_masks = [None if mask is None else mask.to(self.device) for mask in self.token_masks]
        self._real = [None if mask is None else mask.reshape(-1).nonzero()[:, 0] for mask in self.token_masks]

    def store(self) -> ActivationStore:
        """An empty list of activations that are kept at `storage` and needed on the layer's device."""
        return ActivationStore(self.storage, self.device)

    def run(self, batch: int, hidden_states: Tensor) -> Tensor:
        """Output hidden states of the layer for one batch."""
        return run_module(self.calls[batch].run, self.layer, hidden_states.to(self.device, non_blocking=True))

    def outputs(self, hidden_states: Iterable[Tensor]) -> ActivationStore:
        """Output hidden states of the layer, a batch each."""
        outputs = self.store()
        for batch, hidden in enumerate(hidden_states):
            outputs.append(self.run(batch, hidden))
        return outputs

    def arguments_of(
        self, module: nn.Module, hidden_states: Iterable[Tensor]
    ) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
        """Run the layer from its start up to one of its modules; yields what that is called with, a batch each."""
        seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def stop(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            seen.append((arguments, keywords))
            raise StopForward

        for hidden, call in zip(hidden_states, self.calls, strict=True):
            # off while the caller has the arguments
            with module.register_forward_pre_hook(stop, with_kwargs=True), suppress(StopForward):
                run_module(call.run, self.layer, hidden.to(self.device, non_blocking=True))
            if not seen:
                raise RuntimeError(
                    f"a {type(module).__name__} is not called in every forward pass of its decoder layer: leave the "
                    "operators in it dense by exclude."
                )
            yield seen.pop()

    def real_tokens(self, hidden_states: Tensor, batch: int) -> Tensor:
        """Real tokens of hidden states [batch, sequence, n] as [tokens, n]."""
        flat, real = hidden_states.reshape(-1, hidden_states.shape[-1]), self._real[batch]
        return flat if real is None else flat[real]

    def rows(self, activations: Tensor, batch: int, operator: LinearOperator) -> Tensor:
        """Real tokens of an operator's activation [batch, sequence, n] or [batch * sequence, n] as [tokens, n]."""
        flat = activations.detach().reshape(-1, activations.shape[-1])
        mask = self.token_masks[batch]
        if mask is None:
            return flat
        # An expert has rows for the tokens that it was sent, others one for each token, real or padding.
        seen = mask.numel() if operator.tokens is None else operator.tokens.numel()
        if flat.shape[0] != seen:
            raise ValueError(
                f"{operator.name} sees {flat.shape[0]} rows for {seen} tokens, so padding can't be told apart: "
                f"pass batches without padding, or exclude=['{operator.name}']."
            )
        return self.real_tokens(flat, batch) if operator.tokens is None else flat[mask.reshape(-1)[operator.tokens]]

    def tokens(self, batch: int, tokens: Tensor) -> Tensor:
        """Those of the tokens of an expert that are real: `rows` are of them."""
        mask = self.token_masks[batch]
        return tokens if mask is None else tokens[mask.reshape(-1)[tokens]]

    def hidden_state_error(self, states: HiddenStates) -> float | None:
        """`|| H* - H ||_F / || H ||_F` over the real tokens that are not held out.

        `None` if only one of the two streams is carried on.
        """
        if states.dense is None or states.pruned is None:
            return None
        squares = []
        for batch, (dense, pruned) in enumerate(zip(states.dense, states.pruned, strict=True)):
            if self.held_out[batch]:
                continue
            # Norms are taken in float32, squared and added up in float64, and read once at the end.
            wanted, found = (self.real_tokens(h, batch).float() for h in (dense, pruned))
            norms = [torch.linalg.vector_norm(h) for h in (found - wanted, wanted)]
            squares.append(torch.stack(norms).double().square())
        error, energy = torch.stack(squares).sum(0).tolist()
        return math.sqrt(error / energy) if energy else 0.0
