"""Activations of all batches, kept on the device, in CPU memory or in a file, and read back in order."""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Storage = torch.device | Path
"""Where activations wait: a device, or a folder for memory-mapped files."""


class ActivationStore(Sequence[Tensor]):
    """A list of tensors that are kept at `storage` and read on `device`.

    Tensors keep their dtype. Between a device with streams and the CPU or a file they go through two pinned buffers on
    a stream and a thread of their own: writing does not wait, and reading one tensor starts the copy of the next (of
    the one before, if they are read backwards). A file has no name, so that nothing of it is left when the store, or
    the process, ends in whatever way. With `staged` they go through buffers on any device.
    """

    def __init__(self, storage: Storage, device: torch.device, *, staged: bool = False) -> None:
        self.device = device
        self._storage = torch.device("cpu") if isinstance(storage, Path) else storage
        self._kept: list[Tensor] | _MappedFile = _MappedFile(storage) if isinstance(storage, Path) else []
        staged = staged or (_has_streams(device) and self._storage.type == "cpu")
        self._staging = _Staging(self._kept, device) if staged else None

    @property
    def gives_copies(self) -> bool:
        """Whether the tensors handed out are copies that nothing else refers to."""
        return self._staging is not None

    def append(self, tensor: Tensor, *, copy: bool = False) -> None:
        """Keep a tensor; with `copy`, the caller may overwrite it afterwards."""
        tensor = tensor.detach()
        if self._staging is not None:
            self._staging.write(tensor.clone() if copy else tensor)  # the stream reads it at any time from now on
        else:
            # A file holds a copy of its own in any case.
            self._kept.append(tensor.to(self._storage, copy=copy and isinstance(self._kept, list)))

    def kept(self) -> list[Tensor]:
        """All tensors where they are kept."""
        if self._staging is not None:
            self._staging.finish()
        return list(self._kept)

    def move(self, storage: Storage, device: torch.device) -> None:
        """Hand the tensors out on another device from now on, and keep them at `storage` if that is a device."""
        kept = self.kept()
        if isinstance(self._kept, list) and isinstance(storage, torch.device) and storage != self._storage:
            for index, tensor in enumerate(kept):
                self._kept[index] = tensor.to(storage)
            self._storage = storage
        if device != self.device:
            self.device = device
            staged = _has_streams(device) and self._storage.type == "cpu"
            self._staging = _Staging(self._kept, device) if staged else None

    def clear(self) -> None:
        """Free all tensors."""
        if self._staging is not None:
            self._staging.forget()
        self._kept.clear()

    def __len__(self) -> int:
        return len(self._kept) if self._staging is None else self._staging.count

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._kept[index].to(self.device) if self._staging is None else self._staging.read(index)


class _MappedFile(Sequence[Tensor]):
    """Tensors in a file without a name, mapped privately: writing to one changes nothing in the file."""

    def __init__(self, folder: Path) -> None:
        self._file = tempfile.TemporaryFile(dir=folder, prefix="activations-")  # noqa: SIM115, closed with the store
        self._places: list[tuple[int, torch.Size, torch.dtype]] = []
        self._map: mmap.mmap | None = None

    def append(self, tensor: Tensor) -> None:
        place = self._file.seek(0, 2)
        if tensor.numel():
            self._file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
        self._file.flush()
        # Every tensor begins on a page, so that it is aligned for any dtype.
        self._file.write(b"\0" * (-self._file.tell() % mmap.PAGESIZE))
        self._places.append((place, tensor.shape, tensor.dtype))
        self._map = None  # it ends before this tensor

    def clear(self) -> None:
        self._places.clear()
        self._map = None
        self._file.truncate(0)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: Any) -> Any:
        place, shape, dtype = self._places[index]
        if not shape.numel():
            return torch.empty(shape, dtype=dtype)
        if self._map is None:
            self._file.flush()
            # Copy on write: PyTorch wants memory that may be written to, and the file must not change.
            self._map = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_COPY)
        return torch.frombuffer(self._map, dtype=dtype, count=shape.numel(), offset=place).view(shape)


def _has_streams(device: torch.device) -> bool:
    return device.type not in ("cpu", "meta") and hasattr(torch.get_device_module(device), "Stream")


class _Staging:
    """Copies between a device and `kept`, through two pinned buffers each way, by one thread in the order asked for."""

    def __init__(self, kept: list[Tensor] | _MappedFile, device: torch.device) -> None:
        self.count = len(kept)
        self._kept = kept
        self._device = device
        self._module = torch.get_device_module(device)
        self._stream = self._module.Stream(device) if _has_streams(device) else None
        self._thread = ThreadPoolExecutor(1, "activations")
        self._buffers: list[Tensor] = [torch.empty(0, dtype=torch.uint8) for _ in range(2)]
        self._writes: list[Future[None]] = []
        self._next: tuple[int, Future[tuple[Tensor, Any]]] | None = None
        self._last = 0

    def write(self, tensor: Tensor) -> None:
        while len(self._writes) > 1:  # both buffers are taken
            self._writes.pop(0).result()
        # The tensor that was read ahead may still be in the buffer that is wanted.
        if self._next is not None:
            self._next[1].result()
            self._next = None
        buffer = self._buffer(self.count, tensor)
        made = None
        if self._stream is not None:
            # The copy begins when the tensor has been computed.
            self._stream.wait_stream(self._module.current_stream(self._device))
        with self._module.stream(self._stream):
            buffer.copy_(tensor, non_blocking=True)
            if self._stream is not None:
                # The memory is not given to others before this stream has read it.
                tensor.record_stream(self._stream)
                made = self._stream.record_event()
        self._writes.append(self._thread.submit(self._keep, buffer, made))
        self.count += 1
        self._last = self.count

    def read(self, index: int) -> Tensor:
        self.finish()
        known, self._next = self._next, None
        found = known[1] if known is not None and known[0] == index else self._thread.submit(self._load, index)
        tensor, copied = found.result()
        if copied is not None:
            current = self._module.current_stream(self._device)
            current.wait_event(copied)
            tensor.record_stream(current)
        # After a step backwards the one before comes next.
        expected = index - 1 if 0 < index < self._last else index + 1
        self._last = index
        if 0 <= expected < self.count:
            self._next = (expected, self._thread.submit(self._load, expected))
        return tensor

    def finish(self) -> None:
        """Wait until all is written."""
        while self._writes:
            self._writes.pop(0).result()

    def forget(self) -> None:
        """Wait until nothing is under way, and begin at index 0 again."""
        self.finish()
        if self._next is not None:
            self._next[1].result()
        self._next, self._last, self.count = None, 0, 0

    def _keep(self, buffer: Tensor, made: Any) -> None:
        if made is not None:
            made.synchronize()
        # The buffer is used again; a file has made its copy.
        self._kept.append(buffer.clone() if isinstance(self._kept, list) else buffer)

    def _load(self, index: int) -> tuple[Tensor, Any]:
        stored = self._kept[index]
        with self._module.stream(self._stream):
            buffer = self._buffer(index, stored)
            if self._stream is not None:
                self._stream.synchronize()  # the buffer's last copy is done
            # From a file this reads the disk, on the thread and not on the one that computes.
            buffer.copy_(stored)
            tensor = buffer.to(self._device, non_blocking=True, copy=True)
            return tensor, self._stream.record_event() if self._stream is not None else None

    def _buffer(self, turn: int, like: Tensor) -> Tensor:
        """A pinned tensor of the form of `like` in one of the two buffers."""
        size = like.numel() * like.element_size()
        if self._buffers[turn % 2].numel() < size:
            self._buffers[turn % 2] = torch.empty(size, dtype=torch.uint8, pin_memory=self._stream is not None)
        return self._buffers[turn % 2][:size].view(like.dtype).view(like.shape)
