"""Forward passes of one decoder layer that wait in front of an operator until it is pruned."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from types import TracebackType
from typing import Any

from greenlet import GreenletExit, getcurrent, greenlet
from torch import Tensor, nn

from optimum_fista.model.activation_store import ActivationStore, Storage
from optimum_fista.model.experts import AssignedTokens, ExpertLinear, FusedExperts
from optimum_fista.model.pass_memory import PassMemory
from optimum_fista.model.replay import LayerCall, watching


class PausedForwards:
    """One forward pass a batch, each a coroutine that is paused in front of chosen modules.

    A group of operators needs its inputs over all batches before it is pruned, and what lies behind it needs
    the pruned weights. Pausing every batch there runs each operator once a batch, where replaying the layer
    for every group would run the first operators again and again. The price is memory: the intermediate
    activations of all batches wait, on the layer's device, or in `waiting`, so that those of one batch at a time
    are on the device.

    In front of a mixture of experts every batch is paused once, whatever the number of experts: what an expert is
    called with is made from the hidden states that enter the mixture, of which no other copy is moved.

    Greenlets share one thread, so that PyTorch's thread pools and thread-local state stay as they are. Use it
    as a context manager: passes that were not finished are unwound at its end.

    Args:
        layer: The decoder layer.
        stops: Modules to pause in front of, in the order of their calls.
        calls: Arguments of the layer, a batch each.
        hidden_states: Input of the layer, a batch each.
        waiting: Where the passes' activations go while they wait; `None`: they stay on the layer's device.
    """

    def __init__(
        self,
        layer: nn.Module,
        stops: Sequence[nn.Module],
        calls: Sequence[LayerCall],
        hidden_states: Sequence[Tensor],
        waiting: Storage | None = None,
    ) -> None:
        self._stops = list(stops)
        dense = {module: partial(_pause, i) for i, module in enumerate(stops) if not isinstance(module, ExpertLinear)}
        self._watch = watching(dense)
        self._assigned: dict[FusedExperts, dict[int, AssignedTokens]] = {  # by batch, while it waits there
            module.experts: {} for module in stops if isinstance(module, ExpertLinear)
        }
        device = self._device = next(layer.parameters()).device

        self._layer = layer
        self._waiting = None if waiting is None or waiting == device else waiting
        self._memories = [PassMemory() if self._waiting else None for _ in calls]

        def forward(batch: int) -> tuple[None, Tensor | None]:
            hidden, memory = hidden_states[batch].to(device, non_blocking=True), self._memories[batch]
            if memory is not None and getattr(hidden_states, "gives_copies", False):
                memory.add(hidden)
            return None, calls[batch].run(layer, hidden)

        self._passes = [_Pass(partial(forward, batch)) for batch in range(len(calls))]

    def __enter__(self) -> PausedForwards:
        self._watch.__enter__()
        self._handles = [
            experts.module.register_forward_pre_hook(partial(_pause_mixture, experts), with_kwargs=True)
            for experts in self._assigned
        ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            for forward in self._passes:
                if forward and not forward.dead:
                    forward.throw(GreenletExit)
        finally:
            for handle in self._handles:
                handle.remove()
            self._watch.__exit__(None, None, None)

    def inputs(self, stop: int) -> Iterator[Tensor]:
        """Run every batch on to the stop of this index; yields the module's input, a batch each."""
        module = self._stops[stop]
        return self._expert_inputs(module) if isinstance(module, ExpertLinear) else self._reach(stop)

    def _expert_inputs(self, module: ExpertLinear) -> Iterator[Tensor]:
        assigned = self._assigned[module.experts]
        if not assigned:
            store = ActivationStore(self._waiting or self._device, self._device)
            for arguments, keywords in self._reach(module.experts):
                batch = module.experts.assigned(*arguments, **keywords)
                store.append(batch.hidden_states)
                assigned[len(assigned)] = batch
            for batch, kept in zip(assigned.values(), store.kept(), strict=True):
                batch.hidden_states, batch.rows = kept, batch.rows.to(kept.device)
        for batch in assigned.values():
            yield module.inputs(batch, self._device)

    def _reach(self, stop: object) -> Iterator[Any]:
        """Run every batch on to a stop; yields what is handed out there."""
        store = None if self._waiting is None else ActivationStore(self._waiting, self._device)
        for batch, forward in enumerate(self._passes):
            reached, inputs = self._run_on(batch)
            if reached != stop:
                raise RuntimeError("the operators of this decoder layer are called in another order than when traced")
            yield inputs
            memory = self._memories[batch]
            if memory is not None and store is not None and not forward.dead:
                memory.offload(self._layer, store)

    def output(self, batch: int) -> Tensor:
        """Run one batch to the end; returns the layer's output hidden states."""
        _, output = self._run_on(batch)
        return output

    def _run_on(self, batch: int) -> tuple[int | None, Tensor]:
        for assigned in self._assigned.values():
            assigned.pop(batch, None)
        memory = self._memories[batch]
        if memory is None:
            return self._passes[batch].switch()
        memory.onload()
        with memory:
            return self._passes[batch].switch()

    def outputs(self) -> Iterator[Tensor]:
        """Run every batch to the end; yields the layer's output hidden states, a batch each."""
        for batch in range(len(self._passes)):
            yield self.output(batch)


class _Pass(greenlet):
    """A forward pass that can be paused; callers may run in greenlets of their own."""


def _pause(stop: object, inputs: Any) -> None:
    current = getcurrent()
    if isinstance(current, _Pass):
        current.parent.switch((stop, inputs))


def _pause_mixture(experts: FusedExperts, _: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
    _pause(experts, (arguments, keywords))
