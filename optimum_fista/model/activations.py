"""Activations of all batches, kept on the device, in CPU memory or in a file, and read back in order."""

import mmap
import tempfile
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

Storage = torch.device | Path
"""Where activations are kept: on a device, or in a folder as memory-mapped files."""


class ActivationStore(Sequence[Tensor]):
    """A list of tensors that are kept at `storage` and read on `device`.

    Tensors keep their dtype. A separate stream and thread copy them between a device with streams and the CPU or a
    file, through two pinned buffers: writing does not wait, and reading one tensor starts the copy of the next one (of
    the one before, if they are read backwards). Files have no name, so they vanish when the store or the process ends.
    """

    def __init__(self, storage: Storage, device: torch.device, *, staged: bool = False) -> None:
        self.device = device  # where tensors are handed out
        self._folder = storage if isinstance(storage, Path) else None
        self._storage = torch.device("cpu") if isinstance(storage, Path) else storage
        self._is_staged = staged
        self.staging: _Staging | None = None
        self.clear()

    def _stage(self) -> None:
        """Copy through buffers if the device would wait without them."""
        has_streams = self.device.type not in ("cpu", "meta")
        has_streams = has_streams and hasattr(torch.get_device_module(self.device), "Stream")
        staged = self._is_staged or (has_streams and self._storage.type == "cpu")
        # with buffers, returned tensors are copies that nothing else refers to
        self.staging = _Staging(self._kept, self.device, has_streams) if staged else None

    def append(self, tensor: Tensor, *, copy: bool = False) -> None:
        """Keep a tensor; with `copy`, the caller may overwrite it afterwards."""
        tensor = tensor.detach()
        if self.staging is not None:
            self.staging.write(
                tensor.clone() if copy else tensor
            )  # the stream reads it at any time from now on
        else:
            self._kept.append(
                tensor.to(self._storage, copy=copy and self._folder is None)
            )  # a file has its own copy

    def kept(self) -> list[Tensor]:
        """All tensors where they are kept."""
        if self.staging is not None:
            self.staging.finish()
        return list(self._kept)

    def move(self, storage: Storage, device: torch.device) -> None:
        """From now on return the tensors on another device, and keep them at `storage` if that is a device."""
        if self.staging is not None:
            self.staging.finish()
        if (
            isinstance(self._kept, list)
            and isinstance(storage, torch.device)
            and storage != self._storage
        ):
            for index, tensor in enumerate(
                self._kept
            ):  # one after the other, so that few are held twice
                self._kept[index] = tensor.to(storage)
            self._storage = storage
        if device != self.device:
            self.device = device
            self._stage()

    def clear(self) -> None:
        """Free all tensors."""
        if self.staging is not None:
            self.staging.finish()
        # new ones, because the thread may still read from the old ones
        self._kept: list[Tensor] | _File = [] if self._folder is None else _File(self._folder)
        self._stage()

    def __len__(self) -> int:
        return len(self._kept) if self.staging is None else self.staging.count

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return (
            self._kept[index].to(self.device) if self.staging is None else self.staging.read(index)
        )


class _File(Sequence[Tensor]):
    """Tensors in one file without a name, which the system frees with the store or the process.

    Each is mapped when it is read, because a run may have more tensors than the system allows mappings. Mappings are
    private: writing to a tensor does not change the file.
    """

    def __init__(self, folder: Path) -> None:
        self._file = tempfile.TemporaryFile(dir=folder, prefix="activations-")  # noqa: SIM115, closed with the store
        self._places: list[tuple[int, torch.Size, torch.dtype]] = []

    def append(self, tensor: Tensor) -> None:
        """Write a copy of a CPU tensor to the end of the file."""
        self._places.append((self._file.seek(0, 2), tensor.shape, tensor.dtype))
        self._file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
        self._file.write(
            b"\0" * (-self._file.tell() % mmap.PAGESIZE)
        )  # a tensor at a page's start fits any dtype
        self._file.flush()

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: Any) -> Any:
        place, shape, dtype = self._places[index]
        if not shape.numel():  # nothing can't be mapped
            return torch.empty(shape, dtype=dtype)
        mapped = np.memmap(self._file, np.uint8, "c", place, (shape.numel() * dtype.itemsize,))
        return torch.from_numpy(mapped).view(dtype).view(shape)


class _Staging:
    """Copies between a device and `kept`, through two pinned buffers, by one thread, in the order of the calls."""

    def __init__(self, kept: list[Tensor] | _File, device: torch.device, has_streams: bool) -> None:
        self.count = len(kept)
        self._kept = kept
        self._device = device
        self._module = torch.get_device_module(device)
        self._stream = self._module.Stream(device) if has_streams else None
        self._thread = ThreadPoolExecutor(1, "activations")
        self._buffers: list[Tensor] = [torch.empty(0, dtype=torch.uint8) for _ in range(2)]
        self._writes: list[Future[None]] = []
        self._next: tuple[int, Future[tuple[Tensor, Any]]] | None = None
        self._last = 0

    def write(self, tensor: Tensor) -> None:
        while len(self._writes) > 1:  # both buffers are taken
            self._writes.pop(0).result()
        if self._next is not None:  # the tensor that was read ahead may still be in this buffer
            self._next[1].result()
            self._next = None
        buffer = self._buffer(self.count, tensor)
        made = None
        if self._stream is not None:  # the copy begins after the tensor is computed
            self._stream.wait_stream(self._module.current_stream(self._device))
        with self._module.stream(self._stream):
            buffer.copy_(tensor, non_blocking=True)
            if self._stream is not None:
                tensor.record_stream(self._stream)  # its memory is not reused before it was read
                made = self._stream.record_event()
        self._writes.append(self._thread.submit(self._keep, buffer, made))
        self.count += 1
        self._last = self.count

    def read(self, index: int) -> Tensor:
        self.finish()
        known, self._next = self._next, None
        found = (
            known[1]
            if known is not None and known[0] == index
            else self._thread.submit(self._load, index)
        )
        tensor, copied = found.result()
        if copied is not None:
            current = self._module.current_stream(self._device)
            current.wait_event(copied)
            tensor.record_stream(current)
        expected = (
            index - 1 if 0 < index < self._last else index + 1
        )  # after a step back, expect another step back
        self._last = index
        if 0 <= expected < self.count:
            self._next = (expected, self._thread.submit(self._load, expected))
        return tensor

    def finish(self) -> None:
        """Wait until all is written."""
        while self._writes:
            self._writes.pop(0).result()

    def _keep(self, buffer: Tensor, made: Any) -> None:
        if made is not None:
            made.synchronize()
        self._kept.append(
            buffer.clone() if isinstance(self._kept, list) else buffer
        )  # the buffer is used again

    def _load(self, index: int) -> tuple[Tensor, Any]:
        stored = self._kept[index]
        with self._module.stream(self._stream):
            buffer = self._buffer(index, stored)
            if self._stream is not None:
                self._stream.synchronize()  # the buffer's last copy is done
            buffer.copy_(
                stored
            )  # for a file this reads the disk, in this thread, not in the computing one
            tensor = buffer.to(self._device, non_blocking=True, copy=True)
            return tensor, self._stream.record_event() if self._stream is not None else None

    def _buffer(self, turn: int, like: Tensor) -> Tensor:
        """A pinned tensor with the shape and dtype of `like`, in one of the two buffers."""
        size = like.numel() * like.element_size()
        if self._buffers[turn % 2].numel() < size:
            self._buffers[turn % 2] = torch.empty(
                size, dtype=torch.uint8, pin_memory=self._stream is not None
            )
        return self._buffers[turn % 2][:size].view(like.dtype).view(like.shape)
