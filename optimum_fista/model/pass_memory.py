"""Moving what a paused forward pass holds off its device, and back."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from optimum_fista.model.activation_store import ActivationStore


class PassMemory(TorchDispatchMode):
    """As a context around the running parts of one forward pass: knows the memory that the pass has made.

    While the pass waits, `offload` moves to a store whatever of it is still referred to, wherever Python holds the
    references (as FSDP frees parameters: their storages become empty), and `onload` brings it back to the same
    tensors. What the pass was given, and what modules keep, is left alone.
    """

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._offloaded: list[tuple[torch.UntypedStorage, int]] = []
        self._place: tuple[ActivationStore, int] | None = None

    def add(self, tensor: Tensor) -> None:
        """Count a tensor as made by the pass."""
        storage = tensor.untyped_storage()
        self._made[storage._cdata] = weakref.ref(storage)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        output = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in given:
                self.add(tensor)
        return output

    def offload(self, layer: nn.Module, store: ActivationStore) -> None:
        """Append the pass's memory to a store as one tensor of bytes, and free it."""
        held = {t.untyped_storage()._cdata for m in layer.modules() for t in vars(m).values() if isinstance(t, Tensor)}
        alive = [storage for ref in self._made.values() if (storage := ref()) is not None]
        own = [s for s in alive if s.nbytes() and s.resizable() and s.device == store.device and s._cdata not in held]
        self._offloaded = [(storage, storage.nbytes()) for storage in own]
        empty = torch.empty(0, dtype=torch.uint8, device=store.device)
        self._place = (store, len(store))
        store.append(torch.cat([empty, *(_bytes_of(storage) for storage in own)]))
        for storage in own:
            storage.resize_(0)

    def onload(self) -> None:
        """Bring back what was offloaded, if anything was."""
        if self._place is None:
            return
        store, index = self._place
        packed, start = store[index], 0
        for storage, size in self._offloaded:
            storage.resize_(size)
            _bytes_of(storage).copy_(packed[start : start + size])
            start += size
        self._offloaded, self._place = [], None


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
