import gc
import threading
import time
import weakref

import psutil
import pytest
import torch
from pruning import prune

from optimum_fista import memory
from optimum_fista.memory import (
    available_bytes,
    is_out_of_memory,
    old_objects_skipped,
    release_memory,
    total_bytes,
    watched_memory,
)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        MemoryError(),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError(
            "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"
        ),
        RuntimeError(
            "cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnSpotrf(...)`"
        ),
        RuntimeError(
            "cusolver error: CUSOLVER_STATUS_INTERNAL_ERROR, when calling `cusolverDnCreate(handle)`"
        ),
        RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB, max allowed: 9.07 GB)"),
        RuntimeError(
            "Native API failed. Native API returns: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)"
        ),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory"
        ),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:98] data. DefaultCPUAllocator: not enough memory"
        ),
    ],
    ids=str,
)
def test_errors_of_every_device_and_library_are_recognised_as_out_of_memory(error):
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        RuntimeError(
            "cusolver error: CUSOLVER_STATUS_INTERNAL_ERROR, when calling `cusolverDnSpotrf(...)`"
        ),
        ValueError("the plan says: out of memory"),
        KeyboardInterrupt(),
    ],
    ids=repr,
)
def test_other_errors_are_not_taken_for_out_of_memory(error):
    assert not is_out_of_memory(error)


def test_the_limit_of_a_control_group_counts(monkeypatch, tmp_path):
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 500\ninactive_file 150\n")
    assert available_bytes(torch.device("cpu")) > 1000

    monkeypatch.setattr(memory, "_GROUP", tmp_path)

    # The limit less what is used, but for the files that can be read again: 1000 - (700 - 150).
    assert available_bytes(torch.device("cpu")) == 450
    assert total_bytes() == 1000

    (tmp_path / "memory.max").write_text("max\n")

    assert available_bytes(torch.device("cpu")) > 1000


def test_the_meta_device_does_not_say_what_is_free():
    assert available_bytes(torch.device("meta")) is None


SIZE = 64 << 20  # bytes: far more than what other code allocates meanwhile


def test_memory_that_was_freed_again_counts_in_the_peak():
    before = psutil.Process().memory_info().rss

    with watched_memory(torch.device("cpu")) as peak:
        held = torch.ones(SIZE // 4)  # float32 numbers of 4 bytes
        deadline = time.monotonic() + 60  # it looks when the machine lets it
        while peak.resident_bytes < before + 0.9 * SIZE and time.monotonic() < deadline:
            time.sleep(0.02)
        del held

    assert peak.resident_bytes >= before + 0.9 * SIZE
    assert peak.device_bytes is None
    if peak.anonymous_bytes is not None:
        assert 0.9 * SIZE <= peak.anonymous_bytes <= peak.resident_bytes

    with watched_memory(torch.device("cpu")) as later:
        pass

    assert 0 < later.resident_bytes < peak.resident_bytes


@pytest.mark.skipif(
    not hasattr(memory._LIBRARY, "malloc_trim"), reason="the C library is not glibc"
)
def test_freed_blocks_go_back_to_the_system():
    process = psutil.Process()
    blocks = [torch.ones(2**14) for _ in range(1024)]  # 64 MiB
    del blocks[::2]  # each lies between two that stay
    before = process.memory_info().rss

    release_memory()

    # Of the 32 MiB that were deleted, most must be given back.
    assert process.memory_info().rss < before - 24 * 2**20


def test_the_thread_ends_after_an_error():
    before = {*threading.enumerate()}

    with pytest.raises(KeyboardInterrupt), watched_memory(torch.device("cpu")):
        raise KeyboardInterrupt

    assert {*threading.enumerate()} <= before


def test_on_cuda_the_count_of_pytorch_starts_anew(monkeypatch):
    peaks = {"now": 5}
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: peaks.update(now=0))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: peaks["now"])

    with watched_memory(torch.device("cuda:1")) as peak:
        peaks["now"] = 3

    assert peak.device_bytes == 3


def test_every_layer_that_is_pruned_has_its_peak(llama, tokens):
    first, last = prune(llama, tokens.split(4), method="wanda", exclude="*.layers.1.*").layers

    assert first.memory.resident_bytes > 1 << 20
    assert last.memory is None


class _Cycle:
    """An object that refers to itself, so that only the garbage collector frees it."""

    def __init__(self) -> None:
        self.itself = self


@pytest.fixture
def _nothing_frozen():
    """Take back what conftest.py has frozen, for the time of a test."""
    gc.unfreeze()
    yield
    gc.freeze()


@pytest.mark.usefixtures("_nothing_frozen")
def test_searches_skip_objects_that_are_older_than_the_context():
    model = torch.nn.Linear(512, 1024)  # 2 MiB
    old = _Cycle()
    reference_to_old = weakref.ref(old)

    with old_objects_skipped(model):
        reference_to_new = weakref.ref(_Cycle())
        del old
        release_memory(collect=True)

        assert reference_to_new() is None
        assert reference_to_old() is not None

    release_memory(collect=True)
    assert reference_to_old() is None
    assert gc.get_freeze_count() == 0


def test_objects_that_the_caller_has_frozen_stay_frozen():
    before = gc.get_freeze_count()  # those of conftest.py

    with old_objects_skipped(torch.nn.Linear(512, 1024)):
        pass

    # A few of them may be freed meanwhile, when nothing refers to them any more. `gc.unfreeze` leaves none.
    assert gc.get_freeze_count() > before / 2 > 0


def test_nothing_is_searched_for_a_tiny_model(monkeypatch):
    searches = []
    monkeypatch.setattr(gc, "collect", lambda: searches.append(True))

    with old_objects_skipped(torch.nn.Linear(4, 4)):
        release_memory(torch.nn.Linear(4, 4))

    assert not searches
