"""Tests begin with fresh devices, the second as the current one; without a C++ compiler all are skipped."""

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
