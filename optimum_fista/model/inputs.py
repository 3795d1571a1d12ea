"""Inputs of decoder layers, recorded once for all of them, and from these the inputs of the modules of one layer.

The model runs on every calibration batch with its decoder layers skipped. This gives the hidden states that enter the
first layer, and all other arguments of each layer (masks, position embeddings, inputs of its own). SparseGPT's and
Wanda's code records the arguments of the first layer on the last batch, and uses them for all layers and batches, so
padding and different layers (sliding windows) do not work there. To save memory, equal tensors are kept once.

Later a decoder layer runs alone (`LayerActivations`). Between layers, hidden states are kept at the storage.

Some models of images add features to the hidden states between two decoder layers (DeepStack, arXiv 2406.04334). Then
the model runs again on the first such batch, with skipped layers that return zeros: zero plus the features is exactly
what is added. It becomes part of the next layer's arguments (`Addition`).
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from optimum_fista.bars import tqdm
from optimum_fista.model import UnsupportedArchitectureError
from optimum_fista.model.activations import ActivationStore, Storage
from optimum_fista.model.calibration import CalibrationBatch, pieces
from optimum_fista.model.experts import AssignedTokens, FusedExperts
from optimum_fista.model.hooks import replaced_forwards
from optimum_fista.model.layers import DecoderLayers
from optimum_fista.model.offload import execution_device, onloaded
from optimum_fista.model.operators import LinearOperator
from optimum_fista.model.precision import quick_products

_CHANGES_STATES = "the model changes the hidden states in front of decoder layer"


@dataclass(frozen=True)
class Addition:
    """What a model adds to the hidden states of some tokens of a batch in front of a decoder layer."""

    tokens: Tensor  # their numbers among batch * sequence
    rows: ActivationStore  # [tokens, hidden] of several batches
    number: int  # of this batch among them

    def to(self, hidden_states: Tensor) -> Tensor:
        """The sum, as the model computes it."""
        flat = hidden_states.reshape(
            -1, hidden_states.shape[-1]
        )  # [batch, sequence, hidden] -> [tokens, hidden]
        sums = flat[self.tokens] + self.rows[self.number].to(flat)
        return flat.index_copy(0, self.tokens, sums).view_as(hidden_states)


@dataclass(frozen=True)
class LayerCall:
    """Arguments of one decoder layer for one batch, besides the hidden states."""

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    added: Addition | None = None  # what the model adds to the hidden states in front of the layer

    def run(self, layer: nn.Module, hidden_states: Tensor) -> Tensor:
        """Output hidden states of `layer`, on those that left the layer before it."""
        entering = hidden_states if self.added is None else self.added.to(hidden_states)
        output = layer(entering, *self.arguments, **self.keywords)
        return output[0] if isinstance(output, tuple) else output


@dataclass
class RecordedInputs:
    """Arguments of all decoder layers on all batches."""

    hidden_states: (
        ActivationStore  # [batch, sequence, hidden] of each batch, as they enter the first layer
    )
    calls: list[list[LayerCall]]  # other arguments, calls[layer][batch], where the layer computes
    token_masks: list[
        Tensor | None
    ]  # of each batch, bool [batch, sequence]; None when all are real
    held_out: list[bool]  # whether a batch only measures
    handed_on: bool  # whether all layers had to run, because they pass more than hidden states to the next one
    rest: (
        tuple[Any, ...] | None
    )  # what a layer returns after the hidden states; None: it returns no tuple


def record_inputs(
    layers: DecoderLayers,
    batches: Sequence[CalibrationBatch],
    storage: Storage | None = None,
    *,
    runs_layers: bool = False,
    progress: bool = False,
) -> RecordedInputs:
    """Run the model on every batch with its decoder layers skipped, and record the arguments of each layer.

    The first layer runs once, to learn the form of its output; nothing after the last layer runs. If decoder layers
    pass more than hidden states to the next one (indices that attention shares, the state of a router), all of them run
    (`runs_layers`), and these arguments are recorded as in the dense network. Hidden states are kept at
    `storage`; `None`: on the device.
    """
    model, recorder = (
        layers.model,
        _Recorder(layers, runs_layers, storage, [[] for _ in layers.modules]),
    )
    device = execution_device(model.get_input_embeddings())
    hidden_states, token_masks = ActivationStore(storage or device, device), list[Tensor | None]()
    forwards = [
        partial(recorder.forward, index, layer.forward)
        for index, layer in enumerate(layers.modules)
    ]
    try:
        outside = layers.outside(with_media=any(batch.media for batch in batches))
        with onloaded(outside, copy=False), replaced_forwards(layers.modules, forwards):
            for batch in tqdm(
                batches, desc="Recording inputs", unit="batch", leave=False, disable=not progress
            ):
                recorder.record(partial(batch.run, model))
                if recorder.first is None or not bool(torch.isfinite(recorder.first).all()):
                    damage = "the inputs of the first decoder layer hold NaN or Inf"
                    raise ValueError(f"{damage}: the embeddings of the model are damaged.")
                hidden_states.append(recorder.first)
                token_masks.append(
                    None if batch.attention_mask is None else batch.attention_mask.to(device)
                )
    except (
        _HandsOnMore
    ):  # only a cheap recording without the layers shows whether a model needs them to run
        return record_inputs(layers, batches, storage, runs_layers=True, progress=progress)
    rest, held_out = (
        recorder.rest if recorder.is_tuple else None,
        [batch.held_out for batch in batches],
    )
    return RecordedInputs(hidden_states, recorder.calls, token_masks, held_out, runs_layers, rest)


def _refusal(reason: str) -> UnsupportedArchitectureError:
    fits = "only models that run every decoder layer once, in order, on the output of the one before, can be pruned"
    return UnsupportedArchitectureError(f"{reason}: {fits}.")


class StopForward(Exception):
    """Ends a forward pass whose remainder is not needed."""


class _HandsOnMore(Exception):
    """A decoder layer gets more than hidden states from the layer before it."""


@dataclass
class _Recorder:
    """Replaces the forward pass of every decoder layer: it records the arguments, and skips the layer or runs it."""

    layers: DecoderLayers
    runs_layers: bool
    storage: Storage | None  # of what is added between layers
    calls: list[list[LayerCall]]
    first: Tensor | None = None  # what enters the first layer in this batch
    expected: Tensor | None = None  # what should enter the next layer
    version: int = 0  # of that tensor, which grows if it is changed in place
    next: int = 0  # the number of the next layer
    gives_zeros: bool = False  # whether skipped layers return zeros instead of their inputs
    is_repeated: bool = False  # whether the arguments of this batch are recorded already
    # layers in front of which the model changes the hidden states in this pass, before and after the change
    changes: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    additive: set[int] = field(default_factory=set)  # those where the change was shown to be a sum
    added: dict[int, ActivationStore] = field(
        default_factory=dict
    )  # what is added, of all batches that have it
    # tensors of this batch's arguments, and the equal tensors kept for them, by their id and the device
    met: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = field(default_factory=dict)
    interned: dict[tuple[Any, ...], Tensor] = field(
        default_factory=dict
    )  # tensors kept for equal ones, of all batches
    is_tuple: bool | None = None  # whether layers return a tuple; None before one has run
    rest: tuple[Any, ...] = ()  # what they return after the hidden states

    def record(self, run: Callable[[], Any]) -> None:
        """Record one batch, on which `run` calls the model."""
        changes = self._pass(run, bool(self.additive))
        if new := changes.keys() - self.additive:
            # Run again, once with zeros and once without: x becomes x + d, and 0 becomes 0 + d = d exactly.
            other = self._pass(run, not self.additive, is_repeated=True)
            plain, changes = (other, changes) if self.additive else (changes, other)
            for index in sorted(new | other.keys()):
                both = index in plain and index in changes
                if not both or not torch.equal(
                    plain[index][0] + changes[index][1], plain[index][1]
                ):
                    raise _refusal(f"{_CHANGES_STATES} {self.layers.name}.{index}")
            self.additive |= new
        for index, (_, added) in changes.items():
            flat = added.reshape(
                -1, added.shape[-1]
            )  # [batch, sequence, hidden] -> [tokens, hidden]
            tokens, device = (
                flat.any(-1).nonzero()[:, 0],
                execution_device(self.layers.modules[index]),
            )
            rows = self.added.setdefault(index, ActivationStore(self.storage or device, device))
            rows.append(flat[tokens])
            call = self.calls[index][-1]
            self.calls[index][-1] = replace(
                call, added=Addition(tokens.to(device), rows, len(rows) - 1)
            )

    def _pass(
        self, run: Callable[[], Any], gives_zeros: bool, *, is_repeated: bool = False
    ) -> dict[int, tuple[Tensor, Tensor]]:
        self.first, self.expected, self.next, self.changes = None, None, 0, {}
        self.gives_zeros, self.is_repeated = gives_zeros, is_repeated
        self.met.clear()
        with suppress(StopForward):
            run()
        return self.changes

    def forward(
        self, index: int, original: Callable[..., Any], *arguments: Any, **keywords: Any
    ) -> Any:
        """Replace the forward pass of a decoder layer."""
        if arguments:
            hidden_states, *others = arguments
        else:
            first = "hidden_states" if "hidden_states" in keywords else next(iter(keywords))
            hidden_states, others = keywords.pop(first), []
        if self.first is None:  # the first layer of a batch
            self.first = hidden_states
        name, expected = f"{self.layers.name}.{index}", self.expected
        if index != self.next:
            wanted = f"{self.layers.name}.{self.next}"
            raise _refusal(f"the model calls decoder layer {name} but it should call {wanted}")
        if expected is not None and (
            hidden_states.data_ptr() != expected.data_ptr()
            or hidden_states.shape != expected.shape
            or hidden_states._version != self.version
        ):
            if self.runs_layers or (hidden_states.shape, hidden_states.dtype) != (
                expected.shape,
                expected.dtype,
            ):
                raise _refusal(f"{_CHANGES_STATES} {name}")
            self.changes[index] = (expected, hidden_states)
        carried = [value for value in self.rest if value is not None]
        if any(value is one for value in (*others, *keywords.values()) for one in carried):
            raise _HandsOnMore
        self.next += 1
        layer = self.layers.modules[index]
        device = execution_device(layer)
        if not self.is_repeated:
            kept = {name: self._intern(value, device) for name, value in keywords.items()}
            self.calls[index].append(
                LayerCall(tuple(self._intern(value, device) for value in others), kept)
            )
        if index == len(self.layers) - 1:
            raise StopForward  # the final norm and the head are not needed
        # a skipped layer returns its input
        leaving = torch.zeros_like(hidden_states) if self.gives_zeros else hidden_states
        if self.runs_layers or self.is_tuple is None:
            with onloaded(layer.modules()):
                output = original(hidden_states, *others, **keywords)
            if self.runs_layers:
                self.expected = output[0] if isinstance(output, tuple) else output
                self.version = self.expected._version
                return output
            # a layer that is called with one of the rest gets more than hidden states from the layer before
            self.is_tuple, self.rest = (
                isinstance(output, tuple),
                tuple(output[1:] if isinstance(output, tuple) else ()),
            )
        self.expected, self.version = leaving, leaving._version
        return (leaving, *self.rest) if self.is_tuple else leaving

    def _intern(self, value: Any, device: torch.device) -> Any:
        """Share equal tensors (masks, position embeddings) between the layers of a device, and between batches."""
        if isinstance(value, tuple | list):
            return type(value)(self._intern(item, device) for item in value)
        if not isinstance(value, Tensor):
            return value
        if (
            id(value),
            device,
        ) not in self.met:  # most layers of a batch get the same tensor: compare it once
            moved = value.to(device)
            # Most unequal tensors differ in their last value, so that few are compared whole.
            key = (
                device,
                tuple(moved.shape),
                moved.dtype,
                moved.flatten()[-1].item() if moved.numel() else 0.0,
            )
            known = self.interned.setdefault(key, moved)
            self.met[id(value), device] = (
                value,
                known if known is moved or torch.equal(known, moved) else moved,
            )
        return self.met[id(value), device][1]


@dataclass
class HiddenStates:
    """Hidden states that enter a decoder layer, [batch, sequence, hidden], a batch each."""

    dense: Sequence[Tensor] | None  # of the dense network; None if nothing needs them
    pruned: Sequence[Tensor] | None = (
        None  # of the network pruned so far; None if every layer starts from dense ones
    )

    @property
    def entering(self) -> Sequence[Tensor]:
        """The hidden states on which the layer is pruned."""
        found = self.dense if self.pruned is None else self.pruned
        assert found is not None
        return found

    def kept(self) -> dict[str, list[Tensor]]:
        """Tensors of both streams, where they are kept; a missing stream has none."""
        streams = {"dense": self.dense, "pruned": self.pruned}
        return {
            k: s.kept() if isinstance(s, ActivationStore) else list(s or [])
            for k, s in streams.items()
        }

    def move(self, storage: Storage, device: torch.device) -> None:
        """Return both streams on another layer's device from now on, and keep them at its storage, unless in files."""
        for stream in (self.dense, self.pruned):
            if isinstance(stream, ActivationStore):
                stream.move(storage, device)


@dataclass
class LayerActivations:
    """One decoder layer with everything needed to run it on the calibration tokens."""

    layer: nn.Module
    calls: Sequence[LayerCall]  # its arguments besides the hidden states, a batch each
    token_masks: Sequence[
        Tensor | None
    ]  # of each batch, bool [batch, sequence]; False tokens are ignored
    storage: Storage  # where hidden states and recorded activations are kept between passes
    held_out: Sequence[
        bool
    ] = ()  # whether a batch only measures, for each batch; () means none does
    device: torch.device = field(init=False)  # where the layer computes
    store: Callable[[], ActivationStore] = field(
        init=False
    )  # makes an empty list of activations for that device

    def __post_init__(self) -> None:
        self.held_out = self.held_out or [False] * len(self.calls)
        self.device = execution_device(self.layer)
        self.store = partial(ActivationStore, self.storage, self.device)
        self.token_masks = [
            None if mask is None else mask.to(self.device) for mask in self.token_masks
        ]
        # found once: selection by a mask makes the host wait for the device each time
        self._real = [
            None if mask is None else mask.reshape(-1).nonzero()[:, 0] for mask in self.token_masks
        ]

    @quick_products()
    def run(self, batch: int, hidden_states: Tensor) -> Tensor:
        """Output hidden states of the layer for one batch."""
        return self.calls[batch].run(self.layer, hidden_states.to(self.device, non_blocking=True))

    def outputs(self, hidden_states: Iterable[Tensor]) -> ActivationStore:
        """Output hidden states of the layer, a batch each."""
        outputs = self.store()
        for batch, hidden in enumerate(hidden_states):
            outputs.append(self.run(batch, hidden))
        return outputs

    def arguments_of(
        self, module: nn.Module, hidden_states: Iterable[Tensor]
    ) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
        """Run the layer from its start up to one of its modules; yields the module's arguments for each batch."""
        seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def stop(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            seen.append((arguments, keywords))
            raise StopForward

        for batch, hidden in enumerate(hidden_states):
            # the hook is removed before the caller gets the arguments, because it may run the layer itself
            with module.register_forward_pre_hook(stop, with_kwargs=True), suppress(StopForward):
                self.run(batch, hidden)
            if not seen:
                why = f"a {type(module).__name__} is not called in every forward pass of its decoder layer"
                raise RuntimeError(f"{why}: leave the operators in it dense by exclude.")
            yield seen.pop()

    def assigned_tokens(
        self,
        experts: FusedExperts,
        hidden_states: Iterable[Tensor],
        see: Callable[[int, AssignedTokens], None] = lambda _, __: None,
    ) -> list[AssignedTokens]:
        """Inputs of the experts of a mixture in every batch, kept at `storage`; first `see` is called with each."""
        store, assigned = self.store(), list[AssignedTokens]()
        for batch, (arguments, keywords) in enumerate(
            self.arguments_of(experts.module, hidden_states)
        ):
            assigned.append(experts.assigned(*arguments, **keywords))
            see(batch, assigned[-1])
            store.append(assigned[-1].hidden_states)
            assigned[-1].hidden_states = assigned[-1].hidden_states[
                :0
            ]  # frees the batch on the device
        for tokens, kept in zip(assigned, store.kept(), strict=True):
            tokens.hidden_states, tokens.rows = kept, tokens.rows.to(kept.device)
        return assigned

    def rows(
        self, activations: Tensor, batch: int, operator: LinearOperator | None = None
    ) -> Tensor:
        """Real tokens of activations [batch, sequence, n] or [batch * sequence, n] as [tokens, n].

        If `operator` is an expert, the rows are its own tokens; otherwise all tokens, real or padding.
        """
        flat = activations.detach().reshape(-1, activations.shape[-1])
        mask = self.token_masks[batch]
        if mask is None:
            return flat
        tokens = None if operator is None else operator.tokens
        seen = mask.numel() if tokens is None else tokens.numel()
        if operator is not None and flat.shape[0] != seen:
            why = f"{operator.name} sees {flat.shape[0]} rows for {seen} tokens, so padding can't be told apart"
            raise ValueError(
                f"{why}: pass batches without padding, or exclude=['{operator.name}']."
            )
        return flat[self._real[batch] if tokens is None else mask.reshape(-1)[tokens]]

    def hidden_state_error(self, states: HiddenStates) -> float | None:
        """`|| H* - H ||_F / || H ||_F` over the real tokens to fit; `None` if only one of the two is known."""
        if states.dense is None or states.pruned is None:
            return None
        squares = []
        for batch, (dense, pruned) in enumerate(zip(states.dense, states.pruned, strict=True)):
            if self.held_out[batch]:
                continue
            # Norms are computed in float32, squared and summed in float64, and read once at the end.
            wanted, found = (self.rows(h, batch).float() for h in (dense, pruned))
            norms = [torch.linalg.vector_norm(h) for h in (found - wanted, wanted)]
            squares.append(torch.stack(norms).double().square())
        error, energy = torch.stack(squares).sum(0).tolist()
        return math.sqrt(error / energy) if energy else 0.0


def cut_states(
    states: HiddenStates, sizes: Sequence[int], storage: Storage, device: torch.device
) -> HiddenStates:
    """The same hidden states in batches of other sizes, kept at `storage`; those in stores are freed."""

    def cut(stream: Sequence[Tensor] | None) -> ActivationStore | None:
        if stream is None:
            return None
        store = ActivationStore(storage, device)
        for number, start, end in pieces([len(hidden) for hidden in stream], sizes):
            store.append(stream[number][start:end])  # [batch, sequence, hidden]
        if isinstance(stream, ActivationStore):
            stream.clear()  # otherwise the run would hold it until the layer is done
        return store

    dense = cut(
        states.dense
    )  # before the first pruned layer both streams are the same tensors: cut them once
    return HiddenStates(dense, dense if states.pruned is states.dense else cut(states.pruned))
