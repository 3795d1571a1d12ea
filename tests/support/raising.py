"""Errors and interrupts in the midst of a run: at its n-th operation."""

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class RaiseAt(TorchDispatchMode):
    """As a context: counts operations that allocate a tensor of `least` bytes, and raises an error in place of the
    `number`-th, from 1; of none if it is 0.
    """

    def __init__(
        self, number: int = 0, error: BaseException | None = None, least: int = 1024
    ) -> None:
        super().__init__()
        self.count = 0
        self._number = number
        self._error = error
        self._least = least

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        given = _storages((args, kwargs))
        output = function(*args, **(kwargs or {}))
        self.count += any(
            size >= self._least for key, size in _storages(output).items() if key not in given
        )
        if self._error is not None and self.count == self._number:
            error = self._error
            self._error = None
            raise error
        return output


def _storages(values: Any) -> dict[int, int]:
    tensors = [
        value for value in tree_leaves(values) if isinstance(value, Tensor) and not value.is_meta
    ]
    storages = [tensor.untyped_storage() for tensor in tensors]
    return {storage._cdata: storage.nbytes() for storage in storages}
