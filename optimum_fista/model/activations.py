"""Activations of all batches, kept on the device, in CPU memory or in a file, and read back in order.

An `ActivationStore` is a list to which each batch appends a tensor. Where copies would make the device wait, they go
through two pinned buffers and a thread (`_Staging`).
"""

import mmap
import os
import tempfile
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from optimum_fista.model.digests import bytes_of_values

Storage = torch.device | Path
"""Where activations are kept: on a device, or in a folder as memory-mapped files."""


class ActivationStore(Sequence[Tensor]):
    """A list of tensors that are kept at `storage` and read on `device`.

    Tensors keep their dtype. A separate stream and thread copy them between a device with streams and the CPU or a
    file, through two pinned buffers: writing does not wait, and reading one tensor starts the copy of the next one (of
    the one before, if they are read backwards). Files have no name, so they vanish when the store or the process ends.
    """

    def __init__(self, storage: Storage, device: torch.device, *, staged: bool = False) -> None:
        """Begin empty. `storage` is where tensors are kept, and `device` is the one that they are returned on.

        A file is made at once if `storage` is a folder. With `staged`, copies go through buffers even if no device
        would wait for them, as tests want it.
        """
        self.device = device
        self._folder = storage if isinstance(storage, Path) else None
        # a file is written from CPU memory
        self._storage = torch.device("cpu") if isinstance(storage, Path) else storage
        self._is_staged = staged
        self.staging: _Staging | None = None
        self.clear()

    def _stage(self) -> None:
        """Set `self.staging` to new buffers if the device would wait for copies without them, otherwise to `None`.

        `self._is_staged` asks for buffers even if nothing would wait, as tests do. `self._storage` is the device where
        tensors are kept, the CPU if they are in a file. `self._kept` are the tensors kept so far, a list or a file,
        which the buffers are for.
        """
        has_streams = False
        if self.device.type not in ("cpu", "meta"):
            has_streams = hasattr(torch.get_device_module(self.device), "Stream")
        would_wait = has_streams and self._storage.type == "cpu"
        self.staging = None
        if self._is_staged or would_wait:
            self.staging = _Staging(self._kept, self.device, has_streams)

    def append(self, tensor: Tensor, *, copy: bool = False) -> None:
        """Keep a tensor as the last one, at the storage; with `copy`, the caller may overwrite it afterwards.

        Without `copy`, a tensor that is at the storage already is kept itself. The tensor goes through the buffers
        `self.staging` if there are any.
        """
        tensor = tensor.detach()
        if self.staging is not None:
            # Without a copy, the caller must not overwrite it: the buffers read it later, at any time.
            self.staging.write(tensor.clone() if copy else tensor)
            return
        is_in_file = self._folder is not None
        needs_copy = copy and not is_in_file  # the values in a file are a copy
        self._kept.append(tensor.to(self._storage, copy=needs_copy))

    def stored_tensors(self) -> list[Tensor]:
        """Return all tensors where they are kept, such as in CPU memory, and not on `device`.

        Waits until all are written. The tensors are those of the store, not copies. Changes nothing.
        """
        if self.staging is not None:
            self.staging.finish()
        return list(self._kept)

    def move(self, storage: Storage, device: torch.device) -> None:
        """From now on return the tensors on another device, and keep them at `storage` if that is a device.

        Tensors that are kept in memory (`self._kept` is a list then) are moved there now. Tensors in a file stay in it,
        and tensors in memory stay there if `storage` is a folder.
        """
        if self.staging is not None:
            self.staging.finish()  # its thread may still append to `self._kept`

        if (
            isinstance(self._kept, list)
            and isinstance(storage, torch.device)
            and storage != self._storage
        ):
            # one after the other, so that few are held twice
            for index, tensor in enumerate(self._kept):
                self._kept[index] = tensor.to(storage)
            self._storage = storage

        if device != self.device:
            self.device = device
            self._stage()  # buffers belong to one device

    def clear(self) -> None:
        """Free all tensors and buffers; the store is empty afterwards, and new tensors go to the same storage.

        `self._kept` becomes a new list, or a new file if `self._folder` is set, and `self.staging` gets new buffers for
        it, or becomes `None` if none are needed.
        """
        if self.staging is not None:
            self.staging.finish()
        # A new list or file, because the thread may still read from the old one.
        self._kept: list[Tensor] | _File = [] if self._folder is None else _File(self._folder)
        self._stage()

    def __len__(self) -> int:
        return len(self._kept) if self.staging is None else self.staging.count

    def __getitem__(self, index: Any) -> Any:
        """Return the tensor with the number `index` from 0, on `self.device`; a copy if it is kept elsewhere.

        `self._kept` has the tensors that were appended. `self.staging` are buffers, `None` if no copy would make the
        device wait; they also begin to read the tensor that is expected next.
        """
        if not 0 <= index < len(self):
            raise IndexError(index)
        if self.staging is None:
            return self._kept[index].to(self.device)
        return self.staging.read(index)


class _File(Sequence[Tensor]):
    """Tensors in one file without a name, which the system frees with the store or the process.

    Each is mapped when it is read, because a run may have more tensors than the system allows mappings. Mappings are
    private: writing to a tensor does not change the file.
    """

    def __init__(self, folder: Path) -> None:
        self._file = tempfile.TemporaryFile(dir=folder, prefix="activations-")  # noqa: SIM115, closed with the store
        # of each tensor: its first byte in the file, shape and dtype
        self._entries: list[tuple[int, torch.Size, torch.dtype]] = []

    def append(self, tensor: Tensor) -> None:
        """Write a copy of a CPU tensor to the end of `self._file`, and note its place in `self._entries`."""
        end = self._file.seek(0, os.SEEK_END)  # the position, in bytes
        self._entries.append((end, tensor.shape, tensor.dtype))
        self._file.write(bytes_of_values(tensor))
        # Zeros fill the last page of memory, because a tensor at a page's start fits any dtype. The remainder of the
        # negative position is the number of bytes up to the next page.
        num_missing = -self._file.tell() % mmap.PAGESIZE
        self._file.write(bytes(num_missing))
        self._file.flush()

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: Any) -> Any:
        """Map the tensor with the number `index` from the file, into CPU memory. Changes nothing.

        `self._entries` has the first byte, the shape and the dtype of each tensor.
        """
        start, shape, dtype = self._entries[index]
        if shape.numel() == 0:  # no bytes, which can't be mapped
            return torch.empty(shape, dtype=dtype)
        mapped = np.memmap(
            self._file,
            dtype=np.uint8,
            mode="c",  # copy on write: changes of the tensor stay in memory
            offset=start,
            shape=(shape.numel() * dtype.itemsize,),
        )
        return torch.from_numpy(mapped).view(dtype).view(shape)


class _Staging:
    """Copies between a device and `kept`, through two pinned buffers, by one thread, in the order of the calls.

    The thread owns `kept` from now on: call `finish` before anything else reads it. On a device without streams all
    copies wait.
    """

    def __init__(self, kept: list[Tensor] | _File, device: torch.device, has_streams: bool) -> None:
        """Begin with the tensors that `kept` has; `device` is the one that tensors come from and go to.

        `has_streams`: the device can copy beside its other work. Makes a thread, and two buffers of no size, which grow
        when tensors come.
        """
        self.count = len(kept)  # number of tensors, those that are still copied included
        self._kept = kept
        self._device = device
        self._device_module = torch.get_device_module(device)
        self._stream = self._device_module.Stream(device) if has_streams else None
        self._thread = ThreadPoolExecutor(1, "activations")
        self._buffers: list[Tensor] = [torch.empty(0, dtype=torch.uint8) for _ in range(2)]
        self._writes: list[Future[None]] = []  # that may not be done yet: at most two
        # the tensor that is read ahead: its number, and with the tensor an event of its copy
        self._next: tuple[int, Future[tuple[Tensor, Any]]] | None = None
        self._last = 0  # the number of the tensor that was read or written last

    def write(self, tensor: Tensor) -> None:
        """Append a tensor; its memory may be freed afterwards, but not overwritten.

        The tensor is copied to one of the two buffers now, by `self._stream` if the device has streams. The thread
        copies it on to the kept tensors later; `self._writes` are these tasks. `self._next` is the task that reads a
        tensor ahead, with its number; it is dropped here.
        """
        while len(self._writes) > 1:  # both buffers hold tensors that are not kept yet
            oldest = self._writes.pop(0)
            oldest.result()  # waits
        if self._next is not None:
            # The tensor that was read ahead may still be in the buffer that is filled now.
            _, reading = self._next
            reading.result()  # waits
            self._next = None

        buffer = self._buffer(self.count, tensor)
        copied = None  # an event, which comes when the copy to the buffer is done
        if self._stream is not None:
            # The copy must not begin before the tensor is computed.
            self._stream.wait_stream(self._device_module.current_stream(self._device))
        with self._device_module.stream(self._stream):
            buffer.copy_(tensor, non_blocking=True)
            if self._stream is not None:
                # The tensor's memory is not used for another one before it was read.
                tensor.record_stream(self._stream)
                copied = self._stream.record_event()
        self._writes.append(self._thread.submit(self._keep, buffer, copied))
        self.count += 1
        self._last = self.count  # so that reading from the end on counts as backwards

    def read(self, index: int) -> Tensor:
        """Return the tensor with the number `index` on the device, and begin to read the one that is expected next.

        Waits for tensors that are still written. `self._next` is the task that reads a tensor ahead, with the number of
        this tensor; it is replaced. `self._last` is the number of the tensor that was read or written before.
        `self._thread` runs `_load`. This gives the tensor, and an event that comes when the copy of the tensor is done:
        `copied`, or `None` if the copy is done already.
        """
        self.finish()
        ahead = self._next
        self._next = None
        if ahead is not None and ahead[0] == index:
            _, loading = ahead
        else:
            loading = self._thread.submit(self._load, index)
        tensor, copied = loading.result()
        if copied is not None:
            # The work that the caller starts next must wait for the copy, which ran in another stream.
            current = self._device_module.current_stream(self._device)
            current.wait_event(copied)
            tensor.record_stream(current)

        # In falling order, as the backward pass reads them. From number 0, a new pass in rising order may begin.
        is_backwards = 0 < index < self._last
        expected = index - 1 if is_backwards else index + 1
        self._last = index
        if 0 <= expected < self.count:
            self._next = (expected, self._thread.submit(self._load, expected))
        return tensor

    def finish(self) -> None:
        """Wait until all is written."""
        while self._writes:
            self._writes.pop(0).result()

    def _keep(self, buffer: Tensor, copied: Any) -> None:
        """Append the content of a buffer to `self._kept`; runs in the thread.

        `buffer` is one of the two, in CPU memory, and is used again afterwards. The event `copied` says when the buffer
        is filled; `None`: it is filled already.
        """
        if copied is not None:
            copied.synchronize()
        is_in_memory = isinstance(self._kept, list)
        if is_in_memory:
            self._kept.append(buffer.clone())
        else:
            self._kept.append(buffer)  # a file writes the values, so it needs no copy

    def _load(self, index: int) -> tuple[Tensor, Any]:
        """Copy the tensor with the number `index` to the device; runs in the thread.

        Overwrites one of the two buffers, by turns, or replaces it by a larger one (`self._buffer`). `self._kept` has
        the tensors, in CPU memory or in a file; `self._device_module` is `torch.cuda` or its like. Returns the tensor
        with an event, which comes when the copy is done, or with `None` if the device has no streams.
        """
        stored = self._kept[index]
        # Without streams `self._stream` is `None`, and this context does nothing.
        with self._device_module.stream(self._stream):
            buffer = self._buffer(index, stored)
            if self._stream is not None:
                self._stream.synchronize()  # until the buffer's earlier content has reached the device
            # For a file this line reads the disk: in this thread, while the other one computes.
            buffer.copy_(stored)
            tensor = buffer.to(self._device, non_blocking=True, copy=True)
            copied = None if self._stream is None else self._stream.record_event()
            return tensor, copied

    def _buffer(self, turn: int, like: Tensor) -> Tensor:
        """A pinned tensor with the shape and dtype of `like`, in one of the two buffers, which take turns.

        `turn` is the number of the tensor that the buffer is for. The buffer, bytes in `self._buffers`, is replaced by
        a larger one if it is too small. Without streams it is not pinned.
        """
        size = like.numel() * like.element_size()  # in bytes
        number = turn % 2  # of the buffer
        if self._buffers[number].numel() < size:
            is_pinned = self._stream is not None
            self._buffers[number] = torch.empty(size, dtype=torch.uint8, pin_memory=is_pinned)
        return self._buffers[number][:size].view(like.dtype).view(like.shape)
