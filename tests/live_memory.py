"""Bytes of tensors alive at a time."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten


class LiveMemory(TorchDispatchMode):
    """As a context: the largest number of bytes that tensors made inside held at a time, and the operations run."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self.operations: list[str] = []
        self._held: dict[int, int] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        for tensor in tree_flatten((args, kwargs))[0]:
            if isinstance(tensor, torch.Tensor):
                self._held.setdefault(tensor.untyped_storage()._cdata, 0)  # made outside
        output = function(*args, **(kwargs or {}))
        self.operations.append(function.overloadpacket.__name__)
        for tensor in tree_flatten(output)[0]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._held:
                    self._held[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self._held.pop, storage._cdata, None)
                    self.peak = max(self.peak, sum(self._held.values()))
        return output
