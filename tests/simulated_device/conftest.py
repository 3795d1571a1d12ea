"""Every test here begins with fresh devices; without a C++ compiler all are skipped."""

import pytest
from simulated_device import backend


@pytest.fixture(autouse=True)
def _fresh_devices():
    if backend.MISSING:
        pytest.skip(backend.MISSING)
    backend.reset()
    yield
    backend.reset()
