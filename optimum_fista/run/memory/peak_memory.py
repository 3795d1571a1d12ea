"""The most memory that this process holds while something runs."""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass, replace
from types import TracebackType

import psutil
import torch

from optimum_fista.run.memory.available_memory import device_counts

_INTERVAL = 0.02
"""Seconds between two looks."""


@dataclass(frozen=True)
class MemoryPeak:
    """Largest memory of a process, in bytes.

    Attributes:
        resident_bytes: All that is in physical memory, pages of files that are read or mapped included.
        anonymous_bytes: The part that no file backs, so that the system can't drop it; `None` if it is unknown.
        device_bytes: Tensors on the accelerator; `None` on the CPU, and if PyTorch does not count them.
    """

    resident_bytes: int
    anonymous_bytes: int | None = None
    device_bytes: int | None = None


class PeakMemory:
    """As a context: watches this process, 50 times a second, and takes PyTorch's exact count on an accelerator.

    That count (`torch.cuda.max_memory_allocated` and its like) starts again with it.

    Attributes:
        peak: The largest values, known when the context ends.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._counts = device_counts(device)
        self._process = psutil.Process()
        self._done = threading.Event()
        # The thread must not keep this object, so that it ends with it if an interrupt hits the context itself.
        self._thread = threading.Thread(target=_watch, args=(weakref.ref(self), self._done), daemon=True)
        self.peak = MemoryPeak(0)

    def __enter__(self) -> PeakMemory:
        if self._counts is not None:
            self._counts.reset_peak_memory_stats(self._device)
        self._look()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()
        self._look()
        if self._counts is not None:
            self.peak = replace(self.peak, device_bytes=self._counts.max_memory_allocated(self._device))

    def _look(self) -> None:
        memory = self._process.memory_info()
        anonymous = memory.rss - memory.shared if hasattr(memory, "shared") else None
        seen = self.peak
        self.peak = MemoryPeak(
            max(seen.resident_bytes, memory.rss),
            None if anonymous is None else max(seen.anonymous_bytes or 0, anonymous),
        )


def _watch(peak: weakref.ref[PeakMemory], done: threading.Event) -> None:
    while not done.wait(_INTERVAL):
        watched = peak()
        if watched is None:
            return
        watched._look()
        del watched
