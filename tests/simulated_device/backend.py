"""A simulated accelerator, `torch.device("simulated")`: two devices, to find on a CPU what fails on a GPU.

It refuses operations that mix devices and tensors whose storage was freed, limits memory, and counts copies,
synchronisations and operations. It computes by the CPU's kernels, so results agree with the CPU's. Once imported, it is
PyTorch's accelerator until the end of the process: `make test` starts one of its own for the tests in this folder.

Every test begins with 16 GiB on each device, and device 1 as the current one: a device that is forgotten somewhere is
another one than the model's. Tests of the backend itself begin with device 0.
"""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils.cpp_extension import include_paths, library_paths

SOURCE = Path(__file__).with_name("backend.cpp")
FOLDER = Path(__file__).with_name("build")
MEMORY = 16 * 2**30  # bytes of each device if no test sets another limit
COMPILER = shutil.which(os.environ.get("CXX", "c++"))
MISSING = (
    None if COMPILER else "no C++ compiler builds the simulated accelerator (set CXX to name one)"
)

_ops: Any = torch.ops.simulated
_Device = torch.device | str | int | None


def _library() -> Path:
    """Build the library unless this source was built for this PyTorch, and return its path."""
    key = hashlib.sha256(SOURCE.read_bytes() + torch.__version__.encode()).hexdigest()[:16]
    library = FOLDER / f"simulated-{key}.so"
    FOLDER.mkdir(exist_ok=True)
    with open(FOLDER / "lock", "w") as lock:
        # one process builds, the others wait; a killed one leaves no lock
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            _compile(library)
    return library


def _compile(library: Path) -> None:
    """Compile the source to a library, which has its name only when it is complete."""
    unfinished = library.with_suffix(".unfinished")
    command = [str(COMPILER), "-std=c++20", "-O1", "-fPIC", "-shared"]
    command += [f"-I{folder}" for folder in include_paths()]
    command += [f"-L{folder}" for folder in library_paths()]
    command += [str(SOURCE), "-lc10", "-ltorch_cpu", "-o", str(unfinished)]
    subprocess.run(command, check=True)
    unfinished.rename(library)


# ----------------------------------------------------------------------------------- the interface of torch.cuda

current_device = torch.accelerator.current_device_index
set_device = torch.accelerator.set_device_index
current_stream = torch.accelerator.current_stream
default_stream = torch.accelerator.current_stream
synchronize = torch.accelerator.synchronize
memory_stats = torch.accelerator.memory_stats
mem_get_info = torch.accelerator.get_memory_info
reset_peak_memory_stats = torch.accelerator.reset_peak_memory_stats
memory_allocated = torch.accelerator.memory_allocated
memory_reserved = torch.accelerator.memory_allocated  # nothing is cached
max_memory_allocated = torch.accelerator.max_memory_allocated
max_memory_reserved = torch.accelerator.max_memory_allocated


def _index(device: _Device = None) -> int:
    """The number of a device; that of the current one if `device` names none."""
    if isinstance(device, int):
        return device
    index = None if device is None else torch.device(device).index
    return current_device() if index is None else index


def is_available() -> bool:
    return True


is_initialized = is_available
is_bf16_supported = is_available


def _is_in_bad_fork() -> bool:
    return False


def device_count() -> int:
    return 2


class device:
    """As a context: another device is the current one."""

    def __init__(self, device: _Device) -> None:
        self._index = _index(device)
        self._before = -1

    def __enter__(self) -> None:
        self._before = current_device()
        set_device(self._index)

    def __exit__(self, *error: object) -> None:
        set_device(self._before)


def get_device_name(device: _Device = None) -> str:
    return f"Simulated accelerator {_index(device)}"


def get_device_properties(device: _Device = None) -> SimpleNamespace:
    return SimpleNamespace(name=get_device_name(device), total_memory=mem_get_info(device)[1])


def get_amp_supported_dtype() -> list[torch.dtype]:
    return [torch.bfloat16, torch.float16]


def empty_cache() -> None:
    pass


init = empty_cache
_lazy_init = empty_cache


def Stream(device: _Device = None, priority: int = 0) -> torch.Stream:
    return torch.Stream(torch.device("simulated", _index(device)), priority=priority)


def Event(**options: Any) -> torch.Event:
    return torch.Event("simulated", **options)


def stream(stream: torch.Stream | None) -> Any:
    return nullcontext() if stream is None else stream


def manual_seed_all(seed: int) -> None:
    for index in range(device_count()):
        _ops.seed(seed, index)


def get_rng_state(device: _Device = None) -> Tensor:
    return _ops.get_rng_state(_index(device))


def set_rng_state(new_state: Tensor, device: _Device = None) -> None:
    _ops.set_rng_state(new_state, _index(device))


# ----------------------------------------------------------------------------------------------- for the tests


@contextmanager
def counted() -> Iterator[SimpleNamespace]:
    """Count in the block (blocks do not nest): `waits` by cause, `copies` and `bytes` by way, `runs` by operation.

    The ways of a copy are "host to device", "device to host" and "device to device".
    """
    counts = SimpleNamespace(waits=Counter(), copies=Counter(), bytes=Counter(), runs=Counter())
    _ops.start_counting()
    try:
        yield counts
    finally:
        # names are such as "waits for item" and "runs aten::mm"
        for name, number in _ops.stop_counting().items():
            kind, _, cause = name.partition(" ")
            getattr(counts, kind)[cause.removeprefix("for ").removeprefix("aten::")] += number


@contextmanager
def memory_limit(bytes: int, device: _Device = None) -> Iterator[None]:
    """Give a device (the current one by default) this many bytes in the block, what it holds already included."""
    index = _index(device)
    before = mem_get_info(index)[1]
    _ops.set_memory_limit(index, bytes)
    try:
        yield
    finally:
        _ops.set_memory_limit(index, before)


@contextmanager
def failing_allocation(number: int, at_least: int = 1) -> Iterator[SimpleNamespace]:
    """Refuse the allocation with this number, from 1, of those of `at_least` bytes in the block; `seen` counts them."""
    failure = SimpleNamespace(seen=0)
    _ops.fail_allocation(number, at_least)
    try:
        yield failure
    finally:
        failure.seen = _ops.allocations_seen()
        _ops.fail_allocation(0, 0)


def reset() -> None:
    """Put both devices in the state that every test begins with."""
    set_device(0)
    _ops.fail_allocation(0, 0)
    for index in range(device_count()):
        _ops.set_memory_limit(index, MEMORY)
        reset_peak_memory_stats(index)


if MISSING is None:
    torch.ops.load_library(_library())
    torch.utils.rename_privateuse1_backend("simulated")
    torch._register_device_module("simulated", sys.modules[__name__])
    torch.utils.generate_methods_for_privateuse1_backend()
