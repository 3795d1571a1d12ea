"""Inputs of decoder layers, recorded once for all of them, and from these the inputs of the modules of one layer.

The model runs on every calibration batch with its decoder layers skipped. This gives the hidden states that enter the
first layer, and all other arguments of each layer (masks, position embeddings, inputs of its own). SparseGPT's and
Wanda's code records the arguments of the first layer on the last batch, and uses them for all layers and batches, so
padding and different layers (sliding windows) do not work there. To save memory, equal tensors are kept once.

Some models of images add features to the hidden states between two decoder layers (DeepStack, arXiv 2406.04334). Then
the model runs again on the first such batch, with skipped layers that return zeros: zero plus the features is exactly
what is added. It becomes part of the next layer's arguments (`Addition`).

`record_inputs` is called first. Later a decoder layer runs alone (`LayerActivations`), on the recorded arguments
(`LayerCall`). Between layers, hidden states are kept in an `ActivationStore` at the storage, a device or a folder.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from optimum_fista import internals
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


@dataclass(frozen=True)
class Addition:
    """What a model adds to the hidden states of some tokens of a batch in front of a decoder layer."""

    tokens: Tensor  # their numbers among batch * sequence
    rows: ActivationStore  # [tokens, hidden] of several batches
    number: int  # of this batch among them

    def to(self, hidden_states: Tensor) -> Tensor:
        """The sum with `hidden_states` [batch, sequence, hidden], as the model computes it; a new tensor.

        `self.tokens` are the numbers of the tokens that something is added to, and `self.rows[self.number]` is what is
        added to them, [tokens, hidden].
        """
        # [batch, sequence, hidden] -> [tokens, hidden]
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        sums = flat[self.tokens] + self.rows[self.number].to(flat)
        return flat.index_copy(0, self.tokens, sums).view_as(hidden_states)


@dataclass(frozen=True)
class LayerCall:
    """Arguments of one decoder layer for one batch, besides the hidden states."""

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    added: Addition | None = None  # what the model adds to the hidden states in front of the layer

    def run(self, layer: nn.Module, hidden_states: Tensor) -> Tensor:
        """Run a decoder layer on the hidden states that left the layer before it, and return those that leave it.

        Both are [batch, sequence, hidden]. The layer's other arguments are the recorded ones of this object, and
        `self.added` is what the model adds to the hidden states in front of the layer; `None`: nothing. This changes
        nothing, unless the layer itself writes to a cache among the recorded arguments.
        """
        entering = hidden_states if self.added is None else self.added.to(hidden_states)
        output = layer(entering, *self.arguments, **self.keywords)
        return output[0] if isinstance(output, tuple) else output


@dataclass
class RecordedInputs:
    """Arguments of all decoder layers on all batches, as `record_inputs` makes them."""

    # [batch, sequence, hidden] of each batch, as they enter the first layer
    hidden_states: ActivationStore
    calls: list[list[LayerCall]]  # other arguments, calls[layer][batch], where the layer computes
    # of each batch, bool [batch, sequence]; None if all tokens are real
    token_masks: list[Tensor | None]
    held_out: list[bool]  # whether a batch only measures
    # the name of the text of each batch; None if the calibration has one text
    sources: list[str | None]
    # whether all layers had to run, because they pass more than hidden states to the next one
    layers_pass_more: bool
    # what a layer returns after the hidden states; None: it returns no tuple
    returned_besides: tuple[Any, ...] | None


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
    `storage`; `None`: on the device of the embedding. `progress` shows a bar.

    While the model runs, the forward passes of its decoder layers are replaced, and offloaded weights around them are
    on the device; both are as before at the end.
    """
    device = execution_device(layers.model.get_input_embeddings())
    hidden_states = ActivationStore(storage or device, device)
    token_masks: list[Tensor | None] = []
    recorder = _Recorder(layers, runs_layers, storage, calls=[[] for _ in layers.modules])
    # each records the arguments of one layer, and skips the layer or runs its own forward pass
    forwards = [
        partial(recorder.forward, index, layer.forward)
        for index, layer in enumerate(layers.modules)
    ]
    has_media = any(batch.media for batch in batches)
    try:
        with (
            onloaded(layers.outside(with_media=has_media), read_only=True),
            replaced_forwards(layers.modules, forwards),
        ):
            for batch in tqdm(
                batches, desc="Recording inputs", unit="batch", leave=False, disable=not progress
            ):
                # Adds to `recorder.calls`.
                entering = recorder.record(partial(batch.run, layers.model))
                if entering is None or not bool(torch.isfinite(entering).all()):
                    raise ValueError(
                        "the inputs of the first decoder layer hold NaN or Inf: the embeddings of the model are "
                        "damaged. Load or download the model again."
                    )
                hidden_states.append(entering)
                mask = batch.attention_mask
                token_masks.append(None if mask is None else mask.to(device))
    except _HandsOnMore:
        # A later layer gets more than hidden states of the first one. Only a recording without the layers, which is
        # cheap, shows whether a model needs them to run.
        return record_inputs(layers, batches, storage, runs_layers=True, progress=progress)
    # What the one run of the first layer returned after its hidden states; without a tuple, there is no such thing.
    returned_besides = recorder.returned_besides if recorder.is_tuple else None
    return RecordedInputs(
        hidden_states=hidden_states,
        calls=recorder.calls,
        token_masks=token_masks,
        held_out=[batch.held_out for batch in batches],
        sources=[batch.source for batch in batches],
        layers_pass_more=runs_layers,
        returned_besides=returned_besides,
    )


class StopForward(Exception):
    """Ends a forward pass whose remainder is not needed."""


class _HandsOnMore(Exception):
    """A decoder layer gets more than hidden states from the layer before it."""


@dataclass
class _Pass:
    """One pass of the model on a batch, in which its decoder layers are skipped or run."""

    gives_zeros: bool  # whether skipped layers return zeros instead of their inputs
    is_repeated: bool  # whether the arguments of this batch are recorded already

    first: Tensor | None = None  # what enters the first layer
    expected: Tensor | None = None  # what should enter the next layer
    version: int = 0  # of that tensor, which grows if the tensor is changed in place
    next: int = 0  # the number of the next layer
    # layers in front of which the model changes the hidden states, with these before and after the change
    changes: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    # tensors among the arguments, each with the equal tensor that is kept for it, by their id and the device
    met: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = field(default_factory=dict)

    def expect(self, hidden_states: Tensor) -> None:
        """Note the hidden states that should enter the next layer, and how often they were changed in place."""
        self.expected = hidden_states
        self.version = internals.version_of(hidden_states)


@dataclass
class _Recorder:
    """Replaces the forward pass of every decoder layer: it records the arguments, and skips the layer or runs it.

    `record` is called for each batch. It runs the model, in which `forward` then runs for each decoder layer in turn.
    """

    layers: DecoderLayers
    runs_layers: bool
    storage: Storage | None  # of what is added between layers; None: the layer's device
    calls: list[list[LayerCall]]  # calls[layer][batch], to which the recorded ones are added

    # The pass of the model that runs, or ran last.
    current: _Pass = field(default_factory=lambda: _Pass(gives_zeros=False, is_repeated=False))

    # Of all batches:
    additive: set[int] = field(default_factory=set)  # layers where the change was shown to be a sum
    # what is added in front of these layers, of all batches that have it
    added: dict[int, ActivationStore] = field(default_factory=dict)
    # tensors that are kept for equal ones, by properties that are quickly compared
    interned: dict[tuple[Any, ...], Tensor] = field(default_factory=dict)
    is_tuple: bool | None = None  # whether layers return a tuple; None before one has run
    returned_besides: tuple[Any, ...] = ()  # what they return after the hidden states

    def record(self, run: Callable[[], Any]) -> Tensor | None:
        """Record one batch, on which `run` calls the model; returns what enters the first layer, `None` if none ran.

        `self.calls` get one more of each layer. What the model adds between layers becomes a part of these calls.
        `self.additive` are the layers in front of which it was shown to add, on this batch or on earlier ones. If there
        are such layers, skipped layers return zeros, so that only what is added comes out.
        """
        # by layer, the hidden states before and after a change
        changes = self._run(run, gives_zeros=bool(self.additive))
        has_new_changes = bool(changes.keys() - self.additive)
        if has_new_changes:
            changes = self._prove_sums(run, changes)
        # These are of a pass with zeros before each change. So what is there afterwards was added.
        for index, (_, added) in changes.items():
            self._keep_addition(index, added)
        return self.current.first

    def _prove_sums(
        self, run: Callable[[], Any], changes: dict[int, tuple[Tensor, Tensor]]
    ) -> dict[int, tuple[Tensor, Tensor]]:
        """Prove that the model only adds to hidden states in front of layers, by running a batch again.

        `run` calls the model on the batch. `changes` are those of its first pass: by the number of the layer, the
        hidden states before and after the change. In one of the two passes, skipped layers return their inputs: x
        becomes x + d. In the other they return zeros: 0 becomes 0 + d = d exactly. The first pass was the one with
        zeros if sums were known before it (`self.additive`, numbers of layers).

        Returns the changes of the pass with zeros, and adds the new layers to `self.additive`. The second pass appends
        no arguments to `self.calls`.
        """
        gave_zeros = self.current.gives_zeros
        other_changes = self._run(run, gives_zeros=not gave_zeros, is_repeated=True)
        if gave_zeros:
            with_zeros = changes
            with_states = other_changes
        else:
            with_zeros = other_changes
            with_states = changes

        # Proved are the new layers, and all that the second pass changed. Known ones are not proved again only because
        # the first pass changed them.
        new_layers = changes.keys() - self.additive
        for index in sorted(new_layers | other_changes.keys()):
            is_sum = False
            if index in with_states and index in with_zeros:
                before, after = with_states[index]  # x and x + d
                _, added = with_zeros[index]  # d
                is_sum = torch.equal(before + added, after)
            if not is_sum:
                raise UnsupportedArchitectureError(
                    f"the model changes the hidden states in front of decoder layer {self.layers.name}.{index}: "
                    "only models that run every decoder layer once, in order, on the output of the one before, can "
                    "be pruned."
                )
        self.additive |= new_layers
        return with_zeros

    def _keep_addition(self, index: int, added: Tensor) -> None:
        """Make what is `added` [batch, sequence, hidden] in front of a layer a part of its latest call.

        Changes the last entry of `self.calls` of the layer, and appends the rows that are not zero to its store in
        `self.added`, which is at `self.storage` or on the layer's device. `index` is the number of the layer.
        """
        flat = added.reshape(-1, added.shape[-1])  # [batch, sequence, hidden] -> [tokens, hidden]
        tokens = flat.any(-1).nonzero()[:, 0]  # numbers of the rows that are not zero
        device = execution_device(self.layers.modules[index])
        if index not in self.added:
            self.added[index] = ActivationStore(self.storage or device, device)
        rows = self.added[index]
        rows.append(flat[tokens])
        addition = Addition(tokens.to(device), rows, number=len(rows) - 1)
        self.calls[index][-1] = replace(self.calls[index][-1], added=addition)

    def _run(
        self, run: Callable[[], Any], *, gives_zeros: bool, is_repeated: bool = False
    ) -> dict[int, tuple[Tensor, Tensor]]:
        """Run the model on one batch, and return the hidden states that it changes between two layers.

        For each change these are the hidden states before and after it, by the number of the layer that follows. `run`
        calls the model, whose layers call `forward` of this object. `self.current` becomes this pass; the other
        arguments are fields of it.
        """
        self.current = _Pass(gives_zeros, is_repeated)
        with suppress(StopForward):  # raised in the last layer
            run()
        return self.current.changes

    def forward(
        self, index: int, original: Callable[..., Any], *arguments: Any, **keywords: Any
    ) -> Any:
        """Record the arguments of the decoder layer number `index`, in place of its forward pass `original`.

        The other arguments are those of the pass. Returns the layer's output if layers run (`self.runs_layers`).
        Otherwise the layer is skipped: what it returns has the form of its output, with its input or zeros as hidden
        states. The last layer raises `StopForward`, because nothing after it is needed.

        A call is appended to `self.calls`, unless this batch has been recorded. `self.current` notes what should enter
        the next layer, and what was changed in front of this one.
        """
        if arguments:
            hidden_states, *others = arguments
        else:
            # All are by keyword: the hidden states have their usual name, or else come first.
            key = "hidden_states" if "hidden_states" in keywords else next(iter(keywords))
            hidden_states = keywords.pop(key)
            others = []
        if self.current.first is None:  # this is the first layer
            self.current.first = hidden_states

        self._check_order(index, hidden_states)
        self._check_arguments([*others, *keywords.values()])
        self.current.next += 1
        if not self.current.is_repeated:
            self._keep_call(index, others, keywords)
        if index == len(self.layers) - 1:
            raise StopForward  # the final norm and the head are not needed

        if self.runs_layers:
            with onloaded(self.layers.modules[index].modules()):
                output = original(hidden_states, *others, **keywords)
            self.current.expect(output[0] if isinstance(output, tuple) else output)
            return output

        if (
            self.is_tuple is None
        ):  # the form of an output is not known yet, and the layer runs once to show it
            with onloaded(self.layers.modules[index].modules()):
                output = original(hidden_states, *others, **keywords)
            self.is_tuple = isinstance(output, tuple)
            self.returned_besides = tuple(output[1:]) if isinstance(output, tuple) else ()
        # what leaves the skipped layer
        leaving = torch.zeros_like(hidden_states) if self.current.gives_zeros else hidden_states
        self.current.expect(leaving)
        return (leaving, *self.returned_besides) if self.is_tuple else leaving

    def _keep_call(self, index: int, others: Sequence[Any], keywords: Mapping[str, Any]) -> None:
        """Append a call of the decoder layer number `index` to `self.calls`.

        `others` are its positional arguments after the hidden states. Equal tensors are kept once, on the device of the
        layer.
        """
        device = execution_device(self.layers.modules[index])
        kept_keywords = {key: self._intern(value, device) for key, value in keywords.items()}
        kept_others = tuple(self._intern(value, device) for value in others)
        self.calls[index].append(LayerCall(kept_others, kept_keywords))

    def _check_arguments(self, others: Sequence[Any]) -> None:
        """Raise `_HandsOnMore` if an argument besides the hidden states is what the first layer returned besides them.

        `others` are these arguments; `self.returned_besides` is what the first layer returned when it ran to show the
        form of its output. Changes nothing.
        """
        for returned in self.returned_besides:
            # the same object: the model hands it on
            if returned is not None and any(value is returned for value in others):
                raise _HandsOnMore

    def _check_order(self, index: int, hidden_states: Tensor) -> None:
        """Refuse the layer number `index` if it is out of order, or gets other hidden states than expected.

        `self.current` says which layer should be called next, and what should enter it (`None` in front of the first
        layer). Other hidden states of the same form may be sums: they are noted in its `changes`, and proved to be sums
        later. If layers run (`self.runs_layers`), they can't be proved, and are refused.
        """
        name = f"{self.layers.name}.{index}"
        if index != self.current.next:
            raise UnsupportedArchitectureError(
                f"the model calls decoder layer {name} but it should call {self.layers.name}.{self.current.next}: only "
                "models that run every decoder layer once, in order, on the output of the one before, can be pruned: "
                "pass another model."
            )
        expected = self.current.expected
        if expected is None:
            return
        is_expected = (
            hidden_states.data_ptr() == expected.data_ptr()
            and hidden_states.shape == expected.shape
            and internals.version_of(hidden_states) == self.current.version  # not changed in place
        )
        if is_expected:
            return
        has_same_form = (
            hidden_states.shape == expected.shape and hidden_states.dtype == expected.dtype
        )
        if self.runs_layers or not has_same_form:
            raise UnsupportedArchitectureError(
                f"the model changes the hidden states in front of decoder layer {name}: only models that run every "
                "decoder layer once, in order, on the output of the one before, can be pruned: pass another model."
            )
        self.current.changes[index] = (expected, hidden_states)

    def _intern(self, value: Any, device: torch.device) -> Any:
        """Share equal tensors (masks, position embeddings) between the layers of a device, and between batches.

        `value` is an argument of a layer. It is returned with its tensors on the device, each replaced by an equal one
        if there is one. Tuples and lists are searched; all other values are returned as they are.

        `self.interned` has the tensors that are kept, by properties that are quickly compared, and gets new ones.
        `met` of `self.current` notes which tensors were compared in this pass of the model, by their id.
        """
        if isinstance(value, tuple | list):
            return type(value)(self._intern(item, device) for item in value)
        if not isinstance(value, Tensor):
            return value
        # Most layers of a batch get the same tensor: compare it once.
        met = self.current.met
        if (id(value), device) not in met:
            moved = value.to(device)
            # Most unequal tensors differ in their last value. As a part of the key, it spares comparing them whole.
            last = moved.flatten()[-1].item() if moved.numel() else 0.0
            key = (device, tuple(moved.shape), moved.dtype, last)
            interned = self.interned.setdefault(key, moved)  # is `moved` if the key is new
            is_equal = interned is moved or torch.equal(interned, moved)
            # The pair holds `value`, so that no other tensor gets its id in this pass.
            met[id(value), device] = (value, interned if is_equal else moved)
        return met[id(value), device][1]


@dataclass
class HiddenStates:
    """Hidden states that enter a decoder layer, [batch, sequence, hidden], a batch each."""

    dense: Sequence[Tensor] | None  # of the dense network; None if nothing needs them
    # of the network pruned so far; None if every layer starts from dense ones
    pruned: Sequence[Tensor] | None = None

    @property
    def to_prune_on(self) -> Sequence[Tensor]:
        """The hidden states on which the layer is pruned: the pruned ones if there are any, else the dense ones."""
        if self.pruned is not None:
            return self.pruned
        assert self.dense is not None
        return self.dense

    def to_save(self) -> dict[str, list[Tensor]]:
        """The tensors to save for a run that resumes, by "dense" and "pruned": one for each batch.

        A stream (`self.dense`, `self.pruned`) that is `None` has none. Tensors are not moved to the device, and not
        copied. Changes nothing.
        """
        tensors: dict[str, list[Tensor]] = {}
        for name, stream in (("dense", self.dense), ("pruned", self.pruned)):
            if stream is None:
                tensors[name] = []
            elif isinstance(stream, ActivationStore):
                tensors[name] = stream.stored_tensors()
            else:
                tensors[name] = list(stream)
        return tensors

    def move(self, storage: Storage, device: torch.device) -> None:
        """Return the tensors of both streams on another layer's device from now on, and move them to its storage.

        Those in a file stay there. Sequences that are not in an `ActivationStore` are left alone.
        """
        for stream in (self.dense, self.pruned):
            if isinstance(stream, ActivationStore):
                stream.move(storage, device)


@dataclass
class LayerActivations:
    """One decoder layer with everything needed to run it on the calibration tokens."""

    layer: nn.Module
    calls: Sequence[LayerCall]  # its arguments besides the hidden states, a batch each
    # of each batch, bool [batch, sequence], moved to the layer's device; False tokens are ignored
    token_masks: Sequence[Tensor | None]
    storage: Storage  # where hidden states and recorded activations are kept between passes
    # whether a batch only measures, for each batch; () means none does
    held_out: Sequence[bool] = ()
    # the name of the text of each batch, if the calibration has several; () means all are of one text
    sources: Sequence[str | None] = ()
    device: torch.device = field(init=False)  # where the layer computes

    def __post_init__(self) -> None:
        """Fill in the fields that follow from the others, and move the masks to the layer's device.

        `self.calls` are the recorded arguments, one for each batch. If `self.held_out` is empty, no batch is held out:
        it gets False for each. If `self.sources` is empty, it gets `None` for each: all batches are of one text.
        `self.token_masks` are bool [batch, sequence], or `None` if a batch has no padding.
        """
        if not self.held_out:
            self.held_out = [False] * len(self.calls)
        if not self.sources:
            self.sources = [None] * len(self.calls)
        self.device = execution_device(self.layer)
        self.token_masks = [
            None if mask is None else mask.to(self.device) for mask in self.token_masks
        ]
        # The numbers of the real tokens of each batch, found once: selection by a mask makes the host wait each time.
        self._real_tokens = [
            None if mask is None else mask.reshape(-1).nonzero()[:, 0] for mask in self.token_masks
        ]

    def store(self) -> ActivationStore:
        """Make an empty list of activations that are kept at `storage` and returned on the layer's device."""
        return ActivationStore(self.storage, self.device)

    @quick_products()
    def run(self, batch: int, hidden_states: Tensor) -> Tensor:
        """Run the layer on the batch number `batch`, and return its output hidden states [batch, sequence, hidden].

        `hidden_states` of the same shape enter the layer, and may be on another device. `self.calls` has the layer's
        other arguments for each batch. No weight changes.
        """
        return self.calls[batch].run(self.layer, hidden_states.to(self.device, non_blocking=True))

    def outputs(self, hidden_states: Iterable[Tensor]) -> ActivationStore:
        """Run the layer on all batches, and return its output hidden states in a new store.

        `hidden_states` [batch, sequence, hidden] of each batch enter the layer. No weight changes.
        """
        outputs = self.store()
        for batch, hidden in enumerate(hidden_states):
            outputs.append(self.run(batch, hidden))
        return outputs

    def arguments_of(
        self, module: nn.Module, hidden_states: Iterable[Tensor]
    ) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
        """Run the layer from its start up to one of its modules; yields the module's arguments for each batch.

        `hidden_states` [batch, sequence, hidden] of each batch enter the layer. The layer runs on a batch when the
        caller asks for its arguments. A hook is on the module only while the layer runs. No weight changes.
        """
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def stop(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            """Append the arguments to `calls`, and end the pass of the layer; a forward pre-hook of the module."""
            calls.append((arguments, keywords))
            raise StopForward

        for batch, hidden in enumerate(hidden_states):
            # the hook is removed before the caller gets the arguments, because the caller may run the layer
            with module.register_forward_pre_hook(stop, with_kwargs=True), suppress(StopForward):
                self.run(batch, hidden)
            if not calls:
                raise RuntimeError(
                    f"a {type(module).__name__} is not called in every forward pass of its decoder layer: leave the "
                    "operators in it dense by exclude."
                )
            yield calls.pop()

    def assigned_tokens(
        self,
        experts: FusedExperts,
        hidden_states: Iterable[Tensor],
        see: Callable[[int, AssignedTokens], None] = lambda _, __: None,
    ) -> list[AssignedTokens]:
        """Run the layer up to a mixture of experts, and return the inputs of its experts in every batch.

        `experts` is the mixture, a module of the layer. `hidden_states` [batch, sequence, hidden] of each batch enter
        the layer. `see` is called with the number of each batch and its inputs, while these are on the device; by
        default it does nothing. Modules of the layer run; nothing of it is changed.

        The returned inputs are kept at `self.storage`: their `hidden_states`, and `rows`, int64, the numbers of the
        rows of `hidden_states` that the experts get. The rows of all experts stand one after the other (`part` finds
        those of one).
        """
        store = self.store()
        assigned_batches: list[AssignedTokens] = []
        # the layer runs on a batch when the loop asks for the arguments of this batch
        calls = self.arguments_of(experts.module, hidden_states)
        for batch, (arguments, keywords) in enumerate(calls):
            assigned = experts.assigned(*arguments, **keywords)
            assigned_batches.append(assigned)
            see(batch, assigned)
            on_device = assigned.hidden_states
            store.append(on_device)
            # An empty tensor in its place frees the batch on the device. An empty slice would hold its memory.
            assigned.hidden_states = on_device.new_empty(0, on_device.shape[-1])

        # `append` may return before its copy has reached the storage; `stored_tensors` waits for all of them
        for assigned, stored in zip(assigned_batches, store.stored_tensors(), strict=True):
            assigned.hidden_states = stored
            assigned.rows = assigned.rows.to(stored.device)  # they index the hidden states
        return assigned_batches

    def rows(
        self,
        activations: Tensor,
        batch: int,
        operator: LinearOperator | None = None,
        tokens: Tensor | None = None,
    ) -> Tensor:
        """Real tokens of activations [batch, sequence, n] or [batch * sequence, n] as [tokens, n].

        If the rows of `activations` are only some tokens of the batch, as of an expert, `tokens` says which, int64
        [rows]. With an `operator`, whose inputs or outputs the activations are, it is an error if there is not a row
        for every token, real or padding.

        `batch` is the number of the batch, whose mask in `self.token_masks` is False for padding; `None`: all tokens
        are real. `self._real_tokens` has their numbers. The result may share memory with `activations`.
        """
        flat = activations.detach().reshape(-1, activations.shape[-1])
        mask = self.token_masks[batch]
        if mask is None:
            return flat
        num_tokens = mask.numel() if tokens is None else tokens.numel()
        if operator is not None and flat.shape[0] != num_tokens:
            raise ValueError(
                f"{operator.name} sees {flat.shape[0]} rows for {num_tokens} tokens, so padding can't be told apart: "
                f"pass batches without padding, or exclude=['{operator.name}']."
            )
        if tokens is not None:
            return flat[mask.reshape(-1)[tokens]]
        return flat[self._real_tokens[batch]]

    def hidden_state_error(self, states: HiddenStates) -> float | None:
        """`|| H* - H ||_F / || H ||_F` over the real tokens to fit; `None` if only one of the two is known.

        `states` leave the layer: H in the dense network, H* in the pruned one, [batch, sequence, hidden] of each batch.
        Batches that only measure (`self.held_out`) are left out. Changes nothing.
        """
        if states.dense is None or states.pruned is None:
            return None
        squares = []
        for batch, (dense, pruned) in enumerate(zip(states.dense, states.pruned, strict=True)):
            if self.held_out[batch]:
                continue
            # Norms are computed in float32, squared and summed in float64, and read once at the end.
            dense_rows = self.rows(dense, batch).float()  # [real tokens, hidden]
            pruned_rows = self.rows(pruned, batch).float()
            error_norm = torch.linalg.vector_norm(pruned_rows - dense_rows)
            dense_norm = torch.linalg.vector_norm(dense_rows)
            squares.append(torch.stack([error_norm, dense_norm]).double().square())
        error, energy = torch.stack(squares).sum(0).tolist()
        if energy == 0:
            return 0.0
        return math.sqrt(error / energy)


def cut_states(
    states: HiddenStates, sizes: Sequence[int], storage: Storage, device: torch.device
) -> HiddenStates:
    """Cut hidden states into smaller batches, kept at `storage` and returned on `device`.

    `states` are those of the dense and of the pruned network, [batch, sequence, hidden] of each batch; one may be
    `None`. `sizes` are the numbers of sequences of the new batches, in order. Each old batch is cut into whole new
    ones: an old batch of 8 sequences into 4 and 4. The old hidden states are freed if they are in stores: these are
    empty afterwards.
    """
    # Before the first pruned layer both streams are the same tensors: they are cut once. A store that was cut is empty.
    are_same = states.pruned is states.dense
    dense = _cut_stream(states.dense, sizes, storage, device)
    if are_same:
        return HiddenStates(dense, dense)
    return HiddenStates(dense, _cut_stream(states.pruned, sizes, storage, device))


def _cut_stream(
    stream: Sequence[Tensor] | None, sizes: Sequence[int], storage: Storage, device: torch.device
) -> ActivationStore | None:
    """Cut the hidden states of one network, as `cut_states` does; `None` stays `None`."""
    if stream is None:
        return None
    store = ActivationStore(storage, device)
    # the numbers of sequences; each batch is read for that, and once more for each of its pieces
    lengths = [len(hidden) for hidden in stream]
    # a piece is a new batch: sequences `start` to `end` of the old batch with a number
    for number, start, end in pieces(lengths, sizes):
        store.append(stream[number][start:end])  # [batch, sequence, hidden]
    if isinstance(stream, ActivationStore):
        stream.clear()  # otherwise the run would hold it until the layer is done
    return store
