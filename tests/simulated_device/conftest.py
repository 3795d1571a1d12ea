"""Tests begin with fresh devices, the second as the current one; without a C++ compiler all are skipped."""

import gc

import pytest


@pytest.fixture(autouse=True)
def _fresh_devices(request):
    from simulated_device import backend

    if backend.MISSING:
        pytest.skip(backend.MISSING)
    backend.reset()
    if not request.module.__name__.endswith("test_backend"):
        backend.set_device(1)
    yield
    backend.reset()


@pytest.fixture
def bytes_before(_fresh_devices):
    """Bytes that each device holds when the test begins; its peak is counted from there.

    Models of earlier tests may be in reference cycles. They are collected first: if they went during the test, or
    stayed, what the test measures would not be its own.
    """
    from simulated_device import backend

    gc.collect()
    for index in range(backend.device_count()):
        backend.reset_peak_memory_stats(index)
    return [backend.memory_allocated(index) for index in range(backend.device_count())]
